"""The training loop: the same bits after a kill, the same gradient in parts, errors that tell."""

import csv
import math
import os
import pickle

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import nn

from medtpp.data.batches import BatchStream
from medtpp.errors import MedtppError, WeightsError
from medtpp.seeds import Seeds
from medtpp.training.loop import Group, Hooks, Schedule, fit
from medtpp.training.resume import LOG, RESUME, finish

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
LABELS = torch.arange(20) % 3


class Net(nn.Module):
    """A small classifier with something random per case, like masks, in its input."""

    def __init__(self, limit=None):
        super().__init__()
        with Seeds(0).scope("net"):
            self.hidden, self.out = nn.Linear(16, 8), nn.Linear(8, 3)
        self.limit = limit
        self.sizes = []

    def forward(self, images, targets, visits):
        self.sizes.append(len(images))
        if self.limit and len(images) > self.limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        noise = (visits[:, None] % 7).float() / 70
        logits = self.out(torch.tanh(self.hidden(images.float().flatten(1) / 255 + noise)))
        return nn.functional.cross_entropy(logits, targets), {"confidence": logits.softmax(1).amax(1).mean()}

    def groups(self):
        return [
            Group("tuner", dict(self.hidden.named_parameters(prefix="hidden")), 1e-2),
            Group("head", dict(self.out.named_parameters(prefix="out")), 3e-2, weight_decay=0.1),
        ]


class LowRank(Net):
    """Like LoRA: the second factor starts at zero, so that the first has no gradient at first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(2, 16)), nn.Parameter(torch.zeros(3, 2))

    def forward(self, images, targets, visits):
        logits = images.float().flatten(1) / 255 @ self.a.T @ self.b.T
        return nn.functional.cross_entropy(logits.float(), targets), {}

    def groups(self):
        return [Group("tuner", {"a": self.a, "b": self.b}, 1e-2)]


class Killed(BaseException):
    """What no handler catches."""


def stream(batch_size=6, images=IMAGES):
    keys = np.arange(20)
    return BatchStream(images, np.arange(20), keys, LABELS, batch_size, Seeds(0))


def train(net=None, schedule=None, data=None, after_step=None, **options):
    net = Net() if net is None else net
    fabric = Fabric(accelerator="cpu", devices=1)
    options.setdefault("hooks", Hooks(after_step))
    record = fit(fabric, net, net.groups(), data or stream(), schedule or Schedule(20), **options)
    return net, record


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def figures(record):
    """The rows without what the clock decides."""
    clock = ("images_per_second", "waiting")
    return [{key: value for key, value in row.items() if key not in clock} for row in record.rows]


def scores():
    """A validation that is best in the middle."""
    given = {3: 0.1, 6: 0.5, 9: 0.9, 12: 0.7, 15: 0.2, 18: 0.3, 20: 0.4}
    calls = iter(given.values())
    return lambda: next(calls)


def test_the_loss_falls_and_two_runs_are_the_same_bits():
    (one, first), (other, second) = train(schedule=Schedule(60)), train(schedule=Schedule(60))
    assert_same(state(one), state(other))
    assert figures(first) == figures(second)
    assert first.rows[-1]["loss"] < 0.9 * first.rows[0]["loss"]


@pytest.mark.parametrize("kill_at", [1, 4, 7, 8, 13, 20])
def test_a_killed_run_ends_in_the_same_bits(tmp_path, kill_at):
    schedule = Schedule(20, checkpoint_every=4)
    whole, record = train(schedule=schedule, folder=tmp_path / "whole")

    def kill(step, total):
        assert total == 20
        if step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        train(schedule=schedule, folder=tmp_path / "killed", after_step=kill, spent=1000.0)
    done = []
    again, resumed = train(
        schedule=schedule, folder=tmp_path / "killed", after_step=lambda step, total: done.append(step)
    )
    assert done == list(range((kill_at - 1) // 4 * 4 + 1, 21))
    assert_same(state(again), state(whole))
    assert figures(resumed) == figures(record)
    assert (resumed.seconds > 1000) == (kill_at > 4)  # what a warm-up took counts, kept with the first resume file


def test_a_run_killed_in_validation_keeps_its_best(tmp_path):
    schedule = Schedule(20, checkpoint_every=2, validate_every=3)
    given = {3: 0.1, 6: 0.5, 9: 0.9, 12: 0.7, 15: 0.2, 18: 0.3, 20: 0.4}

    def validation(kill=None):
        steps = []

        def validate():
            if steps[-1] == kill:
                raise Killed
            return given[steps[-1]]

        return {"validate": validate, "after_step": lambda step, total: steps.append(step)}

    whole, record = train(schedule=schedule, folder=tmp_path / "whole", **validation())
    assert record.best == (0.9, 9)
    for kill in (9, 12, 20):
        with pytest.raises(Killed):
            train(schedule=schedule, folder=tmp_path / str(kill), **validation(kill))
        again, resumed = train(schedule=schedule, folder=tmp_path / str(kill), **validation())
        assert resumed.best == (0.9, 9)
        assert_same(state(again), state(whole))
        assert figures(resumed) == figures(record)
    short, _ = train(schedule=Schedule(20))
    assert not torch.equal(short.out.weight, whole.out.weight)


def test_the_best_parameters_are_those_of_their_step():
    at = {}
    net = Net()
    _, record = train(
        net,
        Schedule(20, validate_every=3),
        validate=scores(),
        after_step=lambda step, total: at.update({step: state(net)}),
    )
    assert record.best == (0.9, 9)
    assert_same(state(net), at[9])
    assert [row["step"] for row in record.rows if "validation" in row] == [3, 6, 9, 12, 15, 18, 20]


@pytest.mark.parametrize("accumulate", [2, 3, 4, 6, 50])
def test_micro_batches_have_the_gradient_of_the_batch(accumulate):
    whole, one = train(schedule=Schedule(8))
    net, record = train(schedule=Schedule(8, accumulate=accumulate))
    parts = min(accumulate, 6)
    assert len(net.sizes) == 8 * parts
    assert sum(net.sizes[:parts]) == 6
    for name, value in state(net).items():
        torch.testing.assert_close(value, whole.state_dict()[name], atol=1e-5, rtol=1e-5)
    for row, expected in zip(figures(record), figures(one), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_running_out_of_memory_is_recovered_with_the_same_result():
    whole, one = train(schedule=Schedule(8))
    net, record = train(Net(limit=2), Schedule(8))
    assert net.sizes[:3] == [6, 3, 2]  # whole, in two parts, in four
    assert max(net.sizes[3:]) == 2  # it is remembered
    assert len(record.rows) == 8
    for name, value in state(net).items():
        torch.testing.assert_close(value, whole.state_dict()[name], atol=1e-5, rtol=1e-5)
    assert record.rows[-1]["loss"] == pytest.approx(one.rows[-1]["loss"], rel=1e-4)


def test_what_was_done_of_a_step_before_memory_ran_out_does_not_count_twice():
    class LaterFull(Net):
        def forward(self, images, targets, visits):
            loss = super().forward(images, targets, visits)
            if len(self.sizes) == 2:  # the second part of the first step, when the first has left its gradient
                raise torch.OutOfMemoryError("no memory")
            return loss

    whole, _ = train(schedule=Schedule(4))
    net, _ = train(LaterFull(), Schedule(4, accumulate=2))
    assert net.sizes[:6] == [3, 3, 2, 1, 1, 2]
    for name, value in state(net).items():
        torch.testing.assert_close(value, whole.state_dict()[name], atol=1e-5, rtol=1e-5)


def test_memory_that_does_not_suffice_for_one_image_is_an_error():
    net = Net(limit=0.5)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(net)
    assert net.sizes[-1] == 1


def test_other_runtime_errors_are_not_taken_for_memory():
    class Broken(Net):
        def forward(self, images, targets, visits):
            self.sizes.append(len(images))
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    net = Broken()
    with pytest.raises(RuntimeError, match="mat1"):
        train(net)
    assert net.sizes == [6]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(bad):
    class Exploding(Net):
        def forward(self, images, targets, visits):
            loss, logs = super().forward(images, targets, visits)
            return (loss * bad if len(self.sizes) > 5 else loss), logs

    with pytest.raises(MedtppError, match=r"loss is (nan|inf) at step 6.*learning rate"):
        train(Exploding())


def test_a_parameter_without_gradient_is_named():
    class Deaf(Net):
        def __init__(self):
            super().__init__()
            self.prompts, self.spare = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

        def groups(self):
            return [*super().groups(), Group("deaf", {"prompts": self.prompts, "spare": self.spare}, 1e-2)]

    for steps in (2, 20):
        with pytest.raises(MedtppError, match="get no gradient") as raised:
            train(Deaf(), Schedule(steps))
        assert raised.value.problems == ["prompts", "spare"]


def test_a_gradient_that_comes_at_the_second_step_is_enough():
    train(LowRank(), Schedule(3))


def test_steps_that_a_gradient_scaler_leaves_out_do_not_count():
    """In 16 bits the first steps overflow until the scale has come down; LoRA's A has no gradient before."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    net = LowRank()
    fit(fabric, net, net.groups(), stream(), Schedule(12))
    assert scaler.get_scale() < 2.0**18
    assert net.b.abs().sum() > 0


def test_clipping_bounds_the_gradient():
    _, record = train(schedule=Schedule(4, clip=1e-3))
    _, free = train(schedule=Schedule(4, clip=0))
    assert all(row["gradient_norm"] > 1e-3 for row in record.rows)  # as it was before
    assert all("gradient_norm" not in row for row in free.rows)
    moved, unclipped = train(schedule=Schedule(4, clip=1e-9))[0], train(schedule=Schedule(4, clip=0))[0]
    step = (moved.hidden.weight - Net().hidden.weight).abs().max()
    assert step < 0.5 * (unclipped.hidden.weight - Net().hidden.weight).abs().max()


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (2, 0.5), (10, 0.0), (100, 0.1), (1000, 0.05)])
def test_the_schedule_rises_to_its_peak_and_falls_to_almost_zero(steps, warmup):
    schedule = Schedule(steps, warmup)
    factors = [schedule.factor(step) for step in range(steps)]
    peak = factors.index(max(factors))
    assert max(factors) == 1.0
    assert min(factors) > 0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert peak == max(1, round(steps * warmup)) - 1
    if steps >= 100:
        assert factors[-1] < 1e-3
        assert schedule.factor(steps // 2) == pytest.approx(0.5, abs=0.1)


def test_the_log_has_a_column_for_each_value(tmp_path):
    _, record = train(schedule=Schedule(20, validate_every=10), folder=tmp_path, validate=lambda: 0.25)
    with (tmp_path / LOG).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {
        *("step", "loss", "lr_tuner", "lr_head", "confidence", "gradient_norm", "validation"),
        *("images_per_second", "waiting"),
    }
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert [row["validation"] for row in rows if row["validation"]] == ["0.25", "0.25"]
    assert float(rows[1]["lr_tuner"]) == pytest.approx(1e-2)
    assert float(rows[1]["lr_head"]) == pytest.approx(3e-2)
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in record.rows]
    assert 0 <= record.waiting < 1
    assert record.images_per_second > 0


def test_long_runs_log_two_hundred_rows():
    _, record = train(schedule=Schedule(450))
    assert 200 <= len(record.rows) <= 230
    assert record.rows[-1]["step"] == 450


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(schedule=Schedule(4, checkpoint_every=1))
    assert list(tmp_path.iterdir()) == []


class Malicious:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def partial_run(folder):
    def kill(step, total):
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(schedule=Schedule(20, checkpoint_every=2), folder=folder, after_step=kill)
    return folder / RESUME


def test_the_resume_file_is_tensors_and_plain_values(tmp_path):
    saved = torch.load(partial_run(tmp_path), weights_only=True)
    assert saved["step"] == 4
    assert saved["parameters"].keys() == dict(Net().named_parameters()).keys()
    finish(tmp_path)
    assert not (tmp_path / RESUME).exists()
    finish(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "kind", ["cut short", "empty", "text", "a list", "pickle", "torch pickle", "other keys", "parts"]
)
def test_a_broken_resume_file_is_an_error(tmp_path, kind):
    path = partial_run(tmp_path)
    good = path.read_bytes()
    trap = tmp_path / "trap"
    if kind == "cut short":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint, but somewhat longer than a few bytes")
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious(trap)))
    elif kind == "torch pickle":
        torch.save({**torch.load(path, weights_only=True), "step": Malicious(trap)}, path)
    elif kind == "other keys":
        saved = torch.load(path, weights_only=True)
        saved["parameters"]["another"] = saved["parameters"].pop("out.bias")
        torch.save(saved, path)
    else:
        saved = torch.load(path, weights_only=True)
        del saved["optimizer"]
        torch.save(saved, path)
    net = Net()
    with pytest.raises(WeightsError, match=r"resume\.pt"):
        train(net, Schedule(20, checkpoint_every=2), folder=tmp_path)
    assert not trap.exists()
    assert_same(state(net), state(Net()))


def test_a_resume_file_of_another_shape_is_an_error(tmp_path):
    path = partial_run(tmp_path)

    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = nn.Linear(16, 9), nn.Linear(9, 3)

    with pytest.raises(WeightsError, match="another experiment"):
        train(Wider(), Schedule(20), folder=path.parent)
