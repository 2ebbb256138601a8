"""Judged pairs -> accuracy with intervals, ties, unreadable shares, correlations; and their JSONL form. Numpy only.

The rule throughout: a judgement that can't be read is never a score. All pairs stand in the denominator of
`accuracy`, a tie earns half, a pair with an unreadable side earns nothing; what the judge would have with the readable
pairs alone stands beside it and never in its place. Intervals are 95 % percentile bootstraps over prompts: the pairs
of one prompt are drawn together, since they are not independent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from patarm_lite.errors import UserError
from patarm_lite.records import Criterion, CriterionScore, JudgedPair, Pair, Turn, Verdict, Vote

ScoreKind = Literal["sampled", "mean", "expected"]
Floats = NDArray[np.float64]

DRAWS = 2000
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap draws."""
CELLS = 4_000_000
"""Draws x prompts held in memory at once."""
LEAST_MASS = 0.5
"""Below this probability of a legal score there is no expected score."""
SIDES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy of a judge on pairs, with what stands beside it.

    `value` has all pairs in the denominator and `low`, `high` are its interval. `readable` is the same over readable
    pairs only (None where there are none), `ties` the share of all pairs that tied (of vote-pairs, for `sampled`),
    `n` the number of pairs.
    """

    value: float
    low: float
    high: float
    readable: float | None
    ties: float
    n: int


@dataclass(frozen=True, slots=True)
class _Outcomes:
    """Per pair, over its comparisons (k for `sampled`, else 1): what was earned, readable and tied. [N] each."""

    earned: Floats
    readable: Floats
    tied: Floats
    comparisons: int


# --- accuracy ---


def accuracy(judged: Sequence[JudgedPair], score: ScoreKind = "sampled", seed: int = 0) -> Accuracy:
    """Share of pairs whose chosen response gets the higher score; ties half, unreadable nothing.

    Args:
        judged: N pairs with k votes a side.
        score: `sampled`: vote i of one side against vote i of the other, averaged over the k votes, so each index is
            the accuracy of a single judgement. `mean`: the mean of a side's readable votes (vote@k). `expected`: the
            mean of the readable votes' expected scores; a side without any counts as unreadable.
        seed: of the bootstrap.

    Raises:
        UserError: no pairs, or a pair whose sides have no votes or not the same number.

    >>> def side(*scores): return tuple(Vote(Verdict(s, None if s else "truncated"), "") for s in scores)
    >>> pair = Pair((Turn("user", "q"),), "a", "b")
    >>> votes = [JudgedPair(pair, side(9, 5), side(5, 5)), JudgedPair(pair, side(9, None), side(2, 2))]
    >>> accuracy(votes).value, accuracy(votes).readable      # 1 + 1/2 + 1 + 0 of 4; of the 3 readable
    (0.625, 0.8333333333333334)
    >>> accuracy(votes, "mean").value                        # 7 > 5 and 9 > 2
    1.0
    """
    outcomes = _outcomes(judged, score)
    low, high = _interval(_resampled(judged, [outcomes.earned], seed)[0])
    comparisons = len(judged) * outcomes.comparisons
    readable = outcomes.readable.sum()
    return Accuracy(
        value=float(outcomes.earned.mean()),
        low=low,
        high=high,
        readable=float(outcomes.earned.sum() * outcomes.comparisons / readable) if readable else None,
        ties=float(outcomes.tied.sum() / comparisons),
        n=len(judged),
    )


def paired_difference(
    before: Sequence[JudgedPair], after: Sequence[JudgedPair], score: ScoreKind = "sampled", seed: int = 0
) -> tuple[float, float, float]:
    """Accuracy after minus before on the same pairs, with its interval: (difference, low, high).

    Both accuracies of a draw come from the same prompts, so what makes a prompt hard cancels out.

    Raises:
        UserError: the two lists are not the same pairs in the same order.
    """
    if [_identity(j.pair) for j in before] != [_identity(j.pair) for j in after]:
        raise UserError(
            f"a paired difference needs the same pairs in the same order; found {len(before)} before and {len(after)} "
            "after that are not; judge both with the same pair file"
        )
    change = _outcomes(after, score).earned - _outcomes(before, score).earned
    low, high = _interval(_resampled(before, [change], seed)[0])
    return float(change.mean()), low, high


def _identity(pair: Pair) -> tuple[object, ...]:
    return pair.id, pair.prompt, pair.chosen, pair.rejected


def earned(judged: Sequence[JudgedPair], score: ScoreKind = "sampled") -> Floats:
    """What each pair earns, [N]; its mean is `accuracy`.

    Raises:
        UserError: see `accuracy`.
    """
    return _outcomes(judged, score).earned


def longer_wins(pairs: Sequence[Pair]) -> dict[str, float]:
    """Accuracy of the rule "the longer response wins", by words and by characters; equal lengths earn half.

    >>> longer_wins([Pair((), "one two", "a"), Pair((), "I am", "verylongword")])
    {'words': 1.0, 'characters': 0.5}
    """
    if not pairs:
        raise UserError("there are no pairs to measure; the rule 'the longer one wins' needs at least one")

    def rule(length: Callable[[str], int]) -> float:
        differences = [length(pair.chosen) - length(pair.rejected) for pair in pairs]
        return sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences) / len(pairs)

    return {"words": rule(words), "characters": rule(len)}


def _outcomes(judged: Sequence[JudgedPair], score: ScoreKind) -> _Outcomes:
    votes(judged)
    if score == "sampled":
        sides = [[(_sampled(c), _sampled(r)) for c, r in zip(j.chosen, j.rejected, strict=True)] for j in judged]
    elif score == "mean":
        sides = [[(_mean(j.chosen), _mean(j.rejected))] for j in judged]
    elif score == "expected":
        sides = [[(_mean_expected(j.chosen), _mean_expected(j.rejected))] for j in judged]
    else:
        raise UserError(f"score {score!r} is not one of sampled, mean, expected")
    earned, readable, tied = np.zeros(len(judged)), np.zeros(len(judged)), np.zeros(len(judged))
    for index, comparisons in enumerate(sides):
        known = [(c, r) for c, r in comparisons if c is not None and r is not None]
        wins, ties = sum(c > r for c, r in known), sum(c == r for c, r in known)
        earned[index] = (wins + 0.5 * ties) / len(comparisons)
        readable[index], tied[index] = len(known), ties
    return _Outcomes(earned, readable, tied, len(sides[0]))


def votes(judged: Sequence[JudgedPair]) -> int:
    """k: the number of votes each side of each pair has.

    Raises:
        UserError: there are no pairs, a side has no votes, or not all sides have the same number.
    """
    if not judged:
        raise UserError("there are no judged pairs to measure; judge at least one pair first")
    k = len(judged[0].chosen)
    for j in judged:
        if len(j.chosen) != k or len(j.rejected) != k or k == 0:
            raise UserError(
                f"pair {j.pair.id!r} has {len(j.chosen)} votes on the chosen and {len(j.rejected)} on the rejected "
                f"side, others {k}; votes are matched by index, so every side needs the same number, at least 1"
            )
    return k


def _sampled(vote: Vote) -> float | None:
    return vote.verdict.score


def _mean(side: Sequence[Vote]) -> float | None:
    """Mean of the readable votes. Quotients of small integers: equal means are equal floats."""
    scores = [vote.verdict.score for vote in side if vote.verdict.score is not None]
    return sum(scores) / len(scores) if scores else None


def _mean_expected(side: Sequence[Vote]) -> float | None:
    scores = [v.expected for v in side if v.verdict.score is not None and v.expected is not None]
    return sum(scores) / len(scores) if scores else None


def _resampled(judged: Sequence[JudgedPair], values: Sequence[Floats], seed: int) -> list[Floats]:
    """Means of each per-pair value over bootstrap draws of prompts: a list of [DRAWS]."""
    groups: dict[tuple[Turn, ...], int] = {}
    group = np.array([groups.setdefault(j.pair.prompt, len(groups)) for j in judged])
    size = np.bincount(group).astype(float)
    sums = [np.bincount(group, weights=value) for value in values]
    rng = np.random.default_rng(seed)
    means: list[list[Floats]] = [[] for _ in values]
    block = max(1, CELLS // len(groups))
    for start in range(0, DRAWS, block):
        drawn = rng.integers(0, len(groups), size=(min(block, DRAWS - start), len(groups)))
        pairs = size[drawn].sum(axis=1)
        for into, total in zip(means, sums, strict=True):
            into.append(total[drawn].sum(axis=1) / pairs)
    return [np.concatenate(blocks) for blocks in means]


def _interval(draws: Floats) -> tuple[float, float]:
    low, high = np.percentile(draws, INTERVAL)
    return float(low), float(high)


# --- judgements ---


def judgements(judged: Iterable[JudgedPair]) -> list[Vote]:
    """Every vote of both sides, in order."""
    return [vote for j in judged for side in (j.chosen, j.rejected) for vote in side]


def unreadable(judged: Sequence[JudgedPair]) -> float:
    """Share of judgements without a score."""
    return _share([vote.verdict.score is None for vote in judgements(judged)])


def problems(judged: Sequence[JudgedPair]) -> Counter[str]:
    """Why judgements could not be read: problem -> number of judgements."""
    return Counter(vote.verdict.problem for vote in judgements(judged) if vote.verdict.problem is not None)


def faults(judged: Sequence[JudgedPair]) -> Counter[str]:
    """Flaws in readable judgements: fault -> number of judgements that have it."""
    return Counter(fault for vote in judgements(judged) for fault in vote.verdict.faults)


def faulty(judged: Sequence[JudgedPair]) -> float:
    """Share of judgements that have a score and at least one fault."""
    return _share([bool(vote.verdict.faults) for vote in judgements(judged)])


def _share(flags: Sequence[bool]) -> float:
    if not flags:
        raise UserError("there are no judgements to measure; judge at least one pair first")
    return sum(flags) / len(flags)


# --- correlations ---


def words(text: str) -> int:
    """Length of a response in words: runs without white space."""
    return len(text.split())


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation with average ranks for ties; None when either side is constant or n < 2.

    >>> round(spearman([1, 2, 3, 4], [10, 30, 20, 40]), 12)          # 1 - 6 * 2 / (4 * 15)
    0.8
    >>> spearman([1, 2], [5, 5]) is None
    True
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values against {len(y)}")
    if len(x) < 2:
        return None
    a, b = (ranks - ranks.mean() for ranks in (average_ranks(x), average_ranks(y)))
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread > 0 else None


def average_ranks(values: Sequence[float]) -> Floats:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, place, count = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    shared: Floats = ((last - count + 1 + last) / 2)[place]
    return shared


def spearman_length(judged: Sequence[JudgedPair]) -> float | None:
    """Rank correlation of a response's score (mean of its readable votes) with its length in words."""
    return _with_score(judged, lambda pair, side: words(getattr(pair, side)))


def spearman_quality(judged: Sequence[JudgedPair]) -> float | None:
    """The same with true quality, where `meta` states it (`chosen_quality`, `rejected_quality`); else None."""
    return _with_score(judged, lambda pair, side: pair.meta.get(f"{side}_quality"))


def _with_score(judged: Sequence[JudgedPair], value: Callable[[Pair, str], float | None]) -> float | None:
    points = []
    for j in judged:
        for side in SIDES:
            score, other = _mean(getattr(j, side)), value(j.pair, side)
            if score is not None and other is not None:
                points.append((score, float(other)))
    return spearman([score for score, _ in points], [other for _, other in points])


# --- expected score ---


def expected_score(
    p_by_digit: Sequence[float], p_zero_after_one: float, p_close_after_one: float, p_ten: float = 0.0
) -> tuple[float | None, float]:
    """Expected score from the score tokens' probabilities, and the mass it stands on.

    Args:
        p_by_digit: P("1") to P("9") at the position after `<score>`, temperature 1, no grammar.
        p_zero_after_one: P("0" | "1"): a one that becomes a ten.
        p_close_after_one: P(first token of `</score>` | "1"): a one that stays a one.
        p_ten: P("10") where that is one token, as in Llama 3's vocabulary.

    Returns:
        (sum of k p_k / mass, mass), with None for the score when the mass is below 0.5.

    >>> expected, mass = expected_score([0.6] + [0.05] * 8, p_zero_after_one=0.9, p_close_after_one=0.1)
    >>> round(expected, 2), round(mass, 2)           # the sum that takes P("1") for a one and a ten gives 8.20
    (7.66, 1.0)
    >>> expected_score([0.2] + [0.01] * 8, 0.5, 0.5)[0] is None
    True
    """
    if len(p_by_digit) != 9:
        raise ValueError(f"{len(p_by_digit)} probabilities given for the digits 1 to 9")
    one, *others = p_by_digit
    p = [one * p_close_after_one, *others, one * p_zero_after_one + p_ten]
    mass = float(sum(p))
    if mass < LEAST_MASS:
        return None, mass
    return float(sum(k * p_k for k, p_k in enumerate(p, 1))) / mass, mass


# --- summary ---


def summarise(judged: Sequence[JudgedPair], seed: int = 0) -> dict[str, Any]:
    """Everything a run says of a judge on held-out pairs, as plain JSON values.

    Keys: `accuracy` (one judgement) with `low`, `high`; `accuracy_mean{k}` with `_low`, `_high`; `accuracy_readable`,
    `accuracy_expected` (None where no expected scores were taken); `ties`, `unreadable`, `faulty` (shares);
    `problems` (counts); `spearman_quality`, `spearman_length`; `tokens_mean`; `rows` by task, set, gap, length and
    source.
    """
    k = votes(judged)
    one, mean = accuracy(judged, "sampled", seed), accuracy(judged, "mean", seed)
    expected = accuracy(judged, "expected", seed)
    return {
        "accuracy": one.value,
        "low": one.low,
        "high": one.high,
        f"accuracy_mean{k}": mean.value,
        f"accuracy_mean{k}_low": mean.low,
        f"accuracy_mean{k}_high": mean.high,
        "accuracy_readable": one.readable,
        "accuracy_expected": expected.value if expected.readable is not None else None,
        "ties": one.ties,
        "unreadable": unreadable(judged),
        "problems": dict(problems(judged).most_common()),
        "faulty": faulty(judged),
        "spearman_quality": spearman_quality(judged),
        "spearman_length": spearman_length(judged),
        "tokens_mean": float(np.mean([vote.tokens for vote in judgements(judged)])),
        "rows": {name: _row(part, seed) for name, part in slices(judged).items()},
    }


def slices(judged: Sequence[JudgedPair]) -> dict[str, list[JudgedPair]]:
    """The pairs by task, set, gap, length and (where there are several) source: row name -> its pairs.

    `set` and `gap` (criteria apart) come from `meta`, where the source states them. `length=matched` is an equal
    number of words.
    """
    keys: list[Callable[[Pair], str | None]] = [
        lambda pair: f"task={pair.task}",
        lambda pair: f"set={pair.meta['set']}" if pair.meta.get("set") is not None else None,
        lambda pair: f"gap={pair.meta['gap']}" if pair.meta.get("gap") is not None else None,
        lambda pair: f"length={_length_sign(pair)}",
    ]
    if len({j.pair.source for j in judged}) > 1:
        keys.append(lambda pair: f"source={pair.source or 'not stated'}")
    rows: dict[str, list[JudgedPair]] = {}
    for key in keys:
        found: dict[str, list[JudgedPair]] = {}
        for j in judged:
            name = key(j.pair)
            if name is not None:
                found.setdefault(name, []).append(j)
        rows |= {name: found[name] for name in sorted(found)}
    return rows


def _length_sign(pair: Pair) -> str:
    difference = words(pair.chosen) - words(pair.rejected)
    return "matched" if difference == 0 else "chosen longer" if difference > 0 else "chosen shorter"


def _row(judged: Sequence[JudgedPair], seed: int) -> dict[str, Any]:
    one = accuracy(judged, "sampled", seed)
    return {
        "n": one.n,
        "accuracy": one.value,
        "low": one.low,
        "high": one.high,
        f"accuracy_mean{votes(judged)}": accuracy(judged, "mean", seed).value,
        "ties": one.ties,
        "unreadable": unreadable(judged),
    }


# --- JSONL ---


def pair_to_row(pair: Pair) -> dict[str, Any]:
    """A pair as one line of a run folder's `heldout.jsonl`."""
    row: dict[str, Any] = {
        "id": pair.id,
        "task": pair.task,
        "prompt": [{"role": turn.role, "content": turn.content} for turn in pair.prompt],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "source": pair.source,
        "meta": dict(pair.meta),
    }
    return row if pair.reference is None else row | {"reference": pair.reference}


def row_to_pair(row: Mapping[str, Any]) -> Pair:
    """A pair from one line of `heldout.jsonl`."""
    try:
        return Pair(
            prompt=tuple(Turn(turn["role"], turn["content"]) for turn in row["prompt"]),
            chosen=row["chosen"],
            rejected=row["rejected"],
            task=row["task"],
            id=row["id"],
            source=row["source"],
            reference=row.get("reference"),
            meta=dict(row["meta"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"held-out pair {row.get('id', '?')!r} is damaged: {_missing(error)}; evaluate again") from None


def judged_to_rows(judged: Iterable[JudgedPair]) -> list[dict[str, Any]]:
    """Judged pairs as lines of `heldout_before.jsonl`: one a vote."""
    return [
        {"pair": j.pair.id, "side": side, "vote": k, **_vote_to_row(vote)}
        for j in judged
        for side in SIDES
        for k, vote in enumerate(getattr(j, side))
    ]


def rows_to_judged(rows: Iterable[Mapping[str, Any]], pairs: Sequence[Pair]) -> list[JudgedPair]:
    """Judged pairs from lines of `heldout_before.jsonl` and the pairs they name, in the order of `pairs`.

    Raises:
        UserError: a damaged line, a vote for an unknown pair or given twice, a missing vote, an id that two pairs have.
    """
    if len({pair.id for pair in pairs}) < len(pairs):
        twice = next(name for name, count in Counter(pair.id for pair in pairs).items() if count > 1)
        raise UserError(f"two held-out pairs have the id {twice!r}; votes are matched by id, so ids must differ")
    found: dict[tuple[str, str], dict[int, Vote]] = {(pair.id, side): {} for pair in pairs for side in SIDES}
    for number, row in enumerate(rows, 1):
        try:
            place, k, vote = (row["pair"], row["side"]), int(row["vote"]), _row_to_vote(row)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"judgement {number} is damaged: {_missing(error)}; evaluate again") from None
        if place not in found:
            raise UserError(f"judgement {number} is of {place[1]!r} of pair {place[0]!r}, which is not among the pairs")
        if k in found[place]:
            raise UserError(f"judgement {number}: vote {k} of {place[1]!r} of pair {place[0]!r} is given twice")
        found[place][k] = vote
    for (name, side), by_vote in found.items():
        if not by_vote or sorted(by_vote) != list(range(len(by_vote))):
            raise UserError(
                f"pair {name!r}, {side}: found votes {sorted(by_vote)}, expected them from 0 without a gap; "
                "evaluate again"
            )

    def side_votes(pair: Pair, side: str) -> tuple[Vote, ...]:
        by_vote = found[pair.id, side]
        return tuple(by_vote[k] for k in sorted(by_vote))

    return [JudgedPair(pair, side_votes(pair, "chosen"), side_votes(pair, "rejected")) for pair in pairs]


def _vote_to_row(vote: Vote) -> dict[str, Any]:
    verdict = vote.verdict
    return {
        "score": verdict.score,
        "problem": verdict.problem,
        "faults": list(verdict.faults),
        "rubric": [{"name": c.name, "description": c.description, "weight": c.weight} for c in verdict.rubric],
        "criterion_scores": [
            {"name": c.name, "finding": c.finding, "score": c.score} for c in verdict.criterion_scores
        ],
        "expected": vote.expected,
        "mass": vote.mass,
        "tokens": vote.tokens,
        "text": vote.text,
    }


def _row_to_vote(row: Mapping[str, Any]) -> Vote:
    score, problem = row["score"], row["problem"]
    readable = problem is None and type(score) is int and 1 <= score <= 10
    if not (readable or (score is None and isinstance(problem, str))):
        raise ValueError(f"score {score!r} with problem {problem!r}, expected a score from 1 to 10 or one problem")
    verdict = Verdict(
        score=score,
        problem=problem,
        rubric=tuple(Criterion(c["name"], c["description"], c["weight"]) for c in row["rubric"]),
        criterion_scores=tuple(CriterionScore(c["name"], c["finding"], c["score"]) for c in row["criterion_scores"]),
        faults=tuple(row["faults"]),
    )
    return Vote(verdict, row["text"], row["expected"], row["mass"], row["tokens"])


def _missing(error: Exception) -> str:
    return f"key {error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
