"""What a comparison is measured by, and the sentences made from its numbers."""

import pytest

from medtpp.errors import ConfigError
from medtpp.evaluation.bootstrap import Estimate
from medtpp.evaluation.paired import Difference, as_other_method
from medtpp.workflow.compare import Axes
from medtpp.workflow.compare.plan import Arm
from medtpp.workflow.compare.words import Measure, sentence


@pytest.mark.parametrize(
    ("axes", "masks", "expected"),
    [
        (Axes(), False, ("auc", 0.005)),
        (Axes(), True, ("dice", 0.01)),
        (Axes(metric="nsd"), True, ("nsd", 0.01)),
        (Axes(metric="hd95"), True, ("hd95", 0.5)),
        (Axes(metric="hd95", margin=2.0), True, ("hd95", 2.0)),
        (Axes(metric="brier", margin=0.0), False, ("brier", 0.0)),
    ],
)
def test_the_metric_and_its_margin_suit_the_task(axes, masks, expected):
    found = axes.measured(masks=masks)
    assert (found.metric, found.margin) == expected
    with pytest.raises(ConfigError, match=f"no metric {found.metric} of a"):
        found.measured(masks=not masks)


@pytest.mark.parametrize(
    ("measure", "value", "verdict", "said"),
    [
        (Measure("hd95", "HD95", "mm", 0.5), -0.8, "helps", "TPP helps: HD95 is 0.80 mm lower than with no TPP"),
        (Measure("hd95", "HD95", "mm", 0.5), 0.1, "equivalent", "equivalent within 0.5 mm of HD95 (+0.10 ["),
        (Measure("dice", "Dice", "", 0.01), 0.023, "helps", "TPP helps: Dice is 2.3 points higher than with no TPP"),
        (Measure("dice", "Dice", "", 0.01), 0.005, "helps", "by less than the margin of 1 point:"),
        (Measure("log_loss", "log loss", "", 0.01), -0.1, "no difference seen", "-0.100 of log loss"),
    ],
)
def test_sentences_tell_the_unit(measure, value, verdict, said):
    estimate = Estimate(value, value - 0.05, value + 0.05, 0.0)
    gap = Difference(estimate, estimate, 0.01, dict.fromkeys(range(6), value))
    assert said in sentence(Arm("lora", "tpp"), Arm("lora", "standard"), "5", gap, verdict, measure)


@pytest.mark.parametrize(
    ("baseline", "against"),
    [
        (Arm("linear", "standard"), "frozen features"),
        (Arm("full", "standard"), "full fine-tuning"),
        (Arm("full", "scratch"), "training from scratch"),
    ],
)
def test_tpp_has_no_credit_where_the_tuner_differs_too(baseline, against):
    measure = Measure("auc", "macro AUC", "", 0.005)
    arm, named = Arm("lora", "tpp"), Arm("lora", "tpp", "simmim")
    assert arm.is_method_beside(baseline)
    for value, found, verdict, size in ((0.222, "helps", "better", "22.2 points higher"), (-0.1, "hurts", "worse", "")):
        assert as_other_method(found) == verdict
        estimate = Estimate(value, value - 0.05, value + 0.05, 0.0)
        gap = Difference(estimate, estimate, 0.01, dict.fromkeys(range(6), value))
        told = sentence(arm, baseline, "250", gap, verdict, measure)
        assert told.startswith(f"lora, 250 labels: lora with TPP is {verdict} than {against}: macro AUC is {size}")
        assert "lora with TPP by simmim is" in sentence(named, baseline, "250", gap, verdict, measure)
        for other in ("equivalent", "no difference seen", "too few seeds", "undefined"):
            assert "lora with TPP" in sentence(arm, baseline, "250", gap, other, measure)
            assert as_other_method(other) == other


@pytest.mark.parametrize("init", ["standard", "longer", "eva", "tpp_labelled", "random_direction"])
def test_tpp_is_what_helps_where_the_tuner_is_the_same(init):
    assert not Arm("lora", "tpp").is_method_beside(Arm("lora", init))
    assert not Arm("full", "tpp").is_method_beside(Arm("full", "standard"))
