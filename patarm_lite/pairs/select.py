"""Choosing among pairs: seeded splits by prompt, balancing, a length filter, and flipped labels for the control."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from patarm_lite.errors import UserError
from patarm_lite.pairs.checks import length_sign
from patarm_lite.pairs.load import Dropped
from patarm_lite.records import Pair

LARGEST_SHARE = 5
"""At most one pair in this many is held out."""


def split_by_prompt(pairs: Sequence[Pair], heldout: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training pairs and held-out pairs, each in the order given; no prompt is on both sides.

    Pairs of one prompt (case and white space folded) stay together, and so do pairs of one `slug` in meta.
    As many as asked for are held out, at most a fifth of all, and fewer where the next group would not fit in.
    Which ones depends on the pairs and the seed, not on their order.

    Raises:
        UserError: too few pairs to hold out two, or every group of pairs is too large.
    """
    room = min(heldout, len(pairs) // LARGEST_SHARE)
    if room < 2:
        raise UserError(
            f"{len(pairs)} pairs are too few to hold out {heldout}: 2 at least, a fifth at most are held out; give 10"
            if heldout >= 2
            else f"{heldout} held-out pairs can't tell anything; ask for 2 or more"
        )
    groups = sorted(_groups(pairs), key=lambda group: min(_digest(pairs[place]) for place in group))
    random.Random(seed).shuffle(groups)
    held: set[int] = set()
    for group in groups:
        if len(held) + len(group) <= room:
            held.update(group)
    if len(held) < 2:
        smallest = min(map(len, groups))
        raise UserError(
            f"no two pairs can be held out: pairs of one prompt stay together, the smallest such group has {smallest} "
            f"of {len(pairs)} pairs and at most {room} may be held out; give pairs with more different prompts"
        )
    train = [pair for place, pair in enumerate(pairs) if place not in held]
    return train, [pair for place, pair in enumerate(pairs) if place in held]


def _groups(pairs: Sequence[Pair]) -> list[list[int]]:
    """Places of pairs that share a prompt or a slug, directly or through others."""
    root = list(range(len(pairs)))

    def find(place: int) -> int:
        while root[place] != place:
            root[place] = root[root[place]]
            place = root[place]
        return place

    first: dict[Any, int] = {}
    for place, pair in enumerate(pairs):
        names: list[Any] = [("prompt", tuple((t.role, " ".join(t.content.casefold().split())) for t in pair.prompt))]
        if pair.meta.get("slug") is not None:
            names.append(("slug", str(pair.meta["slug"])))
        for name in names:
            root[find(place)] = find(first.setdefault(name, place))
    groups: dict[int, list[int]] = defaultdict(list)
    for place in range(len(pairs)):
        groups[find(place)].append(place)
    return list(groups.values())


def _digest(pair: Pair) -> str:
    return hashlib.sha256(repr((pair.prompt, pair.chosen, pair.rejected)).encode()).hexdigest()


def balance(pairs: Sequence[Pair], by: Sequence[Literal["task", "length"]], seed: int) -> list[Pair]:
    """As many pairs as can be kept so that tasks, or signs of length, are even; in the order given.

    "task": every task keeps as many pairs as the smallest one. "length": in every task as many pairs keep a longer
    chosen reply as a longer rejected one; pairs of equal length stay. Both: every task keeps m of either sign,
    m being the smallest count there is, and pairs of equal length are left out.

    Raises:
        UserError: an unknown way to balance; a task in which one sign of length does not occur.
    """
    unknown = sorted(set(by) - {"task", "length"})
    if unknown:
        raise UserError(f"pairs can't be balanced by {unknown[0]!r}; by task, by length, or both")
    cells: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place, pair in enumerate(pairs):
        cells[pair.task, length_sign(pair) if "length" in by else 0].append(place)
    tasks = sorted({task for task, _ in cells})
    if "length" in by:
        for task in tasks:
            for sign, side in ((1, "chosen"), (-1, "rejected")):
                if not cells.get((task, sign)):
                    raise UserError(
                        f"task {task} can't be balanced by length: the {side} reply is the longer one in none of its "
                        "pairs; add such pairs or balance without 'length'"
                    )
    rng = random.Random(seed)
    keep: set[int] = set()
    smallest = min((len(places) for (_, sign), places in cells.items() if sign or "length" not in by), default=0)
    for task in tasks:
        if "length" in by:
            most = smallest if "task" in by else min(len(cells[task, 1]), len(cells[task, -1]))
            chosen = rng.sample(cells[task, 1], most) + rng.sample(cells[task, -1], most)
            keep.update(chosen if "task" in by else chosen + cells.get((task, 0), []))
        else:
            keep.update(rng.sample(cells[task, 0], smallest) if "task" in by else cells[task, 0])
    return [pair for place, pair in enumerate(pairs) if place in keep]


def shuffle_labels(pairs: Sequence[Pair], share: float, seed: int) -> list[Pair]:
    """The pairs with chosen and rejected swapped in exactly round(share * n) of them: the negative control.

    Keys of meta that describe a side (`chosen_*`, `rejected_*`) are swapped too, and `flipped` says so.

    >>> [(p.chosen, p.rejected) for p in shuffle_labels([Pair((), "good", "bad")], 1.0, seed=1)]
    [('bad', 'good')]
    """
    if not 0 <= share <= 1:
        raise UserError(f"the share of flipped labels is {share}; it must be from 0 to 1")
    flipped = set(random.Random(seed).sample(range(len(pairs)), round(share * len(pairs))))
    return [_flip(pair) if place in flipped else pair for place, pair in enumerate(pairs)]


def _flip(pair: Pair) -> Pair:
    def other(name: str) -> str:
        if name.startswith("chosen_"):
            return "rejected_" + name.removeprefix("chosen_")
        return "chosen_" + name.removeprefix("rejected_") if name.startswith("rejected_") else name

    meta = {other(name): value for name, value in pair.meta.items()} | {"flipped": True}
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen, meta=meta)


def drop_long(pairs: Sequence[Pair], lengths: Callable[[Pair], int], limit: int) -> tuple[list[Pair], list[Dropped]]:
    """Pairs of at most `limit` tokens, and the others as dropped rows.

    Args:
        lengths: the tokens of a pair's longer judging prompt.
    """
    kept: list[Pair] = []
    dropped: list[Dropped] = []
    for pair in pairs:
        tokens = lengths(pair)
        if tokens <= limit:
            kept.append(pair)
        else:
            source, row = str(pair.meta.get("file", pair.source)), int(pair.meta.get("row", 0))
            dropped.append(Dropped(source, row, f"longer than {limit} tokens: {tokens}"))
    return kept, dropped
