"""What the judge is asked about a pair in training, and how its answer is read: `grpo.writes`.

    judgement    form `own`: rubric, evaluation and score in one answer
    evaluation   form `shared`: the rubric was written before, once for the prompt, and both sides are evaluated by it
    score        the score alone, behind an empty rubric and an empty evaluation, as `--score only` asks for it

With `evaluation` GRPO trains the second answer; the rubrics of the training pairs are written once, by the judge as
the cold start left it. Left out: a reward for the rubric itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from patarm_lite.prompts import Encoder, decode_judgement
from patarm_lite.records import Pair, Rubric, Turn, Verdict
from patarm_lite.verdicts import NOTHING_WRITTEN, RubricPart, parse, parse_evaluation, parse_rubric_part

if TYPE_CHECKING:
    from patarm_lite.training.evaluation import Sampler

Read = Callable[[str, bool], Verdict]
"""Text of an answer and whether its end token was seen -> its verdict."""
JUDGEMENT, EVALUATION, SCORE = "judgement", "evaluation", "score"


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompt ids of both sides of a pair, and how answers to them are read."""

    chosen: list[int]
    rejected: list[int]
    read: Read


def ask(
    encoder: Encoder,
    pair: Pair,
    rubric: Rubric,
    writes: str = JUDGEMENT,
    part: RubricPart | None = None,
) -> Asked:
    """What the judge is asked about both sides of a pair.

    Args:
        rubric: the primary one. part: with `evaluation`, what was written for the prompt. Where that can't be read,
            neither can any answer: its verdict has the rubric's problem.
    """
    thinking = encoder.protocol.thinking
    if writes == EVALUATION:
        assert part is not None
        sides = [
            encoder.response_prompt_ids(
                pair.prompt,
                response,
                task=pair.task,
                rubric=rubric,
                rubric_text=part.text,
                reference=pair.reference,
            )
            for response in (pair.chosen, pair.rejected)
        ]
        return Asked(sides[0], sides[1], partial(_read_evaluation, part, thinking))
    chosen, rejected = encoder.pair_ids(pair, rubric)
    if writes == SCORE:
        opening = encoder.forced_ids(NOTHING_WRITTEN)
        return Asked([*chosen, *opening], [*rejected, *opening], read_score)
    return Asked(chosen, rejected, partial(_read_judgement, thinking))


def _read_judgement(thinking: bool, text: str, ended: bool) -> Verdict:
    return parse(text, ended, thinking)


def _read_evaluation(part: RubricPart, thinking: bool, text: str, ended: bool) -> Verdict:
    return parse_evaluation(text, part, ended, thinking)


def read_score(text: str, ended: bool) -> Verdict:
    """The verdict of an answer that is the score alone. There is no rubric, so none of its faults.

    >>> read_score("7</score>", True).score, read_score("seven</score>", True).problem
    (7, 'not_an_integer')
    """
    return replace(parse(NOTHING_WRITTEN + text, ended), faults=())


def write_rubrics(
    sampler: Sampler, pairs: Sequence[Pair], rubric: Callable[[str], Rubric], seed: int, tries: int = 1
) -> list[RubricPart]:
    """The rubric of each pair's prompt, written freely at temperature 1 by the sampler's judge; equal prompts share it.

    Args:
        tries: how often one is drawn at most until it can be read; the last one counts.
    """
    asked: dict[tuple[tuple[Turn, ...], str], RubricPart] = {
        (pair.prompt, pair.task): RubricPart("tags_missing") for pair in pairs
    }
    encoder, tokenizer = sampler.encoder, sampler.tokenizer
    for turn in range(tries):
        open_ones = [key for key, part in asked.items() if part.problem is not None]
        if not open_ones:
            break
        prompts = [encoder.rubric_prompt_ids(turns, task=task, rubric=rubric(task)) for turns, task in open_ones]
        for key, (ids,) in zip(open_ones, sampler.answers(prompts, 1, seed + turn), strict=True):
            text, ended = decode_judgement(tokenizer, ids, encoder.end_id)
            asked[key] = parse_rubric_part(text, ended, encoder.protocol.thinking)
    return [asked[pair.prompt, pair.task] for pair in pairs]
