"""Patches: a pure function of the step, as often around a structure as asked for, read as they lie in the store."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from medtpp.config import Window
from medtpp.data import patches
from medtpp.data.batches import BatchStream
from medtpp.data.case import Structure
from medtpp.data.patches import PatchStream
from medtpp.data.store import build_store
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.errors import ConfigError, DataError
from medtpp.seeds import Seeds, name_key
from volumes import READER, write_case

STRUCTURES = (Structure("large", (1,)), Structure("small", (2,)), Structure("absent", (3,)))
SHAPES = ((20, 24, 28), (6, 40, 16), (30, 30, 30), (16, 16, 16), (33, 17, 25))
PREPARE = VolumePreprocessing(patch=(8, 16, 12), windows=(Window(kind="fixed", low=0, high=1),) * 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Five cases, the last without a mask. The first channel holds the label, the second noise."""
    folder = tmp_path_factory.mktemp("patches")
    rng = np.random.default_rng(0)
    cases = []
    for number, shape in enumerate(SHAPES):
        labels = np.zeros(shape, np.uint8)
        labels[: shape[0] // 2, 4:9, :8] = 1
        labels[2, 11, 9 : 10 + number] = 2
        image = np.stack([labels / 4, rng.random(shape)]).astype(np.float32)
        cases.append(write_case(folder, f"case{number}", image, labels if number < 4 else None))
    return build_store(cases, PREPARE, STRUCTURES, READER, folder / "store")


def stream(store, cases=4, batch_size=6, seed=0, **options):
    rows = np.arange(cases)[::-1].copy()
    keys = np.array([name_key(store.records[row].case) for row in rows])
    options = {"masks": True, "targets": None} | options
    return PatchStream(store, rows, keys, batch_size=batch_size, seeds=Seeds(seed), **options)


def same(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "targets", "rows")
    ) and torch.equal(one.draws.visits, other.draws.visits)


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("medtpp-batches")]


def test_images_and_masks_are_of_one_place_and_of_the_store(store):
    for step in range(10):
        batch = stream(store).batch(step)
        assert batch.images.shape == (6, 2, 8, 16, 12)
        assert batch.targets.shape == (6, 8, 16, 12)
        assert (batch.images.dtype, batch.targets.dtype) == (torch.float16, torch.uint8)
        assert torch.equal(batch.images[:, 0] * 4, batch.targets.half())
        for image, row in zip(batch.images.numpy(), batch.rows.tolist(), strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(store.image(row)[1], (8, 16, 12))
            assert (windows == image[1]).all(axis=(-1, -2, -3)).any()
    assert stream(store, masks=False).batch(0).targets is None


def test_cases_come_in_the_order_of_whole_images(store):
    images = np.zeros((4, 1, 2, 2), np.uint8)
    rows = np.arange(4)[::-1].copy()
    keys = np.array([name_key(f"case{row}") for row in rows])
    whole = BatchStream(images, rows, keys, None, 6, Seeds(0))
    for step in range(4):
        one, other = whole.batch(step), stream(store).batch(step)
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.draws.visits, other.draws.visits)


def test_a_place_follows_the_case_and_its_visit_alone(store):
    def found_with(batch_size):
        batches = stream(store, batch_size=batch_size)
        found = {}
        for step in range(24 // batch_size):
            batch = batches.batch(step)
            found |= {
                visit: image.tobytes()
                for visit, image in zip(batch.draws.visits.tolist(), batch.images.numpy(), strict=True)
            }
        return found

    assert len(found_with(6)) == 24
    assert found_with(6) == found_with(8)


@pytest.mark.parametrize("start", [0, 5])
def test_reading_ahead_gives_the_bits_of_the_step(store, start):
    batches = stream(store)
    found = list(batches.iterate(start, 12))
    assert len(found) == 12 - start
    assert all(same(batch, stream(store).batch(step)) for step, batch in enumerate(found, start=start))
    assert batches.waited > 0
    assert not workers()


def test_the_ranks_shares_make_up_the_batch_of_one_process(store):
    whole = stream(store).batch(3)
    for rank in range(3):
        part = stream(store, rank=rank, world=3).batch(3)
        assert torch.equal(part.images, whole.images[rank::3])
        assert torch.equal(part.targets, whole.targets[rank::3])
        assert torch.equal(part.draws.visits, whole.draws.visits[rank::3])


def test_every_structure_is_in_the_middle_as_often_as_the_others(tmp_path, monkeypatch):
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[5:20, 5:30, 5:30] = 1
    labels[30, 30, 30] = 2
    case = write_case(tmp_path, "case", labels[None].astype(np.float32), labels)
    prepare = VolumePreprocessing(patch=(5, 5, 5), windows=(Window(kind="fixed", low=0, high=1),))
    single = build_store([case], prepare, STRUCTURES, READER, tmp_path)
    monkeypatch.setattr(patches, "FOREGROUND", 1.0)
    middles = stream(single, cases=1, batch_size=400).batch(0).targets[:, 2, 2, 2]
    assert set(middles.tolist()) == {1, 2}
    assert (middles == 2).float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("foreground", [0.0, 0.5])
def test_the_share_of_patches_around_structures(tmp_path, foreground, monkeypatch):
    monkeypatch.setattr(patches, "FOREGROUND", foreground)
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[20, 20, 20] = 1
    case = write_case(tmp_path, "case", labels[None].astype(np.float32), labels)
    prepare = VolumePreprocessing(patch=(5, 5, 5), windows=(Window(kind="fixed", low=0, high=1),))
    single = build_store([case], prepare, STRUCTURES[:1], READER, tmp_path)
    targets = stream(single, cases=1, batch_size=400).batch(0).targets
    centred = (targets[:, 2, 2, 2] == 1).float().mean().item()
    assert centred == pytest.approx(foreground, abs=0.1)
    if foreground:
        assert (targets.flatten(1).sum(1) <= 1).all()


def test_other_patches_lie_anywhere_up_to_the_borders(tmp_path):
    ramp = np.arange(7, dtype=np.float32)[:, None, None] * np.ones((7, 6, 6), np.float32) / 8
    prepare = VolumePreprocessing(patch=(4, 6, 6), windows=(Window(kind="fixed", low=0, high=1),))
    single = build_store([write_case(tmp_path, "ramp", ramp[None])], prepare, (), READER, tmp_path)
    images = stream(single, cases=1, batch_size=400, masks=False).batch(0).images
    starts, counts = np.unique((images[:, 0, 0, 0, 0] * 8).numpy(), return_counts=True)
    assert starts.tolist() == [0, 1, 2, 3]
    assert counts.min() > 60


def test_labels_of_cases_and_cases_without_masks(store):
    targets = torch.arange(5) * 10
    batch = stream(store, cases=5, targets=targets, masks=False, batch_size=10).batch(0)
    assert torch.equal(batch.targets, (4 - batch.rows) * 10)


def test_images_of_two_dimensions_in_8_bits(tmp_path):
    tile = np.random.default_rng(0).integers(0, 256, (3, 30, 20), dtype=np.uint8)
    prepare = VolumePreprocessing(patch=(16, 24), windows=(Window(kind="fixed", low=0, high=255),) * 3, dtype="uint8")
    case = write_case(tmp_path, "tile", tile, (tile[0] > 99).astype(np.uint8), units="levels")
    single = build_store([case], prepare, STRUCTURES[:1], READER, tmp_path)
    batch = stream(single, cases=1, batch_size=4).batch(0)
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (4, 3, 16, 24)
    assert not batch.images[:, :, :, :2].any()  # padded by two columns on each side
    assert torch.equal(batch.targets, (batch.images[:, 0] > 99).byte())


def test_an_error_while_reading_reaches_the_consumer_and_no_thread_stays(store, tmp_path):
    broken = replace(store, folder=tmp_path)
    with pytest.raises(FileNotFoundError):
        list(stream(broken).iterate(0, 9))
    for batch in stream(store).iterate(0, 10**9):
        assert len(batch) == 6
        break
    assert not workers()


def test_reading_ahead_is_bounded(store):
    batches, steps = stream(store), []
    original = batches.batch
    batches.batch = lambda step: (steps.append(step), original(step))[1]
    iterator = batches.iterate(0, 1000)
    for _ in range(5):
        next(iterator)
    iterator.close()
    assert 5 <= len(steps) <= 5 + PatchStream.ahead


def test_mistakes_are_told(store):
    with pytest.raises(ConfigError, match="batch size 6 does not divide among 4"):
        stream(store, world=4)
    with pytest.raises(ConfigError, match="no cases"):
        stream(store, cases=0)
    with pytest.raises(ValueError, match="differ in length"):
        stream(store, targets=torch.zeros(7))
    records = (replace_error(store.records[0], "is broken."), *store.records[1:])
    with pytest.raises(DataError) as caught:
        stream(replace(store, records=records), cases=5)
    assert caught.value.problems == ["case0: is broken.", "case4: has no mask"]


def replace_error(record, error):
    return record.model_copy(update={"error": error})
