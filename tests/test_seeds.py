"""Named draws: they depend on their names alone, and are as random as they should be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medtpp.seeds import Draws, Seeds, name_key

INT64 = st.integers(-(2**63), 2**63 - 1)


def visits(count=4000, epoch=0, seed=0):
    cases = torch.tensor([name_key(f"images/{number}.png") for number in range(count)])
    return Seeds(seed).draws(torch.full((count,), epoch), cases)


def all_draws(draws):
    return {
        "uniform": draws.uniform("a", 3, 2),
        "scalar": draws.uniform("a"),
        "between": draws.between("b", -1, 4, 2),
        "normal": draws.normal("c", 5),
        "permutation": draws.permutation("d", 9),
    }


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.tuples(st.integers(0, 10**6), INT64), min_size=1, max_size=12),
    root=INT64,
    data=st.data(),
)
def test_each_row_depends_on_its_own_epoch_and_case_alone(keys, root, data):
    epochs, cases = torch.tensor([key[0] for key in keys]), torch.tensor([key[1] for key in keys])
    whole = all_draws(Seeds(root).draws(epochs, cases))
    order = data.draw(st.permutations(range(len(keys))))
    some = torch.tensor(order[: data.draw(st.integers(1, len(keys)))])
    part = all_draws(Seeds(root).draws(epochs[some], cases[some]))
    assert all(torch.equal(part[name], whole[name][some]) for name in whole)


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(INT64, min_size=1, max_size=8), length=st.integers(1, 40))
def test_draws_are_within_bounds_for_any_key(keys, length):
    draws = Draws(torch.tensor(keys))
    uniform = draws.uniform("x", length)
    assert uniform.shape == (len(keys), length)
    assert uniform.dtype == torch.float32
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert draws.normal("x", length).isfinite().all()
    assert torch.equal(draws.permutation("x", length).sort(dim=1).values, torch.arange(length).expand(len(keys), -1))


def test_the_bits_are_those_of_splitmix64():
    """Against the generator written out in Python's own integers: no platform may draw other numbers."""
    mask = 2**64 - 1

    def mix(value):
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
        return value ^ (value >> 31)

    keys = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    drawn = Draws(torch.tensor(keys)).uniform("mask", 4)
    states = [[((key ^ name_key("mask")) + k * 0x9E3779B97F4A7C15) & mask for k in range(1, 5)] for key in keys]
    expected = [[(mix(state) >> 40) / 2**24 for state in row] for row in states]
    np.testing.assert_array_equal(drawn.double().numpy(), expected)
    assert name_key("mask") == 4586759955743700414


def test_the_same_rows_on_any_number_of_processes():
    whole = visits(12)
    for world in (2, 3):
        parts = [all_draws(Draws(whole.visits[rank::world])) for rank in range(world)]
        for name, value in all_draws(whole).items():
            for rank, part in enumerate(parts):
                assert torch.equal(part[name], value[rank::world])
    assert same(all_draws(whole[2:5]), {name: value[2:5] for name, value in all_draws(whole).items()})
    assert len(whole[2:5]) == 3
    assert same(all_draws(whole.to(torch.device("cpu"))), all_draws(whole))


def test_uniform_draws_are_uniform_and_independent():
    values = visits().uniform("x", 20).double().numpy()
    counts, _ = np.histogram(values, bins=64, range=(0, 1))
    assert stats.chisquare(counts).pvalue > 1e-4
    assert stats.kstest(values[:, 0], "uniform").pvalue > 1e-4
    assert stats.kstest(values[0:200].ravel(), "uniform").pvalue > 1e-4
    between_draws = np.corrcoef(values.T)
    assert np.abs(between_draws - np.eye(20)).max() < 5 / math.sqrt(len(values))
    assert abs(np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]) < 5 / math.sqrt(len(values))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: visits().uniform("y"), id="name"),
        pytest.param(lambda: visits(epoch=1).uniform("x"), id="epoch"),
        pytest.param(lambda: visits(seed=1).uniform("x"), id="seed"),
        pytest.param(lambda: visits(seed=-1).uniform("x"), id="negative seed"),
        pytest.param(lambda: visits(seed=Seeds(0).child("tpp").root).uniform("x"), id="child"),
        pytest.param(lambda: visits().uniform("x", 2)[:, 1], id="place"),
    ],
)  # fmt: skip
def test_draws_of_another_name_epoch_or_seed_are_unrelated(other):
    one, two = visits().uniform("x").numpy(), other().numpy()
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(len(one))
    assert (one == two).mean() < 0.01
    assert stats.kstest((two - one) % 1, "uniform").pvalue > 1e-4


def test_normal_draws_have_the_moments_of_a_normal():
    values = visits().normal("x", 10).double().numpy().ravel()
    assert abs(values.mean()) < 5 / math.sqrt(values.size)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / values.size)
    assert abs(stats.skew(values)) < 5 * math.sqrt(6 / values.size)
    assert abs(stats.kurtosis(values)) < 5 * math.sqrt(24 / values.size)
    assert stats.kstest(values[:4000], "norm").pvalue > 1e-4


def test_between_keeps_its_bounds():
    values = visits().between("x", -3, 5, 4)
    assert values.min() >= -3
    assert values.max() < 5
    assert values.mean().item() == pytest.approx(1, abs=0.1)


def test_every_order_is_as_likely_as_any_other():
    orders = visits().permutation("x", 4)
    codes = (orders * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    _, counts = codes.unique(return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    first = visits().permutation("x", 196)[:, 0]
    assert stats.chisquare(torch.bincount(first, minlength=196).numpy()).pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(
    one=st.lists(st.one_of(st.text(max_size=4), INT64), max_size=4),
    other=st.lists(st.one_of(st.text(max_size=4), INT64), max_size=4),
)
def test_names_have_keys_of_their_own(one, other):
    one, other = ([n.replace("\x1f", "") if isinstance(n, str) else n for n in names] for names in (one, other))
    assert (name_key(*one) == name_key(*other)) == (one == other)


def test_numbers_and_text_are_different_names():
    assert len({name_key("1"), name_key(1), name_key("a", "b"), name_key("ab"), name_key("a", "b", "")}) == 5


def test_generators_follow_their_names():
    seeds = Seeds(3)
    one, again = (torch.rand(4, generator=seeds.generator("head")) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, torch.rand(4, generator=seeds.generator("tail")))
    assert not torch.equal(one, torch.rand(4, generator=Seeds(4).generator("head")))
    assert not torch.equal(one, torch.rand(4, generator=seeds.child("x").generator("head")))
    np.testing.assert_array_equal(seeds.numpy("order").random(3), seeds.numpy("order").random(3))
    assert seeds.numpy("order").random() != seeds.numpy("order", 1).random()
    assert all(0 <= Seeds(root).number("x") < 2**63 for root in range(200))


def interrupted():
    with Seeds(0).scope("x"):
        torch.rand(100)
        raise KeyboardInterrupt


def test_scope_leaves_the_global_stream_as_it_was():
    torch.manual_seed(7)
    expected = torch.rand(6)
    torch.manual_seed(7)
    first = torch.rand(3)
    with Seeds(0).scope("x"):
        inside = torch.rand(3)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(torch.cat([first, torch.rand(3)]), expected)
    torch.manual_seed(99)
    with Seeds(0).scope("x"):
        assert torch.equal(torch.rand(3), inside)
    with Seeds(0).scope("y"):
        assert not torch.equal(torch.rand(3), inside)
