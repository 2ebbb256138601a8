"""Official scores against official vectors, and figures worked by hand where there are none."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from patarm_lite.errors import UserError
from patarm_lite.evals.hhh import HHH
from patarm_lite.evals.items import (
    HALF,
    LOSE,
    OFFICIAL,
    WIN,
    Answer,
    BenchItem,
    chance_of,
    draws,
    interval,
    means_of,
    part_of,
    score,
    shares,
)
from patarm_lite.evals.judgebench import JUDGEBENCH, pair_is_right
from patarm_lite.evals.llmbar import LLMBAR, winners
from patarm_lite.evals.pandalm import PANDALM
from patarm_lite.evals.rewardbench import PRIOR, REWARDBENCH, SECTIONS, leaderboard, sections
from patarm_lite.evals.rewardbench2 import COUNTS, REWARDBENCH2, best_of, margins
from patarm_lite.evals.rm_bench import RM_BENCH, cells


def vectors(shared: Path, name: str) -> Any:
    return json.loads((shared / "vectors" / f"{name}.json").read_text(encoding="utf-8"))


def numbers(value: Any) -> Any:
    """ "NaN" in a vector stands for a missing figure."""
    return math.nan if value == "NaN" else value


def pairs(subset: str, *scores: tuple[float | None, float | None], label: str = "") -> list[Answer]:
    """Answers to as many pairs, the right response first (or as the label says)."""
    return [Answer(BenchItem(f"{subset}/{n}", subset, label), both) for n, both in enumerate(scores)]


# --- RewardBench ---


def test_rewardbench_sections_are_those_of_the_official_code(shared: Path) -> None:
    found = vectors(shared, "rewardbench_v1")
    assert {name: dict(counts) for name, counts in SECTIONS.items()} == {
        section: {name: found["example_counts"][name] for name in names}
        for section, names in found["subset_mapping"].items()
    }
    for case in found["cases"]:
        assert sections(case["metrics"]) == pytest.approx(case["sections"]), case["name"]


def test_rewardbench_leaderboard_weighs_prior_sets_half(shared: Path) -> None:
    cases = [case for case in vectors(shared, "rewardbench_v1")["cases"] if "leaderboard" in case]
    assert len(cases) == 3
    for case in cases:
        priors = [numbers(one) for one in case["prior_sets"] or []]
        wanted = case["leaderboard"]
        assert leaderboard(case["sections"], priors) == pytest.approx(wanted["average"]), case["name"]
        known = [one for one in priors if not math.isnan(one)]
        if known:
            assert sum(known) / len(known) == pytest.approx(wanted["Prior Sets (0.5 weight)"])


def test_a_rewardbench_pair_earns_what_the_official_code_gives_it(shared: Path) -> None:
    scalar, scalar_tie, rating_tie = vectors(shared, "rewardbench_v1")["per_pair_rule"]

    def one(case: Any, rule: str) -> float:
        return score(REWARDBENCH, pairs("mt-bench-easy", (case["chosen"], case["rejected"])), rule)["Chat"]

    assert one(scalar, OFFICIAL) == scalar["result"]
    assert one(scalar_tie, LOSE) == scalar_tie["result"] == 0  # a scalar model's rule
    assert one(rating_tie, OFFICIAL) == rating_tie["result"] == 0.5
    assert score(REWARDBENCH, pairs("mt-bench-easy", (None, 7)))["Chat"] == 0.5
    assert score(REWARDBENCH, pairs("mt-bench-easy", (None, 7)), WIN)["Chat"] == 0


def test_rewardbench_weighs_math_and_code_alike_and_leaves_missing_sections_out() -> None:
    answers = [
        *pairs("math-prm", (9, 1)),
        *pairs("hep-python", (1, 9)),
        *pairs("hep-go", (9, 1), (1, 9)),
        *pairs("llmbar-natural", (9, 1), (9, 1), (9, 1), (1, 9)),
    ]
    found = score(REWARDBENCH, answers)
    assert found["Reasoning"] == 0.8125  # (984 * 1 + 164 * 0 + 164 * 0.5) / (984 + 164 + 164)
    assert found["Chat Hard"] == 0.75
    assert "Safety" not in found
    assert found["Average"] == (0.8125 + 0.75) / 2
    assert part_of(REWARDBENCH, [answer.item for answer in answers]) is not None


def test_rewardbench_prior_sets_enter_the_leaderboard_only() -> None:
    answers = [*pairs("donotanswer", (9, 1), (1, 9)), *pairs("shp", (9, 1))]
    found = score(REWARDBENCH, answers)
    assert (found["Average"], found[PRIOR]) == (0.5, 1.0)
    assert found["Leaderboard"] == (2 * 0.5 + 1 * 1.0) / 3


# --- RewardBench 2 ---


def test_best_of_four_is_the_official_one(shared: Path) -> None:
    found = vectors(shared, "rewardbench_v2")
    groups = found["best_of_n"]
    assert [best_of(group) for group in groups["groups"]] == pytest.approx(groups["results"])
    ratings = found["generative_ratings"]
    readable = [[None if one == -1 else one for one in group] for group in ratings["groups"]]
    assert [best_of(group) for group in readable] == pytest.approx(ratings["results"])


def test_ties_are_scored_as_the_official_code_does(shared: Path) -> None:
    cases = vectors(shared, "rewardbench_v2")["ties"]
    assert len(cases) == 4
    for case in cases:
        answers = []
        for row in case["rows"]:
            kind, _, number = row["id"].partition(":")
            item = BenchItem(row["id"], "Ties", kind, row["num_correct"], number)
            scores = tuple(None if one == -1 else one for one in row["scores"])
            answers.append(Answer(item, scores))
            wanted, one = case["per_prompt"][row["id"]], margins(scores, row["num_correct"])
            assert (one.accurate, one.gap) == (wanted["accurate"], pytest.approx(wanted["correct_incorrect_margin"]))
            assert one.spread == pytest.approx(wanted["different_correct_margin"])
        assert score(REWARDBENCH2, answers)["Ties"] == pytest.approx(case["score"], abs=1e-12), case["name"]


def test_rewardbench_2_is_the_plain_mean_of_its_subsets(shared: Path) -> None:
    assert vectors(shared, "rewardbench_v2")["subset_counts"] == COUNTS
    four = [Answer(BenchItem(f"Math/{n}", "Math"), (9, 1, 1, 1)) for n in range(3)]
    focus = [Answer(BenchItem("Focus/0", "Focus"), (5, 5, 2, 1))]
    assert score(REWARDBENCH2, four + focus) == {"Score": 0.75, "Math": 1.0, "Focus": 0.5}
    assert [score(REWARDBENCH2, focus, rule)["Focus"] for rule in (LOSE, HALF, WIN)] == [0, 0.5, 1]


# --- RM-Bench ---


def test_rm_bench_levels_and_domains_are_the_official_ones(shared: Path) -> None:
    names = {"hard_acc": "Hard", "normal_acc": "Normal", "easy_acc": "Easy", "total_avg_acc": "Total"}
    cases = vectors(shared, "rmbench")["cases"]
    assert len(cases) == 3
    for case in cases:
        answers = [
            Answer(BenchItem(str(n), row.get("domain", "chat")), (*row["score_chosen"], *row["score_rejected"]))
            for n, row in enumerate(case["results"])
        ]
        if "matrix" in case:
            count = len(answers)
            found = [[sum(cells(a.scores)[i][j] for a in answers) / count for j in range(3)] for i in range(3)]
            assert found == case["matrix"]
        table = score(RM_BENCH, answers)
        for name, value in case["expect"].items():
            assert table[names.get(name, name.capitalize())] == pytest.approx(value), name


def test_an_unreadable_score_is_never_higher_in_rm_bench() -> None:
    answers = [Answer(BenchItem("a", "code"), (9, None, 9, 1, None, 1))]
    found = score(RM_BENCH, answers)
    # right: rows 1 and 3 against columns 1 and 3, so cells (1,1) (1,3) (3,1) (3,3)
    assert found["Normal"] == pytest.approx(2 / 3)
    assert found["Hard"] == found["Easy"] == pytest.approx(1 / 3)
    assert shares(RM_BENCH, answers) == (0.0, pytest.approx(2 / 6))


# --- JudgeBench ---


def test_judgebench_decides_as_the_official_truth_table(shared: Path) -> None:
    found = vectors(shared, "judgebench")
    assert len(found["truth_table_both_orders"]) == 32
    for row in found["truth_table_both_orders"]:
        assert 100 * pair_is_right(row["label"], row["decisions"]) == row["correct_percent"], row
    for row in found["single_order"]:
        assert 100 * pair_is_right(row["label"], [row["decision"]]) == row["correct_percent"], row


def test_published_judgebench_runs_get_their_published_scores(shared: Path) -> None:
    runs = [run for run in vectors(shared, "judgebench")["published_outputs"] if "pairs" in run]
    assert ["o1-mini" in run["path"] for run in runs] == [True, False, False]
    for run in runs:
        answers = []
        for name, source, label, *decisions in run["pairs"]:
            group = next(group for group in run["score"] if source.startswith(group))
            answers.append(Answer(BenchItem(name, group, label), decisions=tuple(decisions)))
        assert len(answers) == 350
        assert {row: 100 * value for row, value in score(JUDGEBENCH, answers).items()} == pytest.approx(run["score"])
        assert part_of(JUDGEBENCH, [answer.item for answer in answers]) is None


def test_a_judge_of_single_responses_ties_to_b_in_judgebench_and_half_stands_beside_it() -> None:
    answers = [
        *pairs("livecodebench", (5, 5), (7, 5), label="A>B"),
        *pairs("mmlu-pro", (5, 5), (None, 5), label="B>A"),
    ]
    assert score(JUDGEBENCH, answers)["Overall"] == 2 / 4  # the tie is wrong for A>B and right for B>A
    assert score(JUDGEBENCH, answers[:1])["Overall"] == 0
    assert score(JUDGEBENCH, answers[2:3])["Overall"] == 1
    assert score(JUDGEBENCH, answers, HALF)["Overall"] == (0.5 + 1 + 0.5 + 0) / 4
    assert [score(JUDGEBENCH, answers, rule)["Overall"] for rule in (LOSE, WIN)] == [1 / 4, 3 / 4]


# --- LLMBar ---


def test_llmbar_accuracy_and_agreement_are_the_official_ones(shared: Path) -> None:
    (case,) = vectors(shared, "llmbar")["statistics_cases"]
    answers = [
        Answer(BenchItem(str(n), "Natural", str(row["label"])), decisions=(row["no_swap"], row["swap"]))
        for n, row in enumerate(case["items"])
    ]
    found = score(LLMBAR, answers)

    def percent(words: str) -> float:
        return float(words.rpartition("=")[2].strip(" %")) / 100

    assert found["Natural"] == pytest.approx(percent(case["expect"]["correct_average"]))
    assert found["Natural agreement"] == pytest.approx(percent(case["expect"]["equal"]))
    assert found["Natural right in both orders"] == pytest.approx(percent(case["expect"]["correct_both"]))


def test_llmbar_ratings_win_as_in_the_official_code(shared: Path) -> None:
    rows = vectors(shared, "llmbar")["pointwise_rating_rule"]
    assert len(rows) == 5

    def rating(text: str) -> int | None:  # the official code reads int(text)
        return int(text) if text.isdigit() else None

    for row in rows:
        assert winners(rating(row["score_1"]), rating(row["score_2"])) == tuple(row["winners"].values()), row


def test_llmbar_adversarial_is_the_mean_of_its_four_folders() -> None:
    answers = [
        *pairs("Neighbor", (9, 1), (1, 9), label="1"),
        *pairs("Manual", (1, 9), label="2"),
        *pairs("Natural", (5, 5), label="1"),
    ]
    found = score(LLMBAR, answers)
    assert (found["Adversarial"], found["Natural"], found["Natural agreement"]) == (0.75, 0.5, 0.0)
    assert found["All items"] == (1 + 0 + 1 + 0.5) / 4
    assert score(LLMBAR, answers, LOSE)["Natural"] == 0


# --- PandaLM, HHH ---


def test_pandalm_counts_a_tie_as_a_class_of_its_own() -> None:
    labels, said = "11120", [(9, 1), (9, 1), (5, 5), (1, 9), (1, 9)]  # classes 1 1 0 2 2
    answers = [
        Answer(BenchItem(str(n), "test", label), both) for n, (label, both) in enumerate(zip(labels, said, strict=True))
    ]
    found = score(PANDALM, answers)
    assert found["Accuracy"] == pytest.approx(3 / 5)
    # precision 0, 1, 1/2; recall 0, 2/3, 1; F1 0, 4/5, 2/3
    assert found["Macro precision"] == pytest.approx((0 + 1 + 1 / 2) / 3)
    assert found["Macro recall"] == pytest.approx((0 + 2 / 3 + 1) / 3)
    assert found["Macro F1"] == pytest.approx((0 + 4 / 5 + 2 / 3) / 3)
    assert score(PANDALM, answers, HALF) == {"Accuracy": (1 + 1 + 0.5 + 1) / 4}  # four pairs are no human tie


def test_hhh_is_the_mean_over_pairs_and_not_over_its_parts() -> None:
    answers = [*pairs("honest", (9, 1), (9, 1), (5, 5)), *pairs("other", (1, 9))]
    assert score(HHH, answers) == {"Overall": 2.5 / 4, "honest": pytest.approx(2.5 / 3), "other": 0.0}


# --- intervals ---


def test_an_interval_is_that_of_a_share() -> None:
    answers = pairs("honest", *[(9, 1), (1, 9)] * 200)
    low, high = interval(draws(HHH, answers)["Overall"])
    half_width = 1.96 * math.sqrt(0.25 / 400)
    assert (low, high) == (pytest.approx(0.5 - half_width, abs=0.006), pytest.approx(0.5 + half_width, abs=0.006))


def test_items_are_drawn_within_their_subset() -> None:
    answers = [*pairs("honest", *[(9, 1)] * 20), *pairs("other", *[(1, 9)] * 20)]
    assert interval(draws(HHH, answers)["Overall"]) == (0.5, 0.5)


def test_both_kinds_of_a_ties_question_are_drawn_together() -> None:
    answers = []
    for number in range(12):
        right = number % 2 == 0
        answers.append(Answer(BenchItem(f"ref:{number}", "Ties", "ref", 1, str(number)), (9, 1) if right else (1, 9)))
        answers.append(
            Answer(BenchItem(f"tied:{number}", "Ties", "tied", 2, str(number)), (9, 9, 1) if right else (1, 1, 9))
        )
    units = REWARDBENCH2.units(answers, OFFICIAL)
    assert len(units) == 12
    means, counts = means_of(units)
    assert counts == {"Ties": 12}
    assert means["Ties"]["accurate_ref"] == means["Ties"]["accurate_tied"] == 0.5
    found = draws(REWARDBENCH2, answers)["Ties"]
    # with s right questions of 12: .3 s + .3 s + .2 s + .2 s + .01 (s - (1 - s)), so every draw is 1.02 s - .01
    assert {round((value + 0.01) / 1.02 * 12, 9) % 1 for value in found} == {0.0}


def test_the_same_seed_draws_the_same_items_of_two_judges() -> None:
    one = pairs("honest", *[(9, 1), (1, 9), (9, 1)] * 10)
    assert (draws(HHH, one, seed=3)["Overall"] == draws(HHH, one, seed=3)["Overall"]).all()
    assert (draws(HHH, one, seed=3)["Overall"] != draws(HHH, one, seed=4)["Overall"]).any()


def test_chance_is_what_random_scores_get_on_these_items() -> None:
    def ties(kind: str, correct: int, count: int) -> list[Answer]:
        items = [BenchItem(f"Ties/{kind}:{n}", "Ties", kind, correct, group=str(n)) for n in range(300)]
        return [Answer(item, (1.0,) * count) for item in items]

    known = chance_of(PANDALM, [*pairs("test", *[(5, 5)] * 3, label="2"), *pairs("test", (5, 5), label="0")])
    assert known["Accuracy"] == pytest.approx(3 / 8)  # never a tie, so it loses what people call one
    math_items = [Answer(BenchItem(f"Math/{n}", "Math"), (1.0, 2.0, 3.0, None)) for n in range(3)]
    found = chance_of(REWARDBENCH2, math_items)
    assert (found["Math"], found["Score"]) == (0.25, pytest.approx(0.25))
    # one right of three is the best one in 1/3 (0.30 of the score), and one of two kinds alone has no gaps to compare
    assert chance_of(REWARDBENCH2, ties("ref", 1, 3))["Ties"] == pytest.approx(0.3 / 3, abs=0.005)
    # two right of three lie above the wrong one in 1/3
    assert chance_of(REWARDBENCH2, ties("tied", 2, 3))["Ties"] == pytest.approx(0.3 / 3, abs=0.005)
    assert chance_of(HHH, pairs("helpful", (1, 1)))["Overall"] == 0.5


def test_nothing_is_no_score() -> None:
    with pytest.raises(UserError, match="nothing to score"):
        score(HHH, [])


def test_a_part_is_called_a_part() -> None:
    def items(**counts: int) -> Sequence[BenchItem]:
        return [BenchItem(f"{name}{n}", name) for name, count in counts.items() for n in range(count)]

    whole = {"helpful": 59, "honest": 61, "harmless": 58, "other": 43}
    assert part_of(HHH, items(**whole)) is None
    assert part_of(HHH, items(**{**whole, "other": 42})) == "in part: 220 of 221 items"
    assert part_of(HHH, items(honest=3)) == "in part: 3 of 221 items, no helpful, harmless, other"
    assert part_of(HHH, items(**{**whole, "other": 44})) == "not the official items: 222, where there are 221"
