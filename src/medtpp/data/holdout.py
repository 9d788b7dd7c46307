"""Repeated splits: a fold, or a site that is left out, as the test set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from medtpp.data.case import Case, Dataset, Record
from medtpp.data.split import assign, groups, require_classes
from medtpp.errors import DataError
from medtpp.seeds import Seeds


class _Holdout:
    def resplit(self, case: Case) -> Case:
        """A case without the split that is prescribed for it; of an unlabelled one it says what TPP may not see."""
        return replace(case, split=None) if case.labelled else case


@dataclass(frozen=True)
class Fold(_Holdout):
    """One of several parts of the labelled cases, each of them the test set once.

    Attributes:
        number: From 1 on.
        of: How many there are.
    """

    number: int
    of: int

    @property
    def title(self) -> str:
        """In a reader's words."""
        return f"fold {self.number} of {self.of}"

    def split(
        self, dataset: Dataset, records: Mapping[str, Record], *, seeds: Seeds, val_fraction: float
    ) -> dict[str, str]:
        """The fold as test cases, the others as training and validation cases.

        Folds are disjoint and hold all labelled cases, each class in proportion; a split that the data set prescribes
        is disregarded. Cases of one patient, and cases with the same pixels, stay together.

        Args:
            dataset: The cases; unlabelled ones get no split.
            records: What decoding told, by case id.
            seeds: Seeds of the experiment.
            val_fraction: Share of the cases outside the fold.

        Returns:
            "train", "val" or "test" by case id.

        Raises:
            DataError: There are too few groups of cases for a class in each split.
        """
        labelled = _labelled(dataset)
        shares = {str(number): 1 / self.of for number in range(1, self.of + 1)}
        home = assign(groups(labelled, records), shares, seeds.numpy("folds", self.of))
        test = [case for case in labelled if home[case.id] == str(self.number)]
        rest = [case for case in labelled if home[case.id] != str(self.number)]
        return _split(dataset, records, test, rest, seeds, val_fraction)


@dataclass(frozen=True)
class LeftOut(_Holdout):
    """One site as the test set.

    Attributes:
        site: As the data set names it.
    """

    site: str

    @property
    def title(self) -> str:
        """In a reader's words."""
        return f"site {self.site} left out"

    def resplit(self, case: Case) -> Case:
        """As `Fold.resplit`; TPP sees nothing of the site, its unlabelled cases neither."""
        unseen = not case.labelled and case.site == self.site
        return replace(case, split="test") if unseen else super().resplit(case)

    def split(
        self, dataset: Dataset, records: Mapping[str, Record], *, seeds: Seeds, val_fraction: float
    ) -> dict[str, str]:
        """The site's cases as test cases, those of other sites and of none as training and validation cases.

        Cases of other sites, or of none, that share a patient or their pixels with a test case are left out.

        Args, returns, raises:
            As `Fold.split`.
        """
        test, rest = [], []
        for group in groups(_labelled(dataset), records):
            inside = [case for case in group if case.site == self.site]
            test += inside
            rest += [] if inside else group
        return _split(dataset, records, test, rest, seeds, val_fraction)


Holdout = Fold | LeftOut


def sites_of(dataset: Dataset, column: str) -> tuple[str, ...]:
    """The sites that have labelled cases, each to be left out once.

    Args:
        dataset: For its task.
        column: Of the manifest, that names sites.

    Raises:
        DataError: There are fewer than two.
    """
    found = sorted({case.site for case in _labelled(dataset) if case.site})
    if len(found) < 2:
        raise DataError(
            f"Leaving one site out needs two sites with labelled cases; {dataset.root} has {len(found)}. Sites stand "
            f"in the column {column!r} of the manifest; another is named with --set data.columns.site=NAME."
        )
    return tuple(found)


def _labelled(dataset: Dataset) -> list[Case]:
    return sorted((case for case in dataset.cases if case.labelled), key=lambda case: case.id)


def _split(
    dataset: Dataset,
    records: Mapping[str, Record],
    test: list[Case],
    rest: list[Case],
    seeds: Seeds,
    val_fraction: float,
) -> dict[str, str]:
    shares = {"train": 1 - val_fraction, "val": val_fraction}
    split = assign(groups(rest, records), shares, seeds.numpy("split")) | {case.id: "test" for case in test}
    require_classes(dataset, _labelled(dataset), records, split)
    return split
