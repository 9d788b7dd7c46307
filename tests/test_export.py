"""Exports: what is written runs without medtpp's classes and gives the adapter's own probabilities."""

import copy
import json
import re
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from monai.bundle import ConfigParser
from PIL import Image
from typer.testing import CliRunner

import matrix
from medtpp import backbones, tuners
from medtpp.adapter import Adapter, AdapterCard, BackboneCard, TaskCard, make_task, save_adapter
from medtpp.cli._app import app
from medtpp.config import TUNERS, BackboneOptions, Window
from medtpp.data.geometry import Volume
from medtpp.data.preprocess import Preprocessing
from medtpp.data.volume_preprocess import LEVELS, VolumePreprocessing
from medtpp.data.volumes.nifti import read_nifti
from medtpp.errors import ConfigError, MedtppError, WeightsError
from medtpp.inference import export as exports
from medtpp.inference.export import bundle as bundles
from medtpp.inference.export import network as networks
from medtpp.inference.export import programs
from medtpp.inference.export.network import ExportedNetwork, example
from medtpp.inference.sliding import SlidingWindow, as_member
from medtpp.seeds import Seeds
from volumes import blobs, geometry

VARIANT = "medtpp_test_class_token"
PERCENTILES = Window(kind="percentiles", low=0.5, high=99.5)
PHOTOGRAPHS = Preprocessing(image_size=32, channels=1)
PLANES = VolumePreprocessing(patch=(32, 32), size=(32, 32), windows=(LEVELS,), dtype="uint8")
SCANS = VolumePreprocessing(patch=(8, 16, 16), spacing=(1.0, 1.0, 1.0), windows=(PERCENTILES,))
CLASSIFY, UNETR, LIGHT = (
    {"name": "classification"},
    {"name": "segmentation", "feature_size": 4},
    {"name": "segmentation", "head": "light"},
)
KINDS = {
    "photographs": (PHOTOGRAPHS, CLASSIFY),
    "masks in 2D": (PLANES, UNETR),
    "masks in 3D": (SCANS, UNETR),
}


def tuned(tuner, variant, preprocessing):
    dims = len(preprocessing.patch)
    options = BackboneOptions(
        name=str(matrix.backbone_folder(variant)), dims=dims, patch_size=(4, 8, 8) if dims == 3 else None
    )
    backbone = tuners.attach(backbones.load(options, image_size=preprocessing.patch), tuner, seed=0)
    matrix.perturb(backbone)
    return backbone


@cache
def adapter(preprocessing, task, tuner="lora", variant=VARIANT, multilabel=False, values=((1,), (2,))):
    """A fine-tuned adapter, no part of which is at its start. `task` is its options as JSON, to be hashable."""
    backbone = tuned(tuner, variant, preprocessing)
    options = json.loads(task)
    dense = options["name"] == "segmentation"
    card = TaskCard(
        options=options, classes=("organ", "lesion"), multilabel=multilabel, mask_values=values if dense else ()
    )
    head = make_task(card, backbone, Seeds(9)).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=Seeds(5).generator("head")) * 0.1)
    spec = backbone.spec
    whole = AdapterCard(
        backbone=BackboneCard(
            options=backbone.options, architecture=variant, image_size=spec.image_size, sha256=spec.sha256
        ),
        tuner=TUNERS.get(tuner).Options().model_dump(mode="json"),
        preprocessing=preprocessing,
        modality="mri",
        seed=0,
        task=card,
    )
    return Adapter(whole, backbone, head)


def made(kind, **options):
    preprocessing, task = KINDS[kind]
    return adapter(preprocessing, json.dumps(task), **options)


@torch.no_grad()
def own(one, images):
    """The adapter's probabilities."""
    return one.task.probabilities(one.task(one.backbone.encode(images, taps=one.task.taps)))


def stated(folder):
    return json.loads((folder / "preprocessing.json").read_text())


def batches(folder, one):
    """Batches that the network says it takes, none of the size it was traced with."""
    counts = (1, 3) if stated(folder)["input"]["shape"][0] == "batch" else (1,)
    return [example(one, count) for count in counts]


class TestTorch:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_program_gives_the_same_probabilities(self, kind, tmp_path):
        one = made(kind)
        result = exports.export(one, "torch", tmp_path)
        network = torch.export.load(tmp_path / "model.pt2").module()
        for images in batches(tmp_path, one):
            torch.testing.assert_close(network(images), own(one, images), atol=1e-5, rtol=0)
        assert result.merged
        assert result.difference < 1e-5
        assert result.batch or kind == "masks in 3D"

    @pytest.mark.parametrize("tuner", ["vpt_deep", "convpass"])
    def test_a_tuner_that_does_not_merge_is_exported_as_it_is(self, tuner, tmp_path):
        one = made("photographs", tuner=tuner)
        result = exports.export(one, "torch", tmp_path)
        assert (result.merged, result.batch) == (False, True)
        network = torch.export.load(tmp_path / "model.pt2").module()
        images = example(one, 1)
        torch.testing.assert_close(network(images), own(one, images), atol=1e-5, rtol=0)
        assert stated(tmp_path)["merged"] is False

    def test_no_path_of_this_machine_is_in_the_file(self, tmp_path):
        exports.export(made("photographs"), "torch", tmp_path)
        content = (tmp_path / "model.pt2").read_bytes()
        assert b"timm_vit.py" not in content
        assert b"site-packages" not in content


class TestONNX:
    @pytest.mark.parametrize("kind", KINDS)
    def test_onnxruntime_gives_the_same_probabilities(self, kind, tmp_path):
        one = made(kind)
        exports.export(one, "onnx", tmp_path)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (given,), (found,) = session.get_inputs(), session.get_outputs()
        assert (given.name, found.name) == ("images", "probabilities")
        assert given.shape == stated(tmp_path)["input"]["shape"]
        for images in batches(tmp_path, one):
            values = session.run(None, {"images": images.numpy()})[0]
            torch.testing.assert_close(torch.from_numpy(values), own(one, images), atol=1e-4, rtol=0)
        assert stated(tmp_path)["opset"] == 20
        assert [path.name for path in tmp_path.glob("model*")] == ["model.onnx"]

    def test_missing_packages_are_named(self, monkeypatch):
        monkeypatch.setattr(exports, "find_spec", lambda name: None if name.startswith("onnx") else object())
        with pytest.raises(ConfigError, match=r"onnx, onnxscript, onnxruntime must.*pip install 'medtpp\[onnx\]'"):
            exports.refuse(made("photographs").card, "onnx", "a")


class TestTimm:
    @pytest.mark.parametrize(
        ("preprocessing", "task", "variant"),
        [
            pytest.param(PHOTOGRAPHS, CLASSIFY, VARIANT, id="class token"),
            pytest.param(PHOTOGRAPHS, {**CLASSIFY, "pooling": "mean"}, "medtpp_test_registers", id="mean"),
            pytest.param(PHOTOGRAPHS, CLASSIFY, "medtpp_test_fused_bias", id="fused bias"),
            pytest.param(PLANES, LIGHT, VARIANT, id="light head"),
            pytest.param(PLANES, UNETR, "medtpp_test_rotary", id="decoder"),
        ],
    )
    def test_the_lines_of_the_readme_give_the_same_probabilities(
        self, preprocessing, task, variant, tmp_path, monkeypatch
    ):
        one = adapter(preprocessing, json.dumps(task), variant=variant)
        exports.export(one, "timm", tmp_path)
        monkeypatch.chdir(tmp_path)
        images = example(one, 3)
        (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
        namespace = {"images": images}
        with torch.no_grad():
            exec(code, namespace)
        torch.testing.assert_close(namespace["probabilities"], own(one, images), atol=1e-5, rtol=0)

    def test_timm_loads_the_same_features_by_name_or_from_the_folder(self, tmp_path):
        one = made("photographs")
        exports.export(one, "timm", tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        model = timm.create_model(
            config["architecture"],
            num_classes=0,
            checkpoint_path=str(tmp_path / "model.safetensors"),
            **config["model_args"],
        ).eval()
        images = example(one, 2).expand(-1, 3, -1, -1)
        mean, std = config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]
        x = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        with torch.no_grad():
            features = one.backbone.encode(images).tokens
            torch.testing.assert_close(model.forward_features(x), features, atol=1e-5, rtol=1e-5)
            source = matrix.load(VARIANT).encode(images).tokens
        assert (features - source).abs().max() > 0.1  # the tuner is in it

    def test_all_reasons_against_it_are_told_together(self):
        card = made("masks in 3D", tuner="adaptformer").card
        card = card.model_copy(update={"backbone": card.backbone.model_copy(update={"architecture": "medcoss"})})
        with pytest.raises(ConfigError, match="THIS cannot be exported to timm") as raised:
            exports.refuse(card, "timm", "THIS")
        told = "\n".join(raised.value.problems)
        assert len(raised.value.problems) == 3
        assert all(word in told for word in ("adaptformer", "volumes", "medcoss", "monai-bundle"))

    def test_weights_that_timm_has_no_place_for_are_told(self, tmp_path):
        one = adapter(PHOTOGRAPHS, json.dumps(CLASSIFY), tuner="ssf", variant="medtpp_test_rotary")
        with pytest.raises(ConfigError, match="do not fit timm's") as raised:
            exports.export(one, "timm", tmp_path)
        assert "blocks.0.attn.qkv.bias: only in the adapter" in raised.value.problems


def write_scan(path, shape=(24, 32, 20), spacing=(1.0, 1.0, 1.0), seed=0):
    """A NIfTI volume with axes turned and an odd origin; (x, y, z) voxels."""
    field = blobs(shape, seed).astype(np.float32) * 300 + np.random.default_rng(seed).random(shape, np.float32) * 50
    affine = np.array([[0, -spacing[1], 0, 31.0], [spacing[0], 0, 0, -17.5], [0, 0, spacing[2], 9.25], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(field, affine), path)


def bundle_of(one, folder, **settings):
    exports.export(one, "monai-bundle", folder)
    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    parser.update({"bundle_root": str(folder), "device": "$torch.device('cpu')", **settings})
    return parser


def scan_labels(one, path):
    """medtpp's own mask of a scan."""
    array, restore = one.card.preprocessing.apply(read_nifti(path))
    window = SlidingWindow([as_member(one.backbone, one.task)], one.card.preprocessing.patch, one.card.task.multilabel)
    return window.scan_labels(array, restore)


class TestBundle:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_network_gives_the_same_probabilities(self, kind, tmp_path):
        one = made(kind)
        network = bundle_of(one, tmp_path).get_parsed_content("network")
        for images in batches(tmp_path, one):
            torch.testing.assert_close(network(images), own(one, images), atol=1e-5, rtol=0)
        metadata = json.loads((tmp_path / "configs" / "metadata.json").read_text())
        image, pred = (metadata["network_data_format"][key] for key in ("inputs", "outputs"))
        assert image["image"]["spatial_shape"] == list(one.card.preprocessing.patch)
        assert list(pred["pred"]["channel_def"].values()) == stated(tmp_path)["outputs"]

    @pytest.mark.parametrize(
        ("values", "shape", "agreement"),
        [
            pytest.param(((1,), (2,)), (16, 16, 8), 0.995, id="one window"),  # medtpp keeps float16
            # Weights under 1/1000 are raised to that by MONAI, which changes the borders of scans.
            pytest.param(((7,), (3,)), (24, 32, 20), 0.9, id="many"),
        ],
    )
    def test_masks_of_volumes_are_those_of_medtpp_on_the_scans_own_grid(self, values, shape, agreement, tmp_path):
        one = made("masks in 3D", values=values)
        (tmp_path / "scans").mkdir()
        scan = tmp_path / "scans" / "a.nii.gz"
        write_scan(scan, shape)
        bundle_of(one, tmp_path / "out", dataset_dir=str(scan.parent)).get_parsed_content("run")
        (mask,) = (tmp_path / "out" / "eval").glob("*.nii.gz")
        found, source = nibabel.load(mask), nibabel.load(scan)
        assert found.shape == source.shape
        np.testing.assert_allclose(found.affine, source.affine, atol=1e-4)
        ours = np.array([0, *(value for (value,) in values)])[scan_labels(one, scan)]
        theirs = np.asarray(found.dataobj).T  # ours are (D, H, W)
        assert len(np.unique(ours)) > 1
        assert (theirs == ours).mean() > agreement

    def test_prepared_volumes_are_those_of_medtpp(self, tmp_path):
        one = made("masks in 3D")
        scan = tmp_path / "a.nii.gz"
        write_scan(scan, spacing=(2.0, 1.0, 2.0))
        theirs = bundle_of(one, tmp_path / "out").get_parsed_content("preprocessing")({"image": str(scan)})["image"]
        ours, _ = one.card.preprocessing.apply(read_nifti(scan))
        assert theirs.shape == ours.shape
        np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-3)  # float16

    @pytest.mark.parametrize("air", [None, 60.0])
    def test_every_kind_of_window_and_the_crop(self, air, tmp_path):
        fixed = Window(kind="fixed", low=20, high=400)
        preprocessing = VolumePreprocessing(
            patch=(8, 16, 16), windows=(PERCENTILES, fixed), air=air, crop=True, margin=2.0
        )
        parser = ConfigParser(
            {
                "transforms": bundles.preprocessing_transforms(preprocessing),
                "imports": ["$import numpy as np", "$import torch"],
            }
        )
        steps = parser.get_parsed_content("transforms")[2:]  # after loading
        array = np.zeros((2, 20, 30, 24), np.float32)
        array[:, 5:14, 8:29, 3:22] = np.random.default_rng(0).random((2, 9, 21, 19)) * 500
        where = geometry(array.shape[1:])
        ours, _ = preprocessing.apply(Volume(array, where))
        from monai.data import MetaTensor

        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ _affine(where)
        item = {
            "image": MetaTensor(torch.from_numpy(array.transpose(0, 3, 2, 1).copy()), affine=torch.from_numpy(affine))
        }
        for step in steps:
            item = step(item)
        assert item["image"].shape == ours.shape
        np.testing.assert_allclose(item["image"].numpy(), ours, atol=1e-3)

    @pytest.mark.parametrize(("mode", "size"), [("L", (50, 41)), ("RGB", (20, 33))])
    @pytest.mark.parametrize("fit", ["stretch", "pad"])
    def test_prepared_photographs_are_those_of_medtpp_to_the_bit(self, fit, mode, size, tmp_path):
        preprocessing = Preprocessing(image_size=32, channels=1 if mode == "L" else 3, fit=fit)
        levels = np.random.default_rng(0).integers(
            0, 256, (size[1], size[0], *([3] if mode == "RGB" else [])), np.uint8
        )
        Image.fromarray(levels).save(tmp_path / "a.png")
        imports = [f"${line}" for line in bundles.IMPORTS]
        parser = ConfigParser({"transforms": bundles.preprocessing_transforms(preprocessing), "imports": imports})
        item = {"image": str(tmp_path / "a.png")}
        for step in parser.get_parsed_content("transforms"):
            item = step(item)
        ours = torch.from_numpy(preprocessing.apply(levels)).float() / 255
        torch.testing.assert_close(item["image"].as_tensor(), ours, atol=1e-6, rtol=0)

    def test_masks_of_photographs_have_their_size(self, tmp_path):
        one = made("masks in 2D")
        (tmp_path / "images").mkdir()
        levels = (blobs((48, 40)) * 100).astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / "images" / "a.png")
        bundle_of(one, tmp_path / "out", dataset_dir=str(tmp_path / "images")).get_parsed_content("run")
        (mask,) = (tmp_path / "out" / "eval").glob("*.png")
        assert np.asarray(Image.open(mask)).shape == levels.shape

    @pytest.mark.parametrize("multilabel", [False, True])
    def test_volumes_are_classified_by_the_mean_over_windows(self, multilabel, tmp_path, capsys):
        one = adapter(SCANS, json.dumps(CLASSIFY), multilabel=multilabel)
        write_scan(tmp_path / "a.nii.gz")
        bundle_of(one, tmp_path / "out", dataset_dir=str(tmp_path)).get_parsed_content("run")
        header, row = capsys.readouterr().out.strip().splitlines()[-2:]
        assert header == "file,organ,lesion"
        array, _ = SCANS.apply(read_nifti(tmp_path / "a.nii.gz"))
        from medtpp.inference.stored import network, over_patches

        logits = over_patches(array, SCANS.patch, network(one.backbone, one.task, device=torch.device("cpu")))
        expected = one.task.probabilities(logits[None])[0]
        assert [float(value) for value in row.split(",")[1:]] == pytest.approx(expected.tolist(), abs=1e-3)

    def test_a_network_that_cannot_be_traced_becomes_a_program(self, tmp_path, monkeypatch):
        def fails(*arguments, **options):
            raise RuntimeError("no tracing here")

        monkeypatch.setattr(torch.jit, "trace", fails)
        one = made("photographs")
        network = bundle_of(one, tmp_path).get_parsed_content("network")
        assert not (tmp_path / "models" / "model.ts").exists()
        images = example(one, 1)
        torch.testing.assert_close(network(images), own(one, images), atol=1e-5, rtol=0)


def _affine(where):
    """LPS, from (x, y, z) indices."""
    affine = np.eye(4)
    affine[:3, :3] = (np.array(where.directions) * np.array(where.spacing)[:, None])[::-1].T
    affine[:3, 3] = where.origin
    return affine


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    one, folder = made("photographs"), tmp_path_factory.mktemp("adapter")
    save_adapter(folder, one.backbone, one.card, one.task)
    return folder


def invoke(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_the_command_says_what_came_out(saved, tmp_path):
    result = invoke(saved, "--to", "torch", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.pt2", "preprocessing.json", "medtpp.json"}
    text = " ".join(result.output.split())
    assert "lora, merged into the backbone" in text
    assert "of any size" in text
    again = invoke(saved, "--to", "torch", "-o", tmp_path / "out")
    assert "not empty" in str(again.exception)
    assert invoke(saved, "--to", "torch", "-o", tmp_path / "out", "--overwrite").exit_code == 0


def test_a_network_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    one = made("photographs")
    merged = ExportedNetwork(one.backbone.merged(), copy.deepcopy(one.task))
    with torch.no_grad():
        merged.task.linear.bias.add_(torch.tensor([0.1, 0.0]))
    monkeypatch.setattr(programs, "exported_network", lambda _: merged)
    with pytest.raises(WeightsError, match=r"differs from the adapter by 0\.0"):
        exports.export(one, "torch", tmp_path)
    assert not (tmp_path / "preprocessing.json").exists()


def test_an_adapter_without_a_head_and_an_unknown_target_are_refused(tmp_path):
    one = made("photographs")
    with pytest.raises(ConfigError, match=r"was pre-trained .* but not fine-tuned"):
        exports.refuse(one.card.model_copy(update={"task": None}), "torch", "a")
    save_adapter(tmp_path, one.backbone, one.card.model_copy(update={"task": None}))
    result = invoke(tmp_path, "--to", "onnx", "-o", tmp_path / "out")
    assert isinstance(result.exception, MedtppError)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no export to tensorflow"):
        exports.export(one, "tensorflow", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stated_is_complete(kind, tmp_path, monkeypatch):
    one = made(kind)
    monkeypatch.setitem(exports.TARGETS, "torch", lambda *_: networks.Written(("model.pt2",), True, 0.0))
    exports.export(one, "torch", tmp_path)
    said = stated(tmp_path)
    preprocessing = type(one.card.preprocessing).model_validate(said["preprocessing"])
    assert preprocessing == one.card.preprocessing
    dense = kind != "photographs"
    assert said["outputs"] == [*(["background"] if dense else []), "organ", "lesion"]
    assert said["output"]["shape"] == ["batch", len(said["outputs"]), *(preprocessing.patch if dense else ())]
    assert said["structures"] == (
        [{"name": "organ", "values": [1]}, {"name": "lesion", "values": [2]}] if dense else []
    )
    words = " ".join(said["how"])
    wanted = ("EXIF", "bicubic") if kind == "photographs" else ("Pad", "Gaussian", "scan's grid")
    assert all(word in words for word in wanted)
    assert ("head" in words) == (kind == "masks in 3D")  # depth runs to the head
    assert Path(said["target"]).name == "torch"
