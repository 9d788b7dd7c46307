"""The contract that every tuner keeps with every kind of backbone and every pretext task."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

import matrix
from medtpp import tuners
from medtpp.adapter import load_adapter, save_adapter
from medtpp.config import TASKS, TUNERS
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.training.thin import exact_thin_convolutions
from medtpp.training.tpp import require_pair

SAVED_BESIDE = ("vera_A", "vera_B", "randlora_A", "randlora_B", "rows")  # drawn at random, not trained


@pytest.fixture(scope="module")
def images():
    return matrix.images()


def tokens(backbone, images, **options):
    with torch.no_grad():
        return backbone.encode(images, **options).tokens


def snapshot(module):
    return {name: value.detach().clone() for name, value in module.state_dict(keep_vars=True).items()}


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def targets(tuned):
    """What TPP trains: the tuner's own and, of an inflated network, its new embedding."""
    return {**tuned.targets, **tuned.embed}


def moved(tuner, variant):
    """A tuned backbone whose targets are no longer where they started."""
    tuned = matrix.attach(tuner, variant)
    matrix.perturb(tuned)
    return tuned


@pytest.mark.parametrize(("tuner", "variant"), matrix.params(matrix.TUNED))
class TestTuner:
    def test_exactly_the_targets_require_gradients(self, tuner, variant):
        tuned = matrix.attach(tuner, variant)
        assert {name for name, p in tuned.named_parameters() if p.requires_grad} == tuned.targets.keys()
        assert all(tuned.get_parameter(name) is parameter for name, parameter in tuned.targets.items())
        assert bool(tuned.targets) == TUNERS.get(tuner).has_targets

    def test_attaching_leaves_the_source_as_it_was(self, tuner, variant):
        plain = matrix.load(variant)
        before = {name: value.clone() for name, value in plain.encoder.state_dict().items()}
        tuned = tuners.attach(plain, tuner)
        source = tuned.source_state()
        assert list(source) == list(before)
        assert all(torch.equal(source[name], before[name]) for name in before)

    def test_the_start_depends_on_the_seed_alone(self, tuner, variant):
        one, other = matrix.attach(tuner, variant, seed=5), matrix.attach(tuner, variant, seed=5)
        torch.manual_seed(torch.initial_seed() + 1)
        third = matrix.attach(tuner, variant, seed=5)
        for name, parameter in one.targets.items():
            assert torch.equal(parameter, other.targets[name])
            assert torch.equal(parameter, third.targets[name])

    def test_disabled_is_the_plain_backbone(self, tuner, variant, images):
        plain, tuned = matrix.load(variant), moved(tuner, variant)
        active = tokens(tuned, images)
        assert torch.equal(active, tokens(plain, images)) == (not tuned.targets)
        keep = torch.rand(len(images), matrix.PATCHES).argsort(dim=1)[:, :5]
        drops = "drops_tokens" in tuned.spec.capabilities
        if TUNERS.get(tuner).needs_grid or not drops:
            with pytest.raises(ConfigError, match=r"needs all patches|cannot drop patches"):
                tuned.encode(images, keep=keep)
        with tuned.disabled():
            assert torch.equal(tokens(tuned, images), tokens(plain, images))
            if drops:
                assert torch.equal(tokens(tuned, images, keep=keep), tokens(plain, images, keep=keep))
        assert torch.equal(tokens(tuned, images), active)
        with pytest.raises(KeyboardInterrupt), tuned.disabled():
            raise KeyboardInterrupt
        assert torch.equal(tokens(tuned, images), active)
        assert {name for name, p in tuned.named_parameters() if p.requires_grad} == tuned.targets.keys()

    def test_merging_is_exact(self, tuner, variant, images):
        tuned = moved(tuner, variant)
        if not TUNERS.get(tuner).merges:
            with pytest.raises(ConfigError, match="cannot be merged"):
                tuned.merged()
            return
        before, hash_before = tokens(tuned, images), tuned.source_hash()
        merged = tuned.merged()
        after = tokens(merged, images)
        # Tokens come out of a norm, so that their scale is about one: 1e-5 of the largest.
        assert (after - before).abs().max() <= 1e-5 * before.abs().max()
        assert not isinstance(merged, tuners.TunedBackbone)
        assert not any(parameter.requires_grad for parameter in merged.parameters())
        assert merged.source_state().keys() == matrix.load(variant).source_state().keys()
        assert torch.equal(tokens(tuned, images), before)
        assert tuned.source_hash() == hash_before

    def test_one_tuner_to_a_backbone(self, tuner, variant):
        """An adapter folder holds one tuner: a second one would be lost without a word."""
        plain = matrix.load(variant)
        tuned = tuners.attach(plain, tuner)
        for taken in (plain, tuned):
            with pytest.raises(ConfigError, match="has a tuner already"):
                tuners.attach(taken, tuner)

    def test_a_merged_backbone_has_no_name_to_load_it_by(self, tuner, variant):
        if not TUNERS.get(tuner).merges:
            return
        merged = matrix.attach(tuner, variant).merged()
        assert (merged.options, merged.spec.sha256) == (None, "")
        tuners.attach(merged, "ssf")

    def test_an_adapter_loads_to_the_same_bits(self, tuner, variant, images, tmp_path):
        tuned = moved(tuner, variant)
        save_adapter(tmp_path, tuned, matrix.card_of(tuner, variant))
        loaded = load_adapter(tmp_path)
        assert loaded.task is None
        assert torch.equal(tokens(loaded.backbone, images), tokens(tuned, images))
        assert loaded.backbone.source_hash() == matrix.load(variant).source_hash()
        assert {name for name, p in loaded.backbone.named_parameters() if p.requires_grad} == tuned.targets.keys()
        stored = load_file(tmp_path / "adapter_model.safetensors")
        learned = {name: value for name, value in stored.items() if not name.endswith(SAVED_BESIDE)}
        assert sum(value.numel() for value in learned.values()) == sum(p.numel() for p in tuned.targets.values())

    def test_a_copy_is_on_its_own(self, tuner, variant, images):
        tuned = moved(tuner, variant)
        before = tokens(tuned, images)
        twin = copy.deepcopy(tuned)
        assert torch.equal(tokens(twin, images), before)
        assert all(twin.get_parameter(name) is parameter for name, parameter in twin.targets.items())
        matrix.perturb(twin, seed=4)
        assert torch.equal(tokens(tuned, images), before)
        assert torch.equal(tokens(twin, images), before) == (not tuned.targets)
        with twin.disabled():
            assert torch.equal(tokens(tuned, images), before)
            assert torch.equal(tokens(twin, images), tokens(matrix.load(variant), images))

    def test_training_mode_leaves_the_encoder_in_evaluation_mode(self, tuner, variant, images):
        tuned = moved(tuner, variant)
        before = tokens(tuned, images)
        tuned.train()
        assert not any(module.training for module in tuned.encoder.modules())
        assert torch.equal(tokens(tuned, images), before)

    def test_the_order_of_the_patches_changes_nothing(self, tuner, variant, images):
        tuned = moved(tuner, variant)
        if TUNERS.get(tuner).needs_grid or "drops_tokens" not in tuned.spec.capabilities:
            return  # neighbours are part of what it computes
        whole = tuned.encode(images)
        order = torch.rand(len(images), matrix.PATCHES).argsort(dim=1)
        shuffled = tuned.encode(images, keep=order)
        back = shuffled.patches.gather(1, order.argsort(dim=1)[..., None].expand_as(shuffled.patches))
        torch.testing.assert_close(back, whole.patches, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(
            shuffled.tokens[:, : whole.prefix], whole.tokens[:, : whole.prefix], atol=2e-5, rtol=1e-5
        )

    def test_what_comes_out_has_the_tokens_of_the_image_alone(self, tuner, variant, images):
        tuned = moved(tuner, variant)
        spec = tuned.spec
        features = tuned.encode(images, taps=range(spec.depth))
        assert features.tokens.shape == (len(images), spec.prefix + matrix.PATCHES, spec.width)
        for features_map, stage, stride in zip(features.maps, spec.stages, features.strides, strict=True):
            grid = [matrix.SIZE // side for side in stage.stride]
            assert features_map.shape == (len(images), stage.width, *grid)
            assert stride == stage.stride
        if not TUNERS.get(tuner).needs_grid and "drops_tokens" in spec.capabilities:
            assert tuned.encode(images, keep=torch.zeros(len(images), 3, dtype=torch.int64)).patches.shape[1] == 3

    def test_bfloat16_is_close(self, tuner, variant, images):
        tuned = moved(tuner, variant)
        exact = tokens(tuned, images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = tokens(tuned, images).float()
        assert rounded.isfinite().all()
        assert cosine_similarity(rounded, exact, dim=-1).min() > 0.995
        assert all(parameter.dtype == torch.float32 for parameter in tuned.parameters())

    def test_supervised_training_changes_targets_and_head_alone(self, tuner, variant, images):
        tuned, method = matrix.attach(tuner, variant), TASKS.get("classification")
        task = method(method.Options(), tuned.spec, ("a", "b"), False, Seeds(0))
        labels = torch.arange(len(images)) % 2
        source, before, head_before = tuned.source_hash(), snapshot(tuned), snapshot(task)
        groups = [*({"params": [p], "lr": TUNERS.get(tuner).learning_rate} for p in tuned.targets.values())]
        groups.append({"params": list(task.parameters()), "lr": 1e-2})
        losses = matrix.descend(lambda: task.loss(task(tuned.encode(images)), labels), groups, 12, 1e-3)
        assert losses[-1] < 0.95 * losses[0]
        assert changed(tuned, before) == tuned.targets.keys()
        assert changed(task, head_before) == head_before.keys()
        assert tuned.source_hash() == source


@pytest.mark.parametrize(("pretext", "tuner"), matrix.REFUSED)
def test_pairs_without_sense_are_refused_when_they_are_configured(pretext, tuner):
    with pytest.raises(ConfigError, match="exclude each other"):
        require_pair(tuner, matrix.make_pretext(pretext, matrix.load(matrix.VARIANTS[0])))


@pytest.mark.parametrize(("pretext", "tuner", "variant"), matrix.params(matrix.PRETRAINED))
class TestTPP:
    @pytest.fixture
    def parts(self, pretext, tuner, variant):
        tuned = matrix.attach(tuner, variant)
        return tuned, matrix.make_pretext(pretext, tuned)

    @pytest.fixture
    def images(self, variant):
        return matrix.images(variant=variant)

    def test_training_changes_targets_and_head_alone(self, parts, tuner, images):
        tuned, head = parts
        draws = matrix.draws()
        source, before, head_before = tuned.source_hash(), snapshot(tuned), snapshot(head)
        trained = [*targets(tuned).values(), *head.parameters()]
        losses = matrix.descend(lambda: head.loss(tuned, images, draws)[0], trained, 6, 1e-3)
        assert losses[-1] < 0.999 * losses[0]
        assert changed(tuned, before) == targets(tuned).keys()
        assert changed(head, head_before) == {name for name, _ in head.named_parameters()}
        assert tuned.source_hash() == source

    def test_the_targets_alone_lower_the_loss(self, parts, tuner, images):
        """What TPP is about: a head that knows its task, and the rest of the loss taken by the target parameters."""
        tuned, head = parts
        draws = matrix.draws()

        def loss():
            return head.loss(tuned, images, draws)[0]

        matrix.descend(loss, list(head.parameters()), 10, 1e-2)
        head.requires_grad_(False)

        def falls(rate):
            shares = {name: tuned.relative_rates.get(name, 1) for name in tuned.targets}
            groups = [{"params": [p], "lr": rate * shares[name]} for name, p in tuned.targets.items()]
            losses = matrix.descent(loss, groups, 10, rate)
            first = next(losses)
            return any(value < 0.999998 * first for value in losses)  # over ten times what float32 rounds

        rate = TUNERS.get(tuner).learning_rate
        assert falls(rate) or falls(rate / 10)  # its own may overshoot

    def test_every_target_gets_a_gradient_within_two_steps(self, parts, images):
        tuned, head = parts
        reached = set()
        optimizer = torch.optim.AdamW([*targets(tuned).values(), *head.parameters()], lr=1e-3)
        for step in range(2):
            optimizer.zero_grad()
            head.loss(tuned, images, matrix.draws(epoch=step))[0].backward()
            reached |= {name for name, p in targets(tuned).items() if p.grad is not None and p.grad.any()}
            optimizer.step()
        assert reached == targets(tuned).keys()
        assert all(p.grad is None for name, p in tuned.named_parameters() if name not in reached)

    def test_the_loss_in_bfloat16_is_close(self, parts, images):
        tuned, head = parts
        exact, _ = head.loss(tuned, images, matrix.draws())
        with torch.autocast("cpu", torch.bfloat16), exact_thin_convolutions(tuned):  # as the loop has it
            rounded, _ = head.loss(tuned, images, matrix.draws())
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.0)
        rounded.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in tuned.parameters())

    def test_a_batch_in_parts_has_the_loss_of_the_whole(self, parts, images):
        tuned, head = parts
        if head.couples_images:
            return  # and `fit` does not part its batches
        draws, images = matrix.draws(), images.clone()
        images[0, :, : images.shape[2] // 2] = 0  # half of one image is air, which MAE leaves out
        with torch.no_grad():
            whole, _ = head.loss(tuned, images, draws)
            parts = [head.loss(tuned, images[rows], draws[rows])[0] for rows in (slice(0, 4), slice(4, 8))]
        torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-5, atol=0.0)
        with torch.no_grad():
            again, _ = head.loss(tuned, images, draws)
            other, _ = head.loss(tuned, images, matrix.draws(epoch=1))
        assert torch.equal(again, whole)
        assert not torch.equal(other, whole)


def entering_a_block(tuned):
    """Token counts that the blocks see, noted at each call of their attention's projection."""
    seen = []
    paths = tuned.layout.paths("attention.projection")
    assert len(paths) == matrix.DEPTH
    for path in paths:
        tuned.encoder.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


@pytest.mark.parametrize("variant", [name for name in matrix.VARIANTS if "sequence" in matrix.capabilities(name)])
def test_mae_encodes_the_visible_patches_alone(variant):
    tuned = matrix.attach("vpt_deep", variant)
    mae = matrix.make_pretext("mae", tuned)
    seen = entering_a_block(tuned)
    ids_keep, ids_hidden = mae.split(matrix.draws())
    predicted = mae.decode(tuned, matrix.images(), ids_keep, ids_hidden)
    prompts = tuned.prompts.shape[1]
    assert (ids_keep.shape[1], ids_hidden.shape[1]) == (4, 12)
    assert seen == [tuned.spec.prefix + 4 + prompts] * matrix.DEPTH
    assert predicted.shape == (8, 12, matrix.PATCH**2 * 3)


@pytest.mark.parametrize("variant", ["medtpp_test_rotary", "medtpp_test_gated"])
def test_prompts_have_no_place_in_the_image(variant):
    tuned = matrix.attach("vpt_deep", variant)
    seen = []
    attention = tuned.encoder.get_submodule(tuned.layout.blocks[-1]).attn
    attention.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["rope"]), with_kwargs=True)
    tokens(tuned, matrix.images())
    tokens(tuned, matrix.images(), keep=torch.arange(3).expand(8, -1))
    prompts = tuned.prompts.shape[1]
    for rope, patches in zip(seen, (matrix.PATCHES, 3), strict=True):
        assert rope.shape[-2] == patches + prompts
        sine, cosine = rope[..., -prompts:, :].chunk(2, dim=-1)
        assert (sine == 0).all()
        assert (cosine == 1).all()


@pytest.mark.parametrize(
    ("tuner", "variant"),
    # timm's own EVA, BEiT and Swin v2 add fused biases past the layer that peft changes; medtpp mends that.
    matrix.params([pair for pair in matrix.TUNED if not pair[1].endswith(("_fused_bias", "_beit", "_swin_v2"))]),
)
def test_peft_reads_the_adapters_of_its_methods(tuner, variant, tmp_path):
    images, tuned = matrix.images(channels=3), moved(tuner, variant)
    if "peft_type" not in tuned.adapter_config():
        pytest.skip("peft does not have this method")
    save_adapter(tmp_path, tuned, matrix.card_of(tuner, variant))
    model = peft.PeftModel.from_pretrained(matrix.plain_network(variant), str(tmp_path)).eval()
    with torch.no_grad():
        features = matrix.plain_tokens(model.base_model.model, images)
    torch.testing.assert_close(features, tokens(tuned, images), atol=1e-5, rtol=1e-5)
