"""Adaptive voting: what it asks for, when it stops, and how often a settled answer is wrong, by seeded simulation."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.votes import compare, jumps, normal, replay, vote_of
from patarm_lite.errors import UserError
from patarm_lite.judge.voting import Outcome, VotePlan, Votes, chances, in_rounds
from patarm_lite.records import JudgedPair, Pair, Turn, Vote

Floats = NDArray[np.float64]
LEVELS = np.arange(1, 11)


def unreadable() -> Vote:
    return vote_of(None)


def run(plan: VotePlan, sides: Sequence[Sequence[float]]) -> tuple[Outcome, list[list[tuple[int, list[int]]]]]:
    """Vote from lists of readings that are there already: the outcome, and what was due in each round."""
    votes, rounds = Votes(plan, len(sides)), []
    while due := votes.due():
        rounds.append(due)
        for place, indices in due:
            for index in indices:
                votes.add(place, index, vote_of(5, sides[place][index]))
    return votes.outcome(), rounds


# --- the chance of a wrong answer ---


def posterior(readings: Sequence[int], doubt: float, rng: np.random.Generator, draws: int = 200_000) -> Floats:
    """The same belief by another road: on ten levels a Dirichlet process is a plain Dirichlet distribution."""
    counts = np.array([readings.count(level) for level in LEVELS])
    return np.asarray(rng.dirichlet(doubt / 10 + counts, draws) @ LEVELS)


@pytest.mark.parametrize("doubt", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("high", "low"),
    [([10], [2]), ([10], [6]), ([8, 8], [7, 7]), ([9, 9, 3, 9], [7, 6, 7, 8]), ([6] * 9, [5] * 9), ([7, 7], [7, 7])],
)
def test_the_chance_that_an_order_is_wrong_is_the_one_of_a_plain_dirichlet_distribution(
    high: list[int], low: list[int], doubt: float
) -> None:
    rng = np.random.default_rng(4)
    gap = posterior(low, doubt, rng) - posterior(high, doubt, rng)
    tie = sum(high) / len(high) == sum(low) / len(low)
    exact = (np.abs(gap) if tie else gap) > 0.25
    found, parts = chances(VotePlan(doubt=doubt), [high, low])
    assert found == pytest.approx(exact.mean(), abs=0.025)
    assert parts.tolist() == [found, found]  # of two, both stand wrong or neither


def test_the_chance_for_a_list_counts_every_list_with_a_wrong_place_once() -> None:
    lists = [[9, 9, 8], [4, 6, 5], [8, 8, 7], [7, 7]]
    rng = np.random.default_rng(4)
    mean = [posterior(found, 0.5, rng) for found in lists]
    best_first = [0, 2, 3, 1]
    wrong = np.zeros(len(mean[0]), bool)
    first = np.zeros(len(mean[0]), bool)
    for at, upper in enumerate(best_first):
        for lower in best_first[at + 1 :]:
            wrong |= mean[lower] - mean[upper] > 0.25
            first |= (mean[lower] - mean[upper] > 0.25) & (at == 0)
    assert chances(VotePlan(goal="order"), lists)[0] == pytest.approx(wrong.mean(), abs=0.025)
    assert chances(VotePlan(goal="best"), lists)[0] == pytest.approx(first.mean(), abs=0.025)


def test_the_chance_that_a_score_is_off_is_the_one_of_a_plain_dirichlet_distribution() -> None:
    rng = np.random.default_rng(4)
    readings = [9, 9, 8, 9]
    exact = (np.abs(posterior(readings, 0.5, rng) - 8.75) > 1.0).mean()
    assert chances(VotePlan(goal="score"), [readings])[0] == pytest.approx(exact, abs=0.025)


def test_swapping_two_candidates_swaps_nothing_but_their_places() -> None:
    for sides in ([[9.0, 8.5], [7.0, 7.2]], [[7, 9], [8, 8]], [[5], [5]]):
        assert chances(VotePlan(), sides)[0] == chances(VotePlan(), sides[::-1])[0]


def test_equal_readings_give_equal_answers_whatever_else_was_asked_before() -> None:
    before = chances(VotePlan(), [[9.1, 8.4], [7.0, 7.3]])
    chances(VotePlan(most=64, doubt=1.5), [[3.0] * 60, [4.0] * 64, [5.0]])
    after = chances(VotePlan(), [[9.1, 8.4], [7.0, 7.3]])
    assert before[0] == after[0]
    assert before[1].tolist() == after[1].tolist()


# --- the stated error ---


@pytest.mark.parametrize(
    "plan",
    [VotePlan(), VotePlan(error=0.05), VotePlan(margin=0.0), VotePlan(doubt=1.0, least=2), VotePlan(doubt=2.0)],
    ids=str,
)
def test_of_settled_orders_no_more_than_the_stated_error_are_wrong_for_judges_as_the_prior_has_them(
    plan: VotePlan,
) -> None:
    rng = random.Random(11)
    spreads = np.random.default_rng(11).dirichlet(np.full(10, plan.doubt / 10), (600, 2))
    settled = wrong = 0
    for pair in spreads:
        sides = [rng.choices(LEVELS.tolist(), weights, k=plan.most) for weights in pair]
        outcome, _ = run(plan, sides)
        first, second = pair @ LEVELS
        gap = first - second if outcome.order[0] == 0 else second - first
        settled += outcome.settled
        wrong += outcome.settled and gap < -plan.margin
    assert settled > 300
    assert wrong <= plan.error * settled + 2 * math.sqrt(plan.error * settled)


def test_of_settled_lists_no_more_than_the_stated_error_have_a_wrong_place() -> None:
    plan = VotePlan(goal="order")
    rng = random.Random(12)
    settled = wrong = 0
    for group in np.random.default_rng(12).dirichlet(np.full(10, plan.doubt / 10), (300, 4)):
        outcome, _ = run(plan, [rng.choices(LEVELS.tolist(), weights, k=plan.most) for weights in group])
        means = [group[place] @ LEVELS for place in outcome.order]
        settled += outcome.settled
        wrong += outcome.settled and any(
            lower - upper > plan.margin for at, upper in enumerate(means) for lower in means[at + 1 :]
        )
    assert settled > 100
    assert wrong <= plan.error * settled + 2 * math.sqrt(plan.error * settled)


def test_of_settled_scores_no_more_than_the_stated_error_are_off_by_more_than_the_half_width() -> None:
    plan = VotePlan(goal="score")
    rng = random.Random(13)
    settled = wrong = 0
    for weights in np.random.default_rng(13).dirichlet(np.full(10, plan.doubt / 10), 800):
        outcome, _ = run(plan, [rng.choices(LEVELS.tolist(), weights, k=plan.most)])
        settled += outcome.settled
        mean = outcome.means[0]
        assert mean is not None
        wrong += outcome.settled and abs(mean - weights @ LEVELS) > plan.half_width
    assert settled > 400
    assert wrong <= plan.error * settled + 2 * math.sqrt(plan.error * settled)


def wrong_share(family: tuple[Floats, Floats, Floats], plan: VotePlan) -> tuple[float, float]:
    first, second, truth = family
    judged = [
        JudgedPair(Pair((), "a", "b"), *(tuple(vote_of(5, float(x)) for x in side) for side in sides))
        for sides in zip(first, second, strict=True)
    ]
    found = replay(judged, plan, truth)
    return float(found.wrong.mean()), float(found.votes.mean())


@pytest.mark.parametrize(("spread", "gap"), [(0.3, 0.5), (0.7, 1.0), (1.2, 1.0), (2.0, 2.0), (2.0, 4.0)])
def test_orders_of_judges_that_scatter_evenly_are_wrong_less_often_than_stated(spread: float, gap: float) -> None:
    wrong, _ = wrong_share(normal(spread, gap)(np.random.default_rng(5), 400, 16), VotePlan())
    assert wrong < 0.1


def test_a_judge_that_hides_wild_jumps_is_beyond_the_stated_error_as_the_documentation_says() -> None:
    """Against a constant 7.5 stands a judge that says 9, and 3 in three of ten votes: 7.2. No rule of few votes can
    know. This is the worst of the simulated judges; it is here so that the bound given for it stays true."""
    wrong, votes = wrong_share(jumps(0.3, 6, 0.3)(np.random.default_rng(5), 400, 16), VotePlan())
    assert 0.1 < wrong < 0.5
    assert votes > 4


def test_no_error_at_all_where_one_side_is_always_far_above() -> None:
    wrong, votes = wrong_share(normal(0.3, 7.0)(np.random.default_rng(5), 200, 16), VotePlan())
    assert wrong == 0
    assert votes < 1.5


# --- what is asked for ---


def test_a_wide_gap_takes_one_vote_each_and_a_narrow_one_many() -> None:
    wide, rounds = run(VotePlan(), [[9.9] * 16, [2.1] * 16])
    assert wide.settled
    assert wide.votes == (1, 1)
    assert rounds == [[(0, [0]), (1, [0])]]
    narrow, rounds = run(VotePlan(), [[7.4] * 16, [7.0] * 16])
    assert narrow.order == (0, 1)
    assert narrow.votes[0] == narrow.votes[1] >= 6
    assert [due[0][1] for due in rounds[:5]] == [[0], [1], [2], [3], [4, 5]]


def test_rounds_grow_by_half_and_end_at_most() -> None:
    tied, rounds = run(VotePlan(patience=16), [[7.0] * 16, [7.0] * 16])
    assert [len(due[0][1]) for due in rounds] == [1, 1, 1, 1, 2, 3, 4, 3]  # to 1, 2, 3, 4, 6, 9, 13, 16 votes
    assert tied.votes == (16, 16)
    assert not tied.settled
    assert tied.wrong > 0.1


def test_two_that_stay_equal_are_given_up_unsettled_once_patience_is_out() -> None:
    equal, _ = run(VotePlan(margin=0.0), [[7.0] * 16, [7.0] * 16])
    assert equal.votes == (9, 9)
    assert not equal.settled
    hasty, _ = run(VotePlan(margin=0.0, patience=2), [[7.0] * 16, [7.0] * 16])
    assert hasty.votes == (2, 2)


def test_patience_does_not_end_what_more_votes_would_settle() -> None:
    sides = [[7.5] * 16, [7.0] * 16]
    assert run(VotePlan(error=0.02, patience=2), sides)[0] == run(VotePlan(error=0.02, patience=16), sides)[0]
    assert run(VotePlan(error=0.02, patience=2), sides)[0].settled


def test_in_a_list_two_equal_ones_are_given_up_and_the_others_settled() -> None:
    plan = VotePlan(patience=1, error=0.02)
    outcome, _ = run(plan, [[9.0] * 16, [9.0] * 16, [5.0] * 16, [4.0] * 16])
    assert not outcome.settled
    assert outcome.votes[:2] == (1, 1)
    assert outcome.votes[2] == outcome.votes[3] > 4


def test_least_votes_come_in_one_round() -> None:
    _, rounds = run(VotePlan(least=3), [[10.0] * 16, [1.0] * 16])
    assert rounds == [[(0, [0, 1, 2]), (1, [0, 1, 2])]]


def test_in_a_list_only_candidates_that_may_stand_wrong_get_more_votes() -> None:
    outcome, rounds = run(VotePlan(), [[5.1] * 16, [9.8] * 16, [5.0] * 16, [1.1] * 16])
    assert outcome.order == (1, 0, 2, 3)
    assert outcome.votes[0] == outcome.votes[2] > max(outcome.votes[1], outcome.votes[3])
    assert [place for place, _ in rounds[-1]] == [0, 2]


def test_the_best_alone_is_settled_while_the_others_are_not_in_order() -> None:
    outcome, _ = run(VotePlan(goal="best"), [[2.0] * 16, [9.8] * 16, [2.1] * 16])
    assert outcome.settled
    assert outcome.order[0] == 1
    assert max(outcome.votes) <= 3
    assert not run(VotePlan(goal="order", margin=0.0), [[2.0] * 16, [9.8] * 16, [2.1] * 16])[0].settled


def test_two_that_share_the_first_place_are_not_settled_by_naming_one() -> None:
    outcome, _ = run(VotePlan(goal="best"), [[8.0] * 16, [8.0] * 16, [2.0] * 16])
    assert not outcome.settled
    assert outcome.votes[0] == outcome.votes[1] > outcome.votes[2]


def test_scores_are_settled_one_by_one() -> None:
    outcome, _ = run(VotePlan(goal="score", half_width=1.5, patience=16), [[6.0] * 16, [1.0, 10.0] * 8])
    assert outcome.votes[0] < outcome.votes[1] == 16
    assert not outcome.settled


def test_one_candidate_alone_is_in_order_at_once() -> None:
    outcome, _ = run(VotePlan(), [[5.0] * 16])
    assert outcome.settled
    assert outcome.votes == (1,)


def test_a_smaller_half_width_takes_more_votes() -> None:
    votes = [run(VotePlan(goal="score", half_width=width), [[9.0] * 16])[0].votes[0] for width in (3.0, 2.0, 1.0, 0.5)]
    assert votes == sorted(votes)
    assert votes[0] < votes[-1]


readings = st.floats(1, 10).map(lambda x: round(x, 3)) | st.integers(1, 10).map(float)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(readings, min_size=16, max_size=16), min_size=n, max_size=n)),
    st.sampled_from(["order", "best", "score"]),
    st.integers(1, 4),
)
def test_every_group_ends_with_votes_without_gaps_and_none_above_most(
    sides: list[list[float]], goal: str, least: int
) -> None:
    plan = VotePlan(goal=goal, least=least)  # type: ignore[arg-type]
    outcome, rounds = run(plan, sides)
    asked: list[list[int]] = [[] for _ in sides]
    for due in rounds:
        for place, indices in due:
            asked[place] += indices
    assert all(indices == list(range(count)) for indices, count in zip(asked, outcome.votes, strict=True))
    assert least <= min(outcome.votes) <= max(outcome.votes) <= 16
    assert len(rounds) <= 8 * len(sides)
    assert outcome.settled == (outcome.wrong <= plan.error)
    assert outcome.settled or max(outcome.votes) >= plan.patience


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(readings, min_size=16, max_size=16), min_size=2, max_size=3))
def test_whoever_begins_again_with_the_votes_that_are_there_asks_for_the_same(sides: list[list[float]]) -> None:
    plan = VotePlan()
    going = Votes(plan, len(sides))
    while due := going.due():
        again = Votes(plan, len(sides))
        for place in range(len(sides)):
            for index, vote in enumerate(going.votes(place)):
                again.add(place, index, vote)
        assert again.due() == due
        for place, indices in due:
            for index in indices:
                going.add(place, index, vote_of(5, sides[place][index]))


def test_a_stricter_error_never_takes_fewer_votes() -> None:
    rng = np.random.default_rng(2)
    for _ in range(30):
        sides = np.clip(rng.normal(rng.uniform(2, 9, (2, 1)), 1, (2, 16)), 1, 10).tolist()
        votes = [run(VotePlan(error=error, patience=16), sides)[0].votes[0] for error in (0.3, 0.1, 0.05, 0.01)]
        assert votes == sorted(votes)


# --- unreadable votes, digits and expected scores ---


def test_an_unreadable_vote_is_asked_for_again_and_never_a_score() -> None:
    votes = Votes(VotePlan(), 2)
    assert votes.due() == [(0, [0]), (1, [0])]
    votes.add(0, 0, vote_of(9, 9.0))
    assert votes.due() == [(1, [0])]
    votes.add(1, 0, unreadable())
    assert votes.outcome().wrong == 1
    assert votes.settled() is None
    assert votes.due() == [(1, [1])]
    votes.add(1, 1, vote_of(2, 2.0))
    outcome = votes.settled()
    assert outcome is not None
    assert outcome.means == (9.0, 2.0)
    assert outcome.votes == (1, 2)
    assert votes.due() == []


def test_a_candidate_that_is_never_readable_ends_last_and_keeps_nobody_else_from_being_ordered() -> None:
    votes = Votes(VotePlan(), 3)
    while due := votes.due():
        for place, indices in due:
            for index in indices:
                votes.add(place, index, [vote_of(2, 2.0), unreadable(), vote_of(9, 9.0)][place])
    outcome = votes.outcome()
    assert outcome.order == (2, 0, 1)
    assert outcome.means == (2.0, None, 9.0)
    assert outcome.votes == (1, 16, 1)
    assert outcome.wrong < 0.1
    assert not outcome.settled


def test_where_one_vote_has_no_expected_score_digits_are_read_of_all() -> None:
    votes = Votes(VotePlan(), 2)
    votes.add(0, 0, vote_of(9, 8.6))
    votes.add(1, 0, vote_of(2))
    outcome = votes.outcome()
    assert outcome.reading == "sampled"
    assert outcome.means == (9.0, 2.0)


def test_digits_can_be_asked_for() -> None:
    votes = Votes(VotePlan(reading="sampled"), 1)
    votes.add(0, 0, vote_of(9, 8.6))
    assert votes.outcome().means == (9.0,)


def test_a_vote_given_twice_or_beyond_most_is_refused() -> None:
    votes = Votes(VotePlan(most=2), 1)
    votes.add(0, 0, vote_of(9))
    with pytest.raises(ValueError, match="here already"):
        votes.add(0, 0, vote_of(9))
    with pytest.raises(ValueError, match="not asked for"):
        votes.add(0, 2, vote_of(9))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"goal": "rank"}, "goal 'rank'"),
        ({"reading": "logit"}, "reading 'logit'"),
        ({"least": 0}, "between 0 and 16"),
        ({"least": 5, "most": 4}, "between 5 and 4"),
        ({"most": 65}, "choose 1 to 64"),
        ({"patience": 0}, "patience of 0"),
        ({"error": 0.0}, "error of 0.0"),
        ({"error": math.nan}, "error of nan"),
        ({"error": 0.6}, "error of 0.6"),
        ({"margin": -0.1}, "margin of -0.1"),
        ({"margin": 9.0}, "margin of 9.0"),
        ({"half_width": 0.0}, "half-width of 0.0"),
        ({"doubt": 0.0}, "doubt of 0.0"),
    ],
)
def test_a_plan_out_of_range_is_refused_in_words(wrong: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        VotePlan(**wrong)  # type: ignore[arg-type]


def test_a_group_without_candidates_is_refused() -> None:
    with pytest.raises(UserError, match="no candidates"):
        Votes(VotePlan(), 0)


# --- many groups ---


class Source:
    """Votes drawn by item and index alone, as a backend's are; remembers what was asked for."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.calls: list[int] = []

    def __call__(self, asked: Sequence[tuple[str, Sequence[int]]]) -> Iterator[tuple[int, int, Vote]]:
        self.calls.append(sum(len(indices) for _, indices in asked))
        wanted = [(place, item, index) for place, (item, indices) in enumerate(asked) for index in indices]
        for place, item, index in reversed(wanted):  # whatever is finished first comes first
            self.seen.append((item, index))
            rng = random.Random(f"{item} {index}")
            yield place, index, vote_of(5, min(10, max(1, int(item.split("-")[1]) + rng.gauss(0, 0.5))))


def test_groups_come_back_in_order_with_the_same_votes_however_many_are_live() -> None:
    rng = random.Random(3)
    groups = [([f"{n}a-{rng.randint(1, 10)}", f"{n}b-{rng.randint(1, 10)}"], VotePlan()) for n in range(40)]
    found = []
    for live in (1, 7, 100):
        source = Source()
        done = list(in_rounds(groups, source, live))
        assert [items for items, _ in done] == [items for items, _ in groups]
        assert len(source.seen) == len(set(source.seen)) == sum(sum(votes.outcome().votes) for _, votes in done)
        found.append([votes.outcome() for _, votes in done])
    assert found[0] == found[1] == found[2]


def test_rounds_of_many_groups_are_asked_for_together() -> None:
    source = Source()
    list(in_rounds([(["a-9", "b-2"], VotePlan())] * 20, source, live=20))
    assert source.calls[0] == 40


def test_groups_are_read_as_places_come_free() -> None:
    taken = 0

    def groups() -> Iterator[tuple[list[str], VotePlan]]:
        nonlocal taken
        for n in range(1000):
            taken += 1
            yield [f"{n}a-5", f"{n}b-5"], VotePlan()

    found = in_rounds(groups(), Source(), live=5)
    next(found)
    assert taken <= 20


def test_no_groups_give_nothing() -> None:
    assert list(in_rounds([], Source())) == []


def test_a_backend_that_leaves_a_vote_out_is_a_bug_and_not_an_endless_loop() -> None:
    with pytest.raises(RuntimeError, match="1 votes were asked for and did not come"):
        list(in_rounds([(["a-9"], VotePlan())], lambda asked: iter(())))


# --- the replay of benchmarks/votes.py ---


def judged(name: str, chosen: Sequence[int], rejected: Sequence[int]) -> JudgedPair:
    pair = Pair((Turn("user", name),), "a", "b", id=name)
    return JudgedPair(pair, *(tuple(vote_of(score, float(score)) for score in side) for side in (chosen, rejected)))


def test_the_benchmark_compares_ways_of_voting_on_the_same_votes() -> None:
    pairs = [judged("clear", [9] * 16, [2] * 16), judged("turns", [5] + [9] * 15, [7] * 16)]
    rows = {row["way"]: row for row in compare(pairs, {"auto": VotePlan()})}
    assert rows["fixed 1"]["mean"] == 0.5  # 9 > 2, but 5 < 7
    assert rows["fixed 2"]["mean"] == 0.75  # 9 > 2, and 7 = 7
    assert rows["fixed 8"]["mean"] == rows["fixed 16"]["mean"] == 1.0
    assert rows["fixed 2"]["mean_difference"][0] == -0.25
    assert rows["auto"]["mean"] == 1.0
    assert rows["auto"]["wrong"] == 0.0
    assert rows["auto"]["votes"] == (1 + len(replay(pairs, VotePlan()).judged[1].chosen)) / 2


def test_a_settled_pair_whose_other_votes_say_the_opposite_counts_as_wrong() -> None:
    found = replay([judged("fooled", [9] * 2 + [1] * 14, [3] * 16)], VotePlan(error=0.3))
    assert found.votes.tolist() == [1.0]
    assert found.wrong.tolist() == [True]
