"""Calibration: gap -> P(preferred), score -> percentile."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patarm_lite.calibration import Calibration, check, fit, observe
from patarm_lite.errors import UserError
from patarm_lite.records import JudgedPair, Pair, Turn, Verdict, Vote

SCORES = [3.0, 5.0, 5.0, 9.0]


def side(*votes: tuple[int | None, float | None]) -> tuple[Vote, ...]:
    return tuple(Vote(Verdict(s, None if s else "truncated"), "", e) for s, e in votes)


def pair(chosen: tuple[Vote, ...], rejected: tuple[Vote, ...]) -> JudgedPair:
    return JudgedPair(Pair((Turn("user", "q"),), "a", "b"), chosen, rejected)


@pytest.mark.parametrize("seed", range(5))
def test_the_slope_is_the_one_scipy_finds(seed: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    gaps = rng.normal(1, 2, 200)
    outcomes = (rng.random(200) < 1 / (1 + np.exp(-0.7 * gaps))).astype(float)
    prior = np.median(np.abs(gaps))

    def loss(slope: float) -> float:
        p = 1 / (1 + np.exp(-slope * gaps))
        q = 1 / (1 + np.exp(-slope * prior))
        pairs = -np.sum(outcomes * np.log(p) + (1 - outcomes) * np.log(1 - p))
        return float(pairs - 0.5 * np.log(q) - 0.5 * np.log(1 - q))

    best = optimize.minimize_scalar(loss, bounds=(0, 4), method="bounded", options={"xatol": 1e-10}).x
    assert fit(gaps, outcomes, SCORES).slope == pytest.approx(best, abs=1e-6)


def test_perfect_separation_gives_a_finite_slope_by_the_stated_prior() -> None:
    # 9 pairs gap 2 and one of gap 2 all right: P = 10.5 / 11, slope = log(10.5 / 0.5) / 2
    assert fit([2.0] * 10, [1.0] * 10, SCORES).slope == pytest.approx(math.log(21) / 2, abs=1e-9)


def test_a_judge_that_is_worse_than_a_coin_gets_the_coin_and_not_a_reversed_curve() -> None:
    found = fit([-1.0] * 20, [1.0] * 20, SCORES)
    assert found.slope == 0 and found.p_preferred(7) == 0.5
    assert fit([0.0] * 20, [1.0] * 20, SCORES).slope == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.booleans()), min_size=10, max_size=40))
def test_swapping_the_two_responses_of_every_pair_changes_nothing(rows: list[tuple[float, bool]]) -> None:
    gaps, outcomes = [g for g, _ in rows], [float(o) for _, o in rows]
    one, other = fit(gaps, outcomes, SCORES), fit([-g for g in gaps], [1 - o for o in outcomes], SCORES)
    assert one.slope == pytest.approx(other.slope, rel=1e-6, abs=1e-6) and math.isfinite(one.slope) and one.slope >= 0
    assert one.p_preferred(2.5) + one.p_preferred(-2.5) == pytest.approx(1)


def test_percentiles_count_equal_scores_half() -> None:
    found = fit([1.0] * 10, [1.0] * 10, SCORES)  # 3 | 5 5 | 9: 1/8, (1 + 1)/4, 7/8
    assert found.percentiles == ((3.0, 0.125), (5.0, 0.5), (9.0, 0.875))
    assert [found.percentile(s) for s in (1, 3, 4, 7, 10)] == [0, 0.125, 0.3125, 0.6875, 1]


def test_the_percentile_table_stays_short_and_near_the_truth() -> None:
    scores = np.random.default_rng(1).uniform(1, 10, 5000)
    found = fit([1.0] * 10, [1.0] * 10, scores)
    assert len(found.percentiles) <= 101
    for score in (1.7, 4.2, 8.8):
        assert found.percentile(score) == pytest.approx(float(np.mean(scores < score)), abs=0.005)


def test_gaps_are_of_expected_scores_where_both_sides_have_one_and_unreadable_pairs_are_counted() -> None:
    seen = observe(
        [
            pair(side((8, 7.5)), side((3, 3.25))),
            pair(side((8, 7.5)), side((3, None))),
            pair(side((8, None), (None, None)), side((2, None), (5, None))),
            pair(side((None, 9.0)), side((5, 5.5))),
        ]
    )
    assert seen.gaps.tolist() == [4.25, 5, 4.5] and seen.outcomes.tolist() == [1, 1, 1]
    assert (seen.expected, seen.unreadable) == (1, 1)
    assert seen.scores.tolist() == [7.5, 3.25, 7.5, 3, 8, 3.5, 5.5]


def test_the_check_on_other_pairs_is_the_log_loss_and_the_calibration_error_worked_by_hand() -> None:
    calibration = Calibration(math.log(3), ((5.0, 0.5),), 10)  # gap 1: P = 3/4
    found = check(calibration, [1, 1, 1, -1], [1, 1, 1, 1])
    assert found["log_loss"] == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)
    assert found["log_loss_coin"] == math.log(2)
    assert found["calibration_error"] == pytest.approx(0)  # three of four right where 3/4 was said
    assert found["calibration_error_coin"] == 0.25
    assert check(calibration, [1, 1, 0, 0], [1, 1, 1, 1])["calibration_error"] == pytest.approx(0.125)


def test_json_brings_back_the_same_calibration() -> None:
    found = fit([1.0, -0.5] * 10, [1.0] * 20, SCORES)
    assert Calibration.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "change",
    [
        {"slope": -1},
        {"slope": "steep"},
        {"slope": float("nan")},
        {"percentiles": []},
        {"percentiles": [[1, 2]]},
        {"percentiles": [[2, 0.1], [1, 0.5]]},
        {"percentiles": [[1, 0.5], [2, 0.1]]},
        {"pairs": None},
        {"schema": 2},
        {"how": 3},
    ],
)
def test_a_damaged_calibration_is_one_clear_line(change: dict[str, object]) -> None:
    data = json.loads(fit([1.0] * 10, [1.0] * 10, SCORES).to_json())
    with pytest.raises(UserError, match="calibration") as caught:
        Calibration.from_json(json.dumps({**data, **change}))
    assert "\n" not in str(caught.value)
    for text in ("", "[]", "{", "[" * 100_000):
        with pytest.raises(UserError, match="damaged"):
            Calibration.from_json(text)


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(UserError, match="at least 10"):
        fit([1.0] * 9, [1.0] * 9, SCORES)
