"""Adaptive voting: ask for more votes only until the answer is settled. Pure numpy; knows no judge and no file.

    votes = Votes(VotePlan(goal="order"), candidates=2)
    while due := votes.due():                       # [(candidate, indices of the votes wanted), ...], empty when done
        for place, indices in due:
            for index in indices:
                votes.add(place, index, judge(place, index))
    votes.outcome().order                           # candidates, best first

`in_rounds` does this for many groups of candidates at once, so that a backend's batches stay full.

**The rule.** What is asked for is what the judge would say with endless votes: the order of its mean scores. After
each round we ask how likely the order so far is wrong by more than `margin` points, given the readings (a vote's
expected score where measured, else the digits), and stop when that is at most `error`.

The likelihood needs a prior, and it is this one: before any vote, a candidate's votes may be spread over the scores
1 to 10 in any way, as a Dirichlet process with a uniform base and the weight of `doubt` votes says. In words: however
alike n votes are, there remains a share of about doubt / (doubt + n) of votes that were not seen yet and may be
anything from 1 to 10. So a gap of eight points takes one vote, one of a point some, one of half a point many. (A normal
model does not fit: judges repeat themselves and jump now and then, which two votes seldom show.)

**The error, truly.** Among settled answers, at most `error` are wrong by more than `margin` *on average over judges
and responses as the prior has them*, wherever the rule stops. It is no promise for a single response: of two votes no
rule can tell a judge that always says 9 from one that says 9 with a 3 now and then. Where true means are barely
further apart than `margin` and votes are wild, more are wrong: nearly half for the worst of the simulated judges of
benchmarks/votes.py, which also measures a judge of yours.

A group is over, settled or not, at `most` votes a candidate, and from `patience` votes on already where more votes like
those seen would not settle it: two equally good responses are not fought over to the end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from patarm_lite.errors import UserError
from patarm_lite.records import Vote

Goal = Literal["order", "best", "score"]
Reading = Literal["expected", "sampled"]
Floats = NDArray[np.float64]
T = TypeVar("T")

GOALS = ("order", "best", "score")
READINGS = ("expected", "sampled")
DRAWS = 4096
"""Draws from what is believed of each candidate. They are fixed, so equal votes give equal answers; a chance of 0.1
comes out within 0.01 of what endless draws would give."""
SEED = 20510
STICKS = 64
"""Parts that an unseen spread of votes is made of; what is left after them is below 1e-8 for any `doubt` up to 2."""
MOST, USUAL = 64, 16
"""Votes of a candidate at most, and those that tables of draws are made for unless there are more: 0.5 MB each."""
LEVELS = 10
LOWEST, HIGHEST = 1.0, 10.0
LIVE = 128
"""Groups that `in_rounds` has open at once: a first round of 128 pairs is 256 judgements, some batches full."""
HELD = 4
"""Times LIVE: groups that may be kept, the finished ones that wait for an earlier one included."""


@dataclass(frozen=True, slots=True)
class VotePlan:
    """When to stop asking.

    Attributes:
        goal: `order`: of all candidates. `best`: which is first. `score`: of each candidate by itself.
        least: readable votes of a candidate before anything is settled.
        most: votes of a candidate, readable or not.
        error: chance of a wrong answer at which it counts as settled; for a whole list, not for each two of it.
        margin: points. An order of two candidates is wrong only where their means differ the other way by more.
        half_width: points. A score is wrong where the mean of endless votes is further away.
        doubt: weight of the prior in votes. More doubt, more votes.
        patience: votes after which a candidate gets no more where votes like those seen would not settle its place
            even at `most`: two equally good responses. `most` switches this off.
        reading: what is read of a vote. `expected` falls back to the digits for all candidates of a group together,
            where one readable vote of theirs has no expected score.

    The defaults of `error`, `margin` and `doubt` were chosen on 960 pairs that the trained judge of `small` had not
    seen (the accuracy of 8 votes at 2.2 votes a response) and checked on those of another judge.

    Raises:
        UserError: a value out of range.
    """

    goal: Goal = "order"
    least: int = 1
    most: int = 16
    error: float = 0.1
    margin: float = 0.25
    half_width: float = 1.0
    doubt: float = 0.5
    patience: int = 8
    reading: Reading = "expected"

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise UserError(f"goal {self.goal!r} of adaptive voting is not one of {', '.join(GOALS)}")
        if self.reading not in READINGS:
            raise UserError(f"reading {self.reading!r} of a vote is not one of {', '.join(READINGS)}")
        if not 1 <= self.least <= self.most <= MOST:
            raise UserError(
                f"between {self.least} and {self.most} votes are not possible; choose 1 to {MOST}, "
                "the smaller number first"
            )
        if self.patience < 1:
            raise UserError(f"a patience of {self.patience} votes is not possible; choose 1 or more, as 8")
        if not 0 < self.error <= 0.5:
            raise UserError(f"an error of {self.error} can't be aimed at; choose one above 0 and up to 0.5, as 0.1")
        if not 0 <= self.margin < HIGHEST - LOWEST:
            raise UserError(f"a margin of {self.margin} points is not possible on scores from 1 to 10; 0.25 is usual")
        if not 0 < self.half_width < HIGHEST - LOWEST:
            raise UserError(f"a half-width of {self.half_width} points is not possible on scores from 1 to 10; try 1")
        if not 0 < self.doubt <= 2:
            raise UserError(f"a doubt of {self.doubt} votes is out of range; choose one above 0 and up to 2, as 0.5")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer so far.

    Attributes:
        order: candidates, best first, those without a readable vote last. Equal means stand in the order given.
        means: of each candidate's readings; None without a readable vote.
        wrong: chance that the answer is wrong, given the votes and the prior; 1 while a candidate has too few readable
            votes. With goal `score` the largest of the candidates'. Candidates without any are left out of it.
        settled: whether `wrong` is at most the plan's error and every candidate has a readable vote.
        votes: of each candidate, unreadable ones included.
        reading: what was read of the votes.
    """

    order: tuple[int, ...]
    means: tuple[float | None, ...]
    wrong: float
    settled: bool
    votes: tuple[int, ...]
    reading: Reading


# --- the rule ---


def chances(plan: VotePlan, readings: Sequence[Sequence[float]]) -> tuple[float, Floats]:
    """How likely the answer that some readings give is wrong, and each candidate's part in it.

    Args:
        readings: of each of C candidates, 1 to `most` numbers from 1 to 10.

    Returns:
        The chance that the answer is wrong, and for each candidate the chance that it is one of those that are in the
        wrong place (or whose score is wrong), [C].

    >>> plan = VotePlan()
    >>> chances(plan, [[10], [2]])[0] < 0.05 < 0.5 < chances(plan, [[7], [7]])[0]
    True
    >>> one, two, eight = (chances(plan, [[8] * n, [6] * n])[0] for n in (1, 2, 8))
    >>> one > two > eight
    True
    """
    means = [_mean(found) for found in readings]
    ranked = sorted(range(len(readings)), key=lambda place: (-means[place], sorted(readings[place])))
    believed = np.empty((DRAWS, len(readings)))
    for rank, place in enumerate(ranked):
        believed[:, rank] = _believed(readings[place], rank, plan.doubt)
    sorted_means = np.array([means[place] for place in ranked])
    if plan.goal == "score":
        misplaced = np.abs(believed - sorted_means) > plan.half_width
        shares = misplaced.mean(axis=0)
        wrong = float(shares.max(initial=0.0))
    else:
        misplaced = _misplaced(believed, sorted_means, plan)
        shares = misplaced.mean(axis=0)
        wrong = float(misplaced.any(axis=1).mean())
    by_place = np.empty(len(readings))
    by_place[ranked] = shares
    return wrong, by_place


def _misplaced(believed: Floats, means: Floats, plan: VotePlan) -> NDArray[np.bool_]:
    """Which candidates stand on the wrong side of another, in each draw: [DRAWS, C], best first.

    Where means are equal, either order may be reported, so both must be right.
    """
    leaders = int((means == means[0]).sum()) if plan.goal == "best" else len(means)
    found = np.zeros(believed.shape, bool)
    for first in range(leaders):
        others = [at for at in range(len(means)) if at > first or (at < first and means[at] == means[first])]
        above = believed[:, others] - believed[:, [first]] > plan.margin
        found[:, first] |= above.any(axis=1)
        found[:, others] |= above
    return found


def _believed(readings: Sequence[float], rank: int, doubt: float) -> Floats:
    """Draws of the mean of endless votes, given some: the seen ones and the unseen rest in random shares, [DRAWS]."""
    values = np.asarray(readings, float)
    unseen, weight, shares = _draws(doubt, rank, USUAL if len(values) <= USUAL else MOST)
    seen = shares[: len(values)]
    return (values @ seen + weight * unseen) / (seen.sum(axis=0) + weight)


@lru_cache(maxsize=64)
def _draws(doubt: float, rank: int, votes: int) -> tuple[Floats, Floats, Floats]:
    """Random parts of a candidate's belief: mean of the unseen votes and their weight, [DRAWS] each, and the weight of
    each seen vote, [votes, DRAWS]. Shares are weights over their sum, which makes them a Dirichlet's."""
    rng = np.random.default_rng([SEED, rank])
    unseen, weight = unseen_means(rng, DRAWS, doubt), rng.standard_gamma(doubt, DRAWS)
    return unseen, weight, rng.standard_exponential((votes, DRAWS))


def unseen_means(rng: np.random.Generator, count: int, doubt: float) -> Floats:
    """Means of random spreads of votes, as the prior has them, [count]: sticks broken off a whole, a score for each."""
    means, rest = np.zeros(count), np.ones(count)
    for _ in range(STICKS):
        part = rng.beta(1.0, doubt, count)
        means += rest * part * rng.integers(1, LEVELS + 1, count)
        rest *= 1 - part
    return np.asarray(means + rest * (LOWEST + HIGHEST) / 2)


def _mean(readings: Sequence[float]) -> float:
    return math.fsum(readings) / len(readings)


# --- one group of candidates ---


class Votes:
    """The votes of one group of candidates: which are due next, and what they say so far.

    Indices of a candidate's votes are 0, 1, 2, ..., so votes that a store has already are simply added when asked for.
    """

    def __init__(self, plan: VotePlan, candidates: int = 2) -> None:
        if candidates < 1:
            raise UserError("there are no candidates to vote on; give at least one response")
        self.plan = plan
        self._votes: list[dict[int, Vote]] = [{} for _ in range(candidates)]
        self._wanted = [plan.least] * candidates
        self._outcome: tuple[Outcome, list[int]] | None = None

    def add(self, place: int, index: int, vote: Vote) -> None:
        """Take a vote in, in any order."""
        if not 0 <= index < self.plan.most or index in self._votes[place]:
            raise ValueError(f"vote {index} of candidate {place} was not asked for or is here already")
        self._votes[place][index] = vote
        self._outcome = None

    def due(self) -> list[tuple[int, list[int]]]:
        """The votes wanted next: (candidate, their indices); empty when the group is over.

        While votes of a round are missing these are due. After it, candidates that may be in a wrong place get half as
        many again as they have. The others get none.
        """
        missing = self._missing()
        if missing:
            return missing
        for place in self._assess()[1]:
            here = len(self._votes[place])
            self._wanted[place] = min(self.plan.most, here + max(1, here // 2))
        return self._missing()

    def outcome(self) -> Outcome:
        """What the votes say so far."""
        return self._assess()[0]

    def settled(self) -> Outcome | None:
        """The outcome, where it is settled."""
        outcome = self.outcome()
        return outcome if outcome.settled else None

    def votes(self, place: int) -> tuple[Vote, ...]:
        """A candidate's votes by index."""
        found = self._votes[place]
        return tuple(found[index] for index in sorted(found))

    def _missing(self) -> list[tuple[int, list[int]]]:
        missing = [
            (place, [index for index in range(wanted) if index not in here])
            for place, (wanted, here) in enumerate(zip(self._wanted, self._votes, strict=True))
        ]
        return [(place, indices) for place, indices in missing if indices]

    def _assess(self) -> tuple[Outcome, list[int]]:
        """The outcome, and the candidates that more votes would help."""
        if self._outcome is None:
            kind, readings = read_votes([self.votes(place) for place in range(len(self._votes))], self.plan.reading)
            means = tuple(_mean(found) if found else None for found in readings)
            order = tuple(sorted(range(len(means)), key=lambda place: -(means[place] or 0.0)))
            counts = tuple(len(here) for here in self._votes)
            few = [
                place
                for place, found in enumerate(readings)
                if len(found) < self.plan.least and counts[place] < self.plan.most
            ]
            known = [place for place, found in enumerate(readings) if found]
            wrong, doubtful = (1.0, few) if few or not known else self._doubtful(known, readings)
            settled = wrong <= self.plan.error and len(known) == len(readings)
            open_ones = [place for place in doubtful if counts[place] < self.plan.most]
            if any(counts[place] >= self.plan.patience for place in open_ones) and not few:
                lost = self._hopeless(known, readings)
                open_ones = [place for place in open_ones if counts[place] < self.plan.patience or place not in lost]
            self._outcome = Outcome(order, means, wrong, settled, counts, kind), open_ones
        return self._outcome

    def _doubtful(self, known: Sequence[int], readings: Sequence[Sequence[float]]) -> tuple[float, list[int]]:
        """The chance that the answer for the candidates with readings is wrong, and those of them that make it so.

        Whatever is wrong has a candidate in it, so an unsettled group always has one above its share of the error.
        """
        wrong, shares = chances(self.plan, [readings[place] for place in known])
        bar = self.plan.error if self.plan.goal == "score" else self.plan.error / len(known)
        unsure = [place for place, share in zip(known, shares, strict=True) if share > bar]
        return wrong, unsure if wrong > self.plan.error else []

    def _hopeless(self, known: Sequence[int], readings: Sequence[Sequence[float]]) -> list[int]:
        """The candidates that would be in doubt still, did all votes up to `most` repeat those seen."""
        most = self.plan.most
        repeated = [[found[at % len(found)] for at in range(most)] if found else [] for found in readings]
        return self._doubtful(known, repeated)[1]


def read_votes(votes: Sequence[Sequence[Vote]], reading: Reading) -> tuple[Reading, list[list[float]]]:
    """The readings of each candidate's readable votes, and of which kind they are: one kind for all.

    >>> from patarm_lite.records import Verdict
    >>> sure, unsure, lost = Vote(Verdict(8), "", 7.5), Vote(Verdict(8), ""), Vote(Verdict(None, "no_score"), "")
    >>> read_votes([[sure, lost], [sure]], "expected")
    ('expected', [[7.5], [7.5]])
    >>> read_votes([[sure, unsure], [sure]], "expected")
    ('sampled', [[8.0, 8.0], [8.0]])
    """
    readable = [[vote for vote in side if vote.verdict.score is not None] for side in votes]
    expected = [[vote.expected for vote in side if vote.expected is not None] for side in readable]
    if reading == "expected" and [len(side) for side in expected] == [len(side) for side in readable]:
        return "expected", expected
    return "sampled", [[float(vote.verdict.score or 0) for vote in side] for side in readable]


# --- many groups ---


def in_rounds(
    groups: Iterable[tuple[Sequence[T], VotePlan]],
    ask: Callable[[Sequence[tuple[T, Sequence[int]]]], Iterable[tuple[int, int, Vote]]],
    live: int = LIVE,
) -> Iterator[tuple[Sequence[T], Votes]]:
    """Vote on many groups of candidates, each until it is settled or out of votes; in the order given.

    Args:
        groups: the candidates of each group, with its plan; read as places come free.
        ask: gives the votes of items by index, as `Backend.votes` does: (place in what was asked, index, vote).
        live: groups that are voted on at once. At most four times as many are kept.

    Raises:
        RuntimeError: `ask` left a vote out.
    """
    source = iter(groups)
    kept: deque[tuple[Sequence[T], Votes]] = deque()
    exhausted = False
    while True:
        due = [(items, votes, votes.due()) for items, votes in kept]
        busy = sum(1 for *_, wanted in due if wanted)
        while not exhausted and busy < live and len(kept) < HELD * live:
            group = next(source, None)
            if group is None:
                exhausted = True
                break
            items, plan = group
            votes = Votes(plan, len(items))
            kept.append((items, votes))
            due.append((items, votes, votes.due()))
            busy += 1
        asked = [(items, votes, place, indices) for items, votes, wanted in due for place, indices in wanted]
        if asked:
            missing = sum(len(indices) for *_, indices in asked)
            for at, index, vote in ask([(items[place], indices) for items, _, place, indices in asked]):
                _, votes, place, _ = asked[at]
                votes.add(place, index, vote)
                missing -= 1
            if missing:
                raise RuntimeError(f"{missing} votes were asked for and did not come")
        while kept and not kept[0][1].due():
            yield kept.popleft()
        if exhausted and not kept:
            return
