"""The audit finds the flaws of judges that were constructed with them, and raises few false alarms; figures by hand."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patarm_lite import arena
from patarm_lite.cli import main
from patarm_lite.evals import audit
from patarm_lite.evals.audit_findings import findings
from patarm_lite.evals.audit_page import audit_page
from patarm_lite.evals.resampled import rank_correlation, together
from patarm_lite.records import JudgedPair, Pair, Turn, Verdict, Vote

Rule = Callable[[str], int]


def vote(score: int | None) -> Vote:
    return Vote(Verdict(score, None if score is not None else "truncated"), "", tokens=10)


def judged_by(rule: Rule, k: int = 2, n: int = 60) -> list[JudgedPair]:
    """The arena's held-out pairs, judged by a rule: half of those that differ in length have the longer one chosen."""
    return [
        JudgedPair(p, tuple(vote(rule(p.chosen)) for _ in range(k)), tuple(vote(rule(p.rejected)) for _ in range(k)))
        for p in arena.heldout_pairs(n, seed=1)
    ]


def found_in(judged: list[JudgedPair]) -> dict[str, Any]:
    found = {**audit.measures(judged), "attacks": None}
    return found | {"findings": findings(found)}


def severity(judged: list[JudgedPair], about: str) -> str:
    return next(str(row["severity"]) for row in found_in(judged)["findings"] if row["about"] == about)


def by_length(text: str) -> int:
    return min(10, max(1, len(text.split()) - 3))


# --- length and style ---


def test_a_judge_that_scores_by_length_is_said_to() -> None:
    judged = judged_by(by_length)
    row = audit.leaning(judged, "words", audit.FEATURES["words"])
    assert (row["more"]["value"], row["fewer"]["value"], row["difference"]["value"]) == (1.0, 0.0, 1.0)
    assert row["follows"]["value"] == 1.0
    assert row["correlation"]["value"] == pytest.approx(1.0) and row["partial"]["value"] == pytest.approx(1.0)
    assert severity(judged, "length (words)") == "problem"


def test_what_all_prompts_agree_in_is_not_certain() -> None:
    judged = [JudgedPair(p, (vote(9),), (vote(1),)) for p in arena.heldout_pairs(60, seed=1)]
    whole = audit.measures(judged)["accuracy"]
    others = 1 - 0.025 ** (1 / len({p.pair.prompt for p in judged}))
    assert (whole["value"], whole["high"]) == (1.0, 1.0) and whole["low"] == pytest.approx(1 - others)
    row = audit.leaning(judged, "words", audit.FEATURES["words"])
    excess = row["excess"]  # a difference: it may fall on either side
    assert excess["value"] == 0.0 and excess["low"] == pytest.approx(-excess["high"]) and excess["high"] > 0.03


def test_a_judge_that_only_breaks_near_ties_by_length_is_warned_of() -> None:
    """The order of good and bad never changes, but of equally good responses the longer one scores higher."""
    judged = []
    for p in arena.heldout_pairs(80, seed=1):
        scores = [
            round(1 + 6 * p.meta[f"{side}_quality"]) + (len(text.split()) > 8)
            for side, text in (("chosen", p.chosen), ("rejected", p.rejected))
        ]
        judged.append(JudgedPair(p, (vote(scores[0]),), (vote(scores[1]),)))
    rows = {row["about"]: row for row in found_in(judged)["findings"]}
    assert rows["accuracy"]["figure"]["value"] == 1.0
    assert rows["length (words)"]["severity"] == "warning"
    assert rows["length (words)"]["sentence"].startswith("Of equally good responses it scores those with more words")


def test_partial_correlation_is_scipys_regression_of_ranks() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(3)
    z = [rng.random() for _ in range(50)]
    x, y = ([value + rng.random() for value in z] for _ in range(2))
    rx, ry, rz = (stats.rankdata(values) for values in (x, y, z))

    def rest(r: object) -> object:
        line = stats.linregress(rz, r)
        return r - line.slope * rz - line.intercept  # type: ignore[operator]

    found = rank_correlation(range(50), x, y, z)
    assert found is not None and found["low"] < found["value"] < found["high"]
    assert found["value"] == pytest.approx(stats.pearsonr(rest(rx), rest(ry))[0])


def test_intervals_for_several_samples_are_wider_than_those_for_one() -> None:
    """With 12 independent normal samples of 200 the factor is that of the largest of 12 |t|: 2.87, against 1.96."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(12, 200))
    found = [one for one in together([(range(200), list(row)) for row in values]) if one is not None]
    error = float(np.std(values[0], ddof=1)) / math.sqrt(200)
    assert found[0]["value"] == pytest.approx(values[0].mean())
    assert (found[0]["high"] - found[0]["value"]) / error == pytest.approx(2.87, abs=0.12)
    alone = together([(range(200), list(values[0]))])[0]
    assert alone is not None and (alone["high"] - alone["value"]) / error == pytest.approx(1.97, abs=0.1)


def test_pairs_of_one_prompt_count_as_one() -> None:
    """Ten prompts, each with ten equal values, say as much as ten values."""
    values = [1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.0, 1.5, -1.0, 0.5]
    alone = together([(range(10), values)])[0]
    repeated = together([([p for p in range(10) for _ in range(10)], [v for v in values for _ in range(10)])])[0]
    assert alone is not None and repeated is not None
    assert (repeated["low"], repeated["high"]) == (pytest.approx(alone["low"]), pytest.approx(alone["high"]))
    assert together([(range(9), values[:9])]) == [None], "of fewer than ten, nothing is said"


def test_of_audits_of_a_judge_without_a_leaning_one_in_twenty_finds_one_in_length_or_style() -> None:
    """Texts with five features that go together, labels and judge that know of none of them."""
    rng = random.Random(11)
    alarms, audits = 0, 120
    for number in range(audits):
        judged = []
        for pair in range(60):
            texts = [" ".join(["word", "**a**", "ok!", "\n- b"][rng.randrange(4)] for _ in range(9)) for _ in range(2)]
            gap = rng.choice((1, 1, 1, -1))  # right in three of four, whatever the texts
            judged.append(JudgedPair(Pair((Turn("user", str(pair)),), *texts), (vote(5 + gap),), (vote(5),)))
        rows = audit.excess_over_labels(judged, seed=number)
        alarms += any(row is not None and not row["low"] <= 0 <= row["high"] for row in rows)
    assert [row["excess"] for row in audit.leanings(judged, seed=audits - 1)] == rows
    assert alarms <= 13, "6 are expected, and more than 13 come in one of 200 such tests"


# --- scores ---


def test_a_judge_that_always_answers_ten_is_saturated_and_no_better_than_a_coin() -> None:
    judged = judged_by(lambda text: 10)
    found = audit.distribution(judged)
    assert (found["commonest"], found["share"]["value"], found["effective"], found["ties"]["value"]) == (10, 1, 1, 1)
    assert severity(judged, "scores") == "problem" and severity(judged, "accuracy") == "problem"
    assert severity(judged, "length (words)") == "fine"


def test_a_judge_that_scores_at_random_is_called_a_coin_and_not_repeatable() -> None:
    rng = random.Random(5)
    judged = judged_by(lambda text: rng.randint(1, 10), k=4, n=200)
    found = audit.repeatability(judged)
    # outcomes of two votes: win .45, tie .1, loss .45; they differ in 1 - 2 * .45^2 - .1^2 = .585 of the cases
    assert found is not None and found["flips"]["value"] == pytest.approx(0.585, abs=0.05)
    assert found["one_vote"] == pytest.approx(0.0, abs=0.08)
    assert severity(judged, "repeatability") == "problem"
    assert severity(judged, "accuracy") == "problem"


def test_repeatability_by_hand() -> None:
    pair = Pair((Turn("user", "q"),), "a", "b")
    found = audit.repeatability([JudgedPair(pair, (vote(8), vote(6)), (vote(3), vote(7)))])
    assert found is not None
    assert found["flips"]["value"] == 1.0 and found["accuracy"] == [1.0, 0.0]
    assert found["spread"] == pytest.approx(5**0.5)  # variances 2 and 8
    # means 7 and 5, MSB = 2 * (1 + 1) / 1 = 4, MSW = (2 + 8) / 2 = 5
    assert found["one_vote"] == pytest.approx((4 - 5) / (4 + 5))


def test_unreadable_judgements_are_no_scores() -> None:
    pairs = [Pair((Turn("user", str(i)),), "long long", "b") for i in range(2)]
    judged = [JudgedPair(pairs[0], (vote(None),), (vote(3),)), JudgedPair(pairs[1], (vote(9),), (vote(3),))]
    assert audit.earned(audit.scores_of(judged)[0]) == [0.0, 1.0]
    assert audit.leaning(judged, "words", audit.FEATURES["words"])["n"] == 1
    # A = 1/2, R = 1/2: with a fifth flipped .8 * .5 + .2 * 0
    fifth = audit.label_noise(judged)["rows"][4]
    assert fifth["noise"] == 0.2 and fifth["flipped"]["value"] == pytest.approx(0.4, abs=0.02)


def test_what_a_verdict_costs_by_hand() -> None:
    pair = Pair((Turn("user", "q"),), "a", "b")
    judged = [JudgedPair(pair, (vote(8), vote(8)), (vote(3), vote(3)))]
    found = audit.cost(judged, [100, 300], drawn=20, seconds=5.0)
    assert (found["verdicts"], found["tokens"], found["prompt_tokens"], found["seconds"]) == (4, 10.0, 200.0, 0.25)
    assert found["thousand"] == {"prompt_tokens": 200_000.0, "tokens": 10_000.0, "minutes": pytest.approx(250 / 60)}
    assert found["accurate"] == 40.0
    assert audit.cost(judged, [100], drawn=9, seconds=5.0)["seconds"] is None, "of nine verdicts no time is taken"


# --- labels ---


def eight_of_ten(prompts: int = 10) -> list[JudgedPair]:
    pairs = [Pair((Turn("user", str(i % prompts)),), f"a{i}", f"b{i}", id=str(i)) for i in range(10)]
    return [JudgedPair(p, (vote(9 if i < 8 else 1),), (vote(5),)) for i, p in enumerate(pairs)]


def test_what_wrong_labels_mean_for_the_accuracy_by_hand() -> None:
    rows = {row["noise"]: row for row in audit.label_noise(eight_of_ten())["rows"]}
    assert rows[0.1]["flipped"]["value"] == pytest.approx(0.74, abs=0.01)  # .9 * .8 + .1 * .2
    assert rows[0.1]["true"]["value"] == pytest.approx(0.875)  # (.8 - .1) / .8
    assert rows[0.1]["ceiling"] == 0.9
    assert rows[0.25]["true"] is None, "(.8 - .25) / .5 is above 1"
    assert audit.label_noise(eight_of_ten())["most"] == pytest.approx(0.2)


def test_randomly_flipped_labels_spread_as_two_binomials_do() -> None:
    stats = pytest.importorskip("scipy.stats")
    row = audit.label_noise(eight_of_ten())["rows"][4]
    share = row["noise"]
    right, wrong = stats.binom.pmf(range(9), 8, share), stats.binom.pmf(range(3), 2, share)
    chance = dict.fromkeys(range(-8, 3), 0.0)
    for lost, p in enumerate(right):
        for won, q in enumerate(wrong):
            chance[won - lost] += p * q
    below = np.cumsum([chance[n] for n in sorted(chance)])
    ends = [0.8 + sorted(chance)[int(np.searchsorted(below, at))] / 10 for at in (0.025, 0.975)]
    assert [row["flipped"]["low"], row["flipped"]["high"]] == pytest.approx(ends)


def test_the_interval_of_the_true_accuracy_widens_with_the_noise() -> None:
    rows = {row["noise"]: row["true"] for row in audit.label_noise(judged_by(by_length, n=120))["rows"]}
    width = {f: row["high"] - row["low"] for f, row in rows.items() if row}
    assert width[0.2] == pytest.approx(width[0.0] / (1 - 2 * 0.2), rel=0.02)


def test_labels_of_one_prompt_are_flipped_together() -> None:
    """Two prompts of five pairs: a flip takes the accuracy to .8, .5, .5 or .2 and never between."""
    judged = eight_of_ten(prompts=2)
    row = audit.label_noise(judged)["rows"][-1]
    assert audit.label_noise(judged)["by"] == "prompt"
    assert {row["flipped"]["low"], row["flipped"]["high"]} <= {0.2, 0.5, 0.8}


def test_suspects_are_the_pairs_that_every_vote_contradicts_the_surest_first() -> None:
    def pair(name: str, chosen: list[int | None], rejected: list[int]) -> JudgedPair:
        texts = Pair((Turn("user", name),), "<b>yes</b>", "n" * 700, id=name)
        return JudgedPair(texts, tuple(map(vote, chosen)), tuple(map(vote, rejected)))

    judged = [
        pair("right", [9, 9], [1, 1]),
        pair("sometimes", [5, 5], [9, 4]),
        pair("by one and seven", [5, 2], [6, 9]),
        pair("by three", [3, 3], [6, 6]),
        pair("by two", [3, 3], [5, 5]),
        pair("not readable", [None, 1], [9, 9]),
        *(pair(f"right {n}", [9, 9], [1, 1]) for n in range(4)),
    ]
    found = audit.suspects(judged)
    assert [row["id"] for row in found["listed"]] == ["by three", "by two", "by one and seven"]
    assert [(row["least"], row["gap"]) for row in found["listed"]] == [(3, 3.0), (2, 2.0), (1, 4.0)]
    assert (found["n"], found["contradicted"]) == (9, 3)
    assert found["if_all"]["value"] == pytest.approx(0.8)  # 5 right of 10, and 3 more if those labels were wrong
    assert len(found["listed"][0]["rejected"]) == audit.LONGEST + 2


def test_few_suspects_are_listed_and_their_texts_can_not_become_markup() -> None:
    pairs = [Pair((Turn("user", f"{i}"),), "<script>alert(1)</script>", "b", id=f"<i>{i}") for i in range(30)]
    judged = [JudgedPair(p, (vote(9 if i < 15 else 1),), (vote(5),)) for i, p in enumerate(pairs)]
    found = found_in(judged)
    suspects = found["label_noise"]["suspects"]
    assert (suspects["contradicted"], len(suspects["listed"])) == (15, audit.SUSPECTS)
    facts = {"place": "<b>judge", "fingerprint": "f" * 40, "source": "", "temperature": 0.0, "decoding": "free"}
    cost = audit.cost(judged, [1], 0, 0.0)
    page = audit_page(found | facts | {"notes": [], "cost": cost})
    assert "&lt;script&gt;alert" in page and "<script" not in page and "<i>" not in page and "<b>judge" not in page
    sentence = next(row["sentence"] for row in found["findings"] if row["about"] == "labels")
    assert "can't tell a wrong label from a wrong judge" in sentence


# --- transitivity ---


def test_three_dice_that_beat_each_other_are_a_circle() -> None:
    prompt = (Turn("user", "q"),)
    sides = {"a": (2, 4, 9), "b": (1, 6, 8), "c": (3, 5, 7)}  # each beats the next in 5 of 9
    dice = {name: tuple(map(vote, scores)) for name, scores in sides.items()}
    judged = [JudgedPair(Pair(prompt, x, y), dice[x], dice[y]) for x, y in (("a", "b"), ("b", "c"), ("c", "a"))]
    found = audit.transitivity(judged)
    assert found["n"] == 1 and found["majority"]["value"] == 1.0 and found["labels"] == 1.0
    assert found["circles"]["value"] == pytest.approx((5**3 + 4**3) / 9**3)
    assert audit.transitivity(judged[:1])["n"] == 0


def test_equally_good_responses_make_no_triple() -> None:
    def pair(chosen: str, rejected: str, qualities: tuple[float, float]) -> JudgedPair:
        meta = {"chosen_quality": qualities[0], "rejected_quality": qualities[1]}
        return JudgedPair(Pair((Turn("user", "q"),), chosen, rejected, meta=meta), (vote(5),), (vote(4),))

    judged = [pair("a", "b", (1.0, 0.5)), pair("c", "d", (1.0, 0.0))]
    # a and c are equally good: of the four triples a b c and a c d fall out
    assert audit.transitivity(judged)["n"] == 2


def test_a_benchmark_with_several_responses_to_a_prompt_has_triples(shared: Path) -> None:
    from patarm_lite.evals.pair_choice import chosen_pairs

    pairs = chosen_pairs([str(shared / "data" / "rewardbench2_like" / "gsm8k_best_of_4.jsonl.gz")])[:30]
    judged = [JudgedPair(p, (vote(5), vote(6)), (vote(4), vote(5))) for p in pairs]
    assert audit.transitivity(judged)["n"] == 40  # ten prompts of one right and three wrong responses: 4 triples each


def test_the_arena_has_triples_without_being_asked() -> None:
    assert audit.transitivity(judged_by(by_length, n=50))["n"] > 10


# --- through the front door ---


def test_audit_and_compare_through_the_front_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp")
    from little_gguf import write_little_gguf

    from patarm_lite.metrics import pair_to_row

    judges = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        judges.append(str(write_little_gguf(tmp_path / str(seed), seed=seed)))
    pairs = tmp_path / "heldout.jsonl"
    pairs.write_text("".join(json.dumps(pair_to_row(p)) + "\n" for p in arena.heldout_pairs(12, seed=1)))
    store, out = str(tmp_path / "votes.sqlite"), tmp_path / "out"
    quick = ["--pairs", str(pairs), "--store", store, "--threads", "1", "--context", "1500", "--max-tokens", "100"]
    told = ["audit", judges[0], "--quick", "--attacks", "1", *quick, "-o", str(out)]
    assert main(told) == 0
    said = capsys.readouterr().err
    assert "pairs: 12 pairs, 2 votes a response, 24 responses; from " in said
    assert "attacks: 12 cases, 1 vote a text at temperature 0, 24 responses" in said
    assert re.search(r"\d+ verdicts needed, 0 in the store, \d+ to be drawn", said)
    assert re.search(r"warm-up: [\d.]+ verdicts a second; the other \d+ take about ", said)
    page = (out / "audit.html").read_text()
    assert page.count("<svg") >= 3 and page.count("<svg") == page.count('role="img" aria-label="')
    assert not re.search(r"""(?:src|href)=["'](?!#)|@import|url\((?!#)""", page)
    found = json.loads((out / "audit.json").read_text())
    assert found["attacks"] is None and found["cost"]["thousand"]["tokens"] == 1000 * found["cost"]["tokens"]
    capsys.readouterr()
    assert main(told) == 2 and "exists already" in capsys.readouterr().err
    assert main([*told, "--force"]) == 0 and " 0 to be drawn" in capsys.readouterr().err
    assert main(["compare", *judges, *quick, "--json", "-o", str(tmp_path / "c")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 12 and found["against"][0]["difference"]["n"] == 12
    assert [judge["decoding"] for judge in found["judges"]] == ["constrained", "constrained"]
    assert main(["compare", judges[0], *quick]) == 2


def test_an_audit_of_a_judge_of_something_else_needs_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shared: Path
) -> None:
    pytest.importorskip("llama_cpp")
    from stock_gguf import write_stock

    judge = str(write_stock(tmp_path / "stock.gguf", "llama3"))
    assert main(["audit", judge, "--no-store", "--threads", "1", "-o", str(tmp_path / "out")]) == 2
    assert re.fullmatch(r"error: [^\n]*no judge of the arena[^\n]*give --pairs FILE\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
