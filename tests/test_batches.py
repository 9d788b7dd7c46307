"""The order of the cases: a pure function of the step, the same for any number of processes."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medtpp.data.batches import BatchStream
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds, name_key

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)


def stream(cases=10, batch_size=4, seed=0, images=IMAGES, targets=True, **options):
    rows = np.arange(cases)[::-1] + 3
    keys = np.array([name_key(f"case{number}") for number in range(cases)])
    return BatchStream(
        images, rows, keys, torch.arange(cases) * 10 if targets else None, batch_size, Seeds(seed), **options
    )


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("medtpp-batches")]


def same(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "targets", "rows")
    ) and torch.equal(one.draws.visits, other.draws.visits)


@settings(max_examples=40, deadline=None)
@given(cases=st.integers(1, 30), batch_size=st.integers(1, 20), seed=st.integers(0, 5))
def test_every_epoch_visits_every_case_once(cases, batch_size, seed):
    batches = stream(cases, batch_size, seed)
    steps = -(-3 * cases // batch_size)
    rows = torch.cat([batches.batch(step).rows for step in range(steps)])
    for epoch in range(3):
        assert sorted(rows[epoch * cases : (epoch + 1) * cases].tolist()) == list(range(3, cases + 3))
    assert all(len(batches.batch(step)) == batch_size for step in range(steps))


def test_images_targets_and_rows_belong_together():
    batch = stream().batch(7)
    np.testing.assert_array_equal(batch.images, IMAGES[batch.rows])
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.targets, (12 - batch.rows) * 10)
    assert stream(targets=False).batch(7).targets is None


def test_orders_differ_between_epochs_and_seeds():
    first, second = (stream(batch_size=10).batch(step).rows for step in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, stream(batch_size=10, seed=1).batch(0).rows)


def test_a_case_that_comes_twice_has_other_draws():
    batch = stream(cases=2, batch_size=8).batch(0)
    assert len(set(batch.draws.visits.tolist())) == 8


def test_draws_follow_the_case_and_the_epoch_alone():
    # The same visit, met in batches of 4 and of 5.
    by_visit = [
        {(row, index // 10): visit for index, (row, visit) in enumerate(zip(rows, visits, strict=True))}
        for rows, visits in (
            (
                torch.cat([stream(batch_size=size).batch(step).rows for step in range(20 // size)]).tolist(),
                torch.cat([stream(batch_size=size).batch(step).draws.visits for step in range(20 // size)]).tolist(),
            )
            for size in (4, 5)
        )
    ]
    assert by_visit[0] == by_visit[1]
    assert len(set(by_visit[0].values())) == 20


@settings(max_examples=40, deadline=None)
@given(cases=st.integers(1, 20), share=st.integers(1, 5), world=st.integers(1, 4), step=st.integers(0, 10_000))
def test_the_ranks_shares_make_up_the_batch_of_one_process(cases, share, world, step):
    whole = stream(cases, share * world).batch(step)
    for rank in range(world):
        part = stream(cases, share * world, rank=rank, world=world).batch(step)
        assert torch.equal(part.rows, whole.rows[rank::world])
        assert torch.equal(part.images, whole.images[rank::world])
        assert torch.equal(part.targets, whole.targets[rank::world])
        assert torch.equal(part.draws.visits, whole.draws.visits[rank::world])


@pytest.mark.parametrize("start", [0, 1, 5, 11])
def test_iterating_from_any_step_gives_the_same_bits(start):
    whole = list(stream().iterate(0, 12))
    resumed = list(stream().iterate(start, 12))
    assert len(resumed) == 12 - start
    assert all(same(one, other) for one, other in zip(resumed, whole[start:], strict=True))
    assert not workers()


def test_an_empty_range_gives_nothing():
    assert list(stream().iterate(3, 3)) == []
    assert list(stream().iterate(5, 3)) == []


def test_a_consumer_may_stop_or_fail_and_no_thread_stays():
    batches = stream()
    for batch in batches.iterate(0, 10**9):
        assert len(batch) == 4
        break
    assert not workers()

    def fail():
        for _ in batches.iterate(0, 10**9):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert not workers()


class Images:
    """Counts reads, and fails at the third."""

    def __init__(self, fail=False):
        self.reads = 0
        self.fail = fail

    def __getitem__(self, rows):
        self.reads += 1
        if self.fail and self.reads == 3:
            raise OSError("the disk went away")
        return IMAGES[rows]


def test_an_error_while_reading_reaches_the_consumer():
    seen = []
    with pytest.raises(OSError, match="the disk went away"):
        seen.extend(len(batch) for batch in stream(images=Images(fail=True)).iterate(0, 9))
    assert not workers()


def test_reading_ahead_is_bounded():
    images = Images()
    iterator = stream(images=images).iterate(0, 1000)
    for _ in range(10):
        next(iterator)
    iterator.close()
    assert 10 <= images.reads <= 12


def test_waiting_time_is_counted():
    batches = stream()
    assert batches.waited == 0
    list(batches.iterate(0, 5))
    assert 0 < batches.waited < 5


def test_a_batch_moves_to_a_device():
    batch = stream().batch(0)
    moved = batch.to(torch.device("meta"))
    assert moved.images.device == moved.targets.device == moved.rows.device == moved.draws.visits.device
    assert moved.images.device.type == "meta"
    assert same(batch.to(torch.device("cpu")), batch)


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="batch size 4 does not divide among 3"):
        stream(world=3)
    with pytest.raises(ConfigError, match="no cases"):
        stream(cases=0)
    with pytest.raises(ValueError, match="differ in length"):
        BatchStream(IMAGES, np.arange(4), np.arange(5), None, 2, Seeds(0))
