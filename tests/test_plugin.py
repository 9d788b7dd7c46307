"""examples/plugin: methods from another package, installed, found, and held to the contract of medtpp's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Their own contract in the matrix; the backbone by hand, since the matrix has kinds of one family.
BACKBONE = """
import torch
from medtpp import backbones, tuners
from medtpp.config import PRETEXTS, TUNERS, BackboneOptions
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.training.tpp import make_pretext

def load():
    return backbones.load(BackboneOptions(name="mixer_s32_224", weights="random"), image_size=64)

images, seeds = torch.rand(4, 1, 64, 64), Seeds(0)
plain = load()
expected = plain.encode(images).tokens
assert expected.shape == (4, 4, plain.spec.width)
for name in ("lora", "mlp_scale", "ssf", "bitfit", "ln_tuning"):
    tuned = tuners.attach(load(), name)
    before = tuned.source_hash()
    pretext, _ = make_pretext(PRETEXTS.get("simmim").Options(), tuned, seeds)
    draws = seeds.draws(torch.zeros(4, dtype=torch.int64), torch.arange(4))
    optimizer = torch.optim.AdamW([*tuned.targets.values(), *pretext.parameters()], lr=1e-3)
    for _ in range(2):
        loss, _ = pretext.loss(tuned, images, draws)
        loss.backward()
        optimizer.step()
    assert tuned.source_hash() == before == plain.source_hash()
    with tuned.disabled():
        assert torch.equal(tuned.encode(images).tokens, expected)
    assert not torch.equal(tuned.encode(images).tokens, expected)
    if TUNERS.get(name).merges:
        gap = (tuned.merged().encode(images).tokens - tuned.encode(images).tokens).abs().max()
        assert gap < 1e-4, (name, gap)
try:
    make_pretext(PRETEXTS.get("mae").Options(), load(), seeds)
except ConfigError as error:
    assert "tokens that can be dropped" in str(error)
else:
    raise AssertionError("MAE drops patches, which a Mixer cannot")
try:
    tuners.attach(load(), "convpass")
except ConfigError as error:
    assert "one sequence of tokens" in str(error)
else:
    raise AssertionError("Convpass needs a plain vision transformer")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a process that finds the plugin, installed in a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source") / "plugin"
    subprocess.run(["cp", "-r", ROOT / "examples" / "plugin", source], check=True)  # building leaves files behind
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", target]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, source], check=True)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(target), *sys.path[:1], str(ROOT / "src")])}


def run(environment, *arguments, program=sys.executable):
    done = subprocess.run([program, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_lists_have_them(installed):
    for kind, name in (("tuners", "mlp_scale"), ("pretexts", "rotation"), ("backbones", "mixer")):
        assert name in run(installed, "list", kind, program=Path(sys.executable).with_name("medtpp"))


def test_tuner_and_pretext_keep_the_contract(installed):
    told = run(
        installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_matrix.py", "-k", "mlp_scale or rotation"
    )
    assert "100%" in told


def test_the_backbone_does_what_its_capabilities_say(installed):
    run(installed, "-c", BACKBONE)
