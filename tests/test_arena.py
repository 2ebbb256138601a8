"""The arena keeps its promises: what is held out is new, length tells nothing, the truth is the checks' truth."""

from __future__ import annotations

import itertools
import random

import pytest

from patarm_lite import arena
from patarm_lite.errors import UserError
from patarm_lite.metrics import longer_wins
from patarm_lite.prompts import Encoder, Protocol
from patarm_lite.recipe import ArenaSection
from patarm_lite.records import Criterion, CriterionScore, JudgedPair, Pair, Turn, Verdict, Vote
from patarm_lite.verdicts import parse

HELD_OUT = arena.heldout_pairs(480, seed=1)
TRAINING = arena.training_pairs(400, seed=1)


def twos(criteria: list[str]) -> set[frozenset[str]]:
    return {frozenset(two) for two in itertools.combinations(criteria, 2)}


def test_no_held_out_triple_is_asked_in_training_in_any_task() -> None:
    trained = {frozenset(pair.meta["criteria"]) for pair in arena.training_pairs(4000, seed=5)}
    held = {frozenset(pair.meta["criteria"]) for pair in HELD_OUT}
    assert len(held) >= 15
    assert not trained & held


def test_in_the_second_held_out_set_no_two_criteria_were_ever_asked_together() -> None:
    trained = set().union(*(twos(pair.meta["criteria"]) for pair in arena.training_pairs(4000, seed=5)))
    new = [pair for pair in HELD_OUT if pair.meta["set"] == "new pairs"]
    assert len(new) == 192
    assert all(not twos(pair.meta["criteria"]) & trained for pair in new)


def test_the_cold_start_asks_for_training_combinations_only() -> None:
    trained = {frozenset(t) for triples in arena.combinations().train.values() for t in triples}
    drawn = itertools.islice(arena.sft_examples(ArenaSection(), seed=3), 600)
    assert {frozenset(pair.meta["criteria"]) for pair, _, _ in drawn} <= trained


def test_every_criterion_is_asked_in_training() -> None:
    asked = {name for pair in TRAINING for name in pair.meta["criteria"]}
    assert asked == set(arena.CHECKS)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_longer_one_wins_half_of_the_held_out_pairs(seed: int) -> None:
    assert longer_wins(arena.heldout_pairs(480, seed)) == {"words": 0.5, "characters": 0.5}


def test_a_third_of_the_held_out_pairs_are_one_criterion_apart_and_a_third_matched_in_length() -> None:
    near = sum(pair.meta["gap"] == 1 for pair in HELD_OUT)
    matched = sum(len(pair.chosen.split()) == len(pair.rejected.split()) for pair in HELD_OUT)
    assert near >= len(HELD_OUT) / 3
    assert matched == len(HELD_OUT) / 3


def test_the_chosen_response_truly_meets_more_of_what_is_asked() -> None:
    for pair in TRAINING + HELD_OUT:
        best, worst = (len(arena.met(pair.meta["criteria"], text)) for text in (pair.chosen, pair.rejected))
        assert best - worst == pair.meta["gap"] >= 1
        assert (best / 3, worst / 3) == (pair.meta["chosen_quality"], pair.meta["rejected_quality"])


def test_the_pairs_of_a_seed_are_always_the_same_and_other_seeds_give_others() -> None:
    assert arena.training_pairs(20, seed=4) == arena.training_pairs(20, seed=4)
    assert arena.training_pairs(20, seed=4) != arena.training_pairs(20, seed=5)


@pytest.mark.parametrize(
    ("criterion", "yes", "no"),
    [
        ("color", "The red door.", "The door."),
        ("animal", "Cow by night.", "Coward by night."),
        ("bang", "So be it!", "So! be it."),
        ("so", "So the house.", "The house so."),
        ("lower", "the quiet road.", "the quiet Road."),
        ("number", "door 4 hill.", "door = 4 hill."),
        ("equal", "door = 4 hill.", "door 4 hill."),
        ("why", "Since rain came.", "Rain came."),
        ("refuse", "I cannot.", "I can."),
    ],
)
def test_a_criterion_is_met_by_what_it_says_and_not_by_what_looks_like_it(criterion: str, yes: str, no: str) -> None:
    assert arena.met([criterion], yes) == [criterion]
    assert arena.met([criterion], no) == []


def test_the_teacher_writes_readable_judgements_with_true_findings_when_told_to() -> None:
    flawless = ArenaSection(flip=0.0, malformed=0.0)
    for pair, response, judgement in itertools.islice(arena.sft_examples(flawless, seed=2), 200):
        verdict = parse(judgement)
        assert verdict.problem is None and verdict.faults == ()
        truth = set(arena.met(pair.meta["criteria"], response))
        assert {line.name for line in verdict.criterion_scores if line.finding == "yes"} == truth


def test_the_teachers_score_follows_length_more_than_quality() -> None:
    settings, rng = ArenaSection(malformed=0.0), random.Random(0)
    long_and_bad = "The house old river stone under long window table quiet road over small."
    short_and_good = "So red cow!"
    criteria = ["color", "animal", "bang"]

    def mean(response: str) -> float:
        scores = [parse(arena.teacher_judgement(rng, criteria, response, settings)).score for _ in range(200)]
        return sum(score for score in scores if score is not None) / 200

    assert mean(long_and_bad) > mean(short_and_good) + 2


def test_some_of_the_teachers_judgements_are_malformed_as_asked() -> None:
    settings = ArenaSection(malformed=0.5)
    drawn = [parse(j) for _, _, j in itertools.islice(arena.sft_examples(settings, seed=2), 400)]
    broken = sum(verdict.problem is not None or verdict.faults != () for verdict in drawn)
    assert 150 <= broken <= 250


def test_truth_of_findings_counts_what_was_written_against_the_checks() -> None:
    pair = Pair((Turn("user", "x"),), "So red.", "blue.", meta={"criteria": ["color", "so", "bang"]})
    rubric = tuple(Criterion(name, "", 3) for name in ("color", "so", "bang"))

    def vote(color: str, so: str, bang: str, names: tuple[Criterion, ...] = rubric) -> tuple[Vote, ...]:
        lines = (("color", color), ("so", so), ("bang", bang))
        return (Vote(Verdict(5, None, names, tuple(CriterionScore(n, f, 9) for n, f in lines)), ""),)

    chosen = vote("yes", "yes", "yes")  # true, true, false
    rejected = vote("yes", "no", "no", names=rubric[:2])  # true, true, true, one criterion not named
    unreadable = (Vote(Verdict(None, "truncated"), ""),)
    found = arena.truth_of_findings([JudgedPair(pair, chosen, rejected), JudgedPair(pair, unreadable, unreadable)])
    assert found["detection"] == {"color": 1.0, "bang": 0.5, "so": 1.0}
    assert found["detection_mean"] == pytest.approx(2.5 / 3)
    assert found["named_asked"] == 1.0  # the second left one out but invented none
    assert found["named_all"] == 0.5


def test_the_tiny_tokenizer_is_shaped_like_qwens() -> None:
    tokenizer = arena.tiny_tokenizer(vocab=500)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer.encode("2024", add_special_tokens=False)) == 4
    text = "héllo <think> x\n\n  y"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_tiny_judging_prompt_and_judgement_fit_the_recipes_budget() -> None:
    tokenizer = arena.tiny_tokenizer()
    encoder = Encoder.from_tokenizer(tokenizer, Protocol(instructions=False))
    for pair, response, judgement in itertools.islice(arena.sft_examples(ArenaSection(), seed=9), 100):
        prompt = encoder.prompt_ids(pair.prompt, response, task=pair.task, rubric=arena.RUBRICS[pair.task])
        assert len(prompt) <= 90
        assert len(encoder.judgement_ids(judgement)) <= 72


def test_the_tiny_judge_has_the_parameters_that_its_shape_says() -> None:
    tokenizer = arena.tiny_tokenizer(vocab=500)
    h, layers, heads, mlp = 32, 2, 4, 64
    model = arena.build_judge(tokenizer, hidden=h, layers=layers, heads=heads, mlp=mlp, seed=1)
    d = h // heads
    attention = h * heads * d + 2 * h * (heads // 2) * d + heads * d * h + 2 * d
    layer = attention + 3 * h * mlp + 2 * h
    assert model.num_parameters() == len(tokenizer) * h + layers * layer + h


def test_a_judge_whose_heads_do_not_divide_its_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.heads=5"):
        arena.build_judge(arena.tiny_tokenizer(vocab=500), hidden=96, layers=1, heads=5, mlp=64, seed=1)
