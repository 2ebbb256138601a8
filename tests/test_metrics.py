"""Accuracy, ties, intervals, correlations and expected score, against numbers worked by hand and against scipy."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from patarm_lite.errors import UserError
from patarm_lite.metrics import (
    accuracy,
    expected_score,
    faults,
    faulty,
    judged_to_rows,
    longer_wins,
    pair_to_row,
    paired_difference,
    problems,
    row_to_pair,
    rows_to_judged,
    spearman,
    spearman_length,
    spearman_quality,
    summarise,
    unreadable,
)
from patarm_lite.records import Criterion, CriterionScore, JudgedPair, Pair, Turn, Verdict, Vote

U = None  # an unreadable judgement


def vote(score, expected=None, tokens=10):
    return Vote(Verdict(score, None if score is not None else "truncated"), "", expected, None, tokens)


def judged(*sides, prompts=None, **fields):
    """Pairs p0, p1, ... from (chosen scores, rejected scores)."""
    return [
        JudgedPair(
            replace(Pair((Turn("user", f"{prompts[i] if prompts else i}"),), "a", "b", id=f"p{i}"), **fields),
            tuple(vote(s) for s in chosen),
            tuple(vote(s) for s in rejected),
        )
        for i, (chosen, rejected) in enumerate(sides)
    ]


# --- accuracy ---


def test_a_tie_earns_half_and_a_wrong_order_nothing():
    result = accuracy(judged(([9], [2]), ([5], [5]), ([3], [8]), ([7], [6])))
    assert (result.value, result.ties, result.readable, result.n) == (2.5 / 4, 1 / 4, 2.5 / 4, 4)


def test_a_pair_with_an_unreadable_side_earns_nothing_but_stays_in_the_denominator():
    result = accuracy(judged(([9], [2]), ([U], [1]), ([9], [U]), ([U], [U])))
    assert (result.value, result.readable, result.ties) == (1 / 4, 1.0, 0.0)


def test_sampled_accuracy_is_the_mean_over_vote_indices_of_a_single_judgements_accuracy():
    pairs = judged(([9, 2], [5, 5]), ([6, U], [6, 3]))
    first = judged(([9], [5]), ([6], [6]))  # 1 and 1/2
    second = judged(([2], [5]), ([U], [3]))  # 0 and nothing
    assert accuracy(first).value == 0.75 and accuracy(second).value == 0.0
    result = accuracy(pairs)
    assert result.value == 0.375
    assert result.ties == 1 / 4  # one of four vote-pairs
    assert result.readable == 1.5 / 3


def test_the_mean_of_votes_leaves_unreadable_votes_out_and_needs_one_readable_vote_a_side():
    pairs = judged(([9, U], [8, 9]), ([U, U], [1, 1]), ([4, 5], [4, 5]))  # 9 > 8.5, nothing, tie
    result = accuracy(pairs, "mean")
    assert (result.value, result.readable, result.ties) == (1.5 / 3, 1.5 / 2, 1 / 3)


def test_means_over_different_numbers_of_readable_votes_tie_exactly():
    pairs = judged(([7, 8, 8, U, U, U], [7, 8, 8, 7, 8, 8]))  # 23/3 and 46/6
    assert accuracy(pairs, "mean").ties == 1.0


def test_expected_accuracy_orders_by_expected_scores_of_readable_votes_only():
    prompt = (Turn("user", "q"),)
    chosen = (vote(5, 5.4), vote(U, 9.9))  # the second can't be read: its expectation is no score
    pairs = [
        JudgedPair(Pair(prompt, "a", "b", id="x"), chosen, (vote(5, 5.5), vote(5, 5.5))),
        JudgedPair(Pair(prompt, "a", "b", id="y"), (vote(5, 5.6), vote(5)), (vote(5, 5.5), vote(5, 5.5))),
        JudgedPair(Pair(prompt, "a", "b", id="z"), (vote(5), vote(5)), (vote(5, 5.5), vote(5, 5.5))),
    ]
    result = accuracy(pairs, "expected")
    assert (result.value, result.readable, result.ties) == (1 / 3, 1 / 2, 0.0)


def test_nothing_readable_is_accuracy_zero_and_no_readable_accuracy():
    result = accuracy(judged(([U], [U])))
    assert (result.value, result.low, result.high, result.readable) == (0.0, 0.0, 0.0, None)


THREE_SCORES = st.lists(st.one_of(st.none(), st.integers(1, 10)), min_size=3, max_size=3)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(THREE_SCORES, THREE_SCORES), min_size=1))
def test_swapping_the_sides_of_readable_pairs_gives_one_minus_the_accuracy(sides):
    there, back = judged(*sides), judged(*[(r, c) for c, r in sides])
    for score in ("sampled", "mean"):
        one, other = accuracy(there, score), accuracy(back, score)
        assert one.ties == other.ties
        if one.readable is not None:
            assert one.readable + other.readable == pytest.approx(1)
        assert 0 <= one.low <= one.high <= 1
        assert one.value <= (one.readable or 0) + 1e-12


# --- intervals ---


def test_the_interval_is_that_of_a_binomial_when_every_pair_has_its_own_prompt():
    sides = [([9], [1])] * 280 + [([1], [9])] * 120
    result = accuracy(judged(*sides))
    low, high = stats.binom.ppf([0.025, 0.975], 400, 0.7) / 400
    assert result.low == pytest.approx(low, abs=0.006)
    assert result.high == pytest.approx(high, abs=0.006)


def test_pairs_of_one_prompt_are_resampled_together():
    """Four prompts with 25 equal pairs each hold four facts, not a hundred: the interval spans 0 to 1."""
    sides = [([9], [1])] * 50 + [([1], [9])] * 50
    together = accuracy(judged(*sides, prompts=[i // 25 for i in range(100)]))
    apart = accuracy(judged(*sides))
    assert (together.low, together.high) == (0.0, 1.0)
    assert apart.high - apart.low < 0.25


def test_the_interval_weighs_a_prompt_by_its_pairs():
    """Two prompts, one pair won and three lost: the four equally likely draws give 1, 1/4, 1/4 and 0."""
    result = accuracy(judged(([9], [1]), *[([1], [9])] * 3, prompts=[0, 1, 1, 1]))
    assert (result.value, result.low, result.high) == (0.25, 0.0, 1.0)


def test_the_same_seed_gives_the_same_interval_and_another_seed_nearly_the_same():
    prompts = [i // (1 + i % 7) for i in range(90)]  # of unequal sizes, so that hardly two draws give one number
    pairs = judged(*[([9], [1]), ([1], [9]), ([5], [5])] * 30, prompts=prompts)
    assert accuracy(pairs, seed=1) == accuracy(pairs, seed=1)
    assert accuracy(pairs, seed=1).low != accuracy(pairs, seed=2).low
    assert accuracy(pairs, seed=1).low == pytest.approx(accuracy(pairs, seed=2).low, abs=0.02)


def test_a_paired_difference_is_narrower_than_two_intervals_apart():
    """One pair in ten is repaired, the rest stays as it was: +0.1, with the error of a tenth, not of two halves."""
    before = judged(*[([9], [1]), ([1], [9])] * 50)
    after = judged(*([([9], [1]), ([1], [9])] * 40 + [([9], [1]), ([9], [1])] * 10))
    difference, low, high = paired_difference(before, after)
    spread = 1.96 * np.sqrt(0.1 * 0.9 / 100)
    assert difference == pytest.approx(0.1)
    assert (low, high) == (pytest.approx(0.1 - spread, abs=0.015), pytest.approx(0.1 + spread, abs=0.015))


def test_a_paired_difference_refuses_other_pairs():
    with pytest.raises(UserError, match="same pairs in the same order"):
        paired_difference(judged(([9], [1])), judged(([9], [1]), ([9], [1])))


def test_a_pair_whose_sides_have_different_numbers_of_votes_is_named():
    with pytest.raises(UserError, match="'p1' has 2 votes on the chosen and 1 on the rejected"):
        accuracy(judged(([9], [1]), ([9, 9], [1])))
    with pytest.raises(UserError, match="no judged pairs"):
        accuracy([])


# --- judgements ---


def test_unreadable_and_faulty_are_shares_of_judgements_not_of_pairs():
    pairs = judged(([9, U], [2, 2]), ([5, 5], [5, 5]))
    flawed = Vote(Verdict(5, faults=("criteria_count", "duplicate_criterion")), "")
    pairs[1] = replace(pairs[1], chosen=(flawed, Vote(Verdict(5, faults=("criteria_count",)), "")))
    assert unreadable(pairs) == 1 / 8
    assert problems(pairs) == Counter(truncated=1)
    assert faulty(pairs) == 2 / 8
    assert faults(pairs) == Counter(criteria_count=2, duplicate_criterion=1)


# --- correlations ---


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=40))
def test_spearman_is_scipys_with_ties_and_none_when_constant(points):
    x, y = [a for a, _ in points], [b for _, b in points]
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert spearman(x, y) is None
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_the_score_of_a_side_is_correlated_with_its_words_and_its_true_quality():
    """Scores 9, 5, 7, 1 against words 1, 3, 2, 4 (reversed) and qualities 1, 2/3, 2/3, 0."""
    pairs = judged(([9], [5]), ([7], [1]))
    pairs[0] = replace(pairs[0], pair=replace(pairs[0].pair, chosen="w", rejected="w w  w"))
    pairs[1] = replace(pairs[1], pair=replace(pairs[1].pair, chosen="longer words", rejected="w w\nw w"))
    assert spearman_length(pairs) == pytest.approx(-1)
    assert spearman_quality(pairs) is None
    qualities = [{"chosen_quality": 1.0, "rejected_quality": 2 / 3}, {"chosen_quality": 2 / 3, "rejected_quality": 0.0}]
    pairs = [replace(j, pair=replace(j.pair, meta=meta)) for j, meta in zip(pairs, qualities, strict=True)]
    assert spearman_quality(pairs) == pytest.approx(stats.spearmanr([9, 5, 7, 1], [3, 2, 2, 0]).statistic)


def test_a_side_that_no_vote_could_read_has_no_place_in_a_correlation():
    pairs = judged(([9], [5]), ([U], [1]))
    texts = [("w w w", "w w"), ("w w w w w w", "w")]  # with a 0 for the unreadable one it would not be 1
    pairs = [replace(j, pair=replace(j.pair, chosen=c, rejected=r)) for j, (c, r) in zip(pairs, texts, strict=True)]
    assert spearman_length(pairs) == pytest.approx(1)


# --- the rule "the longer one wins" ---


def test_the_longer_one_wins_by_words_and_by_characters():
    pairs = [
        Pair((), chosen="a b c", rejected="incomprehensible"),  # words: right, characters: wrong
        Pair((), chosen="ab cd", rejected="ef gh"),  # a tie in both
        Pair((), chosen="x", rejected="x y"),  # wrong in both
        Pair((), chosen="abc de", rejected="f g"),  # words: a tie, characters: right
    ]
    assert longer_wins(pairs) == {"words": 2 / 4, "characters": 1.5 / 4}


# --- expected score ---


def test_the_worked_case_of_the_expected_score_is_7_66_and_not_the_naive_8_20():
    expected, mass = expected_score([0.6] + [0.05] * 8, p_zero_after_one=0.9, p_close_after_one=0.1)
    assert (expected, mass) == (pytest.approx(7.66), pytest.approx(1.0))
    naive = 1 * 0.6 + sum(k * 0.05 for k in range(2, 10)) + 10 * 0.6 * 0.9
    assert naive == pytest.approx(8.20)


def test_a_one_followed_by_neither_zero_nor_the_closing_tag_is_lost_mass():
    """P(1) = 0.5, of which 0.3 goes on to another digit: mass 0.7 + 0.5; p_1 = 0.1, p_10 = 0.1, p_5 = 0.5."""
    expected, mass = expected_score([0.5, 0, 0, 0, 0.5, 0, 0, 0, 0], 0.2, 0.2)
    assert mass == pytest.approx(0.7)
    assert expected == pytest.approx((0.1 * 1 + 0.5 * 5 + 0.1 * 10) / 0.7)


def test_below_half_the_mass_there_is_no_expected_score_but_the_mass_is_reported():
    assert expected_score([0, 0.25, 0.25, 0, 0, 0, 0, 0, 0], 0, 0) == (pytest.approx(2.5), 0.5)
    assert expected_score([0, 0.25, 0.2, 0, 0, 0, 0, 0, 0], 0, 0) == (None, pytest.approx(0.45))


@given(st.lists(st.integers(0, 20), min_size=9, max_size=9), st.integers(0, 10), st.integers(0, 10))
def test_the_expected_score_is_the_exact_weighted_mean(parts, zero, close):
    total, after = max(sum(parts), 1), max(zero + close, 1)
    p = [Fraction(part, total) for part in parts]
    legal = [p[0] * Fraction(close, after), *p[1:], p[0] * Fraction(zero, after)]
    expected, mass = expected_score([float(x) for x in p], zero / after, close / after)
    assert mass == pytest.approx(float(sum(legal)))
    if expected is not None:
        assert expected == pytest.approx(float(sum(k * x for k, x in enumerate(legal, 1)) / sum(legal)))
        assert 1 - 1e-9 <= expected <= 10 + 1e-9


# --- summary ---


def test_a_summary_has_every_key_of_the_table_and_a_row_for_every_slice():
    prompt = (Turn("user", "q"),)
    chat = Pair(prompt, "a b", "c", "chat", "1", "arena", meta={"gap": 1, "set": "triples"})
    math = Pair((Turn("user", "r"),), "a", "bb", "math", "2", "arena", meta={"gap": 3, "set": "pairs"})
    code = Pair((Turn("user", "s"),), "a", "b c", "code", "3", "human")
    results = [
        JudgedPair(chat, (vote(9), vote(9)), (vote(1), vote(9))),
        JudgedPair(math, (vote(1), vote(1)), (vote(2), vote(U))),
        JudgedPair(code, (vote(8, 7.5), vote(8, 7.5)), (vote(4, 3.5), vote(4, 3.5))),
    ]
    summary = summarise(results)
    assert " ".join(summary) == (
        "accuracy low high accuracy_mean2 accuracy_mean2_low accuracy_mean2_high accuracy_readable accuracy_expected "
        "ties unreadable problems faulty spearman_quality spearman_length tokens_mean rows"
    )
    assert summary["accuracy"] == pytest.approx((0.75 + 0 + 1) / 3)
    assert summary["accuracy_mean2"] == pytest.approx(2 / 3)
    assert summary["accuracy_expected"] == pytest.approx(1 / 3)  # the other two have no expected scores
    assert summary["problems"] == {"truncated": 1}
    assert summary["tokens_mean"] == 10
    assert list(summary["rows"]) == [
        *("task=chat", "task=code", "task=math", "set=pairs", "set=triples", "gap=1", "gap=3"),
        *("length=chosen longer", "length=chosen shorter", "length=matched", "source=arena", "source=human"),
    ]
    row = summary["rows"]["task=chat"]
    assert row == {
        "n": 1,
        "accuracy": 0.75,
        "low": 0.75,
        "high": 0.75,
        "accuracy_mean2": 1.0,
        "ties": 0.5,
        "unreadable": 0,
    }
    assert summary["rows"]["gap=3"]["unreadable"] == 1 / 4
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_without_expected_scores_truth_or_second_source_those_entries_are_none_or_absent():
    summary = summarise(judged(([9], [2])))
    assert summary["accuracy_expected"] is None and summary["spearman_quality"] is None
    assert list(summary["rows"]) == ["task=chat", "length=matched"]


# --- JSONL ---

FULL = Vote(
    Verdict(
        7,
        None,
        (Criterion("tone", "is friendly", 2), Criterion("facts", "is right", 5)),
        (CriterionScore("tone", "warm", 9),),
        ("criteria_count", "unscored_criterion"),
    ),
    "<score>7</score>\u2028 <script>",
    6.5,
    0.75,
    58,
)
CHAT = Pair((Turn("system", "be brief"), Turn("user", "hé")), "a", "b", "safety", "x:1", "s", "ref", {"gap": 2})


def test_judged_pairs_come_back_the_same_from_json_lines():
    results = [
        JudgedPair(CHAT, (FULL, vote(U)), (vote(3), FULL)),
        JudgedPair(replace(CHAT, id="x:2", reference=None), (vote(1), FULL), (vote(U), vote(10))),
    ]
    pair_lines = [json.dumps(pair_to_row(j.pair)) for j in results]
    vote_lines = [json.dumps(row) for row in judged_to_rows(results)]
    assert len(vote_lines) == 8
    pairs = [row_to_pair(json.loads(line)) for line in pair_lines]
    assert rows_to_judged(map(json.loads, vote_lines), pairs) == results


def test_a_line_holds_the_documented_keys():
    row = judged_to_rows([JudgedPair(CHAT, (FULL,), (vote(U),))])[0]
    assert row == {
        "pair": "x:1",
        "side": "chosen",
        "vote": 0,
        "score": 7,
        "problem": None,
        "faults": ["criteria_count", "unscored_criterion"],
        "rubric": [
            {"name": "tone", "description": "is friendly", "weight": 2},
            {"name": "facts", "description": "is right", "weight": 5},
        ],
        "criterion_scores": [{"name": "tone", "finding": "warm", "score": 9}],
        "expected": 6.5,
        "mass": 0.75,
        "tokens": 58,
        "text": FULL.text,
    }


def rows_of_one_pair():
    return judged_to_rows([JudgedPair(CHAT, (FULL, FULL), (FULL, FULL))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), "2 votes on the chosen and 1 on the rejected"),
        (lambda rows: rows.pop(0), "expected them from 0 without a gap"),
        (lambda rows: rows.append(rows[0]), "vote 0 of 'chosen' of pair 'x:1' is given twice"),
        (lambda rows: rows[1].update(pair="y"), "judgement 2 is of 'chosen' of pair 'y', which is not among the pairs"),
        (lambda rows: rows[1].update(side="left"), "judgement 2 is of 'left'"),
        (lambda rows: rows[1].pop("text"), "judgement 2 is damaged: key 'text' is missing"),
        (lambda rows: rows[1].update(score=11), "score 11 with problem None"),
        (lambda rows: rows[1].update(score=None), "score None with problem None"),
        (lambda rows: rows[1].update(problem="truncated"), "score 7 with problem 'truncated'"),
    ],
)
def test_damaged_judgements_are_refused_by_line(change, message):
    rows = rows_of_one_pair()
    change(rows)
    with pytest.raises(UserError, match=message):
        summarise(rows_to_judged(rows, [CHAT]))


def test_two_pairs_with_one_id_are_refused():
    with pytest.raises(UserError, match="two held-out pairs have the id 'x:1'"):
        rows_to_judged([], [CHAT, CHAT])


def test_a_damaged_pair_is_refused():
    row = pair_to_row(CHAT)
    del row["chosen"]
    with pytest.raises(UserError, match="held-out pair 'x:1' is damaged: key 'chosen' is missing"):
        row_to_pair(row)


def test_any_combination_of_readable_and_unreadable_sides_counts_once():
    sides = [([c], [r]) for c, r in product([U, 1, 10], repeat=2)]
    result = accuracy(judged(*sides))
    assert result.value == (1 + 0.5 + 0.5) / 9  # 10 > 1, and two ties
    assert result.readable == 2 / 4
