"""PAR: worked examples by hand, and the properties every form must have."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from patarm_lite import par
from patarm_lite.errors import UserError
from patarm_lite.par import FORMS, format_reward, implied_score, par_rewards, preference_rewards
from patarm_lite.records import Criterion, CriterionScore, Verdict
from patarm_lite.verdicts import FAULTS, PROBLEMS

MARGIN_FORMS = ("graded", "constant", "saturating")
ALL_FORMS = (*MARGIN_FORMS, "auc", "bradley_terry")

sampled = st.one_of(st.none(), st.integers(1, 10))
group = st.lists(sampled, min_size=1, max_size=8)
form = st.sampled_from(ALL_FORMS)


def test_the_forms_are_the_two_of_par_and_the_three_alternatives() -> None:
    assert set(FORMS) == set(ALL_FORMS)


def test_one_pair_worked_by_hand_in_every_form() -> None:
    # means: chosen (9 + 7 + 5) / 3 = 7, rejected (4 + 6 + 8) / 3 = 6; the None counts in neither
    chosen, rejected = [9, 7, None, 5], [4, 6, 8]
    # distances to the other mean: chosen 3, 1, -, wrong side; rejected 3, 1, wrong side
    assert par_rewards(chosen, rejected, "graded") == ([1.4, 1.2, 0.0, 0.0], [1.4, 1.2, 0.0])
    assert par_rewards(chosen, rejected, "constant") == ([1.3, 1.3, 0.0, 0.0], [1.3, 1.3, 0.0])
    assert par_rewards(chosen, rejected, "saturating") == ([1.0, 1 / 3, 0.0, 0.0], [1.0, 1 / 3, 0.0])
    # beaten: 9 beats 4, 6, 8; 7 beats 4, 6; 5 beats 4. 4 is below 9, 7, 5; 6 below 9, 7; 8 below 9
    assert par_rewards(chosen, rejected, "auc") == ([1.0, 2 / 3, 0.0, 1 / 3], [1.0, 2 / 3, 1 / 3])
    # sigmoid(x / 2) at x = 5, 3, 1 for the nine; at x = 5, 3, 1 for the four (9 - 4, 7 - 4, 5 - 4)
    expected = sum(1 / (1 + math.exp(-x / 2)) for x in (5, 3, 1)) / 3
    soft_chosen, soft_rejected = par_rewards(chosen, rejected, "bradley_terry")
    assert soft_chosen[0] == pytest.approx(expected)
    assert soft_chosen[2] == 0.0
    assert soft_rejected[0] == pytest.approx(expected)


def test_the_graded_step_is_above_a_distance_of_two_and_not_at_it() -> None:
    assert par_rewards([7], [5], "graded")[0] == [1.2]
    assert par_rewards([7], [5, 5, 4], "graded")[0] == [1.4]  # the mean is 14/3, the distance 7/3


def test_saturating_stops_growing_at_a_distance_of_three() -> None:
    assert par_rewards([6, 8, 10], [5], "saturating")[0] == [1 / 3, 1.0, 1.0]


def test_a_tie_that_floating_point_would_call_a_win_earns_nothing() -> None:
    tied = Fraction(14, 5)  # as a float, (2.8 + 2.8 + 2.8) / 3 is 2.7999999999999994, which 2.8 would beat
    assert sum([float(tied)] * 3) / 3 < float(tied)
    for name in MARGIN_FORMS:
        assert par_rewards([tied], [tied] * 3, name)[0] == [0.0]


def test_a_distance_of_exactly_two_in_fractions_stays_on_the_near_step() -> None:
    assert par_rewards([Fraction(24, 5)], [Fraction(14, 5)] * 3, "graded")[0] == [1.2]


def test_an_expected_score_may_stand_in_as_the_other_sides_reference() -> None:
    # 6 is above the sampled mean 5 and below the expected mean 6.5
    assert par_rewards([6], [5, 5], "constant") == ([1.3], [1.3, 1.3])
    assert par_rewards([6], [5, 5], "constant", rejected_reference=[6.25, 6.75]) == ([0.0], [1.3, 1.3])
    assert par_rewards([6], [5, 5], "constant", chosen_reference=[4.5]) == ([1.3], [0.0, 0.0])


def test_an_unknown_form_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"'gradd' is not one of .* Did you mean 'graded'\?"):
        par_rewards([1], [2], "gradd")


@given(group, group, form)
def test_reflecting_the_scores_and_swapping_the_sides_swaps_the_rewards(
    chosen: list[int | None], rejected: list[int | None], name: str
) -> None:
    def reflected(scores: list[int | None]) -> list[int | None]:
        return [None if s is None else 11 - s for s in scores]

    first, second = par_rewards(chosen, rejected, name)
    assert par_rewards(reflected(rejected), reflected(chosen), name) == (second, first)


@given(group, group, st.sampled_from(MARGIN_FORMS))
def test_a_score_at_the_other_sides_mean_earns_nothing_in_the_margin_forms(
    chosen: list[int | None], rejected: list[int | None], name: str
) -> None:
    known = [s for s in rejected if s is not None]
    assume(known)
    at_the_mean = Fraction(sum(known), len(known))
    assert par_rewards([at_the_mean, *chosen], rejected, name)[0][0] == 0.0


@given(st.integers(1, 10), st.integers(1, 8), st.integers(1, 8))
def test_a_tie_throughout_is_worth_nothing_to_a_margin_and_half_to_the_others(score: int, n: int, m: int) -> None:
    for name in MARGIN_FORMS:
        assert par_rewards([score] * n, [score] * m, name) == ([0.0] * n, [0.0] * m)
    for name in ("auc", "bradley_terry"):
        assert par_rewards([score] * n, [score] * m, name) == ([0.5] * n, [0.5] * m)


@given(group, group, form)
def test_an_unreadable_judgement_earns_nothing_and_changes_no_other_reward(
    chosen: list[int | None], rejected: list[int | None], name: str
) -> None:
    first, second = par_rewards(chosen, rejected, name)
    assert all(reward == 0.0 for score, reward in zip(chosen, first, strict=True) if score is None)
    readable = [s for s in chosen if s is not None], [s for s in rejected if s is not None]
    kept = (
        [r for s, r in zip(chosen, first, strict=True) if s is not None],
        [r for s, r in zip(rejected, second, strict=True) if s is not None],
    )
    assert par_rewards(*readable, name) == kept


@given(group, st.integers(1, 8), form)
def test_against_a_wholly_unreadable_side_nobody_earns_preference(scores: list[int | None], n: int, name: str) -> None:
    assert par_rewards(scores, [None] * n, name) == ([0.0] * len(scores), [0.0] * n)
    assert par_rewards([None] * n, scores, name) == ([0.0] * n, [0.0] * len(scores))


@given(group, group, st.integers(1, 9), st.integers(-50, 50), form)
def test_a_positive_affine_change_of_all_scores_keeps_who_earns(
    chosen: list[int | None], rejected: list[int | None], factor: int, shift: int, name: str
) -> None:
    def moved(scores: list[int | None]) -> list[int | None]:
        return [None if s is None else factor * s + shift for s in scores]

    before, after = par_rewards(chosen, rejected, name), par_rewards(moved(chosen), moved(rejected), name)
    if name in ("constant", "auc"):
        assert after == before
    else:
        assert [[r > 0 for r in side] for side in after] == [[r > 0 for r in side] for side in before]


@given(group, group)
def test_each_form_stays_within_its_stated_bounds(chosen: list[int | None], rejected: list[int | None]) -> None:
    def every(name: str) -> list[float]:
        first, second = par_rewards(chosen, rejected, name)
        assert (len(first), len(second)) == (len(chosen), len(rejected))
        return first + second

    assert set(every("graded")) <= {0.0, 1.2, 1.4}
    assert set(every("constant")) <= {0.0, 1.3}
    assert all(0 <= reward <= 1 for reward in every("saturating"))
    assert all(0 <= reward <= 1 for reward in every("auc"))
    assert all(0 <= reward < 1 for reward in every("bradley_terry"))


@given(st.permutations([9, 7, 7, 2]), group, form)
def test_a_reward_belongs_to_its_score_and_not_to_its_place(
    order: list[int], rejected: list[int | None], name: str
) -> None:
    first, second = par_rewards([9, 7, 7, 2], rejected, name)
    paid = dict(zip([9, 7, 7, 2], first, strict=True))
    again, other = par_rewards(order, rejected, name)
    assert again == [paid[score] for score in order]
    assert other == pytest.approx(second)


@given(group, group)
def test_the_mean_auc_reward_of_both_sides_is_the_same_number(
    chosen: list[int | None], rejected: list[int | None]
) -> None:
    first, second = par_rewards(chosen, rejected, "auc")
    wins = [r for s, r in zip(chosen, first, strict=True) if s is not None]
    losses = [r for s, r in zip(rejected, second, strict=True) if s is not None]
    assume(wins and losses)
    assert sum(wins) / len(wins) == pytest.approx(sum(losses) / len(losses))  # Mann-Whitney, from either side


# ---- format ----------------------------------------------------------------------------------------------------------


def test_every_problem_has_its_penalty() -> None:
    expected = {"no_score": -1.0, "not_an_integer": -1.0, "out_of_range": -1.0}
    for problem in PROBLEMS:
        assert format_reward(Verdict(None, problem)) == expected.get(problem, -1.5), problem


def test_faults_cost_a_quarter_each_and_at_most_three_quarters() -> None:
    names = tuple(FAULTS)
    assert [format_reward(Verdict(5, faults=names[:k])) for k in range(6)] == [0.0, -0.25, -0.5, -0.75, -0.75, -0.75]


# ---- findings --------------------------------------------------------------------------------------------------------

a_verdict = st.one_of(
    st.sampled_from(sorted(PROBLEMS)).map(lambda problem: Verdict(None, problem)),
    st.builds(
        lambda score, weights, scores, faults: Verdict(
            score,
            None,
            tuple(Criterion(f"c{i}", "meaning", w) for i, w in enumerate(weights)),
            tuple(CriterionScore(f"c{i}", "finding", s) for i, s in enumerate(scores)),
            tuple(sorted(faults)),
        ),
        st.integers(1, 10),
        st.lists(st.integers(1, 5), max_size=6),
        st.lists(st.integers(1, 10), max_size=6),
        st.sets(st.sampled_from(sorted(FAULTS))),
    ),
)
verdict_group = st.lists(a_verdict, min_size=1, max_size=6)


def judged(score: int, *criterion_scores: int) -> Verdict:
    """A sound verdict of equally weighed criteria c0, c1, ..."""
    rubric = tuple(Criterion(f"c{i}", "meaning", 2) for i in range(len(criterion_scores)))
    return Verdict(score, None, rubric, tuple(CriterionScore(f"c{i}", "f", s) for i, s in enumerate(criterion_scores)))


def test_the_implied_score_is_the_weighted_mean_of_the_criterion_scores() -> None:
    rubric = (Criterion("a", "", 5), Criterion("b", "", 2), Criterion("c", "", 1))
    lines = (CriterionScore("a", "", 4), CriterionScore("b", "", 9), CriterionScore("x", "", 1))
    # a and b are both weighed and scored: (5 * 4 + 2 * 9) / 7; c has no score and x no weight
    assert implied_score(Verdict(10, None, rubric, lines)) == Fraction(38, 7)


def test_findings_that_settle_nothing_imply_no_score() -> None:
    twice = (CriterionScore("a", "", 9), CriterionScore("a", "", 1))
    assert implied_score(Verdict(None, "truncated")) is None
    assert implied_score(Verdict(7)) is None
    assert implied_score(Verdict(7, None, (Criterion("a", "", 1),), twice, ("duplicate_criterion",))) is None


def test_a_right_score_over_wrong_findings_earns_only_the_scores_share() -> None:
    honest, hollow, poor = judged(8, 9, 8), judged(8, 2, 2), judged(3, 2, 2)
    # scores: 8 and 8 against 3: both 1.4. Implied: 8.5 and 2 against 2: 1.4 and a tie, 0.
    assert preference_rewards([honest, hollow], [poor], "graded", 0.5)[0] == [1.4, 0.7]
    assert preference_rewards([honest, hollow], [poor], "graded", 1.0)[0] == [1.4, 0.0]
    assert preference_rewards([honest, hollow], [poor], "graded")[0] == [1.4, 1.4]


@given(verdict_group, verdict_group, form, st.floats(0, 1))
def test_any_share_for_findings_keeps_the_bounds(
    chosen: list[Verdict], rejected: list[Verdict], name: str, share: float
) -> None:
    highest = {"graded": 1.4, "constant": 1.3}.get(name, 1.0)
    for side, rewards in zip((chosen, rejected), preference_rewards(chosen, rejected, name, share), strict=True):
        for verdict, reward in zip(side, rewards, strict=True):
            assert 0.0 <= reward <= highest
            assert -2.25 <= par.LOWEST <= reward + format_reward(verdict) <= par.HIGHEST <= 1.4
            assert verdict.score is not None or reward == 0.0


@given(verdict_group, verdict_group, form)
def test_a_share_of_zero_is_plain_par_of_the_scores(chosen: list[Verdict], rejected: list[Verdict], name: str) -> None:
    plain = par_rewards([v.score for v in chosen], [v.score for v in rejected], name)
    assert preference_rewards(chosen, rejected, name) == plain
    assert preference_rewards(chosen, rejected, name, 0.0) == plain


@given(st.integers(1, 10), st.integers(1, 10), form, st.floats(0, 1))
def test_findings_that_say_what_the_scores_say_change_nothing(high: int, low: int, name: str, share: float) -> None:
    chosen, rejected = [judged(high, high, high)], [judged(low, low, low)]
    assert preference_rewards(chosen, rejected, name, share) == preference_rewards(chosen, rejected, name)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_for_findings_outside_zero_to_one_is_refused(share: float) -> None:
    with pytest.raises(UserError, match=r"findings=.* give a number from 0 to 1"):
        preference_rewards([judged(8, 9)], [judged(3, 2)], "graded", share)
