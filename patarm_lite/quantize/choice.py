"""`--auto`: how much accuracy a file may have lost, and the smallest file of which that is little enough.

Chosen on one half of the held-out pairs, reported on the other: the best of several files looks better on the pairs it
was chosen by than it is. A loss is the original's accuracy minus the file's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from patarm_lite.errors import UserError
from patarm_lite.records import JudgedPair, Pair

CERTAINTY = 0.95
Z = 1.6448536269514722
"""Quantile of the normal distribution at CERTAINTY."""
SAFE_TYPE = "q8_0"
"""What `choose` keeps where the pairs can't tell."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that could be kept: its type, its size, and how much accuracy it may have lost at most."""

    type: str
    bytes: int
    bound: float


@dataclass(frozen=True, slots=True)
class Choice:
    """`type` is kept, for `reason`. `enough`: whether the pairs could tell at all. `pairs`: in the choosing half;
    `needed`: of these, without a single flip, to tell."""

    type: str
    reason: str
    enough: bool
    needed: int
    pairs: int
    max_loss: float


def halves(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """(to choose on, to report on): by the hash of the prompt, so that all pairs of a prompt fall into one half and a
    pair falls into the same half in every file and every run."""
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        parts[hashlib.sha256(b"half" + prompt_bytes(pair)).digest()[0] % 2].append(pair)
    return parts


def prompt_bytes(pair: Pair) -> bytes:
    """What is hashed of a pair's prompt, the same for all its pairs."""
    turns = json.dumps([[turn.role, turn.content] for turn in pair.prompt], ensure_ascii=False)
    return turns.encode("utf-8", "surrogatepass")


def loss_bound(reference: Sequence[JudgedPair], other: Sequence[JudgedPair]) -> float:
    """Upper end of a one-sided 95 % interval of the accuracy lost, in -1 to 1.

    The loss of a pair is what the original earned minus what the file earned. Two bounds, the larger counts:

    - A score bound: the d at which n (d - m)^2 = z^2 (q + d - m - d^2), with m the mean loss and q the mean of its
      squares. The variance is that of losses whose mean is d: what is missing to d is made up of whole losses, the
      worst case. With losses of 0 and 1 alone this is Wilson's bound.
    - The exact (Clopper-Pearson) bound of the net number of losses in n, rounded up. At no net loss that is
      1 - 0.05^(1/n), about 3 / n: no flip in 100 pairs does not prove a loss under 1 %.

    Where the losses of one prompt's pairs go together, n is divided by the design effect that they show. Without any
    loss they show none: pairs then count as independent.

    A normal interval with pseudo counts was tried first: where flips are rare it holds in 84 % of cases, not in 95 %
    (exact enumeration; a test repeats it for this one).

    Raises:
        UserError: not the same pairs.
    """
    if [j.pair for j in reference] != [j.pair for j in other]:
        raise UserError("a loss is of the same pairs in the same order; judge both files with the same pairs")
    losses = [_earned(a) - _earned(b) for a, b in zip(reference, other, strict=True)]
    return bound_of(losses, [j.pair.prompt for j in reference])


def _earned(judged: JudgedPair) -> float:
    """What a pair earns of 1: vote against vote, a tie half, an unreadable side nothing (as `metrics.accuracy`)."""
    earned = 0.0
    for chosen, rejected in zip(judged.chosen, judged.rejected, strict=True):
        a, b = chosen.verdict.score, rejected.verdict.score
        if a is not None and b is not None:
            earned += 1.0 if a > b else 0.5 if a == b else 0.0
    return earned / len(judged.chosen)


def bound_of(losses: Sequence[float], prompts: Sequence[object] | None = None) -> float:
    """The bound of `loss_bound` for losses, each in -1 to 1, of pairs of these prompts (none: all different).

    >>> round(bound_of([0.0] * 299), 5)
    0.00997
    >>> round(bound_of([1.0] + [0.0] * 99), 4)                      # Clopper-Pearson, 1 of 100
    0.0466
    """
    if not losses:
        return 1.0
    n = max(1, math.floor(len(losses) / _design_effect(losses, prompts or range(len(losses)))))
    mean, square = (sum(loss**power for loss in losses) / len(losses) for power in (1, 2))
    share = Z * Z / n
    half = (2 * mean + share) / 2
    root = math.sqrt(max(0.0, half * half - (1 + share) * (mean * mean - share * (square - mean))))
    return min(1.0, max((half + root) / (1 + share), _exact_bound(math.ceil(max(0.0, mean * n) - 1e-9), n)))


def _design_effect(losses: Sequence[float], prompts: Sequence[object]) -> float:
    """How much the variance of the sum exceeds that of independent losses; at least 1."""
    mean = sum(losses) / len(losses)
    sums: dict[object, float] = {}
    for loss, prompt in zip(losses, prompts, strict=True):
        sums[prompt] = sums.get(prompt, 0.0) + loss - mean
    apart = sum((loss - mean) ** 2 for loss in losses)
    return max(1.0, sum(total * total for total in sums.values()) / apart) if apart > 0 else 1.0


def _exact_bound(count: int, n: int) -> float:
    """The p at which at most `count` of n happen with probability 0.05 (Clopper and Pearson's upper bound)."""
    if count >= n:
        return 1.0
    if count == 0:
        return float(1 - (1 - CERTAINTY) ** (1 / n))
    ways = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(count + 1)]
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        terms = [w + k * math.log(p) + (n - k) * math.log1p(-p) for k, w in enumerate(ways)]
        low, high = (p, high) if sum(map(math.exp, terms)) > 1 - CERTAINTY else (low, p)
    return high


def pairs_needed(max_loss: float) -> int:
    """Pairs of which none may flip for the bound to fall below `max_loss`.

    It is the number in the choosing half: a file of pairs needs about twice as many.

    >>> pairs_needed(0.01), pairs_needed(0.05)
    (299, 59)
    """
    if not 0 < max_loss < 1:
        raise UserError(
            f"the largest loss {max_loss:g} is not between 0 and 1; --max-loss 0.01 is one pair in a hundred"
        )
    needed = math.ceil(math.log(1 - CERTAINTY) / math.log1p(-max_loss))
    while bound_of([0.0] * needed) >= max_loss:
        needed += 1
    return needed


def choose(files: Sequence[Candidate], max_loss: float, pairs: int, original: str = "f16") -> Choice:
    """The smallest file whose bound is below `max_loss`.

    With too few pairs to show that of any file, q8_0 (or, where that was not made, the largest file) is kept. Where the
    pairs would do but every file loses too much, the original is.

    Args:
        files: quantized files with their bounds. pairs: in the half they were measured on.
        original: the type of the unquantized file.
    """
    if not files:
        raise UserError("there are no files to choose from; give at least one type")
    needed = pairs_needed(max_loss)
    if pairs < needed:
        kept = next((file.type for file in files if file.type == SAFE_TYPE), max(files, key=lambda f: f.bytes).type)
        reason = (
            f"too few pairs to tell: {pairs} in the choosing half, and to show a loss below {max_loss:g} it "
            f"takes {needed} without a single flip, so about {2 * needed} in all; {kept} is kept"
        )
        return Choice(kept, reason, False, needed, pairs, max_loss)
    passing = [file for file in files if file.bound < max_loss]
    if not passing:
        best = min(files, key=lambda file: file.bound)
        reason = (
            f"no file is shown to lose less than {max_loss:g} (the best, {best.type}, may lose {best.bound:.4f}): "
            f"{original} is kept; give more pairs, or a larger --max-loss"
        )
        return Choice(original, reason, True, needed, pairs, max_loss)
    kept_file = min(passing, key=lambda file: (file.bytes, file.bound))
    reason = (
        f"{kept_file.type} is the smallest file that loses less than {max_loss:g} with 95 % certainty "
        f"(at most {kept_file.bound:.4f}, on {pairs} pairs)"
    )
    return Choice(kept_file.type, reason, True, needed, pairs, max_loss)
