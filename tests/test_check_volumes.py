"""What `check` says of volumes and masks, by what reading them told."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medtpp.data.case import Case, Dataset, Structure
from medtpp.data.check import check, describe
from medtpp.data.sources import class_names
from medtpp.data.volume_scan import VolumeScan


def make(scans, structures=("organ",), **facts):
    """A data set of cases with masks, all or those of `bare`, and what reading them told."""
    bare = facts.pop("bare", ())
    cases = tuple(
        Case(
            name, Path("data") / name, labelled=name not in bare, mask=None if name in bare else Path(f"data/m/{name}")
        )
        for name in scans
    )
    named = tuple(Structure(name, (number,)) for number, name in enumerate(structures, start=1))
    return Dataset(Path("data"), "manifest", cases, structures=named, **facts), scans


def scan(name, **facts):
    usual = {"fingerprint": name, "shape": (9, 8, 7), "spacing": (1.0, 1.0, 1.0), "known": True, "channels": 1}
    return VolumeScan(name, **usual | {"values": (0, 1), "mask_fingerprint": name, "labelled": True} | facts)


def some(count=4, **others):
    """Sound scans, and others by name and what is special about them."""
    names = [f"s{number}" for number in range(count)]
    return {name: scan(name) for name in names} | {name: scan(name, **facts) for name, facts in others.items()}


def found(*data):
    return {problem.code: problem for problem in check(*make(*data))}


def test_sound_scans_have_no_problems():
    assert found(some()) == {}


def test_scans_that_cannot_be_used_are_listed_by_their_files():
    bad = {f"b{n}": VolumeScan(f"b{n}", error=f"data/m/b{n}: is torn.\n  - mask: 3\n  - image: 4") for n in range(7)}
    dataset, scans = make(some() | bad)
    (problem,) = check(dataset, scans)
    assert (problem.severity, problem.code, problem.cases) == ("error", "unreadable-case", tuple(bad))
    lines = problem.message.splitlines()
    assert lines[:4] == ["7 cases cannot be used:", "- m/b0: is torn.", "    - mask: 3", "    - image: 4"]
    assert lines[-2] == "- and 2 more"
    assert "--set 'data.exclude=" in lines[-1]


def test_what_does_not_go_together():
    mixed = found(some(flat={"shape": (9, 8), "spacing": (1.0, 1.0)}))["images-and-volumes"]
    assert mixed.cases == ("flat",)
    assert "1 image and 4 volumes are mixed" in mixed.message
    assert """leave the fewer out: --set 'data.exclude=["flat"]'.""" in mixed.message
    double = found(some(double={"channels": 2}))["different-channels"]
    assert (double.severity, double.cases) == ("error", ("double",))
    assert "1 (4 cases such as s0); 2 (double)" in double.message
    assert found(some(ct={"units": "HU"}))["different-units"].severity == "error"
    photographs = {n: scan(n, shape=(9, 8), spacing=(1.0, 1.0), known=False, units="levels") for n in "abc"}
    assert (
        found(photographs | {"d": scan("d", shape=(9, 8), spacing=(1.0, 1.0), known=False, units="levels", channels=3)})
        == {}
    )


def test_values_that_nobody_named_and_structures_that_nobody_sees():
    problems = found(some(odd={"values": (0, 1, 7)}, odder={"values": (0, 1, 7, 9)}), ("organ", "lesion"))
    assert {problem.severity for problem in problems.values()} == {"warning"}
    assert "7 (in m/odd, m/odder), 9 (in m/odder)" in problems["values-of-no-structure"].message
    assert problems["values-of-no-structure"].cases == ("odd", "odder")
    assert "No mask shows lesion (2)" in problems["structure-absent"].message


def test_a_foreground_that_two_programs_saved():
    """255 in some masks, 1 in others."""
    unnamed = (Structure("1", (1,)), Structure("255", (255,)))

    def told(structures, **values):
        dataset, scans = make(some(**{name: {"values": its} for name, its in values.items()}))
        return {problem.code: problem.message for problem in check(replace(dataset, structures=structures), scans)}

    assert "1 (in 4 cases such as m/s0) and 255 (in m/w), none" in told(unnamed, w=(0, 255))["two-foregrounds"]
    assert told(unnamed, w=(0, 255), both=(0, 1, 255)) == {}
    assert told((Structure("organ", (1,)), Structure("lesion", (255,))), w=(0, 255)) == {}


def test_negative_values_are_background():
    odd = {"odd": {"values": (-1, 0, 1)}, "odder": {"values": (-2, -1, 0, 1)}}
    (problem,) = found(some(**odd)).values()
    assert (problem.severity, problem.code, problem.cases) == ("warning", "negative-values", ("odd", "odder"))
    assert "count as background: -2 (in m/odder), -1 (in m/odd, m/odder). " in problem.message
    both = found({"a": scan("a", values=(-1, 0), labelled=False)}, ())  # nothing else is there
    assert {name: one.severity for name, one in both.items()} == {
        "no-structures": "error",
        "negative-values": "warning",
    }
    assert "grey-masks" in found(some(grey={"values": tuple(range(-79, 1))}), ())


def test_empty_masks():
    empty = {"values": (0,), "labelled": False}
    problem = found(some(e1=empty, e2=empty))["empty-mask"]
    assert (problem.severity, problem.cases) == ("warning", ("e1", "e2"))
    assert "2 of 6 masks are empty: m/e1, m/e2" in problem.message
    nothing = found({"a": scan("a", values=(0, 255), labelled=False)})
    assert list(nothing) == ["no-structures"]
    assert "The only mask shows none of the structures (organ 1); it holds 0, 255" in nothing["no-structures"].message
    assert found({"a": scan("a", values=(0,), labelled=False)}, ())["no-structures"].severity == "error"


def test_grey_levels_are_no_labels():
    assert found(some(grey={"values": tuple(range(80))}), ())["grey-masks"].severity == "error"
    many = {f"s{n}": scan(f"s{n}", values=(0, n + 1)) for n in range(70)}  # few in each, many in all
    assert "70 different values, from 1 to 70" in found(many, ())["grey-masks"].message


def test_spacings():
    problems = found(some(thin={"spacing": (0.1, 1.0, 1.0)}, blind={"known": False}, slab={"spacing": (3.0, 0.9, 0.9)}))
    assert {problem.severity for problem in problems.values()} == {"warning"}
    assert problems["odd-spacing"].cases == ("thin",)
    assert "thin (0.1 x 1 x 1 mm)" in problems["odd-spacing"].message
    assert "median (1 x 1 x 1 mm)" in problems["odd-spacing"].message
    assert problems["unknown-spacing"].cases == ("blind",)
    assert problems["thick-slices"].cases == ("slab",)
    blind = {name: scan(name, known=False) for name in "ab"}
    assert found(blind) == {}


def test_masks_that_several_images_have():
    dataset, scans = make(some())
    cases = (*dataset.cases[:2], *(replace(case, mask=dataset.cases[0].mask) for case in dataset.cases[2:]))
    (problem,) = check(replace(dataset, cases=cases), scans)
    assert (problem.severity, problem.code, problem.cases) == ("warning", "shared-mask", ("s0", "s2", "s3"))
    assert "1 mask belongs to several images: m/s0 (s0, s2, s3)." in problem.message


def test_images_that_show_nothing():
    problem = found(some(flat={"constant": True}))["constant-image"]
    assert (problem.severity, problem.cases) == ("warning", ("flat",))
    assert """or leave it out: --set 'data.exclude=["flat"]'.""" in problem.message


def test_copies_whose_masks_differ():
    problems = found(some(a={"fingerprint": "x"}, b={"fingerprint": "x"}))
    assert list(problems) == ["same-pixels-two-masks"]
    assert "a = b" in problems["same-pixels-two-masks"].message
    same = {"fingerprint": "x", "mask_fingerprint": "m"}
    assert list(found(some(a=same, b=same))) == ["duplicates"]


@pytest.mark.parametrize("field", ["shape", "spacing"])
def test_a_size_or_spacing_that_gives_the_label_away(field):
    rng = np.random.default_rng(0)
    cases = tuple(Case(f"{n}", Path(f"{n}"), ("ab"[n % 2],), labelled=True) for n in range(60))
    dataset = Dataset(Path("data"), "folders", cases, class_names(cases))
    for tied in (True, False):
        scans = {}
        for case in cases:
            size = int(rng.integers(20, 30)) + 20 * (tied and case.labels[0] == "a")
            facts = {"shape": (size, 8, 7)} if field == "shape" else {"spacing": (size / 10, 1.0, 1.0)}
            scans[case.id] = scan(case.id, values=None, **facts)
        assert ("shape-predicts-label" in {problem.code for problem in check(dataset, scans)}) == tied


def test_sites_are_no_giveaway_where_nothing_is_classified():
    cases = tuple(Case(f"{n}", Path(f"{n}"), labelled=True, site=f"s{n % 2}", mask=Path(f"m{n}")) for n in range(30))
    dataset = Dataset(Path("data"), "manifest", cases, structures=(Structure("organ", (1,)),))
    assert check(dataset, {case.id: scan(case.id) for case in cases}) == []


def test_describe():
    scans = some(2, big={"shape": (20, 8, 7), "spacing": (2.0, 1.0, 1.0), "values": (0, 1, 2), "units": "HU"})
    scans |= {"bare": scan("bare", values=None, known=False), "bad": VolumeScan("bad", error="torn")}
    dataset, scans = make(scans, ("organ", "lesion"), bare=("bare",))
    summary = describe(dataset, scans)
    volumes = summary.volumes
    assert (summary.cases, summary.labelled, summary.classes, summary.width) == (5, 4, {}, None)
    assert volumes.size == ((9, 9, 20), (8, 8, 8), (7, 7, 7))
    assert volumes.spacing == ((1, 1, 2), (1, 1, 1), (1, 1, 1))
    assert (volumes.unknown, volumes.units, volumes.channels) == (1, {"none": 3, "HU": 1}, {1: 4})
    assert (volumes.masks, volumes.structures) == (3, {"organ": 3, "lesion": 1})
