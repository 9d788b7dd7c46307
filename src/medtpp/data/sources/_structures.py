"""Names of the values in masks, as experiment files, the Decathlon and nnU-Net write them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from medtpp.data.case import MASK_VALUES, Structure
from medtpp.data.problems import first_few
from medtpp.errors import DataError


def parse_structures(labels: Mapping[str, int | str | list[int]], where: str) -> tuple[Structure, ...]:
    """Structures from `{"1": "kidney"}` (Decathlon) or `{"kidney": 1, "whole kidney": [1, 2]}` (nnU-Net).

    The background, 0, is left out. Structures that share no value are sorted by their values, so that in the usual
    case structure i has the value i; those that overlap keep their order.

    Args:
        labels: Names and values.
        where: The field and file, for messages.

    Raises:
        DataError: Values are no whole numbers from 0 to 65535, a name or a set of values is there twice, something
            beside the background has the value 0, or nothing is left. All such faults are reported together.
    """
    faults = []
    structures = []
    for key, given in labels.items():
        name, values = (given, _number(key)) if isinstance(given, str) else (key, _numbers(given))
        name = name.strip()
        if values and not 0 <= min(values) <= max(values) < MASK_VALUES:
            faults.append(
                f"{key!r}: {given!r} is no value of a structure, which are from 1 to {MASK_VALUES - 1}; what is below "
                "0 in a mask counts as background"
            )
        elif not values:
            faults.append(f"{key!r}: {given!r} is not a name and a mask value, such as {{1: kidney}} or {{kidney: 1}}")
        elif not name:
            faults.append(f"the value {first_few(values)} has no name")
        elif values == (0,):
            continue  # the background, whatever it is called
        elif 0 in values or name.casefold() == "background":
            faults.append(f"{name!r} has {first_few(values)}: the background, and it alone, has the value 0")
        else:
            structures.append(Structure(name, values))
    by_name: dict[str, list[Structure]] = defaultdict(list)
    by_values: dict[tuple[int, ...], list[Structure]] = defaultdict(list)
    for structure in structures:
        by_name[structure.name].append(structure)
        by_values[structure.values].append(structure)
    faults += [f"{name!r} is there {len(alike)} times" for name, alike in by_name.items() if len(alike) > 1]
    faults += [
        f"{first_few(repr(one.name) for one in alike)} have the same value {first_few(values)}"
        for values, alike in by_values.items()
        if len(alike) > 1
    ]
    if not structures and not faults:
        faults.append("nothing is named but the background")
    if faults:
        raise DataError(f"The structures in {where} cannot be used:", faults)
    owned = [value for structure in structures for value in structure.values]
    overlap = len(set(owned)) < len(owned)
    return tuple(structures if overlap else sorted(structures, key=lambda structure: structure.values))


def named_structures(labels: Mapping[str, int | str | list[int]]) -> tuple[Structure, ...]:
    """The structures that `data.structures` names, if any.

    Raises:
        DataError: See `parse_structures`.
    """
    return parse_structures(labels, "data.structures") if labels else ()


def _number(text: str) -> tuple[int, ...]:
    return (int(text),) if text.strip().isdecimal() else ()


def _numbers(values: int | list[int]) -> tuple[int, ...]:
    return tuple(sorted(set(values))) if isinstance(values, list) else (values,)
