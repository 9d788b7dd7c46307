"""Heads of classifications that start as a logistic regression on features that stand still."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

import medtpp
import stages
from medtpp import backbones
from medtpp.adapter import load_adapter
from medtpp.config import FinetuneOptions
from medtpp.errors import ConfigError
from medtpp.files import MARKER, read_json
from medtpp.seeds import Seeds
from medtpp.tasks.classification import STRENGTH, Classification, ClassificationOptions
from medtpp.training.finetune import SupervisedModule, resolve_finetune, run_finetune
from medtpp.training.tpp import run_tpp

WIDTH = 24


def head(classes: int, **options) -> Classification:
    multilabel = options.pop("multilabel", False)
    names = tuple("abcdef"[:classes])
    spec = SimpleNamespace(width=WIDTH, pooling="mean")
    return Classification(ClassificationOptions(**options), spec, names, multilabel, Seeds(0))


def some(cases: int, classes: int):
    """Features as the head reads them, and labels that have to do with them."""
    generator = torch.Generator().manual_seed(cases)
    read = F.layer_norm(torch.randn(cases, WIDTH, generator=generator), (WIDTH,))
    noise = torch.randn(cases, classes, generator=generator)
    return read, (2 * read[:, :classes] + noise)


def expected(read, targets, strength, **options):
    """What scikit-learn says, with the penalty on the bias: a feature of one that is of unit length as the others."""
    inputs = np.hstack([read.double().numpy() / np.sqrt(WIDTH), np.ones((len(read), 1))])
    model = LogisticRegression(C=strength, fit_intercept=False, tol=1e-10, max_iter=10_000, **options)
    return model.fit(inputs, targets).predict_proba(inputs)


@pytest.mark.parametrize(("cases", "classes"), [(12, 3), (300, 3), (40, 5)])
def test_it_is_a_logistic_regression(cases, classes):
    task = head(classes)
    read, values = some(cases, classes)
    targets = values.argmax(dim=1)
    task.fit(read, targets)
    found = task.probabilities(task.linear(read)).detach().numpy()
    np.testing.assert_allclose(found, expected(read, targets.numpy(), STRENGTH), atol=1e-4)


def test_of_two_classes_each_has_half_the_weight():
    task = head(2)
    read, values = some(50, 2)
    targets = values.argmax(dim=1)
    task.fit(read, targets)
    found = task.probabilities(task.linear(read)).detach().numpy()
    # Softmax over two classes shares one weight vector between them: w/2 and -w/2 cost half of w.
    np.testing.assert_allclose(found, expected(read, targets.numpy(), 2 * STRENGTH), atol=1e-4)


def test_with_several_labels_there_is_one_regression_for_each():
    task = head(3, multilabel=True)
    read, values = some(60, 3)
    targets = (values > 0).float()
    task.fit(read, targets)
    found = task.probabilities(task.linear(read)).detach().numpy()
    for index in range(3):
        one = expected(read, targets[:, index].numpy(), STRENGTH)[:, 1]
        np.testing.assert_allclose(found[:, index], one, atol=1e-4)


def test_rare_classes_weigh_more_where_the_options_say_so():
    task = head(3, class_weights="balanced")
    read, values = some(90, 3)
    targets = (values - torch.tensor([0.0, 2.0, 4.0])).argmax(dim=1)
    assert len(torch.bincount(targets).unique()) == 3
    task.balance(targets)
    task.fit(read, targets)
    found = task.probabilities(task.linear(read)).detach().numpy()
    np.testing.assert_allclose(found, expected(read, targets.numpy(), STRENGTH, class_weight="balanced"), atol=1e-4)


def test_a_class_without_a_case_is_improbable_and_finite():
    task = head(4)
    read, values = some(20, 2)
    task.fit(read, values.argmax(dim=1))
    assert bool(task.linear.weight.isfinite().all())
    assert bool(task.linear.bias.isfinite().all())
    assert float(task.probabilities(task.linear(read))[:, 2:].detach().max()) < 0.05


def test_the_penalty_stays_in_the_loss(phantom_folder):
    inputs = stages.finetune_inputs(phantom_folder)
    backbone = backbones.load("test_vit", weights="random", image_size=stages.SIZE)
    task = Classification(ClassificationOptions(), backbone.spec, inputs.classes, False, Seeds(0))
    module = SupervisedModule(backbone, task, lambda images, draws: images)
    images, targets = torch.rand(8, 3, stages.SIZE, stages.SIZE), torch.arange(8) % len(inputs.classes)
    visits = torch.zeros(8, 2, dtype=torch.int64)
    plain = F.cross_entropy(task(backbone.encode(images)), targets)
    torch.testing.assert_close(module(images, targets, visits)[0], plain)
    task.fit(task.read(backbone.encode(images)), targets)
    weight, bias = task.linear.weight, task.linear.bias
    width = backbone.spec.width
    penalty = (width * weight.square().sum() + bias.square().sum()) / (2 * STRENGTH * 8)
    plain = F.cross_entropy(task(backbone.encode(images)), targets)
    assert float(penalty.detach()) > 1e-3
    torch.testing.assert_close(module(images, targets, visits)[0], plain + penalty)


@pytest.fixture(scope="module")
def tpp(phantom_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tpp")
    run_tpp(stages.tpp_inputs(phantom_folder), folder)
    return folder / "adapter"


RATES = {"learning_rate": 1e-12, "head_learning_rate": 1e-12}
STILL = {"finetune": {"steps": 2, "keep": "last", "head_start": "fitted", **RATES}}


def fitted_to(backbone, inputs) -> Classification:
    task = Classification(ClassificationOptions(), backbone.spec, inputs.classes, False, Seeds(0))
    with torch.no_grad():
        read = task.read(backbone.encode(inputs.train.images(limit=1000)))
    task.fit(read, task.targets(inputs.train.cases))
    return task


def made(inputs, folder):
    run_finetune(inputs, folder)
    return load_adapter(folder / "adapter")


def test_fine_tuning_begins_with_the_head_that_fits_each_start(phantom_folder, tpp, tmp_path):
    own, primed = stages.finetune_inputs(phantom_folder, **STILL), stages.finetune_inputs(phantom_folder, tpp, **STILL)
    plain = backbones.load("test_vit", weights="random", image_size=stages.SIZE)
    found = made(own, tmp_path / "own").task
    torch.testing.assert_close(found.linear.weight, fitted_to(plain, own).linear.weight, atol=1e-4, rtol=1e-3)
    after = made(primed, tmp_path / "primed").task
    expected = fitted_to(load_adapter(tpp).backbone, primed)
    torch.testing.assert_close(after.linear.weight, expected.linear.weight, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(after.linear.weight, found.linear.weight, atol=1e-3)


def test_beside_a_tuner_a_head_starts_at_random(phantom_folder, tmp_path):
    inputs = stages.finetune_inputs(phantom_folder, finetune={**STILL["finetune"], "head_start": "auto"})
    found = made(inputs, tmp_path / "random")
    drawn = Classification(ClassificationOptions(), found.backbone.spec, inputs.classes, False, Seeds(0))
    torch.testing.assert_close(found.task.linear.weight, drawn.linear.weight, atol=1e-6, rtol=0)


def test_the_time_of_fitting_counts(phantom_folder, tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count(step=1000).__next__)
    monkeypatch.setattr("medtpp.training.finetune.time", clock)
    run_finetune(stages.finetune_inputs(phantom_folder, **STILL), tmp_path)
    assert read_json(tmp_path / MARKER)["seconds"] > 1000


def test_a_classifier_on_a_frozen_backbone_starts_fitted():
    spec = backbones.load("test_vit", weights="random", image_size=stages.SIZE).spec
    known = {"cases": 20, "spec": spec}
    for tuner, task, start in (
        ("linear", "classification", "fitted"),
        ("lora", "classification", "random"),
        ("linear", "segmentation", "random"),
    ):
        assert resolve_finetune(FinetuneOptions(), tuner=tuner, task=task, **known).head_start == start
    with pytest.raises(ConfigError, match="cannot be fitted"):
        resolve_finetune(FinetuneOptions(head_start="fitted"), tuner="lora", task="segmentation", **known)


def test_in_a_script_too(phantom_folder):
    inputs = stages.finetune_inputs(phantom_folder)
    images = inputs.train.images(limit=1000)
    backbone = backbones.load("test_vit", weights="random", image_size=stages.SIZE)
    labels = [case.labels[0] for case in inputs.train.cases]
    tuned = medtpp.attach(backbone, "linear")
    still = {"steps": 2, "head_learning_rate": 1e-12, "precision": "32"}
    found = medtpp.finetune(tuned, images, labels, **still)
    expected = fitted_to(backbone, inputs)
    torch.testing.assert_close(found.linear.weight, expected.linear.weight, atol=1e-4, rtol=1e-3)
