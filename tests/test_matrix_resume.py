"""The contract's word on resuming: whatever the methods, a run that was killed ends in the same bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric

import matrix
from medtpp.config import TASKS, AugmentOptions
from medtpp.data.augment import Augmenter
from medtpp.data.batches import BatchStream
from medtpp.seeds import Seeds
from medtpp.training.finetune import SupervisedModule
from medtpp.training.loop import Group, Hooks, Schedule, fit
from medtpp.training.stage import PretextModule, tuner_groups
from medtpp.training.tpp import head_groups


class Killed(BaseException):
    """What no handler catches."""


def train(module, groups, hooks, images, targets=None, folder=None, kill_at=None):
    """Two steps of the loop, with a resume file after the first."""

    def after_step(step, total):
        if hooks.after_step:
            hooks.after_step(step, total)
        if step == kill_at:
            raise Killed

    rows = np.arange(8)
    levels = (255 * images).round().byte().numpy()
    stream = BatchStream(levels, rows, rows, targets, 4, Seeds(0))
    fabric = Fabric(accelerator="cpu", devices=1)
    fit(
        fabric, module, groups, stream, Schedule(2, checkpoint_every=1), folder=folder,
        hooks=replace(hooks, after_step=after_step),
    )  # fmt: skip
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_resumes(run, folder):
    """That a run ends in the same bits when it is killed after a resume file; `run` takes `train`'s options."""
    whole = run()
    with pytest.raises(Killed):
        run(folder=folder, kill_at=2)
    resumed = run(folder=folder)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.parametrize(("pretext", "tuner", "variant"), matrix.singly(matrix.PRETRAINED))
def test_a_killed_tpp_ends_in_the_same_bits(pretext, tuner, variant, tmp_path):
    def run(**options):
        tuned = matrix.attach(tuner, variant)
        module = PretextModule(tuned, matrix.make_pretext(pretext, tuned))
        groups = [*tuner_groups(tuned, 1e-3, 0.0), *head_groups(module.pretext, None, 1e-3)]
        return train(module, groups, module.hooks(), matrix.images(variant=variant), **options)

    assert_resumes(run, tmp_path)


@pytest.mark.parametrize(("tuner", "variant"), matrix.singly(matrix.TUNED))
def test_a_killed_fine_tuning_ends_in_the_same_bits(tuner, variant, tmp_path):
    def run(**options):
        tuned = matrix.attach(tuner, variant)
        method = TASKS.get("classification")
        task = method(method.Options(), tuned.spec, ("a", "b"), False, Seeds(0))
        module = SupervisedModule(tuned, task, Augmenter(AugmentOptions(), "unknown"))
        groups = [*tuner_groups(tuned, 1e-3, 0.0), Group("head", dict(task.named_parameters()), 1e-3)]
        targets = torch.arange(8) % 2
        hooks = Hooks(tuned.after_step, tuned.after_step_buffers)
        return train(module, groups, hooks, matrix.images(), targets, **options)

    assert_resumes(run, tmp_path)
