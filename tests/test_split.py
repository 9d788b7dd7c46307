"""Splits, label draws, and what TPP may see."""

import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medtpp.data.case import Case, Dataset, ImageRecord
from medtpp.data.holdout import Fold, LeftOut, sites_of
from medtpp.data.sources import class_names
from medtpp.data.split import draw_labels, groups, make_split, read_split, split_problems, tpp_cases, write_split
from medtpp.errors import DataError
from medtpp.seeds import Seeds


def make(cases, **options) -> Dataset:
    return Dataset(Path("data"), "manifest", tuple(cases), class_names(cases), **options)


def case(name: str, *labels: str, **facts) -> Case:
    return Case(name, Path(name), labels, labelled=facts.pop("labelled", bool(labels)), **facts)


def counted(**sizes: int) -> list[Case]:
    return [case(f"{name}{i}", name) for name, size in sizes.items() for i in range(size)]


def split_of(cases, records=None, seed=0, val=0.15, test=0.2, **options) -> dict[str, str]:
    return make_split(make(cases, **options), records or {}, seeds=Seeds(seed), val_fraction=val, test_fraction=test)


def per_class(cases, split) -> dict[str, Counter]:
    counts = defaultdict(Counter)
    for one in cases:
        for label in one.labels:
            if one.id in split:
                counts[label][split[one.id]] += 1
    return counts


@st.composite
def data_sets(draw):
    """Cases of up to four classes; each patient has one class; some images are copies of others of the class."""
    cases, records = [], {}
    for name in "abcd"[: draw(st.integers(2, 4))]:
        for patient in range(draw(st.integers(3, 9))):
            for image in range(draw(st.integers(1, 4))):
                one = case(f"{name}/{patient}/{image}", name, patient=draw(st.sampled_from([None, f"{name}{patient}"])))
                pixels = draw(st.sampled_from([one.id, one.id, one.id, f"{name}/{patient}/0"]))
                cases.append(one)
                records[one.id] = ImageRecord(one.id, 8, 8, fingerprint=pixels)
    return cases, records


@given(data_sets(), st.integers(0, 5), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_invariants_of_a_drawn_split(data, seed, shuffler):
    cases, records = data
    split = split_of(cases, records, seed)
    assert split.keys() == {one.id for one in cases}
    for tie in (lambda one: one.patient, lambda one: records[one.id].fingerprint):
        together = defaultdict(set)
        for one in cases:
            if tie(one):
                together[tie(one)].add(split[one.id])
        assert all(len(names) == 1 for names in together.values())
    assert all(set(counts) == {"train", "val", "test"} for counts in per_class(cases, split).values())
    assert split_problems(make(cases), split) == []
    shuffled = list(cases)
    shuffler.shuffle(shuffled)
    assert split_of(shuffled, records, seed) == split


def require_whole_groups(cases, records, split):
    for group in groups(cases, records):
        assert len({split.get(one.id) for one in group if one.id in split}) <= 1


@given(data_sets(), st.integers(0, 5), st.integers(2, 3))
@settings(max_examples=40, deadline=None)
def test_folds_are_disjoint_and_hold_every_case_once(data, seed, count):
    cases, records = data
    folds = [Fold(number, count) for number in range(1, count + 1)]
    try:
        splits = [fold.split(make(cases), records, seeds=Seeds(seed), val_fraction=0.15) for fold in folds]
    except DataError:  # of three patients of a class in two folds, one alone may be left for train and val
        assume(False)
    tested = Counter(name for split in splits for name, part in split.items() if part == "test")
    assert tested == dict.fromkeys((one.id for one in cases), 1)
    for split in splits:
        assert split.keys() == tested.keys()
        require_whole_groups(cases, records, split)
        assert all({"train", "test"} <= set(counts) for counts in per_class(cases, split).values())


def test_folds_keep_the_classes_in_proportion_and_disregard_a_prescribed_split():
    cases = [replace(one, split="train") for one in counted(a=100, b=40)]
    for number in range(1, 6):
        split = Fold(number, 5).split(make(cases), {}, seeds=Seeds(0), val_fraction=0.25)
        counts = per_class(cases, split)
        assert counts["a"] == {"train": 60, "val": 20, "test": 20}
        assert counts["b"] == {"train": 24, "val": 8, "test": 8}
    with pytest.raises(DataError, match="No sensible split"):
        Fold(1, 5).split(make(counted(a=1, b=1)), {}, seeds=Seeds(0), val_fraction=0.25)


@given(data_sets(), st.data())
@settings(max_examples=40, deadline=None)
def test_a_site_that_is_left_out_is_the_test_set(data, more):
    cases, records = data
    cases = [replace(one, site=more.draw(st.sampled_from(["n", "n", "s", None]))) for one in cases]
    try:
        split = LeftOut("n").split(make(cases), records, seeds=Seeds(0), val_fraction=0.15)
    except DataError:
        return  # too few are left for a class in each split
    site = {one.id: one.site for one in cases}
    assert {name for name, part in split.items() if part == "test"} == {name for name in site if site[name] == "n"}
    require_whole_groups(cases, records, split)
    lost = site.keys() - split.keys()
    beside = {one.id for group in groups(cases, records) if any(one.site == "n" for one in group) for one in group}
    assert lost == {name for name in beside if site[name] != "n"}  # those that a test case gives away
    seen, _ = tpp_cases(make(cases), records, split)
    assert {one.id for one in seen} == {name for name, part in split.items() if part == "train"}


def test_fewer_than_two_sites_are_refused():
    cases = [case("1", "a", site="n"), case("2", "b", site="n"), case("3", site="s"), case("4", "a")]
    with pytest.raises(DataError, match=r"has 1\. Sites stand in the column 'hospital'"):
        sites_of(make(cases), "hospital")
    assert sites_of(make([*cases, case("5", "a", site="e")]), "site") == ("e", "n")


def test_groups_join_patients_and_pixels_in_chains():
    cases = [case("1", "a", patient="p"), case("2", "a", patient="p"), case("3", "a"), case("4", "a"), case("5", "a")]
    records = {name: ImageRecord(name, fingerprint=pixels) for name, pixels in {"2": "x", "3": "x", "4": "y"}.items()}
    assert [[one.id for one in group] for group in groups(cases, records)] == [["1", "2", "3"], ["4"], ["5"]]


def test_shares_follow_the_fractions_in_each_class():
    cases = counted(a=400, b=100, c=40)
    counts = per_class(cases, split_of(cases, val=0.25, test=0.2))
    assert counts["a"] == {"train": 240, "val": 80, "test": 80}
    assert counts["b"] == {"train": 60, "val": 20, "test": 20}
    assert counts["c"] == {"train": 24, "val": 8, "test": 8}


def test_patients_of_many_images_keep_the_shares():
    rng = random.Random(0)
    cases = [case(f"{p}/{i}", "ab"[p % 2], patient=str(p)) for p in range(120) for i in range(rng.randint(1, 12))]
    for counts in per_class(cases, split_of(cases)).values():
        total = counts.total()
        assert counts["test"] == pytest.approx(0.2 * total, abs=4)
        assert counts["val"] == pytest.approx(0.12 * total, abs=4)


@pytest.mark.parametrize("seed", range(5))
def test_the_patients_with_most_images_do_not_tip_the_balance(seed):
    sizes = [30, 20, 15, *[1] * 75]
    cases = [
        case(f"{name}{p}/{i}", name, patient=f"{name}{p}")
        for name in "ab"
        for p, n in enumerate(sizes)
        for i in range(n)
    ]
    for counts in per_class(cases, split_of(cases, seed=seed)).values():
        assert counts["test"] == pytest.approx(28, abs=2)
        assert counts["val"] == pytest.approx(16.8, abs=2)


def test_the_seed_matters():
    cases = counted(a=50, b=50)
    assert split_of(cases, seed=1) != split_of(cases, seed=2)
    assert split_of(cases, seed=1) == split_of(cases, seed=1)


def test_several_labels_are_stratified_too():
    rng = random.Random(1)
    cases = [
        case(
            f"{i}",
            *[name for name, share in (("a", 0.5), ("b", 0.2), ("c", 0.04)) if rng.random() < share],
            labelled=True,
        )
        for i in range(500)
    ]
    counts = per_class(cases, split_of(cases, multilabel=True))
    for name in "abc":
        assert counts[name]["test"] == pytest.approx(0.2 * counts[name].total(), abs=2)
        assert counts[name]["val"] == pytest.approx(0.12 * counts[name].total(), abs=2)


def test_thin_classes():
    cases = counted(a=50, b=40, four=4, two=2, one=1)
    split = split_of(cases)
    counts = per_class(cases, split)
    assert set(counts["four"]) == {"train", "val", "test"}
    assert counts["two"] == {"train": 1, "test": 1}
    assert counts["one"] == {"train": 1}
    messages = [problem.message for problem in split_problems(make(cases), split)]
    assert messages[0].startswith("No case of one, two is in val")
    assert messages[1].startswith("No case of one is in test")


def test_no_sensible_split_names_all_thin_classes():
    cases = [*counted(a=30, b=2), *(case(f"c{i}", "c", patient="p") for i in range(9))]
    with pytest.raises(DataError) as caught:
        split_of(cases)
    assert caught.value.problems == ["b: 2 different", "c: 1 different"]


def test_a_prescribed_split_is_kept():
    cases = [replace(one, split=("train", "val", "test")[i % 3]) for i, one in enumerate(counted(a=20, b=20))]
    assert split_of(cases) == {one.id: one.split for one in cases}


def test_validation_is_taken_from_prescribed_training_cases_by_patient():
    cases = [
        case(f"{p}/{i}", "ab"[p % 2], patient=str(p), split="test" if p < 10 else "train")
        for p in range(60)
        for i in (0, 1)
    ]
    split = split_of(cases, val=0.2)
    assert {name for name, where in split.items() if where == "test"} == {
        one.id for one in cases if one.split == "test"
    }
    assert Counter(split.values()) == {"train": 80, "val": 20, "test": 20}
    assert all(split[f"{p}/0"] == split[f"{p}/1"] for p in range(60))


def test_tpp_sees_nothing_of_validation_and_test():
    cases = [
        case("train1", "a", patient="p1", split="train"),
        case("val1", "a", patient="p2", split="val"),
        case("test1", "b", patient="p3", split="test"),
        case("same patient as test", patient="p3"),
        case("same patient as train", patient="p1"),
        case("in the test folder", split="test"),
    ]
    pool = [case("copy of val"), case("copy of train"), case("broken"), case("fresh")]
    pixels = {"train1": "t", "copy of train": "t", "val1": "v", "copy of val": "v", "test1": "x", "fresh": "f"}
    records = {name: ImageRecord(name, fingerprint=fingerprint) for name, fingerprint in pixels.items()}
    records["broken"] = ImageRecord("broken", error="truncated")
    split = {"train1": "train", "val1": "val", "test1": "test"}
    usable, excluded = tpp_cases(make(cases), records, split, pool)
    assert [one.id for one in usable] == ["train1", "same patient as train", "copy of train", "fresh"]
    assert excluded == ["same patient as test", "in the test folder", "copy of val", "broken"]


@given(data_sets(), st.integers(0, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_label_draws_are_nested_exact_and_cover_classes(data, seed, drawer):
    cases, records = data
    dataset, split = make(cases), split_of(cases, records)
    available = sum(where != "test" for where in split.values())
    least = 2 * len(dataset.classes)
    small, large = sorted(drawer.draw(st.integers(least, available)) for _ in "ab")
    few, many = (draw_labels(dataset, split, n, Seeds(seed)) for n in (small, large))
    assert sum(where != "test" for where in few.values()) == small
    assert few.items() <= many.items() <= split.items()
    for counts in per_class(cases, few).values():
        assert set(counts) == {"train", "val", "test"}
    test = {name for name, where in split.items() if where == "test"}
    assert {name for name, where in few.items() if where == "test"} == test
    assert draw_labels(dataset, split, available, Seeds(seed)) == split


def test_label_draws_are_in_proportion_and_seeded():
    cases = counted(a=600, b=200)
    dataset, split = make(cases), split_of(cases)
    drawn = draw_labels(dataset, split, 80, Seeds(0))
    counts = per_class(cases, {name: where for name, where in drawn.items() if where != "test"})
    assert counts == {"a": {"train": 51, "val": 9}, "b": {"train": 17, "val": 3}}
    assert draw_labels(dataset, split, 80, Seeds(1)) != drawn
    shuffled = make(random.Random(0).sample(cases, len(cases)))
    assert draw_labels(shuffled, split, 80, Seeds(0)) == drawn


def test_label_draws_of_several_labels_cover_each_class():
    rng = random.Random(2)
    cases = [case(f"{i}", *[name for name in "abc" if rng.random() < 0.3], labelled=True) for i in range(200)]
    dataset = make(cases, multilabel=True)
    drawn = draw_labels(dataset, split_of(cases, multilabel=True), 6, Seeds(0))
    assert all({"train", "val"} <= set(counts) for counts in per_class(cases, drawn).values())


@pytest.mark.parametrize("n", [3, 81])
def test_impossible_numbers_of_labels(n):
    cases = counted(a=50, b=50)
    with pytest.raises(DataError, match=f"data.labels={n} is not possible: there are 80 .* at least 4"):
        draw_labels(make(cases), split_of(cases), n, Seeds(0))


def test_a_split_file_comes_back(tmp_path):
    cases = [case('odd, "name".png', "a", patient="007"), case("NA", "b"), case("é", "a", "b"), case("free")]
    dataset = make(cases)
    split = {'odd, "name".png': "train", "NA": "val", "é": "test"}
    path = tmp_path / "new" / "split.csv"
    write_split(path, dataset, split)
    assert read_split(path, dataset) == split
    assert path.read_text(encoding="utf-8").splitlines()[:2] == [
        "case,split,label,patient",
        '"odd, ""name"".png",train,a,007',
    ]


def test_split_files_that_do_not_fit(tmp_path):
    dataset, path = make([case("1", "a"), case("2", "b"), case("free")]), tmp_path / "split.csv"
    path.write_text("case,split\n1,train\n1,test\n2,later\n3,val\nfree,val\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_split(path, dataset)
    assert caught.value.problems == [
        "2 not a labelled case of the data set: 3, free",
        "1 more than once: 1",
        "1 with a split other than train, val, test: 2",
    ]
    path.write_text("id,split\n1,train\n", encoding="utf-8")
    with pytest.raises(DataError, match="needs the columns case and split; found are id, split"):
        read_split(path, dataset)
    with pytest.raises(DataError, match="Cannot read the split file"):
        read_split(tmp_path / "none.csv", dataset)
