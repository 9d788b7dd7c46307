"""What pretext tasks have of their own beside the contract of the matrix: views, teachers, queues, changes, sums."""

import pytest
import torch
from pydantic import ValidationError

import matrix
from medtpp import backbones, tuners
from medtpp.config import PRETEXTS, BackboneOptions, TPPOptions
from medtpp.errors import ConfigError
from medtpp.pretext._teacher import Teacher
from medtpp.pretext._views import two_views
from medtpp.pretext.dino import balanced
from medtpp.pretext.restoration import bend, paint, shuffle
from medtpp.seeds import Seeds
from medtpp.training.tpp import make_pretext, require_batches
from test_inflate import load as load_volumes
from test_inflate import volumes

VARIANT = "medtpp_test_class_token"


def make(name, backbone, **options):
    method = PRETEXTS.get(name)
    pretext = method(method.Options(**options), backbone.spec, Seeds(0))
    pretext.begin(backbone)
    return pretext


def test_views_are_two_and_each_case_has_its_own():
    images = matrix.images()
    one, other = two_views(images, matrix.draws())
    assert one.shape == other.shape == images.shape
    assert not torch.equal(one, other)
    again = two_views(images[2:4], matrix.draws()[2:4])
    torch.testing.assert_close(again[0], one[2:4])
    torch.testing.assert_close(again[1], other[2:4])


class TestTeacher:
    def test_it_starts_as_the_student_and_follows(self):
        tuned, head = matrix.attach("ssf", VARIANT), torch.nn.Linear(matrix.WIDTH, 3)
        teacher, images = Teacher(0.75), matrix.images()
        teacher.begin(tuned, head)
        start, pooled = tuned.encode(images).tokens, torch.ones(1, matrix.WIDTH)
        torch.testing.assert_close(teacher.encode(tuned, images).tokens, start)
        before = {name: parameter.detach().clone() for name, parameter in tuned.targets.items()}
        matrix.perturb(tuned)
        with torch.no_grad():
            head.weight.add_(1)
        torch.testing.assert_close(teacher.encode(tuned, images).tokens, start)  # whatever the student does
        projected = teacher.project(head, pooled)
        assert not torch.equal(projected, head(pooled))
        teacher.update(tuned, head, step=0, total=10)
        found = teacher._averages("backbone.")
        assert found.keys() == before.keys()
        for name, parameter in tuned.targets.items():
            torch.testing.assert_close(found[name], 0.75 * before[name] + 0.25 * parameter.detach())
        torch.testing.assert_close(teacher.project(head, pooled), projected + 0.25 * matrix.WIDTH)
        unmoved = {name: value.clone() for name, value in teacher._averages("").items()}
        teacher.update(tuned, head, step=10, total=10)  # at the end it keeps what it has
        for name, value in teacher._averages("").items():
            torch.testing.assert_close(value, unmoved[name])

    def test_it_costs_the_target_parameters_and_the_head(self):
        tuned = matrix.attach("lora", VARIANT)
        pretext = make("byol", tuned)
        trained = [*tuned.targets.values(), *pretext.projection.parameters()]
        assert sum(buffer.numel() for buffer in pretext.buffers()) == sum(p.numel() for p in trained)

    def test_no_gradient_goes_through_it(self):
        tuned, images = matrix.attach("lora", VARIANT), matrix.images()
        teacher, head = Teacher(0.9), torch.nn.Linear(matrix.WIDTH, 3)
        teacher.begin(tuned, head)
        assert not teacher.encode(tuned, images).tokens.requires_grad
        assert not teacher.project(head, tuned.encode(images).pooled("mean")).requires_grad


def test_a_head_is_saved_without_averages_and_loads_before_training():
    trained = make("moco_v3", matrix.attach("lora", VARIANT), queue=4)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    state = trained.head_state()
    assert state.keys() == {name for name, _ in trained.named_parameters()}
    method = PRETEXTS.get("moco_v3")
    new = method(method.Options(queue=8), matrix.load(VARIANT).spec, Seeds(1))
    assert new.load_head({"moco_v3": state})
    assert all(torch.equal(value, state[name]) for name, value in new.head_state().items())
    assert not new.load_head({"mae": state})
    assert not method(method.Options(width=8), matrix.load(VARIANT).spec, Seeds(1)).load_head({"moco_v3": state})


def test_the_queue_holds_the_last_keys():
    tuned = matrix.attach("lora", VARIANT)
    moco = make("moco_v3", tuned, queue=12, width=8)
    first, _ = moco.loss(tuned, matrix.images(), matrix.draws())
    first_keys = moco._keys.clone()
    moco.after_step(tuned, 1, 10)
    torch.testing.assert_close(moco.queue[:8], first_keys)
    assert int(moco.queued) == 8
    second, _ = moco.loss(tuned, matrix.images(), matrix.draws())
    assert second > first  # more to be told apart from
    moco.loss(tuned, matrix.images(), matrix.draws(epoch=1))
    moco.after_step(tuned, 2, 10)
    assert int(moco.queued) == 16
    torch.testing.assert_close(torch.cat([moco.queue[8:], moco.queue[:4]]), moco._keys)


def test_simclr_finds_partners_that_are_alike():
    tuned = matrix.attach("lora", VARIANT)
    simclr, images = make("simclr", tuned), matrix.images()
    before = simclr.loss(tuned, images, matrix.draws())[0]
    matrix.descend(
        lambda: simclr.loss(tuned, images, matrix.draws())[0], [*tuned.targets.values(), *simclr.parameters()], 20, 3e-3
    )
    after, logs = simclr.loss(tuned, images, matrix.draws())
    assert after < before
    assert logs["partners_found"] > 0.6


def test_balanced_classes_are_probabilities_that_use_all_classes():
    logits = torch.randn(64, 8, generator=Seeds(0).generator("logits")) * 0.1
    logits[:, 0] += 1  # one class would win everywhere
    found = balanced(logits, rounds=50)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(found.sum(dim=0), torch.full((8,), 8.0), rtol=0.05, atol=0)
    assert (found.argmax(dim=1) == logits[:, 1:].argmax(dim=1) + 1)[found.argmax(dim=1) > 0].float().mean() > 0.9


@pytest.mark.parametrize("spatial", [(32, 32), (48, 20), (8, 24, 32)])
class TestRestoration:
    def test_changes_keep_shape_and_range_and_differ_by_case(self, spatial):
        images = torch.rand(1, 1, *spatial, generator=Seeds(0).generator("image")).expand(8, 3, *spatial).contiguous()
        for change in (bend, shuffle, paint):
            changed = change(images, matrix.draws())
            assert changed.shape == images.shape
            assert changed.min() >= 0
            assert changed.max() <= 1
            assert all(not torch.equal(changed[0], other) for other in changed[1:])
            torch.testing.assert_close(change(images[3:5], matrix.draws()[3:5]), changed[3:5])

    def test_curves_are_monotone(self, spatial):
        images = torch.rand(8, 1, *spatial, generator=Seeds(0).generator("images"))
        order = images.flatten(1).argsort(dim=1)
        steps = bend(images, matrix.draws()).flatten(1).gather(1, order).diff(dim=1)
        for case in steps:
            assert (case >= -1e-6).all() or (case <= 1e-6).all()

    def test_shuffling_keeps_the_pixels_and_channels_together(self, spatial):
        images = torch.rand(8, 1, *spatial, generator=Seeds(0).generator("images"))
        pair = torch.cat([images, 1 - images], dim=1)
        moved = shuffle(pair, matrix.draws())
        torch.testing.assert_close(moved[:, 0], 1 - moved[:, 1])
        torch.testing.assert_close(moved.flatten(2).sort(dim=2).values, pair.flatten(2).sort(dim=2).values)
        changed = (moved != pair).any(dim=1).float().mean()
        assert 0.1 < changed < 0.5

    def test_painting_leaves_a_part(self, spatial):
        images = 2 + torch.rand(64, 1, *spatial, generator=Seeds(0).generator("images"))  # no grey is that bright
        draws = Seeds(2).draws(torch.zeros(64, dtype=torch.int64), torch.arange(64))
        left = (paint(images, draws) == images).flatten(1).float().mean(dim=1)
        assert ((left > 0) & (left < 1)).all()
        assert left.std() > 0.05


class TestSum:
    def test_it_is_the_weighted_sum_of_its_parts(self):
        tuned, images, draws = matrix.attach("lora", VARIANT), matrix.images(), matrix.draws()
        both = make("sum", tuned, parts={"mae": {"weight": 2, "mask_ratio": 0.5}, "simmim": {}})
        mae, simmim = make("mae", tuned, mask_ratio=0.5), make("simmim", tuned)
        total, logs = both.loss(tuned, images, draws)
        first, second = mae.loss(tuned, images, draws)[0], simmim.loss(tuned, images, draws)[0]
        torch.testing.assert_close(total, 2 * first + second)
        torch.testing.assert_close(logs["loss_simmim"], second.detach())
        assert {"mae masked", "mae restored"} <= both.preview(tuned, images, draws).keys()

    def test_it_needs_what_its_parts_need(self):
        tuned = matrix.attach("lora", VARIANT)
        both = make("sum", tuned, parts={"mae": {}, "simclr": {}})
        assert both.needs == {"drops_tokens"}
        assert both.couples_images
        assert both.least_batch == 32
        assert not make("sum", tuned, parts={"byol": {}}).couples_images

    def test_the_trained_heads_of_parts_are_found(self):
        backbone = backbones.load("medtpp_vit_tiny", image_size=64)
        options = PRETEXTS.get("sum").Options
        assert make_pretext(options(parts={"mae": {}}), backbone, Seeds(0))[1]
        assert not make_pretext(options(parts={"mae": {}, "byol": {}}), backbone, Seeds(0))[1]

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ({}, "at least 1 item"),
            ({"sum": {}}, "cannot be a part"),
            ({"maw": {}}, "no pretext task 'maw'"),
            ({"mae": {"weight": 0}}, "above 0"),
            ({"mae": {"mask": 1}}, "mask"),
        ],
    )
    def test_mistakes_are_told(self, parts, message):
        with pytest.raises(ValidationError, match=message):
            PRETEXTS.get("sum").Options(parts=parts)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("simclr", {"batch_size": 31}, "at least 32"),
        ("simclr", {"batch_size": 64, "accumulate": 2}, "compares the images"),
        ("moco_v3", {"batch_size": 4, "accumulate": 2}, "compares the images"),
        ("moco_v3", {"batch_size": 4}, None),
        ("byol", {"batch_size": 8, "accumulate": 4}, None),
    ],
)
def test_batches_that_a_task_cannot_do_with(name, options, message):
    pretext = make(name, matrix.attach("lora", VARIANT))
    if message is None:
        require_batches(pretext, TPPOptions(**options))
    else:
        with pytest.raises(ConfigError, match=message):
            require_batches(pretext, TPPOptions(**options))


def test_feature_targets_are_those_of_the_frozen_backbone():
    """Perturbed target parameters change what is predicted, and nothing of what is to be predicted."""
    tuned = matrix.attach("lora", VARIANT)
    pretext, images = make("features", tuned), matrix.images()
    seen = []
    original = torch.nn.functional.mse_loss

    def mse_loss(predicted, target, **options):
        seen.append(target.detach().clone())
        return original(predicted, target, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "mse_loss", mse_loss)
        before, _ = pretext.loss(tuned, images, matrix.draws())
        matrix.perturb(tuned)
        after, _ = pretext.loss(tuned, images, matrix.draws())
    assert torch.equal(seen[0], seen[1])
    assert before != after


@pytest.mark.parametrize("name", PRETEXTS.names())
def test_volumes(name):
    tuned = tuners.attach(load_volumes("medtpp_test_registers"), "lora")
    head, images = make(name, tuned), volumes()
    draws = Seeds(2).draws(torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images)))
    parameters = [*tuned.targets.values(), *tuned.embed.values(), *head.parameters()]
    losses = matrix.descend(lambda: head.loss(tuned, images, draws)[0], parameters, 8, 3e-3)
    assert losses[-1] < 0.98 * losses[0]
    for view in head.preview(tuned, images, draws).values():
        assert view.shape[2:] == images.shape[2:]


@pytest.mark.parametrize("name", ["byol", "moco_v3"])
def test_a_killed_run_ends_in_the_same_bits(name, phantom_folder, tmp_path):
    """Averages and queues are taken up with the parameters."""
    from medtpp.workflow.experiment import load_experiment
    from medtpp.workflow.prepare import prepare
    from medtpp.workflow.run import tpp_stage

    settings = [
        f"pretext.name={name}",
        "data.image_size=32",
        "tpp.steps=6",
        "tpp.batch_size=8",
        "tpp.head_warmup=2",
        "tpp.checkpoint_every=2",
        "logging.tensorboard=false",
    ]
    prepared = prepare(load_experiment(phantom_folder, settings))
    whole = tpp_stage(prepared, tmp_path / "whole", lambda _: None)

    def killed(self, backbone, step, total):
        if (step, total) == (5, 6):
            raise KeyboardInterrupt
        original(self, backbone, step, total)

    kind = PRETEXTS.get(name)
    original = kind.after_step
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kind, "after_step", killed)
        with pytest.raises(KeyboardInterrupt):
            tpp_stage(prepared, tmp_path / "killed", lambda _: None)
    again = tpp_stage(prepared, tmp_path / "killed", lambda _: None)
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_a_batch_without_parts_runs_out_of_memory_with_advice():
    from medtpp.errors import MedtppError
    from medtpp.training.loop import Hooks
    from test_loop import Net, train

    with pytest.raises(MedtppError, match=r"Lower tpp.batch_size \(now 6\)"):
        train(Net(limit=2), hooks=Hooks(divisible=False))


def test_backbone_options_of_the_embedded_backbone_in_3d_have_a_trained_head_nowhere():
    """Its MAE head predicts patches of images."""
    options = BackboneOptions(name="medtpp_vit_tiny", dims=3, patch_size=(4, 8, 8))
    backbone = backbones.load(options, image_size=(8, 32, 32))
    assert not make_pretext(PRETEXTS.get("mae").Options(), backbone, Seeds(0))[1]
