"""What a score means: score gap -> P(preferred), score -> percentile. Fitted on judged pairs; numpy only.

The gap of a pair is the chosen side's score minus the rejected side's: of expected scores where both sides have one,
else of the sampled ones (means over a side's readable votes either way). P(preferred) is a logistic curve through the
origin, `1 / (1 + exp(-slope * gap))`: swapping the two responses must swap the answer, so there is no intercept, and a
judge that is worse than a coin gets slope 0 rather than a curve that turns its verdicts round. Pairs with an
unreadable side have no gap: left out and counted.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patarm_lite.errors import UserError
from patarm_lite.records import JudgedPair, Vote

Floats = NDArray[np.float64]

SCHEMA = 1
TABLE = 101
"""Rows of the percentile table at most."""
BINS = 10
"""Equal bins of confidence, 0.5 to 1, for the expected calibration error."""
FEWEST = 10
"""Pairs with a gap that a fit and its check need each."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What judged pairs say: `gaps` and `outcomes` (1 where the first of the gap's two was preferred), [N] each, and
    every response's score. `expected`: gaps that are of expected scores. `unreadable`: pairs without a gap."""

    gaps: Floats
    outcomes: Floats
    scores: Floats
    expected: int
    unreadable: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """A fitted calibration.

    `percentiles`: (score, share of judged responses below it, equal ones half), rising. `pairs`: pairs it was fitted
    on. `how`: settings of the judging and the figures of `check`, plain JSON values.
    """

    slope: float
    percentiles: tuple[tuple[float, float], ...]
    pairs: int
    how: dict[str, Any] = field(default_factory=dict)

    def p_preferred(self, gap: float) -> float:
        """Probability that the response whose score is higher by `gap` is the preferred one.

        >>> Calibration(math.log(3), ((5.0, 0.5),), 9).p_preferred(1.0)
        0.75
        """
        return float(_sigmoid(np.array([self.slope * gap]))[0])

    def percentile(self, score: float) -> float:
        """Share of the judged responses that score below `score`, equal ones half; straight lines between.

        >>> Calibration(1.0, ((2.0, 0.25), (6.0, 0.75)), 9).percentile(4.0)
        0.5
        """
        scores, shares = zip(*self.percentiles, strict=True)
        return float(np.interp(score, scores, shares, left=0.0, right=1.0))

    def to_json(self) -> str:
        """As one line of JSON, for a file's metadata."""
        return json.dumps(
            {
                "schema": SCHEMA,
                "slope": self.slope,
                "percentiles": [list(row) for row in self.percentiles],
                "pairs": self.pairs,
                "how": self.how,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `to_json` wrote.

        Raises:
            UserError: it is damaged, or of a schema that is not known here.
        """
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise UserError(
                    f"the calibration has schema {data['schema']!r} and this version reads {SCHEMA}; "
                    "fit it again with: patarm-lite calibrate"
                )
            found = cls(
                float(data["slope"]),
                tuple((float(score), float(share)) for score, share in data["percentiles"]),
                int(data["pairs"]),
                dict(data["how"]),
            )
        except (KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
            raise _damaged(f"{type(error).__name__}: {error}") from None
        if not (math.isfinite(found.slope) and found.slope >= 0 and found.pairs >= 0):
            raise _damaged(f"slope {found.slope!r}, pairs {found.pairs!r}")
        rows = found.percentiles
        if not rows or not all(math.isfinite(score) and 0 <= share <= 1 for score, share in rows):
            raise _damaged("its table of percentiles")
        if any(a[0] >= b[0] or a[1] > b[1] for a, b in itertools.pairwise(rows)):
            raise _damaged("its table of percentiles does not rise")
        return found


def _damaged(what: str) -> UserError:
    return UserError(f"the calibration is damaged ({what[:120]!r}); fit it again with: patarm-lite calibrate")


def side_score(votes: Sequence[Vote], kind: str) -> float | None:
    """A side's score: the mean over its readable votes of the `sampled` or the `expected` scores; None without any."""
    readable = [vote for vote in votes if vote.verdict.score is not None]
    values = [vote.verdict.score if kind == "sampled" else vote.expected for vote in readable]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def observe(judged: Sequence[JudgedPair]) -> Observed:
    """Gaps (chosen minus rejected, so every outcome is 1) and scores of judged pairs."""
    gaps, scores, expected, unreadable = [], [], 0, 0
    for j in judged:
        sampled = [side_score(side, "sampled") for side in (j.chosen, j.rejected)]
        better = [side_score(side, "expected") for side in (j.chosen, j.rejected)]
        scores += [s if e is None else e for e, s in zip(better, sampled, strict=True) if s is not None]
        if better[0] is not None and better[1] is not None:
            gaps.append(better[0] - better[1])
            expected += 1
        elif sampled[0] is not None and sampled[1] is not None:
            gaps.append(sampled[0] - sampled[1])
        else:
            unreadable += 1
    return Observed(
        np.array(gaps, dtype=float), np.ones(len(gaps)), np.array(scores, dtype=float), expected, unreadable
    )


def fit(
    gaps: Sequence[float] | Floats, outcomes: Sequence[float] | Floats, scores: Sequence[float] | Floats
) -> Calibration:
    """Fit both curves.

    Args:
        gaps: [N] score gaps. outcomes: [N], 1 where the one with the higher score by `gap` was preferred, else 0.
        scores: of all judged responses.

    The slope maximises the likelihood of the outcomes and of one more pair, half won and half lost, whose gap is the
    median of the gaps that are not 0. This prior weighs one pair in N; with all pairs right it keeps the slope finite:
    N equal gaps then get P = (N + 1/2) / (N + 1).

    Raises:
        UserError: fewer than 10 gaps.

    >>> round(fit([2.0] * 19, [1.0] * 19, [5.0, 7.0] * 19).p_preferred(2.0), 9)           # (19 + 1/2) / 20
    0.975
    """
    gap, outcome, score = (np.asarray(values, dtype=float) for values in (gaps, outcomes, scores))
    if gap.shape != outcome.shape:
        raise ValueError(f"{len(gap)} gaps against {len(outcome)} outcomes")
    if len(gap) < FEWEST:
        raise UserError(
            f"a calibration needs at least {FEWEST} readable pairs a half and found {len(gap)}; give more pairs"
        )
    return Calibration(_slope(gap, outcome), _percentiles(score), len(gap))


def _slope(gap: Floats, outcome: Floats) -> float:
    """Newton's method on a concave function of one number, steps halved until they climb."""
    away = np.abs(gap[gap != 0])
    if not len(away):
        return 0.0
    prior = float(np.median(away))
    gap, outcome, weight = np.r_[gap, prior], np.r_[outcome, 0.5], np.r_[np.ones(len(gap)), 1.0]

    def likelihood(slope: float) -> float:
        return -float(weight @ (outcome * _softplus(-slope * gap) + (1 - outcome) * _softplus(slope * gap)))

    slope, value = 0.0, likelihood(0.0)
    for _ in range(100):
        p = _sigmoid(slope * gap)
        gradient, curvature = float((weight * (outcome - p)) @ gap), float((weight * p * (1 - p)) @ gap**2)
        if slope == 0 and gradient <= 0:
            return 0.0
        step = gradient / max(curvature, 1e-300)
        while (better := likelihood(max(0.0, slope + step))) < value and abs(step) > 1e-12 * (1 + slope):
            step /= 2
        slope, value = max(0.0, slope + step), max(value, better)
        if abs(step) <= 1e-10 * (1 + slope):
            break
    return slope


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(np.exp(-_softplus(-x)), dtype=float)


def _softplus(x: Floats) -> Floats:
    """log(1 + exp(x)), for any x."""
    return np.asarray(np.logaddexp(0.0, x), dtype=float)


def _percentiles(scores: Floats) -> tuple[tuple[float, float], ...]:
    """Distinct scores with the share below each, equal ones half; of many, those at equal steps of the share."""
    if not len(scores):
        raise UserError("a calibration needs scores and found none; judge pairs that the judge can read")
    values, counts = np.unique(scores, return_counts=True)
    shares = (np.cumsum(counts) - counts / 2) / len(scores)
    if len(values) > TABLE:
        keep = np.unique(np.searchsorted(shares, np.linspace(shares[0], shares[-1], TABLE)))
        values, shares = values[keep], shares[keep]
    return tuple(zip(values.tolist(), shares.tolist(), strict=True))


def check(
    calibration: Calibration, gaps: Sequence[float] | Floats, outcomes: Sequence[float] | Floats
) -> dict[str, float]:
    """How good P(preferred) is on pairs that the fit did not see.

    `log_loss` (nats a pair; the coin's is log 2) and `calibration_error`: the expected calibration error of the side
    the judge favours, over 10 equal bins of its probability from 0.5 to 1; `_coin`: what saying 0.5 of that side
    would have.
    """
    gap, outcome = np.asarray(gaps, dtype=float), np.asarray(outcomes, dtype=float)
    signed = calibration.slope * gap
    loss = outcome * _softplus(-signed) + (1 - outcome) * _softplus(signed)
    confidence = _sigmoid(np.abs(signed))
    right = np.where(gap > 0, outcome, np.where(gap < 0, 1 - outcome, 0.5))
    bins = np.minimum((2 * BINS * (confidence - 0.5)).astype(int), BINS - 1)
    return {
        "pairs": len(gap),
        "log_loss": float(loss.mean()),
        "log_loss_coin": math.log(2),
        "calibration_error": _bin_error(confidence, right, bins),
        "calibration_error_coin": abs(float(right.mean()) - 0.5),
    }


def _bin_error(confidence: Floats, right: Floats, bins: NDArray[np.int64]) -> float:
    off = np.bincount(bins, weights=confidence - right, minlength=BINS)
    return float(np.abs(off).sum() / len(confidence))
