"""Fingerprints of what was trained on, so that test cases seen in pre-training are found without keeping any data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from medtpp.config import Options
from medtpp.data.case import Case, Record
from medtpp.files import digest


class Fingerprints(Options):
    """Of a set of cases: hashes of decoded pixels and of patient names, sorted; neither can be read back.

    A patient's hash hides the name from a reader, not from somebody who tries all names: use pseudonyms, as ever.
    """

    images: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()

    @classmethod
    def of(cls, cases: Iterable[Case], records: Mapping[str, Record]) -> Fingerprints:
        """Fingerprints of cases whose images were decoded."""
        cases = list(cases)
        images = {records[case.id].fingerprint for case in cases}
        patients = {patient_hash(case.patient) for case in cases if case.patient}
        return cls(images=tuple(sorted(images)), patients=tuple(sorted(patients)))

    def __or__(self, other: Fingerprints) -> Fingerprints:
        """Of both sets of cases."""
        return Fingerprints(
            images=tuple(sorted({*self.images, *other.images})),
            patients=tuple(sorted({*self.patients, *other.patients})),
        )

    def overlap(self, cases: Sequence[Case], records: Mapping[str, Record]) -> list[str]:
        """Ids of the cases whose pixels or patient are among these."""
        images, patients = set(self.images), set(self.patients)
        return [
            case.id
            for case in cases
            if records[case.id].fingerprint in images or (case.patient and patient_hash(case.patient) in patients)
        ]


def patient_hash(patient: str) -> str:
    """32 hexadecimal digits."""
    return digest("patient", patient)[:32]
