"""Segmentation from folders of scans to scores, in two and three dimensions: one path for both."""

import pickle

import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image
from safetensors.torch import load_file

import medtpp
import scans
from medtpp import backbones, tuners
from medtpp.adapter import load_adapter, read_card
from medtpp.config import Window
from medtpp.data.case import Structure
from medtpp.data.volume_scan import VolumeScan
from medtpp.errors import ConfigError, DataError, LeakageError
from medtpp.evaluation import read_segmentations
from medtpp.files import MARKER, read_json
from medtpp.inference.stored import mean_dice, sliding_window
from medtpp.seeds import Seeds
from medtpp.tasks.decoders import UNETR
from medtpp.training import finetune, tpp
from medtpp.tuners.base import TunedBackbone
from medtpp.workflow.images import VOLUME_PATCH
from medtpp.workflow.prepare import arrange, prepare
from medtpp.workflow.run import evaluate_stage, finetune_stage, tpp_stage
from runs import done

WRITERS = {"2D": scans.write_pictures, "3D": scans.write_volumes}
QUIET = lambda _: None  # noqa: E731


@pytest.fixture(scope="module", params=WRITERS)
def made(request, tmp_path_factory):
    """A folder of scans, the experiment prepared, and both stages done with a decoder that TPP pre-trained."""
    folder = WRITERS[request.param](tmp_path_factory.mktemp("scans"))
    out = tmp_path_factory.mktemp("run")
    prepared = prepare(scans.experiment(folder, "tpp.decoder=true"))
    start = tpp_stage(prepared, out / "tpp", QUIET)
    adapter = finetune_stage(prepared, out / "finetune", QUIET, start=start)
    return folder, prepared, out, start, adapter


def test_the_task_and_the_structures_are_found(made):
    _, prepared, *_ = made
    assert prepared.experiment.task.name == "segmentation"
    assert prepared.dataset.structures == (Structure("1", (1,)), Structure("2", (2,)))
    assert prepared.experiment.data.structures == {"1": [1], "2": [2]}
    volumes = prepared.preprocessing.dims == 3
    assert prepared.experiment.backbone.dims == (3 if volumes else 2)
    assert prepared.experiment.backbone.patch_size == (VOLUME_PATCH if volumes else None)
    assert prepared.preprocessing.size == (None if volumes else (64, 64))
    assert (prepared.preprocessing.spacing is not None) == volumes


def test_what_the_plan_was_made_from_is_not_kept(made):
    """Ten thousand voxels of each scan would lie in the memory of every process that trains."""
    _, prepared, *_ = made
    scanned = [record for record in prepared.records.values() if isinstance(record, VolumeScan)]
    assert len(scanned) == len(prepared.dataset.cases)
    assert not any(scan.samples.size for scan in scanned)
    assert all(scan.fingerprint and scan.shape for scan in scanned)
    assert len(pickle.dumps(prepared)) < 40_000 * len(scanned)


def test_an_experiment_prepared_again_from_what_it_resolved_is_the_same(made):
    _, prepared, *_ = made
    again = prepare(prepared.experiment)
    assert again.experiment == prepared.experiment
    assert again.preprocessing == prepared.preprocessing
    assert again.whole_split == prepared.whole_split


def test_the_source_is_bit_frozen_in_both_stages(made, tmp_path, monkeypatch):
    _, prepared, *_ = made
    trained = []
    for stage in (tpp, finetune):
        monkeypatch.setattr(stage, "save_adapter", keep_backbone(trained, stage.save_adapter))
    start = tpp_stage(prepared, tmp_path / "tpp", QUIET)
    finetune_stage(prepared, tmp_path / "finetune", QUIET, start=start)
    untouched = backbones.load(prepared.experiment.backbone, image_size=prepared.preprocessing.patch)
    assert [backbone.source_hash() for backbone in trained] == [untouched.source_hash()] * 2


def keep_backbone(kept, save):
    """`save_adapter` that keeps the backbone as training left it."""

    def saved(folder, backbone, *others, **more):
        kept.append(backbone)
        save(folder, backbone, *others, **more)

    return saved


def test_tpp_moves_target_parameters_embedding_and_decoder(made):
    _, prepared, _, start, _ = made
    files = {file.stem for file in start.glob("*.safetensors")}
    assert files == {"adapter_model", "decoder"} | ({"embed"} if prepared.preprocessing.dims == 3 else set())
    for file, untrained in untrained_states(prepared).items():
        trained = load_file(start / f"{file}.safetensors") if untrained else {}
        assert trained.keys() == untrained.keys()
        assert [name for name, value in untrained.items() if torch.equal(trained[name], value)] == [], file


def untrained_states(prepared):
    """What fine-tuning without TPP begins with, by the file that holds it after TPP."""
    experiment, seeds = prepared.experiment, Seeds(prepared.experiment.seed)
    backbone = backbones.load(experiment.backbone, image_size=prepared.preprocessing.patch)
    tuned = tuners.attach(backbone, experiment.tuner, seed=seeds)
    decoder = UNETR(backbone.spec, seeds, experiment.task.feature_size, experiment.task.image_skip)
    return {
        "adapter_model": tuned.adapter_state(),
        "embed": tuned.embed_state(),
        "decoder": decoder.state_dict(),
    }


def test_fine_tuning_starts_with_the_decoder_of_tpp(made, tmp_path):
    _, prepared, _, start, _ = made
    still = {"learning_rate": 1e-12, "head_learning_rate": 1e-12}
    options = prepared.experiment.finetune.model_copy(update=still)
    quiet = arrange(prepared, prepared.experiment.model_copy(update={"finetune": options}))
    adapter = finetune_stage(quiet, tmp_path / "still", QUIET, start=start)
    before, after = load_file(start / "decoder.safetensors"), load_file(adapter / "decoder.safetensors")
    for name, value in before.items():
        torch.testing.assert_close(after[f"decoder.{name}"], value, atol=1e-6, rtol=0)
    other = prepared.experiment.task.model_copy(update={"feature_size": 8})
    changed = arrange(prepared, prepared.experiment.model_copy(update={"task": other}))
    with pytest.raises(ConfigError, match="Pre-train it again"):
        finetune_stage(changed, tmp_path / "other", QUIET, start=start)


def test_the_same_seed_gives_the_same_bits_and_a_killed_run_too(made, tmp_path, monkeypatch):
    _, prepared, _, start, adapter = made
    calls = []

    def killed(step, total):
        calls.append(step)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TunedBackbone, "after_step", lambda self, step, total: killed(step, total))
        with pytest.raises(KeyboardInterrupt):
            finetune_stage(prepared, tmp_path / "killed", QUIET, start=start)
    assert calls == [1, 2, 3]
    again = finetune_stage(prepared, tmp_path / "killed", QUIET, start=start)
    for file in adapter.glob("*.safetensors"):
        first, second = load_file(file), load_file(again / file.name)
        assert all(torch.equal(first[name], second[name]) for name in first), file.name


def test_an_adapter_says_how_to_use_it_on_new_scans(made):
    _, prepared, _, _, adapter = made
    card = read_card(adapter)
    assert card.preprocessing == prepared.preprocessing
    assert card.task.structures == prepared.dataset.structures
    assert card.task.multilabel is False
    assert all(isinstance(window, Window) for window in card.preprocessing.windows)


def test_scores_are_of_the_scans_own_grid(made):
    folder, prepared, out, _, adapter = made
    evaluation = evaluate_stage(prepared, adapter, out / "evaluation", mistakes=False, resamples=50)
    table = read_segmentations(out / "evaluation" / "segmentation.csv")
    assert table.cases == tuple(case.id for case in prepared.cases("test"))
    assert table.structures == ("1", "2")
    volumes = prepared.preprocessing.dims == 3
    assert evaluation.unit == ("mm" if volumes else "px")
    for row, case in enumerate(table.cases):
        mask = SimpleITK.ReadImage(str(folder / case.replace("images/", "masks/")))
        values = SimpleITK.GetArrayFromImage(mask)
        element = np.prod(mask.GetSpacing()) / 1000 if volumes else 1
        for index in (0, 1):
            assert table.volume_true[row, index] == pytest.approx((values == index + 1).sum() * element)
    assert read_json(out / "evaluation" / "evaluation.json")["task"] == "segmentation"


def test_validation_tells_the_dice_of_the_kept_weights(made):
    _, prepared, out, _, adapter = made
    loaded = load_adapter(adapter)
    store, data = prepared.store, prepared.data(prepared.cases("val"))
    window = sliding_window(
        loaded.backbone, loaded.task, store.preprocessing.patch, device=torch.device("cpu"), overlap=0.0
    )
    told = read_json(out / "finetune" / MARKER)["validation_dice"]
    assert told == pytest.approx(mean_dice(window, store, data.rows, 2), abs=1e-3)


def test_data_that_an_adapter_was_trained_on_are_refused(made, tmp_path):
    _, prepared, _, _, adapter = made
    everything = prepare(prepared.experiment, all_test=True)
    with pytest.raises(LeakageError):
        evaluate_stage(everything, adapter, tmp_path / "leak")


def test_masks_that_changed_make_another_experiment(tmp_path):
    folder = scans.write_pictures(tmp_path / "scans")
    prepared = prepare(scans.experiment(folder, "tpp.enabled=false"))
    finetune_stage(prepared, tmp_path / "finetune", QUIET)
    told = []
    finetune_stage(prepared, tmp_path / "finetune", told.append)
    assert told == ["Fine-tuning was done before."]
    train = prepared.cases("train")[0]
    values = np.array(Image.open(train.mask))
    Image.fromarray(np.where(values == 2, 1, values).astype(np.uint8)).save(train.mask)
    changed = prepare(scans.experiment(folder, "tpp.enabled=false"))
    assert changed.experiment == prepared.experiment
    with pytest.raises(ConfigError, match="differing: training cases"):
        finetune_stage(changed, tmp_path / "finetune", told.append)


def test_regions_may_overlap(tmp_path):
    folder = scans.write_volumes(tmp_path / "scans")
    regions = "data.structures={whole: [1, 2], core: 2}"
    prepared = prepare(scans.experiment(folder, "tpp.enabled=false", "task={name: segmentation, head: light}", regions))
    adapter = finetune_stage(prepared, tmp_path / "finetune", QUIET)
    assert read_card(adapter).task.multilabel
    evaluation = evaluate_stage(prepared, adapter, tmp_path / "evaluation", mistakes=False, resamples=50)
    assert set(evaluation.structures) == {"whole", "core"}
    table = read_segmentations(tmp_path / "evaluation" / "segmentation.csv")
    assert (table.volume_true[:, 0] > table.volume_true[:, 1]).all()


def test_modalities_are_channels_from_training_to_prediction(tmp_path):
    folder = scans.write_modalities(tmp_path / "scans")
    prepared = prepare(scans.experiment(folder))
    assert prepared.experiment.backbone.channels == 2
    start = tpp_stage(prepared, tmp_path / "tpp", QUIET)
    adapter = finetune_stage(prepared, tmp_path / "finetune", QUIET, start=start)
    assert load_file(adapter / "embed.safetensors")["patch_embed.proj.weight"].shape[1] == 2
    evaluate_stage(prepared, adapter, tmp_path / "evaluation", mistakes=False, resamples=50)
    done = medtpp.predict(load_adapter(adapter), folder / "imagesTr", tmp_path / "masks")
    assert sorted(done.done) == [f"p{number}.nii.gz" for number in range(6)]


def labelled_volumes(tmp_path):
    """Ten volumes with a class and without masks."""
    folder = scans.write_volumes(tmp_path / "scans", cases=10)
    lines = ["image,label,patient", *(f"images/p{n}.nii.gz,{'even' if n % 2 == 0 else 'odd'},q{n}" for n in range(10))]
    (folder / "manifest.csv").write_text("\n".join(lines))
    return folder


def test_volumes_are_not_rescaled_for_classification_unless_they_are_made_one_size(tmp_path):
    """The size of a finding in millimetres may tell its class."""
    folder = labelled_volumes(tmp_path)
    augment = prepare(scans.experiment(folder)).experiment.data.augment
    assert (augment.crop_min, augment.scaling, augment.rotation) == (1, 0, 30)
    resized = prepare(scans.experiment(folder, "data.volume.size=[8, 16, 16]")).experiment.data.augment
    assert (resized.crop_min, resized.rotation) == (0.5, 0)


def test_volumes_are_classified_by_patches(tmp_path):
    folder = labelled_volumes(tmp_path)
    prepared = prepare(scans.experiment(folder, "data.volume.patch=[8, 16, 16]"))
    assert prepared.experiment.task.name == "classification"
    adapter = finetune_stage(prepared, tmp_path / "finetune", QUIET)
    evaluation = evaluate_stage(prepared, adapter, tmp_path / "evaluation", resamples=50)
    assert evaluation.metrics["auc"].value is not None


def test_negative_values_are_background_from_check_to_predict(tmp_path):
    folder = scans.write_volumes(tmp_path / "scans")
    for path in (folder / "masks").iterdir():
        mask = SimpleITK.ReadImage(str(path), SimpleITK.sitkInt16)
        SimpleITK.WriteImage(mask - 3 * SimpleITK.Cast(mask == 2, SimpleITK.sitkInt16), str(path))  # 2 becomes -1
    settings = [word for setting in scans.SETTINGS for word in ("--set", setting)]
    file, out = tmp_path / "experiment.yaml", tmp_path / "run"
    said = [
        done("check", folder),
        done("init", folder, "-o", file, "--modality", "mri", *settings),
        done("run", file, "--out", out),
    ]
    for result in said:
        assert "count as background: -1 (in 6 cases such as masks/p0.nii.gz)" in result.text
    assert "structures foreground in 6 of 6 masks" in said[0].text
    adapter = out / "finetune" / "adapter"
    assert read_card(adapter).task.structures == (Structure("foreground", (1,)),)
    done("predict", adapter, folder / "images" / "p0.nii.gz", "-o", tmp_path / "masks")
    predicted = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "masks" / "p0.nii.gz")))
    assert set(np.unique(predicted)) <= {0, 1}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.volume.patch=[5, 5, 5]"], r"data\.volume\.patch=\["),
        (["data.image_size=64"], r"data\.volume\.patch"),
        (["data.volume.size=[16, 16, 16]", "data.volume.spacing=[1, 1, 1]"], "exclude"),
        (["backbone.dims=2"], r"backbone\.dims"),
        (["tpp.decoder=true", "task={name: segmentation, head: light}"], r"tpp\.decoder"),
        (["task=classification"], r"task=segmentation"),
    ],
)
def test_what_does_not_go_together_is_told(settings, words, tmp_path):
    folder = scans.write_volumes(tmp_path / "scans")
    with pytest.raises((ConfigError, DataError), match=words):
        prepare(scans.experiment(folder, *settings))
