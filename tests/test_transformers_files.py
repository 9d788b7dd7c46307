"""Weights of Hugging Face transformers: folders, files, the hub, normalisation, MAE's decoder."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from peft.utils import save_and_load
from safetensors.torch import load_file, save_file

from medtpp import tuners
from medtpp.backbones import transformers_weights
from medtpp.config import PRETEXTS
from medtpp.errors import ConfigError, WeightsError
from medtpp.pretext.mae import patchify
from medtpp.seeds import Seeds
from transformers_networks import DEVIATION, MEAN, SIZE, encoder_of, folder_of, load, whole, write

# Normalisation


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("processor_config.json", {"image_processor": {"image_mean": MEAN, "image_std": DEVIATION}}, (MEAN, DEVIATION)),
        ("preprocessor_config.json", {"do_normalize": False, "image_mean": MEAN, "image_std": DEVIATION},
         ([0.0] * 3, [1.0] * 3)),
        ("preprocessor_config.json", {"size": 224}, ([0.5] * 3, [0.5] * 3)),
    ],
)  # fmt: skip
def test_normalisation_is_that_of_the_image_processor(tmp_path, caplog, name, content, expected):
    folder = shutil.copytree(folder_of("vit"), tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    write(folder / name, content)
    spec = load(folder).spec
    assert (list(spec.mean), list(spec.std)) == expected
    assert ("says nothing of normalisation" in caplog.text) == (expected[0][0] == 0.5)


# MAE's decoder


def mae_pretext(backbone, **options):
    task = PRETEXTS.get("mae")
    return task(task.Options(**options), backbone.spec, Seeds(0))


@torch.no_grad()
def test_the_decoder_of_a_mae_becomes_the_pretext_head():
    """It predicts what the library's decoder predicts, of the same visible patches."""
    backbone = load(folder_of("mae"))
    pretext = mae_pretext(backbone, decoder_width=64, decoder_depth=2)
    assert pretext.load_head(backbone.pretext_heads)
    images, order = torch.rand(2, 3, SIZE, SIZE), torch.rand(2, 16).argsort(dim=1)
    predicted = pretext.decode(backbone, images, order[:, :4], order[:, 4:])
    theirs = whole("mae")
    given = theirs(backbone.normalise(images), noise=order.argsort(dim=1).float())
    assert torch.equal(given.ids_restore.argsort(dim=1), order)
    expected = given.logits.gather(1, order[:, 4:, None].expand(-1, -1, 192))
    torch.testing.assert_close(predicted, expected, atol=1e-4, rtol=1e-4)  # norms differ by their epsilon
    pixels = backbone.normalise(images)
    assert torch.equal(patchify(pixels, (8, 8)), theirs.patchify(pixels))


def test_a_decoder_that_does_not_fit_is_left_out(tmp_path):
    backbone = load(folder_of("mae"))
    assert not mae_pretext(backbone).load_head(backbone.pretext_heads), "other sizes than asked for"
    config = json.loads((folder_of("mae") / "config.json").read_text())
    for change in ({"norm_pix_loss": False}, {"decoder_num_attention_heads": 1}):
        folder = shutil.copytree(folder_of("mae"), tmp_path / next(iter(change)))
        write(folder / "config.json", {**config, **change})
        assert load(folder).pretext_heads == {}
    folder = shutil.copytree(folder_of("mae"), tmp_path / "encoder")
    encoder_of(whole("mae")).save_pretrained(folder)
    assert load(folder).pretext_heads == {}, "made at random, since the file has none"
    assert load(folder).spec.sha256 == backbone.spec.sha256
    assert load(folder_of("mae"), weights="random").pretext_heads == {}


# Files


def test_the_files_have_the_names_that_published_weights_have():
    """`save_pretrained` keeps the first names; without this, the other tests would prove less."""
    giant = load_file(folder_of("giant") / "model.safetensors")
    assert {"encoder.layer.0.mlp.weights_in.weight", "encoder.layer.0.attention.attention.query.bias"} <= giant.keys()
    siglip = load_file(folder_of("siglip") / "model.safetensors")
    assert {"vision_model.head.probe", "text_model.embeddings.token_embedding.weight", "logit_bias"} <= siglip.keys()
    assert "vit.encoder.layer.0.output.dense.weight" in load_file(folder_of("classifier") / "model.safetensors")


def test_a_torch_file_is_read_and_python_objects_are_not(tmp_path):
    folder = shutil.copytree(folder_of("vit"), tmp_path / "vit")
    (folder / "model.safetensors").unlink()
    state = load_file(folder_of("vit") / "model.safetensors")
    torch.save({**state, "embeddings.position_ids": torch.arange(17)}, folder / "pytorch_model.bin")
    assert load(folder).spec.sha256 == load(folder_of("vit")).spec.sha256
    witness = tmp_path / "executed"
    torch.save({**state, "callback": Harmful(witness)}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="cannot be read"):
        load(folder)
    assert not witness.exists()


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_hidden_layers": 3}, r"missing: layers\.2\.attention\.k_proj\.bias"),
        ({"num_hidden_layers": 1}, r"unexpected: .*layers?\.1\."),
        (
            {"intermediate_size": 96},
            r"shape of layers\.\*\.mlp\.fc1\.bias: \(128,\) in the file, \(96,\) by config",
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed(tmp_path, change, problem):
    folder = shutil.copytree(folder_of("classifier"), tmp_path / "vit")
    write(folder / "config.json", {**json.loads((folder / "config.json").read_text()), **change})
    with pytest.raises(WeightsError, match=r"do not fit its config\.json") as caught:
        load(folder)
    assert any(re.match(problem, line) for line in caught.value.problems), caught.value.problems


def test_folders_that_are_not_of_transformers(tmp_path):
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        load(tmp_path)
    write(tmp_path / "config.json", {"model_type": "bert"})
    with pytest.raises(ConfigError, match=r"a network of the type bert.* vit, vit_mae, dinov2"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_', encoding="utf-8")
    with pytest.raises(WeightsError, match=r"config\.json is broken"):
        load(tmp_path)
    shutil.copy(folder_of("vit") / "config.json", tmp_path)
    with pytest.raises(WeightsError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder_of("vit") / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"cannot be read.*copy the folder again"):
        load(tmp_path)


def test_random_weights_need_the_config_alone_and_are_the_same_on_every_load(tmp_path):
    shutil.copy(folder_of("siglip") / "config.json", tmp_path)
    first, second = load(tmp_path, weights="random"), load(tmp_path, weights="random", image_size=48)
    assert first.spec.sha256 == second.spec.sha256 == first.source_hash()
    assert first.spec.sha256 != load(folder_of("siglip")).spec.sha256
    assert (first.spec.source, first.spec.objective, second.spec.grid) == ("random", "unknown", (6, 6))


def test_what_this_family_does_not_do(tmp_path):
    vit = folder_of("vit")
    save_file({"weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"brings its own weights.*save_pretrained"):
        load(vit, weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(ConfigError, match=r"encodes 2D images alone.*medtpp_vit_tiny"):
        load(vit, image_size=(16, 32, 32))
    with pytest.raises(ConfigError, match=r"backbone\.patch_size is 16: .* has 8"):
        load(vit, patch_size=16)
    with pytest.raises(ConfigError, match=r"backbone\.channels is 1: .* has 3"):
        load(vit, channels=1)
    assert load(vit, patch_size=8, channels=3).spec.patch == (8, 8)
    with pytest.raises(ConfigError, match=r"36 is not a multiple of the patch size 8"):
        load(vit, image_size=36)
    with pytest.raises(ConfigError, match=r"backbone\.revision .* is a folder"):
        load(vit, revision="v1")
    assert load(vit).spec.sha256 == load(vit, image_size=64).spec.sha256, "positions are resampled on the way"


# The hub


@pytest.fixture
def hub(monkeypatch):
    """A hub with one repository; gives the list of what is asked of it."""
    asked = []

    def download(name, revision=None, allow_patterns=()):
        asked.append((name, revision, tuple(allow_patterns)))
        return str(folder_of("vit"))

    monkeypatch.setattr(transformers_weights, "snapshot_download", download)
    return asked


def test_a_hub_repository_at_a_revision(hub):
    backbone = load("somebody/vit-dino", revision="v2")
    assert {(name, revision) for name, revision, _ in hub} == {("somebody/vit-dino", "v2")}
    assert not any(pattern.endswith(".bin") for _, _, patterns in hub for pattern in patterns)
    spec = backbone.spec
    assert (spec.source, spec.architecture) == ("transformers:somebody/vit-dino@v2", "somebody/vit-dino")
    assert spec.objective == "features", "by its name"


def test_random_weights_of_a_repository_download_no_weights(hub):
    load("somebody/vit", weights="random")
    assert all(pattern.endswith(".json") for _, _, patterns in hub for pattern in patterns)


def test_repositories_that_cannot_be_had(monkeypatch):
    def gated(name, **kwargs):
        raise GatedRepoError("no", response=httpx.Response(403, request=httpx.Request("GET", "https://x")))

    monkeypatch.setattr(transformers_weights, "snapshot_download", gated)
    with pytest.raises(WeightsError, match="asks for a licence to be accepted"):
        load("google/medsiglip-448")

    def unreachable(name, **kwargs):
        raise OSError("unreachable")

    monkeypatch.setattr(transformers_weights, "snapshot_download", unreachable)
    with pytest.raises(WeightsError, match=r"Without a network, name a folder.*transformers:FOLDER"):
        load("owkin/phikon")
    monkeypatch.undo()
    with pytest.raises(WeightsError, match=r"There is no folder \./models/vit"):
        load("./models/vit")


def test_an_adapter_is_written_without_asking_the_hub(monkeypatch):
    """Peft would look there for the network's config.json, to compare vocabularies."""
    backbone = load(folder_of("vit"))
    backbone.encoder.name_or_path = "somebody/vit"  # as after a download

    def refuse(*args):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", refuse)
    assert tuners.attach(backbone, "lora").adapter_state()


def test_names_are_recognised_without_importing_transformers():
    script = (
        "import sys; from medtpp.config import BACKBONES; "
        "assert BACKBONES.get('transformers').recognises('transformers:a/b'); "
        "assert not any(family.recognises('a/b') for family in BACKBONES.values()); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
