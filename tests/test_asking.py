"""What the judge is asked in training (`grpo.writes`), how it is read, and whose scores a rollout is compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, little_recipe, little_tokenizer, write_recipe

from patarm_lite import arena
from patarm_lite.errors import UserError
from patarm_lite.prompts import Encoder, Protocol
from patarm_lite.recipe import GrpoSection, check_recipe
from patarm_lite.records import Verdict
from patarm_lite.training.asking import EVALUATION, SCORE, ask, read_score, write_rubrics
from patarm_lite.training.data import arena_examples, bare_example
from patarm_lite.training.evaluation import Sampler, judge_pairs, open_judge
from patarm_lite.training.grpo import ParReward
from patarm_lite.verdicts import NOTHING_WRITTEN, RubricPart, parse_rubric_part

torch = pytest.importorskip("torch")

RUBRIC_TEXT = (
    "<generated_rubrics>\nso (3): start with so\nfood (3): name a food\nlower (3): all lowercase\n</generated_rubrics>"
)
FINDINGS = "<eval>\nso: yes (9)\nfood: no (2)\nlower: yes (9)\n</eval>\n"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.from_tokenizer(little_tokenizer(), Protocol(instructions=False, forms=("own", "shared")))


@pytest.fixture(scope="module")
def sampler(little_run: Path) -> Sampler:
    """The little run's judge, eight judgements at a time."""
    torch.set_num_threads(1)
    own, model, tokenizer, _ = open_judge(little_run / "judge", little_recipe())
    return Sampler(model, tokenizer, own, max_tokens=40, batch_size=8)


def pair() -> Any:
    return arena.heldout_pairs(6, seed=3)[0]


# --- what is asked ---


def test_a_whole_judgement_is_asked_for_as_ever(encoder: Encoder) -> None:
    one = pair()
    asked = ask(encoder, one, arena.RUBRICS[one.task])
    assert (asked.chosen, asked.rejected) == encoder.pair_ids(one, arena.RUBRICS[one.task])
    assert asked.read(f"{RUBRIC_TEXT}\n{FINDINGS}<score>7</score>", True) == Verdict(
        7, None, *_written(f"{RUBRIC_TEXT}\n{FINDINGS}<score>7</score>")
    )


def _written(text: str) -> tuple[Any, Any]:
    from patarm_lite.verdicts import parse

    verdict = parse(text)
    return verdict.rubric, verdict.criterion_scores


def test_a_bare_score_is_asked_for_as_score_only_does_and_has_no_faults(encoder: Encoder) -> None:
    one = pair()
    asked = ask(encoder, one, arena.RUBRICS[one.task], SCORE)
    plain = encoder.pair_ids(one, arena.RUBRICS[one.task])
    assert asked.chosen == [*plain[0], *little_tokenizer().encode(NOTHING_WRITTEN, add_special_tokens=False)]
    assert asked.chosen[len(plain[0]) :] == asked.rejected[len(plain[1]) :]
    assert asked.read("7</score>", True) == Verdict(7)


@pytest.mark.parametrize(
    ("answer", "ended", "problem"),
    [
        ("7</score>", False, "truncated"),
        ("11</score>", True, "out_of_range"),
        ("</score>", True, "no_score"),
        ("7", True, "tags_missing"),
        ("7</score> or <score>8</score>", True, "two_scores"),
        ("7</score> well", True, "text_outside"),
    ],
)
def test_a_bare_score_that_cannot_be_read_is_no_score(answer: str, ended: bool, problem: str) -> None:
    assert read_score(answer, ended) == Verdict(None, problem)


def test_both_sides_are_evaluated_by_the_rubric_written_before(encoder: Encoder) -> None:
    one = pair()
    asked = ask(encoder, one, arena.RUBRICS[one.task], EVALUATION, parse_rubric_part(RUBRIC_TEXT))
    known = encoder.rubric_prompt_ids(one.prompt, task=one.task, rubric=arena.RUBRICS[one.task])
    known = [*known, *encoder.judgement_ids(RUBRIC_TEXT)]
    assert asked.chosen[: len(known)] == asked.rejected[: len(known)] == known
    verdict = asked.read(f"{FINDINGS}<score>4</score>", True)
    assert (verdict.score, [criterion.name for criterion in verdict.rubric]) == (4, ["so", "food", "lower"])


def test_an_unreadable_rubric_makes_every_evaluation_unreadable(encoder: Encoder) -> None:
    one = pair()
    asked = ask(encoder, one, arena.RUBRICS[one.task], EVALUATION, RubricPart("truncated"))
    assert asked.read(f"{FINDINGS}<score>4</score>", True) == Verdict(None, "truncated")


# --- rubrics written before ---


class Scripted:
    """A sampler whose answers to rubric prompts are laid out, try by try."""

    def __init__(self, encoder: Encoder, *tries: str) -> None:
        self.encoder, self.tokenizer, self.tries = encoder, little_tokenizer(), list(tries)
        self.asked: list[int] = []

    def answers(self, prompts: Any, k: int, seed: int) -> list[list[list[int]]]:
        self.asked.append(len(prompts))
        text = self.tries.pop(0)
        return [[self.encoder.judgement_ids(text)] for _ in prompts]


def test_equal_prompts_share_a_rubric_and_one_that_cannot_be_read_is_drawn_again(encoder: Encoder) -> None:
    one, other = arena.heldout_pairs(6, seed=3)[:2]
    assert one.prompt != other.prompt
    judge: Any = Scripted(encoder, "well", RUBRIC_TEXT)
    found = write_rubrics(judge, [one, other, one], arena.RUBRICS.__getitem__, seed=1, tries=4)
    assert [part.text for part in found] == [RUBRIC_TEXT] * 3
    assert judge.asked == [2, 2]


def test_a_rubric_that_can_never_be_read_keeps_its_problem(encoder: Encoder) -> None:
    judge: Any = Scripted(encoder, "well", "well")
    assert write_rubrics(judge, [pair()], arena.RUBRICS.__getitem__, seed=1, tries=2)[0].problem == "tags_missing"


def test_judging_by_a_rubric_written_before_keeps_pairs_in_order_and_repeats(sampler: Sampler) -> None:
    pairs = arena.heldout_pairs(6, seed=3)
    drawn = [judge_pairs(sampler, pairs, arena.RUBRICS.__getitem__, 2, 5, "x", EVALUATION) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert [one.pair for one in drawn[0]] == pairs and {len(one.chosen) for one in drawn[0]} == {2}


# --- expected scores ---


def test_the_expected_score_behind_an_opening_in_the_prompt_is_that_of_the_next_token(sampler: Sampler) -> None:
    one = pair()
    asked = ask(sampler.encoder, one, arena.RUBRICS[one.task], SCORE)
    answer = sampler.encoder.judgement_ids("7</score>")
    (vote,) = sampler._read([asked.chosen], [answer], True, [asked.read])
    token = sampler.tokenizer.convert_tokens_to_ids
    with torch.no_grad():
        first = torch.softmax(sampler.model(input_ids=torch.tensor([asked.chosen])).logits[0, -1].double(), 0)
    digits = float(sum(first[token(str(digit))] for digit in range(2, 10)))
    assert vote.verdict.score == 7 and vote.mass is not None
    assert digits - 1e-6 <= vote.mass <= digits + float(first[token("1")]) + 1e-6


def reward(other_side: str, expected: list[float | None]) -> list[float]:
    """Preference of two rollouts a side with scores 6, 4 against 5, 5, compared with `expected`."""
    scores = iter([6, 4, 5, 5])
    par = ParReward(
        GrpoSection(n=2, other_side=other_side, findings=0.0),  # type: ignore[arg-type]
        lambda ids: ("", True),
        lambda number, text, ended: Verdict(next(scores)),
        lambda prompts, completions, verdicts: expected,
    )
    return par.preference(completion_ids=[[1], [1], [1], [1]], pair=[0] * 4, side=[0, 0, 1, 1], prompts=[[1]] * 4)


def test_a_rollout_is_compared_with_the_other_sides_expected_scores_and_its_own_stays_written() -> None:
    # written means are 5 and 5; by expected scores 4.5 and 6.5: 6 and 4 both lose, and so do 5 and 5
    assert reward("sampled", [9.0] * 4) == [1.2, 0.0, 0.0, 0.0]
    assert reward("expected", [4.0, 5.0, 6.0, 7.0]) == [0.0, 0.0, 0.0, 0.0]
    # means 7 and 3: 6 wins by 3, 4 by 1, and 5 and 5 win by 2
    assert reward("expected", [7.0, 7.0, 3.0, 3.0]) == [1.4, 1.2, 1.2, 1.2]


def test_a_rollout_without_an_expected_score_counts_with_the_written_one() -> None:
    assert reward("expected", [None, None, None, None]) == reward("sampled", [])


# --- cold start and recipe ---


def test_a_bare_example_teaches_the_score_alone(encoder: Encoder) -> None:
    one = pair()
    example = bare_example(encoder, one, one.chosen, f"{RUBRIC_TEXT}\n{FINDINGS}<score>8</score>")
    assert example.input_ids[example.prompt_length :] == encoder.judgement_ids("8</score>")
    assert example.input_ids[: example.prompt_length] == ask(encoder, one, arena.RUBRICS[one.task], SCORE).chosen


def test_the_cold_start_holds_the_shares_asked_for(encoder: Encoder) -> None:
    recipe = little_recipe(sft={"shared": 0.3, "bare": 0.2, "steps": 25, "batch_size": 40})
    opening = encoder.forced_ids(NOTHING_WRITTEN)
    examples = arena_examples(recipe, encoder)
    bare = sum(e.input_ids[e.prompt_length - len(opening) : e.prompt_length] == opening for e in examples)
    shared = sum(e.between != (0, 0) for e in examples)
    assert len(examples) == 1000 and abs(bare - 200) < 40 and abs(shared - 300) < 45


def test_without_other_forms_the_cold_start_is_what_it_was(encoder: Encoder) -> None:
    from patarm_lite.training.data import own_example

    recipe = little_recipe(sft={"steps": 2, "batch_size": 4})
    drawn = zip(arena_examples(recipe, encoder), arena.sft_examples(recipe.arena, recipe.seed), strict=False)
    assert all(example == own_example(encoder, *row) for example, row in drawn)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"grpo": {"writes": "evaluation"}}, "needs a cold start that saw such answers; set sft.shared="),
        ({"grpo": {"writes": "score", "findings": 0}}, "needs a cold start that saw such answers; set sft.bare="),
        ({"grpo": {"writes": "score"}, "sft": {"bare": 0.3}}, "set grpo.findings=0"),
        ({"sft": {"bare": 0.5, "shared": 0.5}}, "leave no whole judgements"),
        ({"sft": {"bare": 0.5, "source": "file", "file": "x"}}, "set sft.bare=0"),
        ({"grpo": {"writes": "evaluation"}, "sft": {"shared": 0.3}, "method": "rejection"}, "is for method par"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        check_recipe({"name": "x", **changes}, "recipe x")


# --- runs ---


@pytest.mark.parametrize("writes", ["evaluation", "score"])
def test_a_run_in_either_form_trains_and_evaluates_in_it(
    command: Callable[..., Command], tmp_path: Path, writes: str
) -> None:
    recipe = write_recipe(
        tmp_path / "x.yaml",
        sft={"shared": 0.4, "bare": 0.3},
        grpo={"writes": writes, "findings": 0.0, "steps": 2, "other_side": "expected"},
    )
    train = command("train", recipe, "-o", tmp_path / "run")
    assert train.wait() == 0, train.said()
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples and all(not row["text"].startswith("<generated_rubrics>") for row in samples)
    assert (tmp_path / "run" / "rubrics.jsonl").is_file() == (writes == "evaluation")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["heldout"]["after"]["unreadable"] <= 1
