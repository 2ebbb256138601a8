"""Reading a judgement: text in, `Verdict` out. Never raises, never guesses, linear in the text's length.

A judgement of protocol `patarm-lite/1` is three blocks, in this order, once each, every tag at a line start:

    <generated_rubrics>
    NAME (WEIGHT): MEANING          3 to 5 lines, WEIGHT 1 to 5
    </generated_rubrics>
    <eval>
    NAME: FINDING (SCORE)           one line per criterion, SCORE 1 to 10
    </eval>
    <score>N</score>                N an integer from 1 to 10, ASCII digits, no white space inside

then white space and the end token. What breaks the frame is a `problem` and there is no score. What is wrong
inside a sound frame is a `fault`: the score stands. Blank lines and white space at a line's end don't matter, so
CRLF is read as LF. In form `shared` the first block is an answer of its own, written before the response is seen, and
the other two are the second answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from patarm_lite.records import CriterionScore, Rubric, Verdict
from patarm_lite.rubrics import NAME_PATTERN, NUMBER_PATTERN, WEIGHTS, read_line

PROBLEMS = {
    "truncated": "the judgement stopped before its end token",
    "too_long": "the judgement is longer than any that is read",
    "control_token": "a control token stands inside the judgement",
    "tags_missing": "a tag of the protocol is missing",
    "tags_order": "the tags are out of order, nested, repeated or not at a line start",
    "text_outside": "there is text outside the three blocks",
    "no_score": "the score tag is empty",
    "two_scores": "more than one score is given",
    "not_an_integer": "the score is not a plain integer",
    "out_of_range": "the score is not from 1 to 10",
}
FAULTS = {
    "criteria_count": "the rubric does not have 3 to 5 criteria",
    "duplicate_criterion": "a criterion is named twice",
    "unscored_criterion": "a criterion of the rubric has no line in the evaluation",
    "foreign_criterion": "the evaluation scores a criterion that the rubric does not have",
    "criterion_score_out_of_range": "a criterion's score is not from 1 to 10 or its weight not from 1 to 5",
    "malformed_line": "a line of the rubric or the evaluation is not in the protocol's form",
}
TAGS = ("<generated_rubrics>", "</generated_rubrics>", "<eval>", "</eval>", "<score>", "</score>")
SCORES = range(1, 11)
CRITERIA = range(3, 6)
NOTHING_WRITTEN = "<generated_rubrics>\n</generated_rubrics>\n<eval>\n</eval>\n<score>"
"""A judgement without rubric and findings, up to its score: what is forced where only the score is asked for. On a
trained judge the digits after it hold 0.99 of the probability, after a bare `<score>` 0.002."""
LONGEST = 200_000
"""Characters. A longer judgement is `too_long` and not looked at, so that junk costs no time."""

_CONTROL = re.compile(r"<\|[^\s<>|]{1,40}\|>|</?think>|</?tool_(?:call|response)>")
_EVAL_LINE = re.compile(NAME_PATTERN + r": (?P<finding>\S[^\n\r]*?) \((?P<score>" + NUMBER_PATTERN + r")\)")
_LEGAL = {str(score): score for score in SCORES}
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")


def parse(text: str, ended: bool = True, thinking: bool = False) -> Verdict:
    """Read one judgement.

    Args:
        text: what the judge wrote, without the end token; control tokens inside it spelled out.
        ended: whether the end token was seen. A judgement without it is `truncated`, whatever it says.
        thinking: whether the protocol lets the judge think first: a `<think>` block at the very beginning, up to its
            first `</think>`, is then skipped unread. Elsewhere, and without `thinking`, it is a `control_token`.

    >>> parse('''<generated_rubrics>
    ... tone (2): is friendly
    ... facts (5): is right
    ... form (1): is a list
    ... </generated_rubrics>
    ... <eval>
    ... tone: warm (9)
    ... facts: one date is wrong (4)
    ... form: yes (8)
    ... </eval>
    ... <score>6</score>''').score
    6
    >>> parse("<score>6</score>").problem
    'tags_missing'
    """
    found = _blocks(text, TAGS, ended, thinking)
    if isinstance(found, str):
        return Verdict(None, found)
    rubric_block, eval_block, score_text = found
    return _scored(score_text, rubric_block, eval_block)


@dataclass(frozen=True, slots=True)
class RubricPart:
    """The first answer of form `shared`, as it was read: either `problem` says why it can't be, or the rest holds.

    `text` is the block with its tags, which the judge reads again before it evaluates; `rubric` its sound criteria.
    """

    problem: str | None
    text: str = ""
    rubric: Rubric = ()


def parse_rubric_part(text: str, ended: bool = True, thinking: bool = False) -> RubricPart:
    """Read the rubric that a judge wrote before it saw a response. Arguments and problems are those of `parse`.

    >>> parse_rubric_part('''<generated_rubrics>
    ... tone (2): is friendly
    ... </generated_rubrics>''').rubric
    (Criterion(name='tone', description='is friendly', weight=2),)
    >>> parse_rubric_part("tone (2): is friendly").problem
    'tags_missing'
    """
    found = _blocks(text, TAGS[:2], ended, thinking)
    if isinstance(found, str):
        return RubricPart(found)
    criteria = [read_line(line) for line in _lines(found[0])[0]]
    sound = tuple(c for c in criteria if c is not None and c.weight in WEIGHTS)
    return RubricPart(None, f"{TAGS[0]}{found[0]}{TAGS[1]}", sound)


def parse_evaluation(text: str, part: RubricPart, ended: bool = True, thinking: bool = False) -> Verdict:
    """Read the evaluation of a response by a rubric written before: the verdict of both parts together.

    It is that of `parse` for one judgement of both. A rubric that can't be read makes the judgement unreadable, with
    the rubric's problem. Arguments and problems are those of `parse`.
    """
    if part.problem is not None:
        return Verdict(None, part.problem)
    found = _blocks(text, TAGS[2:], ended, thinking)
    if isinstance(found, str):
        return Verdict(None, found)
    eval_block, score_text = found
    return _scored(score_text, part.text[len(TAGS[0]) : -len(TAGS[1])], eval_block)


def _blocks(text: str, tags: Sequence[str], ended: bool, thinking: bool) -> list[str] | str:
    """What stands in the blocks of these tags (opening, closing, ...), or the problem that keeps them from being read.

    A tag of the protocol that is none of these has no place in the text.
    """
    if not ended:
        return "truncated"
    if len(text) > LONGEST:
        return "too_long"
    if thinking and text.lstrip().startswith("<think>"):
        thought, closing, rest = text.partition("</think>")
        text = rest.lstrip() if closing else thought
    if _CONTROL.search(text):
        return "control_token"
    if text.count("<score>") > 1:
        return "two_scores"
    places = [text.find(tag) for tag in tags]
    if -1 in places:
        return "tags_missing"
    starts = [place for tag, place in zip(tags, places, strict=True) if tag != "</score>"]
    at_line_start = all(place == 0 or text[place - 1] == "\n" for place in starts)
    once = all(text.count(tag) == (tag in tags) for tag in TAGS)
    if places != sorted(places) or not at_line_start or not once:
        return "tags_order"
    ends = [place + len(tag) for tag, place in zip(tags, places, strict=True)]
    pieces = [text[end:start] for end, start in zip([0, *ends], [*places, len(text)], strict=True)]
    if any(outside.strip() for outside in pieces[::2]):
        return "text_outside"
    return pieces[1::2]


def _scored(score_text: str, rubric_block: str, eval_block: str) -> Verdict:
    if not score_text.strip():
        return Verdict(None, "no_score")
    if score_text in _LEGAL:
        return _with_faults(_LEGAL[score_text], rubric_block, eval_block)
    return Verdict(None, "out_of_range" if _INTEGER.fullmatch(score_text) else "not_an_integer")


def _with_faults(score: int, rubric_block: str, eval_block: str) -> Verdict:
    """Read what is inside a sound frame. One flaw of a line is one fault: a criterion whose weight or score is out of
    range is not kept, but counts as named or scored."""
    rubric_lines, stray_1 = _lines(rubric_block)
    eval_lines, stray_2 = _lines(eval_block)
    criteria = [read_line(line) for line in rubric_lines]
    scorings = [_read_eval_line(line) for line in eval_lines]
    named = [criterion.name for criterion in criteria if criterion is not None]
    scored = [scoring.name for scoring in scorings if scoring is not None]
    rubric = tuple(c for c in criteria if c is not None and c.weight in WEIGHTS)
    scores = tuple(s for s in scorings if s is not None and s.score in SCORES)
    found = {
        "criteria_count": len(named) not in CRITERIA,
        "duplicate_criterion": len(set(named)) < len(named) or len(set(scored)) < len(scored),
        "unscored_criterion": bool(set(named) - set(scored)),
        "foreign_criterion": bool(set(scored) - set(named)),
        "criterion_score_out_of_range": len(rubric) < len(named) or len(scores) < len(scored),
        "malformed_line": stray_1 or stray_2 or len(named) < len(criteria) or len(scored) < len(scorings),
    }
    return Verdict(score, None, rubric, scores, tuple(sorted(fault for fault, here in found.items() if here)))


def _read_eval_line(line: str) -> CriterionScore | None:
    match = _EVAL_LINE.fullmatch(line)
    return None if match is None else CriterionScore(match["name"], match["finding"].rstrip(), int(match["score"]))


def _lines(block: str) -> tuple[list[str], bool]:
    """The lines of a block that are not blank, and whether text stands beside the opening tag."""
    beside, *lines = block.split("\n")
    return [line.rstrip() for line in lines if line.strip()], bool(beside.strip())
