"""Exports to MONAI bundles: MONAI alone gives what medtpp gives, on images and on the grids of scans."""

import json
import re
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from exported import CLASSIFY, KINDS, PERCENTILES, SCANS, ZSCORE, adapter, batches, made, own, stated
from medtpp.config import Window
from medtpp.data.geometry import Volume
from medtpp.data.preprocess import Preprocessing
from medtpp.data.volume_preprocess import LEVELS, VolumePreprocessing
from medtpp.data.volumes.nifti import read_nifti
from medtpp.errors import ConfigError
from medtpp.inference import export as exports
from medtpp.inference.export import bundle as bundles
from medtpp.inference.export.network import example
from medtpp.inference.sliding import SlidingWindow, as_member
from volumes import blobs, geometry


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


def transformed(transforms, array, where):
    """What MONAI makes of (C, D, H, W) with these transforms, those of loading left out."""
    from monai.data import MetaTensor

    imports = ["$import numpy as np", "$import torch"]
    steps = ConfigParser({"transforms": transforms, "imports": imports}).get_parsed_content("transforms")[2:]
    affine = torch.from_numpy(np.diag([-1.0, -1.0, 1.0, 1.0]) @ _affine(where))
    item = {"image": MetaTensor(torch.from_numpy(array.transpose(0, 3, 2, 1).copy()), affine=affine)}
    for step in steps:
        item = step(item)
    return item["image"].numpy()


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
        # MONAI imports fire for its command line alone, and does not bring it.
        assert "pip install torch monai fire" in (tmp_path / "docs" / "README.md").read_text()

    @pytest.mark.parametrize(
        ("values", "shape", "agreement"),
        [
            pytest.param(((1,), (2,)), (16, 16, 8), 0.995, id="one window"),  # medtpp keeps float16
            # Weights under 1/1000 are raised to that by MONAI, which changes the borders of scans.
            pytest.param(((7,), (3,)), (24, 32, 20), 0.9, id="many"),
            pytest.param(((2,), (600,)), (16, 16, 8), 0.995, id="above 255"),
            pytest.param(((9, 4), (5, 7)), (16, 16, 8), 0.995, id="several values"),
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
        ours = np.array([0, *map(min, values)])[scan_labels(one, scan)]
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

    def test_the_middle_of_volumes_is_that_of_medtpp(self):
        crop = VolumePreprocessing(patch=(4, 8, 8), windows=(LEVELS,), spacing=(2, 1, 1), center_crop=(16, 12, 20))
        array = np.random.default_rng(0).random((1, 12, 30, 26), np.float32) * 255
        where = geometry(array.shape[1:], (2, 1, 1))
        ours, _ = crop.apply(Volume(array, where))
        theirs = transformed(bundles.preprocessing_transforms(crop), array, where)
        np.testing.assert_allclose(theirs, ours, atol=1e-3)
        with pytest.raises(ConfigError, match="medtpp predict"):
            bundles.preprocessing_transforms(crop.model_copy(update={"spacing": None}))

    @pytest.mark.parametrize("air", [None, 60.0])
    def test_every_kind_of_window_and_the_crop(self, air, tmp_path):
        fixed = Window(kind="fixed", low=20, high=400)
        preprocessing = VolumePreprocessing(
            patch=(8, 16, 16), windows=(PERCENTILES, fixed, ZSCORE, ZSCORE), air=air, crop=True, margin=2.0
        )
        array = np.zeros((4, 20, 30, 24), np.float32)
        array[:3, 5:14, 8:29, 3:22] = np.random.default_rng(0).random((3, 9, 21, 19)) * 500
        array[3, 6:9, 8:29, 3:22] = 80  # content of one value
        where = geometry(array.shape[1:])
        ours, _ = preprocessing.apply(Volume(array, where))
        theirs = transformed(bundles.preprocessing_transforms(preprocessing), array, where)
        assert theirs.shape == ours.shape
        np.testing.assert_allclose(theirs, ours, atol=1e-3)

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

    @pytest.mark.parametrize("values", [((1,), (2,)), ((2,), (600,))])
    def test_masks_of_photographs_have_their_size_and_the_values_of_the_training(self, values, tmp_path):
        one = made("masks in 2D", values=values)
        (tmp_path / "images").mkdir()
        levels = (blobs((48, 40)) * 100).astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / "images" / "a.png")
        bundle_of(one, tmp_path / "out", dataset_dir=str(tmp_path / "images")).get_parsed_content("run")
        (mask,) = (tmp_path / "out" / "eval").glob("*.png")
        found = np.asarray(Image.open(mask))
        assert found.shape == levels.shape
        assert set(np.unique(found)) <= {0, *(value for (value,) in values)}
        assert found.any()

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

    def test_channels_in_files_of_their_own_are_given_as_lists(self, tmp_path):
        """What docs/export.md and the bundle's README say of them: one by one they are refused by the network."""
        preprocessing = SCANS.model_copy(update={"windows": (PERCENTILES, ZSCORE)})
        one = adapter(preprocessing, json.dumps(KINDS["masks in 3D"][1]))
        folder = tmp_path / "scans"
        folder.mkdir()
        for channel in range(2):
            write_scan(folder / f"a_{channel:04d}.nii.gz", seed=channel)
        alone = bundle_of(one, tmp_path / "alone", dataset_dir=str(folder))
        with pytest.raises(RuntimeError) as refused:
            alone.get_parsed_content("run")
        assert "to have 2 channels, but got 1 channels" in str(refused.value.__cause__)
        said = (tmp_path / "alone" / "docs" / "README.md").read_text()
        lists = re.search(r'--data "(.*)"', said)[1]
        together = bundle_of(
            one, tmp_path / "out", dataset_dir=str(folder), pattern="*_0000.nii.gz", data=lists.replace("\\$", "$")
        )
        together.get_parsed_content("run")
        assert len(list((tmp_path / "out" / "eval").glob("*.nii.gz"))) == 1
        item = together.get_parsed_content("dataset")[0]["image"]
        scans = [read_nifti(path) for path in sorted(folder.iterdir())]
        ours, _ = preprocessing.apply(replace(scans[0], array=np.concatenate([scan.array for scan in scans])))
        np.testing.assert_allclose(item.numpy(), ours, atol=1e-3)  # float16

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
