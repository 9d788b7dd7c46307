"""The adapter folder: strict, complete, and of one backbone."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import matrix
from medtpp.adapter import (
    CARD,
    Adapter,
    TaskCard,
    TPPCard,
    load_adapter,
    make_task,
    read_card,
    refuse_overlap,
    save_adapter,
)
from medtpp.config import BackboneOptions
from medtpp.data.fingerprints import Fingerprints
from medtpp.errors import LeakageError, MedtppError, WeightsError
from medtpp.seeds import Seeds

VARIANT = "medtpp_test_class_token"
WEIGHTS, HEAD = "adapter_model.safetensors", "head.safetensors"


def fine_tuned(tuner="lora", multilabel=False):
    """An adapter with a head, neither of them at its start."""
    tuned = matrix.attach(tuner, VARIANT)
    matrix.perturb(tuned)
    card = TaskCard(options={"name": "classification"}, classes=("a", "b", "c"), multilabel=multilabel)
    task = make_task(card, tuned, Seeds(9))
    with torch.no_grad():
        task.linear.bias.add_(torch.tensor([0.5, -1.0, 2.0]))
    return Adapter(matrix.card_of(tuner, VARIANT, task=card), tuned, task)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, adapter = tmp_path_factory.mktemp("adapter"), fine_tuned()
    save_adapter(folder, adapter.backbone, adapter.card, adapter.task)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to break."""
    return shutil.copytree(saved, tmp_path / "adapter")


def edit(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


def edit_card(folder, change):
    card = json.loads((folder / CARD).read_text())
    change(card)
    (folder / CARD).write_text(json.dumps(card))


@pytest.mark.parametrize("multilabel", [False, True])
def test_backbone_head_and_card_come_back(tmp_path, multilabel):
    adapter = fine_tuned(multilabel=multilabel)
    save_adapter(tmp_path, adapter.backbone, adapter.card, adapter.task)
    loaded = load_adapter(str(tmp_path))
    assert loaded.card == adapter.card
    assert not loaded.task.training
    images = matrix.images()
    with torch.no_grad():
        one, other = (item.task.probabilities(item.task(item.backbone.encode(images))) for item in (adapter, loaded))
    assert torch.equal(one, other)


def test_the_folder_holds_what_it_should_and_no_pickle(saved):
    files = {path.name for path in saved.rglob("*")}
    assert files == {"adapter_config.json", WEIGHTS, HEAD, CARD, "README.md"}
    for path in saved.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError)):
            pickle.loads(path.read_bytes())
    assert set(read_card(saved).versions) == {"python", "medtpp", "torch", "timm", "transformers", "peft"}
    readme = (saved / "README.md").read_text()
    assert "lora" in readme
    assert "a, b, c" in readme


def test_peft_knows_its_own_configuration(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16.0)
    assert config["base_model_name_or_path"] == VARIANT
    assert config["inference_mode"]
    assert str(saved) not in json.dumps(config)


def break_keys(state):
    del state["base_model.model.blocks.0.attn.qkv.lora_A.weight"]
    state["another.weight"] = torch.zeros(2)
    state["base_model.model.blocks.1.mlp.fc1.lora_B.weight"] = torch.zeros(3, 3)


def test_all_wrong_keys_are_listed_together(folder):
    edit(folder / WEIGHTS, break_keys)
    with pytest.raises(WeightsError, match="does not fit") as raised:
        load_adapter(folder)
    assert str(folder) in raised.value.message
    assert raised.value.problems == [
        "missing: base_model.model.blocks.0.attn.qkv.lora_A.weight",
        "unexpected: another.weight",
        "shape of base_model.model.blocks.1.mlp.fc1.lora_B.weight: (3, 3) in the file, (256, 8) here",
    ]


def test_all_wrong_keys_of_the_head_are_listed_together(folder):
    def change(state):
        state["bias"] = state.pop("linear.bias")
        state["linear.weight"] = state["linear.weight"][:2].clone()

    edit(folder / HEAD, change)
    with pytest.raises(WeightsError) as raised:
        load_adapter(folder)
    assert str(folder) in raised.value.message
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize("tuner", ["lora", "bitfit", "full", "lora+bitfit"])
def test_the_card_says_what_tpp_of_a_selection_is(tuner, tmp_path):
    tpp = TPPCard(
        pretext={"name": "mae"},
        steps=1,
        head_warmup=0,
        batch_size=1,
        learning_rate=1.0,
        seed=0,
        images=1,
        transductive=False,
        fingerprints=Fingerprints(),
    )
    save_adapter(tmp_path, matrix.attach(tuner, VARIANT), matrix.card_of(tuner, VARIANT, tpp=tpp))
    said = (tmp_path / "README.md").read_text()
    assert ("continued pre-training of a subset" in said) == (tuner in ("bitfit", "full"))


@pytest.mark.parametrize("tuner", [pair[0] for pair in matrix.WITH_TARGETS if pair[1] == VARIANT])
def test_every_tuner_refuses_wrong_keys(tuner, tmp_path):
    save_adapter(tmp_path, matrix.attach(tuner, VARIANT), matrix.card_of(tuner, VARIANT))
    name, value = sorted(load_file(tmp_path / WEIGHTS).items())[0]
    for change in (
        lambda state: state.pop(name),
        lambda state: state.update(extra=torch.zeros(1)),
        lambda state: state.update({name: torch.zeros(*value.shape, 1)}),
    ):
        broken = shutil.copytree(tmp_path, tmp_path / "broken")
        edit(broken / WEIGHTS, change)
        with pytest.raises(WeightsError) as raised:
            load_adapter(broken)
        assert len(raised.value.problems) == 1
        shutil.rmtree(broken)


@pytest.mark.parametrize("file", [WEIGHTS, HEAD])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "pickle"])
def test_a_broken_file_is_named(folder, file, damage):
    path = folder / file
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WeightsError, match=file):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param(lambda card: card.update(schema_version=2), "schema_version", id="schema"),
        pytest.param(lambda card: card.update(colour="blue"), "colour", id="unknown field"),
        pytest.param(lambda card: card.pop("preprocessing"), "preprocessing", id="missing field"),
        pytest.param(lambda card: card["tuner"].update(rank=0), "rank", id="tuner option"),
        pytest.param(lambda card: card["tuner"].update(colour="blue"), "colour", id="unknown tuner option"),
        pytest.param(lambda card: card["tuner"].pop("name"), "name", id="no tuner"),
        pytest.param(lambda card: card["tuner"].update(name="lroa"), "Did you mean 'lora'", id="unknown tuner"),
        pytest.param(lambda card: card["task"]["options"].update(pooling="max"), "pooling", id="task option"),
        pytest.param(lambda card: card["task"]["options"].update(name="dreaming"), "dreaming", id="unknown task"),
        pytest.param(lambda card: card["backbone"].update(sha256="0" * 64), "belongs to the backbone", id="hash"),
    ],
)
def test_a_card_that_is_wrong_is_told(folder, change, told):
    edit_card(folder, change)
    with pytest.raises(MedtppError, match=told):
        load_adapter(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"null"])
def test_a_card_that_is_no_card_is_told(folder, content):
    (folder / CARD).write_bytes(content)
    with pytest.raises(WeightsError, match=r"medtpp\.json cannot be read"):
        load_adapter(folder)


def test_a_folder_without_a_card_is_no_adapter(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(WeightsError, match="no adapter folder"):
            load_adapter(folder)


def test_a_moved_backbone_is_found_and_another_refused(folder, tmp_path):
    moved = shutil.copytree(matrix.backbone_folder(VARIANT), tmp_path / "moved")
    loaded = load_adapter(folder, backbone=str(moved))
    assert loaded.card.backbone.options.name == str(moved)
    assert load_adapter(folder, backbone=BackboneOptions(name=str(moved))).card == loaded.card
    other = matrix.backbone_folder("medtpp_test_registers")
    with pytest.raises(WeightsError, match="Use the backbone it was made with"):
        load_adapter(folder, backbone=str(other))
    with pytest.raises(WeightsError, match="Use the backbone it was made with"):
        load_adapter(folder, backbone=BackboneOptions(name=str(moved), weights="random"))
    edit_card(folder, lambda card: card["backbone"]["options"].update(name=str(tmp_path / "gone")))
    with pytest.raises(WeightsError, match="--backbone"):
        load_adapter(folder)
    assert load_adapter(folder, backbone=str(moved)).task is not None


def test_the_card_is_written_last(tmp_path):
    """A folder that has it is whole: nothing may be left to write after it."""
    adapter = fine_tuned()
    (tmp_path / "README.md").mkdir()  # the file before it cannot be written
    with pytest.raises(MedtppError):
        save_adapter(tmp_path, adapter.backbone, adapter.card, adapter.task)
    assert not (tmp_path / CARD).exists()


def test_an_overlap_is_refused_with_examples():
    refuse_overlap("TPP", [])
    with pytest.raises(LeakageError, match=r"TPP saw 7 of the test cases.*c0, c1, c2, c3, c4 and 2 more"):
        refuse_overlap("TPP", [f"c{number}" for number in range(7)])
