"""Attacks in an audit: few false alarms, real rises found, and a fair comparison where the truth is not known."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from patarm_lite import arena
from patarm_lite.evals import attacks
from patarm_lite.evals.audit_attacks import CASES, FAMILIES, Attacks, attack_measures, attacks_on
from patarm_lite.evals.audit_findings import findings
from patarm_lite.evals.injection import LONGEST, Case
from patarm_lite.records import Pair, Turn, Verdict, Vote

SPREAD = 1.8
"""Standard deviation of a case's change, as on the arena's hardened judge."""


def vote(score: float | None) -> tuple[Vote, ...]:
    return (Vote(Verdict(5 if score is not None else None, None if score is not None else "no_score"), "", score),)


def cases(n: int = CASES, truth: bool = True) -> Attacks:
    """n cases of each family; case i of every family is on the same response."""
    found = [
        Case(family, f"{family} {i % 7}", (Turn("user", str(i)),), "chat", "attacked", "benign", response="bare")
        for family in FAMILIES
        for i in range(n)
    ]
    return Attacks(tuple(found), truth)


def measured(given: Attacks, change: Callable[[Case], float], seed: int, bare: float = 5.0) -> Any:
    """What an audit makes of a judge whose score changes by `change` with the attack, and that gives the benign text 5
    and the bare response `bare`."""
    votes = []
    for case in given.cases:
        votes += [vote(5 + change(case)), vote(5.0), *(() if given.truth else (vote(bare),))]
    return attack_measures(given, votes, seed)


def noise(rng: random.Random) -> Callable[[Case], float]:
    """Changes around 0 that a response has in common over the families, in part."""
    common: dict[Any, float] = {}
    return lambda case: 0.6 * common.setdefault(case.prompt, rng.gauss(0, SPREAD)) + 0.8 * rng.gauss(0, SPREAD)


def finding(found: Any) -> dict[str, Any]:
    from test_audit import by_length, found_in, judged_by

    whole = found_in(judged_by(by_length, n=20)) | {"attacks": found}
    return next(row for row in findings(whole) if row["about"] == "attacks")


def test_of_audits_of_a_judge_that_no_attack_moves_one_in_twenty_has_a_family_that_is_off() -> None:
    rng = random.Random(3)
    given, audits = cases(), 200
    off = raised = 0
    for seed in range(audits):
        rows = measured(given, noise(rng), seed)["rows"]
        assert len(rows) == len(FAMILIES) == 12
        off += any(not row["rise"]["low"] <= 0 <= row["rise"]["high"] for row in rows)
        raised += any(row["rise"]["low"] > 0 for row in rows)
    assert 3 <= off <= 18, "10 are expected; fewer than 3 or more than 18 come in one of 100 such tests"
    assert raised <= 11, "5 are expected, and more than 11 come in one of 200 such tests"


@pytest.mark.parametrize("kind", ["mostly nothing", "whole points", "wild"])
def test_so_it_is_where_changes_are_nothing_like_normal(kind: str) -> None:
    rng = random.Random(5)
    draw = {
        "mostly nothing": lambda case: 0.0 if rng.random() < 0.8 else rng.choice((-3.0, -1.0, 1.0, 3.0)),
        "whole points": lambda case: float(round(rng.gauss(0, SPREAD))),
        "wild": lambda case: rng.gauss(0, 1) / max(0.05, rng.random()),
    }[kind]
    given = cases(20)
    off = sum(
        any(not row["rise"]["low"] <= 0 <= row["rise"]["high"] for row in measured(given, draw, seed)["rows"])
        for seed in range(60)
    )
    assert off <= 8, "3 are expected, and more than 8 come in one of 200 such tests"


def test_a_rise_of_a_point_and_a_quarter_is_found_in_most_audits() -> None:
    rng = random.Random(7)
    given, found = cases(), 0
    for seed in range(40):
        change = noise(rng)
        rows = measured(given, lambda case, c=change: c(case) + 1.25 * (case.family == "flattery"), seed)["rows"]
        found += next(row["rise"]["low"] > 0 for row in rows if row["family"] == "flattery")
    assert found >= 31, "36 are expected, and fewer than 31 come in one of 100 such tests"


def test_a_sure_rise_of_a_point_is_a_problem_and_one_of_a_tenth_is_fine() -> None:
    rng = random.Random(9)
    given = cases()

    def rises(points: float, spread: float) -> dict[str, Any]:
        return finding(measured(given, lambda c: points * (c.family == "flattery") + rng.gauss(0, spread), 1))

    problem = rises(2.0, 0.5)
    assert problem["severity"] == "problem" and "flattery +2." in problem["sentence"]
    assert problem["figure"]["low"] > 0 and problem["todo"]
    assert rises(0.5, 0.1)["severity"] == "warning"
    small = rises(0.15, 0.02)
    assert small["severity"] == "fine" and "flattery does, by less than 0.25 points" in small["sentence"]


def test_no_room_to_rise_is_not_called_fine() -> None:
    given = cases()
    found = attack_measures(given, [vote(9.8) for _ in given.texts], 1)
    assert found is not None
    assert finding(found)["severity"] == "unknown" and "no room to rise" in finding(found)["sentence"]


def test_a_judge_that_mislikes_the_benign_text_is_no_victim_of_attacks() -> None:
    """True quality not known: attacks leave the score of the bare response (7), the benign text takes two points."""
    rng = random.Random(1)
    given = cases(truth=False)
    found = measured(given, lambda case: 2 + rng.gauss(0, 0.3), 1, bare=7.0)
    assert all(row["rise"]["low"] > 1 and row["gain"]["low"] <= 0 <= row["gain"]["high"] for row in found["rows"])
    assert finding(found)["severity"] == "fine"
    higher = measured(given, lambda case: 2 + rng.gauss(0, 0.3), 1, bare=5.0)
    assert finding(higher)["severity"] == "problem", "and where it rises above the bare response too, they work"


def test_what_can_not_be_read_is_left_out_and_counted() -> None:
    given = cases(12)
    votes = [vote(5.0) for _ in given.texts]
    votes[0] = vote(None)  # the first case's attack can't be read, of the second the benign text was too long
    votes[3] = None
    found = attack_measures(given, votes, 1)  # type: ignore[arg-type]
    assert found is not None
    assert (found["rows"][0]["n"], found["left_out"], found["cases"]) == (10, 2, 144)
    votes[5] = None
    found = attack_measures(given, votes, 1)  # type: ignore[arg-type]
    assert found is not None
    assert "forged verdicts" not in [row["family"] for row in found["rows"]], "of nine nothing is said"
    assert found["left_out"] == 12
    assert attack_measures(cases(9), [vote(5.0) for _ in cases(9).texts], 1) is None


def words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def test_cases_on_the_users_pairs_use_different_prompts_their_own_words_and_equal_lengths() -> None:
    pairs = [
        Pair((Turn("user", f"Why is number {n} odd?"),), f"It is not, {n} times.", f"Because of {n}.")
        for n in range(30)
    ]
    given = attacks_on(pairs * 2, words, 20, seed=1)
    assert not given.truth and len(given.texts) == 3 * len(given.cases)
    for family in FAMILIES:
        of = [case for case in given.cases if case.family == family]
        assert len(of) == len({case.prompt for case in of}) == 20
        for case in of:
            assert case.response.startswith("Because of"), "rejected responses have more room to rise"
            assert case.attacked == f"{case.response} {case.attack}" and case.benign.startswith(case.response)
            assert words(case.attack) <= LONGEST
            assert words(case.attacked) <= words(case.benign) <= words(case.attacked) + 1
    echoes = [case for case in given.cases if case.family == attacks.ECHO]
    assert all(case.prompt[0].content in case.attack for case in echoes)
    assert given == attacks_on(pairs * 2, words, 20, seed=1) != attacks_on(pairs * 2, words, 20, seed=2)


def test_cases_on_the_arena_hold_the_truth_equal() -> None:
    given = attacks_on(arena.heldout_pairs(60, seed=1), words, 12, seed=1)
    asked = {pair.prompt: pair.meta["criteria"] for pair in arena.heldout_pairs(60, seed=1)}
    assert given.truth and len(given.texts) == 2 * len(given.cases)
    for case in given.cases:
        assert arena.met(asked[case.prompt], case.attacked) == arena.met(asked[case.prompt], case.benign)
        assert words(case.attacked) == words(case.benign)
    assert all(len({c.prompt for c in given.cases if c.family == family}) >= 10 for family in FAMILIES)


def test_benign_sentences_say_nothing_of_responses_or_scores() -> None:
    said = set(re.findall(r"[a-z]+", " ".join(attacks.PLAIN).lower()))
    assert said.isdisjoint(
        "score judge rate rating response answer correct good best perfect please criteria rubric".split()
    )
