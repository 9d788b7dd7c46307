"""`pretext: auto`: what the backbone was pre-trained for decides, once, and is written down."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import medtpp
from medtpp import backbones
from medtpp.backbones.timm_names import objective_of
from medtpp.config import PRETEXTS, TUNERS, AutoPretext
from medtpp.errors import ConfigError
from medtpp.files import read_json
from medtpp.training.tpp import natural_pretext, resolve_pretext
from medtpp.workflow.compare import Axes, open_comparison
from medtpp.workflow.compare.plan import cell_experiment
from medtpp.workflow.experiment import load_experiment
from runs import data_folder, done, experiment, finished, refused, settings

OBJECTIVES = ("pixels", "features", "language", "supervised", "unknown")


def spec(objective="unknown", architecture="test_vit", size=32):
    return replace(network(architecture, size), objective=objective)


@cache
def network(architecture, size):
    return medtpp.load(architecture, weights="random", image_size=size).spec


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("vit_base_patch16_224.mae", "pixels"),
        ("ViTMAEModel", "pixels"),
        ("vit_small_patch14_dinov2.lvd142m", "features"),
        ("vit_base_patch16_dinov3.lvd1689m", "features"),
        ("Dinov2Model", "features"),
        ("microsoft/rad-dino", "features"),
        ("owkin/phikon", "features"),
        ("hf-hub:MahmoodLab/UNI2-h", "features"),
        ("hf-hub:paige-ai/Virchow2", "features"),
        ("somebody/vit-ibot", "features"),
        ("vit_giant_patch16_gap_224.in22k_ijepa", "features"),
        ("eva02_large_patch14_224.mim_in22k", "features"),
        ("vit_base_patch16_clip_224.openai", "language"),
        ("vit_base_patch16_siglip_224.webli", "language"),
        ("SiglipVisionModel", "language"),
        ("CLIPVisionTransformer", "language"),
        ("vit_base_patch16_clip_224.laion2b_ft_in12k_in1k", "supervised"),
        ("convnextv2_atto.fcmae_ft_in1k", "supervised"),
        ("vit_base_patch16_224.augreg_in21k", "supervised"),
        ("convnext_nano.in12k", "supervised"),
        ("vit_base_patch16_224", "unknown"),
        ("samvit_base_patch16.sa1b", "unknown"),
        *((name, "features") for name in ("features", "byol", "moco_v3", "simclr", "dino")),  # of `medtpp pretrain`
    ],
)
def test_names_tell_what_a_network_was_pretrained_for(name, objective):
    assert objective_of(name) == objective


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_task_follows_the_objective_where_tokens_can_be_dropped(objective):
    expected = "features" if objective in ("features", "language") else "mae"
    assert natural_pretext(spec(objective)) == natural_pretext(spec(objective), "lora") == expected
    assert natural_pretext(spec(objective), "convpass") == "simmim", "it needs all patches"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_networks_that_drop_no_tokens_have_the_task_they_had(objective):
    assert natural_pretext(spec(objective, "convnext_atto", 64)) == "simmim"
    blind = replace(spec(objective, "convnext_atto", 64), capabilities=frozenset({"dense"}))
    assert natural_pretext(replace(blind, patch=(16, 16))) == "restoration"
    assert natural_pretext(blind) == natural_pretext(replace(blind, capabilities=frozenset())) == "byol"


@given(st.sampled_from(OBJECTIVES), st.sampled_from(TUNERS.names()), st.booleans(), st.booleans())
def test_what_is_chosen_always_fits(objective, tuner, drops, masks):
    able = {"dense"} | ({"drops_tokens"} if drops else set()) | ({"masks"} if masks else set())
    chosen = natural_pretext(replace(spec(objective), capabilities=frozenset(able)), tuner)
    assert PRETEXTS.get(chosen).needs <= able
    assert not (TUNERS.get(tuner).needs_grid and "drops_tokens" in PRETEXTS.get(chosen).needs)


def test_the_embedded_backbone_keeps_its_task_and_options():
    own = backbones.load(load_experiment(data_folder()).backbone).spec
    assert own.objective == "pixels"
    assert resolve_pretext(AutoPretext(), own, "lora") == PRETEXTS.get("mae").Options()


def test_a_named_task_stays():
    options = PRETEXTS.get("simclr").Options()
    assert resolve_pretext(options, spec("features")) is options


@pytest.mark.parametrize("given", [["pretext.mask_ratio=0.6"], ["pretext={name: auto, mask_ratio: 0.6}"],
                                   ["pretext=auto", "pretext.mask_ratio=0.6"]])  # fmt: skip
@pytest.mark.parametrize("objective", ["pixels", "features"])
def test_options_go_to_the_task_that_is_chosen(given, objective):
    written = load_experiment(data_folder(), given).pretext
    name = natural_pretext(spec(objective))
    assert resolve_pretext(written, spec(objective)) == PRETEXTS.get(name).Options(mask_ratio=0.6)


def test_an_option_of_another_task_is_refused_with_those_there_are():
    chosen = AutoPretext(temperature=0.2, queue=64, mask_ratio=0.5)
    with pytest.raises(ConfigError) as caught:
        resolve_pretext(chosen, spec("features"))
    said = str(caught.value)
    for words in ("is features", "mask_ratio, decoder_depth, decoder_width", "pretext.temperature: there is no such"):
        assert words in said
    assert "pretext.queue" in said, "all at once"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("pretext.mask_ration=0.6", "no pretext task has an option mask_ration; did you mean mask_ratio?"),
        ("pretext.xyz=1", "no pretext task has an option xyz; there are "),
        ("pretext.mask_ratio=much", "mask_ratio of dino, features, mae, simmim: input should be a valid number"),
    ],
)
def test_an_option_that_no_task_takes_is_refused_before_anything_is_read(given, words):
    with pytest.raises(ConfigError) as caught:
        load_experiment(data_folder(), [given])
    assert words in str(caught.value)
    assert "- pretext: " in str(caught.value)


def test_a_run_shows_and_keeps_what_was_chosen_and_is_resumed(tmp_path):
    folder, said = finished()
    assert "pretext mae" in said.text
    text = (folder / "experiment.yaml").read_text()
    assert "name: mae # auto: what the backbone was pre-trained for decides" in text
    assert read_json(folder / "tpp" / "inputs.json")["inputs"]["pretext"] == PRETEXTS.get("mae").Options().model_dump()
    command = ("run", data_folder(), "--out", folder, "--modality", "xray", "--resume")
    for named in ((), ("pretext=mae",), ("pretext.name=auto",)):
        assert "TPP was done before." in done(*command, *settings(*named)).text
    assert "pretext.mask_ratio: 0.75 there, 0.5 now" in refused(*command, *settings("pretext.mask_ratio=0.5"))


def test_init_writes_the_task_by_name_and_what_it_wrote_is_read_as_it_is(tmp_path):
    file = tmp_path / "experiment.yaml"
    done("init", data_folder(), "-o", file, *settings("pretext.mask_ratio=0.5", "tuner=convpass"))
    written = load_experiment(file)
    assert (written.pretext.name, written.pretext.mask_ratio) == ("simmim", 0.5)
    assert "name: simmim # auto: " in file.read_text()
    assert load_experiment(file, ["pretext=auto"]).pretext == AutoPretext()


def test_a_wrong_option_ends_a_run_with_one_message(tmp_path):
    said = refused("tpp", data_folder(), "-o", tmp_path / "run", *settings("pretext.temperature=0.2"))
    assert "pretext is auto, which for" in said
    assert not (tmp_path / "run" / "tpp").exists()


def test_all_arms_of_a_comparison_have_one_task(tmp_path):
    written = experiment("hardware.threads=1")
    assert isinstance(written.pretext, AutoPretext)
    comparison = open_comparison(written, Axes(tuners=("lora", "ssf"), seeds=1), None, jobs=1)
    tasks = {cell_experiment(comparison.base, cell).pretext for cell in comparison.cells}
    assert tasks == {PRETEXTS.get("mae").Options()}


def test_python_asks_the_same_function():
    backbone = medtpp.load("test_vit", weights="random", image_size=32)
    backbone.spec = replace(backbone.spec, objective="features")
    tuned = medtpp.attach(backbone, "lora")
    record = medtpp.tpp(tuned, torch.rand(8, 3, 32, 32), {"mask_ratio": 0.5}, steps=2, head_warmup=0)
    assert record.card.pretext == PRETEXTS.get("features").Options(mask_ratio=0.5).model_dump()
    for wrong, words in (({"temperature": 0.5}, "which for test_vit is features"), ({"rat": 1}, "has an option rat;")):
        with pytest.raises(ConfigError) as caught:
            medtpp.tpp(tuned, torch.rand(8, 3, 32, 32), wrong, steps=2, head_warmup=0)
        assert words in str(caught.value)


def test_the_matrix_says_what_auto_is():
    assert "pretext=auto, the default: where backbone and tuner can" in done("list", "matrix").text
