"""Which pairs an audit or a comparison judges: those of files or hub ids, all or a seeded part."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from patarm_lite.errors import UserError
from patarm_lite.metrics import row_to_pair
from patarm_lite.records import Pair

FEWEST = 10
"""Pairs that anything can be said of."""


def chosen_pairs(sources: Sequence[str], count: int | None = None, seed: int = 1, offline: bool = False) -> list[Pair]:
    """Pairs of files, all or `count` drawn with `seed`, in file order. A run's held-out pairs keep the truth that they
    state.

    Raises:
        UserError: a file that can't be read, fewer than FEWEST pairs.
    """
    from patarm_lite.pairs import load_pairs
    from patarm_lite.pairs.files import read_rows

    found: list[Pair] = []
    others = []
    for source in sources:
        rows = [row.value for row in read_rows(source)] if Path(source).name.startswith("heldout") else []
        ours = bool(rows) and all(isinstance(row, dict) and isinstance(row.get("meta"), dict) for row in rows)
        found += [row_to_pair(row) for row in rows] if ours else []
        others += [] if ours else [source]
    found += load_pairs(others, offline=offline).pairs if others else []
    if len(found) < FEWEST:
        raise UserError(f"{', '.join(sources)}: {len(found)} usable pairs, and at least {FEWEST} are needed; give more")
    if count is None or count >= len(found):
        return found
    check_count(count)
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), count))]


def check_count(count: int) -> None:
    """Raise UserError where so many pairs can't tell anything."""
    if count < FEWEST:
        raise UserError(f"--n {count} pairs can't tell anything; give {FEWEST} or more")


def check_enough(judged: int, chosen: int) -> None:
    """Raise UserError where too few pairs fit the judge's context."""
    if judged < FEWEST:
        raise UserError(
            f"{judged} of {chosen} pairs fit the judge's context, and at least {FEWEST} are needed; give a larger "
            "--context, or --long cut"
        )
