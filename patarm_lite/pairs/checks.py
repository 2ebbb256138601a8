"""What makes a pair unfit, and what the set as a whole shows: duplicates, contradictions, lengths, length bias."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from patarm_lite.pairs.chats import kind
from patarm_lite.pairs.fields import Draft
from patarm_lite.records import Pair


def unfit(draft: Draft) -> str | None:
    """Why a draft can't be a pair, or None: what stands before a colon is the kind of reason."""
    if not draft.prompt:
        return "the prompt is empty"
    if draft.prompt[-1].role == "assistant":
        return "the prompt ends with an assistant turn"
    if not draft.prompt[-1].content.strip():
        return "the prompt is empty"
    for side, value in (("chosen", draft.chosen), ("rejected", draft.rejected)):
        if not isinstance(value, str):
            return f"the {side} reply is not text: {kind(value)}"
        if not value.strip():
            return f"the {side} reply is empty"
    if draft.chosen.strip() == draft.rejected.strip():
        return "chosen and rejected are identical"
    return None


def key(pair: Pair) -> tuple[Any, str, str]:
    """What two equal pairs have in common: prompt, chosen and rejected, to the letter."""
    return pair.prompt, pair.chosen, pair.rejected


def contradictions(pairs: Iterable[Pair]) -> list[tuple[Pair, Pair]]:
    """Twos of pairs with one prompt and the same two replies, preferred the other way round."""
    seen: dict[tuple[Any, str, str], Pair] = {}
    found = []
    for pair in pairs:
        twin = seen.get((pair.prompt, pair.rejected, pair.chosen))
        if twin is not None:
            found.append((twin, pair))
        seen.setdefault(key(pair), pair)
    return found


def length_sign(pair: Pair) -> int:
    """1 where the chosen reply has more characters, -1 where the rejected one has, else 0."""
    return (len(pair.chosen) > len(pair.rejected)) - (len(pair.chosen) < len(pair.rejected))


def length_bias(pairs: Sequence[Pair]) -> dict[str, float]:
    """Shares of pairs whose chosen, rejected, or neither reply is longer in characters.

    >>> length_bias([Pair((), "long", "no"), Pair((), "a", "b")])
    {'chosen_longer': 0.5, 'rejected_longer': 0.0, 'equal': 0.5}
    """
    signs = [length_sign(pair) for pair in pairs]
    n = max(len(signs), 1)
    return {"chosen_longer": signs.count(1) / n, "rejected_longer": signs.count(-1) / n, "equal": signs.count(0) / n}


def spread(lengths: Sequence[int]) -> dict[str, float]:
    """Smallest, median, mean, 90th percentile (nearest rank) and largest of some lengths.

    >>> spread([1, 2, 3, 10])
    {'min': 1, 'median': 2.5, 'mean': 4.0, 'p90': 10, 'max': 10}
    """
    if not lengths:
        return {"min": 0, "median": 0, "mean": 0, "p90": 0, "max": 0}
    ordered = sorted(lengths)
    ninth = ordered[-(-9 * len(ordered) // 10) - 1]
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "mean": sum(ordered) / len(ordered),
        "p90": ninth,
        "max": ordered[-1],
    }
