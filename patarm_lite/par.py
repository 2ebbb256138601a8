"""Preference-Aware Reward (PAR): "this response was preferred" as a reward for every sampled judgement.

Pure functions on the scores of one pair's two groups: `chosen[i]` and `rejected[j]` are the sampled scores (numbers
on the scale 1 to 10; None where the judgement had a problem). A None is never a score: it is left out of the means
and gets no preference reward. Comparisons are exact, in fractions, so that a tie is a tie. Source: PaTaRM (arXiv
2510.24235); its exact formula was not seen by us, the forms here are our reading (`docs/par.md`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from patarm_lite.errors import UserError, nearest
from patarm_lite.records import Verdict

Score = int | float | Fraction | None
Scores = Sequence[Score]
Rewards = list[float]
_Exact = list[Fraction | None]

CONSTANT = 1.3
NEAR, FAR, NEAR_DISTANCE = 1.2, 1.4, 2
CAP = 3
TAU = 2.0
TAGS_PENALTY = -1.5
SCORE_PENALTY = -1.0
FAULT_PENALTY, MOST_FAULT_PENALTY = -0.25, -0.75
SCORE_PROBLEMS = frozenset({"no_score", "not_an_integer", "out_of_range"})
LOWEST, HIGHEST = TAGS_PENALTY + MOST_FAULT_PENALTY, FAR
"""Bounds of preference and format reward together. -1.5 is the lowest that occurs: a problem excludes faults."""


def constant(distance: Fraction) -> float:
    """1.3 at any distance above 0."""
    return CONSTANT


def graded(distance: Fraction) -> float:
    """1.2 up to a distance of 2, 1.4 beyond."""
    return NEAR if distance <= NEAR_DISTANCE else FAR


def saturating(distance: Fraction) -> float:
    """The distance over 3, at most 1."""
    return float(min(distance / CAP, Fraction(1)))


def _against_mean(margin: Callable[[Fraction], float]) -> Callable[[_Exact, list[Fraction], int], Rewards]:
    """`margin` of the distance to the other side's mean, on the right side of it; 0 at it and on the wrong side."""

    def side(own: _Exact, other: list[Fraction], sign: int) -> Rewards:
        mean = sum(other, Fraction(0)) / len(other)
        distances = [None if score is None else sign * (score - mean) for score in own]
        return [0.0 if distance is None or distance <= 0 else margin(distance) for distance in distances]

    return side


def _auc(own: _Exact, other: list[Fraction], sign: int) -> Rewards:
    """Share of the other side's scores beaten, ties half."""

    def beaten(score: Fraction) -> float:
        return sum(1.0 if sign * (score - o) > 0 else 0.5 if score == o else 0.0 for o in other) / len(other)

    return [0.0 if score is None else beaten(score) for score in own]


def _bradley_terry(own: _Exact, other: list[Fraction], sign: int) -> Rewards:
    """Mean over the other side of sigmoid(difference / 2)."""

    def mean_win(score: Fraction) -> float:
        return math.fsum(1 / (1 + math.exp(-sign * float(score - o) / TAU)) for o in other) / len(other)

    return [0.0 if score is None else mean_win(score) for score in own]


FORMS: dict[str, Callable[[_Exact, list[Fraction], int], Rewards]] = {
    "graded": _against_mean(graded),
    "constant": _against_mean(constant),
    "saturating": _against_mean(saturating),
    "auc": _auc,
    "bradley_terry": _bradley_terry,
}


def par_rewards(
    chosen: Scores,
    rejected: Scores,
    form: str = "graded",
    chosen_reference: Scores | None = None,
    rejected_reference: Scores | None = None,
) -> tuple[Rewards, Rewards]:
    """Preference reward of every rollout of one pair.

    Args:
        chosen: n scores of the chosen response's rollouts, None for a judgement with a problem.
        rejected: the same for the rejected response.
        form: `graded` or `constant` (PAR), or an alternative: `saturating`, `auc`, `bradley_terry`.
        chosen_reference: what the *rejected* side is compared with, where that is not `chosen` itself
            (expected instead of sampled scores, say); `rejected_reference` likewise.

    Returns:
        Rewards of the chosen and of the rejected rollouts, in order. If one side is wholly unreadable the other
        gets 0 throughout. Bounds: `graded` 0 or [1.2, 1.4], `constant` 0 or 1.3, `saturating` and `auc` [0, 1],
        `bradley_terry` (0, 1) and 0 for a None.

    Raises:
        UserError: for an unknown form.

    >>> par_rewards([8, 6, None], [5, 7, 6])         # means 7 and 6: 8 > 6 by 2, 6 = 6 is a tie, 5 < 7 by 2
    ([1.2, 0.0, 0.0], [1.2, 0.0, 1.2])
    >>> par_rewards([9, 3], [5, 5], form="constant")
    ([1.3, 0.0], [1.3, 1.3])
    >>> par_rewards([9, 5], [5, 1], form="auc")
    ([1.0, 0.75], [0.75, 1.0])
    >>> par_rewards([9, 6], [5, 5], form="saturating")
    ([1.0, 0.3333333333333333], [0.8333333333333334, 0.8333333333333334])
    >>> par_rewards([6, 6], [6, 6], form="bradley_terry")
    ([0.5, 0.5], [0.5, 0.5])
    >>> par_rewards([None, None], [1, 2])
    ([0.0, 0.0], [0.0, 0.0])
    """
    side = FORMS.get(form)
    if side is None:
        raise UserError(f"PAR form {form!r} is not one of {', '.join(FORMS)}.{nearest(form, FORMS)}")
    against_chosen = chosen if chosen_reference is None else chosen_reference
    against_rejected = rejected if rejected_reference is None else rejected_reference

    def rewards(own: Scores, other: Scores, sign: int) -> Rewards:
        known = [score for score in _exact(other) if score is not None]
        return side(_exact(own), known, sign) if known else [0.0] * len(own)

    return rewards(chosen, against_rejected, 1), rewards(rejected, against_chosen, -1)


def _exact(scores: Scores) -> _Exact:
    return [None if score is None else Fraction(score) for score in scores]


def format_reward(verdict: Verdict) -> float:
    """Penalty for the form of one judgement, in [-1.5, 0].

    -1.5 for a frame that is broken, -1.0 for a sound frame without a legal score, -0.25 per fault, at most -0.75.

    >>> format_reward(Verdict(None, "truncated")), format_reward(Verdict(None, "out_of_range"))
    (-1.5, -1.0)
    >>> format_reward(Verdict(7)), format_reward(Verdict(7, faults=("criteria_count",)))
    (0.0, -0.25)
    """
    if verdict.problem is not None:
        return SCORE_PENALTY if verdict.problem in SCORE_PROBLEMS else TAGS_PENALTY
    if not verdict.faults:
        return 0.0
    return max(FAULT_PENALTY * len(verdict.faults), MOST_FAULT_PENALTY)


def implied_score(verdict: Verdict) -> Fraction | None:
    """The score that a judgement's own findings imply: the weighted mean of its criterion scores.

    None for an unreadable judgement, for one none of whose criteria is both weighed and scored, and for one that
    names a criterion twice: which weight or score would count is not ours to guess.

    >>> from patarm_lite.records import Criterion, CriterionScore
    >>> v = Verdict(9, None, (Criterion("a", "", 1), Criterion("b", "", 3)),
    ...             (CriterionScore("a", "", 10), CriterionScore("b", "", 2)))
    >>> implied_score(v)
    Fraction(4, 1)
    """
    if verdict.score is None or "duplicate_criterion" in verdict.faults:
        return None
    weights = {criterion.name: criterion.weight for criterion in verdict.rubric}
    scored = [(weights[line.name], line.score) for line in verdict.criterion_scores if line.name in weights]
    if not scored:
        return None
    return Fraction(sum(weight * score for weight, score in scored), sum(weight for weight, _ in scored))


def preference_rewards(
    chosen: Sequence[Verdict],
    rejected: Sequence[Verdict],
    form: str = "graded",
    findings: float = 0.0,
    chosen_reference: Scores | None = None,
    rejected_reference: Scores | None = None,
) -> tuple[Rewards, Rewards]:
    """PAR of one pair's verdicts, with a share of it paid for what the findings say.

    The references are those of `par_rewards`, for the written scores; implied scores are compared with implied ones.

    PAR pays for the final score alone, and the findings written before it were seen to drift from the truth while
    accuracy held. With `findings` = w in [0, 1] the reward is (1 - w) PAR(scores) + w PAR(implied scores): the
    preference must also be visible in the criterion scores. The bounds stay those of PAR; w = 0 is plain PAR.

    Raises:
        UserError: for an unknown form or a share outside [0, 1].

    >>> from patarm_lite.records import Criterion, CriterionScore
    >>> rubric = (Criterion("a", "", 1),)
    >>> good = Verdict(8, None, rubric, (CriterionScore("a", "", 9),))
    >>> hollow = Verdict(8, None, rubric, (CriterionScore("a", "", 2),))   # the score wins, the finding does not
    >>> poor = Verdict(3, None, rubric, (CriterionScore("a", "", 2),))
    >>> preference_rewards([good, hollow], [poor, poor], findings=0.5)
    ([1.4, 0.7], [1.4, 1.4])
    """
    written = [v.score for v in chosen], [v.score for v in rejected]
    scores = par_rewards(*written, form, chosen_reference, rejected_reference)
    if not 0 <= findings <= 1:
        raise UserError(f"findings={findings} is not a share; give a number from 0 to 1 (0: plain PAR)")
    if findings == 0:
        return scores
    implied = par_rewards([implied_score(v) for v in chosen], [implied_score(v) for v in rejected], form)
    first, second = (
        [_mix(a, b, findings) for a, b in zip(own, own_implied, strict=True)]
        for own, own_implied in zip(scores, implied, strict=True)
    )
    return first, second


def _mix(a: float, b: float, share: float) -> float:
    """(1 - share) a + share b, rounded once, so that it never leaves [a, b] and equal parts give equal rewards."""
    w = Fraction(share)
    return float((1 - w) * Fraction(a) + w * Fraction(b))
