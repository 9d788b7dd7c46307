"""What AdaLoRA, APLA, Convpass, ladder, VPT-shallow and combinations have beside the contract of the matrix."""

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import matrix
from medtpp import backbones, tuners
from medtpp.adapter import load_adapter, save_adapter
from medtpp.cli._app import app
from medtpp.config import PRETEXTS, TUNERS
from medtpp.errors import ConfigError, WeightsError
from medtpp.training.stage import tuner_groups
from medtpp.tuners._starts import orthonormal, principal
from medtpp.tuners.lora import LoRAOptions
from medtpp.workflow.experiment import load_experiment
from medtpp.workflow.prepare import prepare
from medtpp.workflow.run import finetune_stage, tpp_stage

VARIANT = "medtpp_test_class_token"
SETTINGS = [
    "data.image_size=32",
    "tpp.steps=4",
    "tpp.batch_size=8",
    "tpp.head_warmup=0",
    "finetune.steps=40",
    "finetune.batch_size=8",
    "finetune.checkpoint_every=9",
    "finetune.keep=last",
    "logging.tensorboard=false",
]


def quiet(_):
    """No progress."""


@pytest.fixture(scope="module")
def adalora(phantom_folder, tmp_path_factory):
    """AdaLoRA on phantoms: what was prepared, the folders of its stages."""
    folder = tmp_path_factory.mktemp("adalora")
    prepared = prepare(load_experiment(phantom_folder, ["tuner.name=adalora", *SETTINGS]))
    start = tpp_stage(prepared, folder / "tpp", quiet)
    return prepared, start, finetune_stage(prepared, folder / "finetune", quiet, start=start)


def diagonals(adapter):
    state = load_file(adapter / "adapter_model.safetensors")
    return [value for name, value in state.items() if "lora_E" in name]


class TestAdaLoRA:
    def test_fine_tuning_lowers_the_ranks_and_tpp_does_not(self, adalora):
        _, start, adapter = adalora
        before, after = diagonals(start), diagonals(adapter)
        assert all((value != 0).all() for value in before)
        kept = [int((value != 0).sum()) for value in after]
        assert sum(kept) == 8 * len(after)
        assert len(set(kept)) > 1  # not every layer is worth as much

    def test_a_killed_run_ends_in_the_same_bits(self, adalora, tmp_path):
        prepared, start, adapter = adalora
        kind = type(tuners.attach(matrix.load(VARIANT), "adalora"))
        original = kind.after_step

        def killed(self, step, total):
            if step == 21:
                raise KeyboardInterrupt
            original(self, step, total)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(kind, "after_step", killed)
            with pytest.raises(KeyboardInterrupt):
                finetune_stage(prepared, tmp_path / "killed", quiet, start=start)
        again = finetune_stage(prepared, tmp_path / "killed", quiet, start=start)
        for file in adapter.glob("*.safetensors"):
            assert (again / file.name).read_bytes() == file.read_bytes()

    def test_orthogonal_directions_cost_nothing(self):
        tuned = matrix.attach("adalora", VARIANT)
        with torch.no_grad():
            for name, parameter in tuned.targets.items():
                if "lora_E" not in name:
                    parameter.copy_(torch.eye(*parameter.shape))
        assert tuned.penalty().item() == 0
        with torch.no_grad():
            next(p for name, p in tuned.targets.items() if "lora_A" in name)[0, 1] = 0.5
        # Of 16 matrices one has 0.25 on the diagonal and 0.5 on both sides of it.
        gap = (0.25**2 + 2 * 0.5**2) ** 0.5
        torch.testing.assert_close(tuned.penalty().item(), 0.1 * gap / 16, rtol=1e-4, atol=0)

    def test_the_worth_is_that_of_the_paper(self):
        """Equations 8 to 11 by hand, for one direction over two steps."""
        tuned = matrix.attach("adalora", VARIANT)
        matrix.perturb(tuned)
        triple = tuned._triples[0]
        sensitivity, uncertainty = dict.fromkeys(triple, 0.0), dict.fromkeys(triple, 0.0)
        for step in (1, 2):
            for name in triple:
                parameter = tuned.targets[name]
                parameter.grad = torch.full_like(parameter, 0.1 * step)
                now = (parameter.detach() * parameter.grad).abs()
                sensitivity[name] = 0.85 * sensitivity[name] + 0.15 * now
                uncertainty[name] = 0.85 * uncertainty[name] + 0.15 * (now - sensitivity[name]).abs()
            found = tuned._worth(0)
        a, e, b = (sensitivity[name] * uncertainty[name] for name in triple)
        torch.testing.assert_close(found[3], e[3, 0] + a[3].mean() + b[:, 3].mean())


def test_apla_trains_what_the_file_says_whatever_the_seed():
    images = matrix.images()
    one, other = matrix.attach("apla", VARIANT, seed=1), matrix.attach("apla", VARIANT, seed=2)
    matrix.perturb(one)
    with torch.no_grad():
        assert not torch.equal(one.encode(images).tokens, other.encode(images).tokens)
        other.load_adapter_state(one.adapter_state())
        assert torch.equal(one.encode(images).tokens, other.encode(images).tokens)
    changed = (
        one.merged().source_state()["blocks.0.attn.proj.weight"] != one.source_state()["blocks.0.attn.proj.weight"]
    )
    assert int(changed.any(dim=1).sum()) == matrix.WIDTH // 4


def test_convolutions_see_neighbours_and_nothing_else():
    """With the blocks' own work taken away, a patch depends on the patches around it."""
    tuned = matrix.attach("convpass", VARIANT)
    matrix.perturb(tuned, scale=0.5)
    added = tuned.bypasses[0]
    tokens = torch.randn(1, 1 + matrix.PATCHES, matrix.WIDTH, generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 1 + 5] += 1  # row 1, column 1 of a grid of 4 x 4
    with torch.no_grad():
        changed = (added(tokens) != added(other)).any(dim=-1)[0]
    assert not changed[0]  # the class token
    around = {row * 4 + column for row in range(3) for column in range(3)}
    assert {index for index, moved in enumerate(changed[1:].tolist()) if moved} == around


def test_no_gradient_goes_through_the_backbone_beside_a_ladder():
    tuned, images = matrix.attach("ladder", VARIANT), matrix.images()
    asked = []
    tuned.encoder.blocks[0].attn.qkv.register_forward_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    features = tuned.encode(images, taps=[0, 1])
    assert features.tokens.requires_grad
    assert all(item.requires_grad for item in features.maps)
    mask = torch.zeros(len(images), matrix.PATCHES, dtype=torch.bool)
    mask[:, 0] = True
    token = torch.nn.Parameter(torch.ones(matrix.WIDTH))
    tuned.encode(images, mask=mask, mask_token=token).patches[:, 3].sum().backward()
    assert asked == [False, True]  # a mask token learns through the backbone
    assert token.grad.any()


def test_shallow_prompts_go_through_all_blocks():
    tuned, images, seen = matrix.attach("vpt_shallow", VARIANT), matrix.images(), []
    for block in tuned.encoder.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    features = tuned.encode(images, taps=[0, 1])
    assert tuned.prompts.shape == (1, 8, matrix.WIDTH)
    assert seen == [1 + matrix.PATCHES + 8] * matrix.DEPTH
    assert features.tokens.shape[1] == 1 + matrix.PATCHES


def test_more_last_blocks_than_there_are():
    options = TUNERS.get("last_blocks").Options(blocks=13)
    with pytest.raises(ConfigError, match=r"12 blocks; tuner\.blocks is 13"):
        tuners.attach(backbones.load("medtpp_vit_tiny", image_size=64), options)


def test_tuners_that_need_the_grid_are_refused_at_once(phantom_folder):
    """And not after a data set was read and a stage begun."""
    with pytest.raises(ConfigError, match="convpass and the pretext task mae exclude each other"):
        prepare(load_experiment(phantom_folder, ["tuner.name=convpass", "pretext.name=mae", *SETTINGS]))
    prepare(load_experiment(phantom_folder, ["tuner.name=convpass", "pretext.name=simmim", *SETTINGS]))


class TestCombinations:
    def test_no_weight_has_two_tuners(self):
        """ExPLoRA: LoRA in all blocks but the last, which is trained itself."""
        tuned = matrix.attach("lora+last_blocks", VARIANT)
        of_lora = {name for name in tuned.targets if "lora_" in name}
        assert of_lora
        assert all("blocks.0." in name for name in of_lora)
        assert all("blocks.1." in name or "norm" in name for name in tuned.targets.keys() - of_lora)

    def test_each_part_has_its_own_rate(self):
        tuned = matrix.attach("lora+last_blocks", VARIANT)
        groups = {group.name: group for group in tuner_groups(tuned, 1e-3, 0.0)}
        assert {name: group.learning_rate for name, group in groups.items()} == {
            "tuner": 1e-3,
            "tuner_2": pytest.approx(1e-4),
        }
        assert all("lora_" in name for name in groups["tuner"].parameters)
        assert not any("lora_" in name for name in groups["tuner_2"].parameters)
        assert sum(len(group.parameters) for group in groups.values()) == len(tuned.targets)

    def test_files_of_other_tuners_do_not_load(self):
        tuned = matrix.attach("lora+bitfit", VARIANT)
        state = tuned.adapter_state()
        assert {key.partition("/")[0] for key in state} == {"lora", "bitfit"}
        with pytest.raises(WeightsError, match="does not fit"):
            tuned.load_adapter_state({**state, "ssf/more": torch.zeros(1)})
        with pytest.raises(WeightsError, match="does not fit"):
            tuned.load_adapter_state({key: value for key, value in state.items() if key.startswith("lora/")})


class TestStarts:
    @pytest.mark.parametrize("start", ["pissa", "olora"])
    def test_the_function_starts_unchanged_and_the_source_stays(self, start):
        plain, images = matrix.load(VARIANT), matrix.images()
        tuned = tuners.attach(matrix.load(VARIANT), LoRAOptions(start=start))
        expected = plain.encode(images).tokens
        torch.testing.assert_close(tuned.encode(images).tokens, expected, rtol=0, atol=1e-5)
        assert tuned.source_hash() == plain.source_hash()
        matrix.perturb(tuned)
        moved = tuned.encode(images).tokens
        assert not torch.allclose(moved, expected, atol=1e-3)
        with tuned.disabled():
            assert torch.equal(tuned.encode(images).tokens, expected)
        assert torch.equal(tuned.encode(images).tokens, moved)
        torch.testing.assert_close(tuned.merged().encode(images).tokens, moved, rtol=0, atol=2e-5)
        assert tuned.source_hash() == plain.source_hash()

    @pytest.mark.parametrize("start", ["pissa", "olora", "eva"])
    def test_peft_and_medtpp_read_the_file(self, start, tmp_path):
        images = matrix.images(channels=3)
        tuned = tuners.attach(matrix.load(VARIANT), LoRAOptions(start=start), images=images)
        matrix.perturb(tuned)
        card = matrix.card_of("lora", VARIANT)
        card = card.model_copy(update={"tuner": LoRAOptions(start=start).model_dump(mode="json")})
        save_adapter(tmp_path, tuned, card)
        expected = tuned.encode(images).tokens
        loaded = load_adapter(tmp_path).backbone
        torch.testing.assert_close(loaded.encode(images).tokens, expected, rtol=0, atol=1e-5)
        assert loaded.source_hash() == matrix.load(VARIANT).source_hash()
        network = timm.create_model(VARIANT)
        network.load_state_dict(matrix.load(VARIANT).encoder.state_dict(), strict=False)
        theirs = peft.PeftModel.from_pretrained(network, tmp_path).eval()
        features = theirs.base_model.model.forward_features((images - 0.5) / 0.25)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)

    def test_the_start_is_the_files_whatever_the_machine_would_compute(self):
        """Singular vectors have no sign: another library may give the others."""
        images = matrix.images()
        tuned = tuners.attach(matrix.load(VARIANT), LoRAOptions(start="pissa"))
        with torch.no_grad():
            for path, (a, b) in list(tuned._first.items()):
                tuned._begin(path, -a, -b)
            for parameter in tuned.targets.values():
                parameter.neg_()
        matrix.perturb(tuned)
        other = tuners.attach(matrix.load(VARIANT), LoRAOptions(start="pissa"))
        other.load_adapter_state(tuned.adapter_state())
        torch.testing.assert_close(other.encode(images).tokens, tuned.encode(images).tokens, rtol=0, atol=1e-5)
        for name, parameter in tuned.targets.items():
            assert torch.equal(other.targets[name], parameter)

    def test_pissa_is_the_best_of_its_rank(self):
        weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
        a, b = principal(weight, 3, 2.0)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(2 * b @ a, (left[:, :3] * values[:3]) @ right[:3])
        a, b = orthonormal(weight, 3, 2.0)
        torch.testing.assert_close(b.T @ b, torch.eye(3))

    def test_eva_sees_the_main_directions(self):
        """As the singular vectors of all that a layer gets, and no change of the function."""
        images, inputs = matrix.images(), []
        tuned = tuners.attach(matrix.load(VARIANT), LoRAOptions(start="eva"), images=images)
        layer = tuned.encoder.blocks[1].mlp.fc1
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
        expected = matrix.load(VARIANT).encode(images).tokens
        assert torch.equal(tuned.encode(images).tokens, expected)
        main = torch.linalg.svd(torch.cat(inputs), full_matrices=False).Vh[:8]
        agreement = (layer.lora_A["default"].weight @ main.T).abs().diagonal()
        torch.testing.assert_close(agreement, torch.ones(8), rtol=0, atol=1e-3)

    def test_lora_ga_starts_along_the_gradient(self):
        """The first step then changes each weight in the directions that full fine-tuning would change it in most."""
        images, plain = matrix.images(), matrix.load(VARIANT)
        tuned = tuners.attach(matrix.load(VARIANT), LoRAOptions(start="lora_ga"))
        expected = plain.encode(images).tokens

        def losses(backbone):
            for part in images.split(4):
                yield backbone.encode(part).patches[..., 0].square().mean()

        plain.encoder.requires_grad_(True)
        weight = plain.encoder.blocks[1].mlp.fc1.weight
        gradient = sum(torch.autograd.grad(loss, weight)[0] for loss in losses(plain))
        tuned.start_from(losses(tuned), lambda values: values)
        layer = tuned.encoder.blocks[1].mlp.fc1
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        scale = len(gradient) ** 0.25 / 4
        torch.testing.assert_close((a @ right[:8].T / scale).abs().diagonal(), torch.ones(8), rtol=0, atol=1e-3)
        torch.testing.assert_close((left[:, 8:16].T @ b / scale).abs().diagonal(), torch.ones(8), rtol=0, atol=1e-3)
        torch.testing.assert_close(tuned.encode(images).tokens, expected, rtol=0, atol=1e-5)
        assert tuned.source_hash() == matrix.load(VARIANT).source_hash()
        assert {name for name, p in tuned.named_parameters() if p.requires_grad} == tuned.targets.keys()
        before = {name: value.clone() for name, value in tuned.targets.items()}
        tuned.start_from(losses(tuned), lambda values: values)  # once: what is trained is not started again
        assert all(torch.equal(value, before[name]) for name, value in tuned.targets.items())

    def test_eva_without_images_is_refused(self):
        with pytest.raises(ConfigError, match="made from images"):
            tuners.attach(matrix.load(VARIANT), LoRAOptions(start="eva"))

    def test_a_start_stacked_on_tpp_is_refused(self, phantom_folder):
        with pytest.raises(ConfigError, match=r"tuner\.start=pissa and TPP exclude each other"):
            prepare(load_experiment(phantom_folder, ["tuner.start=pissa", *SETTINGS]))

    def test_fine_tuning_from_each(self, phantom_folder, tmp_path):
        for start in ("pissa", "olora", "eva", "lora_ga"):
            settings = [f"tuner.start={start}", "tpp.enabled=false", *SETTINGS, "finetune.steps=4"]
            prepared = prepare(load_experiment(phantom_folder, settings))
            adapter = finetune_stage(prepared, tmp_path / start, quiet)
            assert load_adapter(adapter).card.tuner["start"] == start


def test_the_matrix_shows_what_is_refused():
    said = CliRunner().invoke(app, ["list", "matrix"]).output
    row = next(line.split() for line in said.splitlines() if line.startswith("convpass"))
    marks = dict(zip(PRETEXTS.names(), row[1:], strict=True))
    assert {name for name, mark in marks.items() if mark == "-"} == {"mae", "features"}
    assert "convpass needs all patches" in said
    assert max(map(len, said.splitlines())) <= 80
