"""Which class has which label, and that a run that goes on finds the classes that it was trained with."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


def same_classes(where: str, found: Iterable[str], stored: Sequence[str]) -> list[str]:
    """`stored` in Unicode's normal form C. Raises ValueError, which begins with `where`, unless `found` are the same
    names, in whatever order."""
    found = list(found)
    names = [unicodedata.normalize("NFC", name) for name in stored]
    known, wanted = set(found), set(names)
    missing = [name for name in names if name not in known]
    extra = [name for name in found if name not in wanted]
    if missing or extra or len(wanted) < len(names):
        raise ValueError(
            f"{where} does not have the {len(names)} classes that were trained:"
            f" missing {_listed(missing)}; extra {_listed(extra)}"
        )
    return names


def renumbering(
    where: str, found: Sequence[str], stored: Sequence[str] | None
) -> tuple[list[str], list[int]]:
    """The classes, and the label that each of the labels of `found` becomes: its position in `stored`, if given.

    Raises ValueError as `same_classes` does.
    """
    if stored is None:
        return list(found), list(range(len(found)))
    names = same_classes(where, found, stored)
    positions = {name: label for label, name in enumerate(names)}
    return names, [positions[name] for name in found]


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:10])) or "none"
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown
