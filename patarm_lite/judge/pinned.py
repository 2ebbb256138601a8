"""Constrained decoding with a rubric that is given: the judge scores these criteria instead of writing its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from patarm_lite.errors import UserError
from patarm_lite.judge.grammar import BETWEEN, Form, Rules, _Step
from patarm_lite.prompts import inert_judgement
from patarm_lite.records import Rubric
from patarm_lite.rubrics import WEIGHTS, read_line, rubric_text
from patarm_lite.verdicts import _CONTROL, CRITERIA, TAGS

_TAG = re.compile("|".join([*map(re.escape, TAGS), _CONTROL.pattern]))


class PinnedForm(Form):
    """A `Form` whose rubric is forced, line by line, with the ids that a judge would have written it in."""

    def __init__(self, rules: Rules, max_tokens: int, criteria: Rubric) -> None:
        super().__init__(rules, max_tokens)
        self._pinned = [criterion.name for criterion in criteria]
        self._lines = [rules.ids(rubric_text((criterion,)) + "\n") for criterion in criteria]

    def begin(self) -> list[int]:
        out: list[int] = []
        if self.phase == "rubric":
            self._pin(out)
        self._close_lines(out)
        return [*self.rules.opening, *out]

    def _open_rubric(self, out: list[int]) -> None:
        super()._open_rubric(out)
        self._pin(out)

    def _pin(self, out: list[int]) -> None:
        for line in self._lines:
            self._write(out, line)
        self.names = list(self._pinned)
        self._open_eval(out)

    def _reserve(self, step: _Step) -> int:
        if self.phase not in ("thinking", "rubric"):
            return super()._reserve(step)
        rules = self.rules
        rubric = sum(map(len, self._lines)) + len(rules.ids(BETWEEN))
        thinking = len(rules.think_close) + len(rules.after_thinking) if self.phase == "thinking" else 0
        return thinking + rubric + sum(map(rules.scoring, self._pinned)) + rules.tail


def pinned(rules: Rules, max_tokens: int, criteria: Rubric) -> partial[PinnedForm]:
    """What makes a new form for each judgement.

    Args:
        criteria: 3 to 5, as `check_forced` lets pass.

    Raises:
        UserError: too few tokens for any judgement by this rubric, or a special token of this vocabulary in it.
    """
    for criterion in criteria:
        if not rules.added.isdisjoint(rules.ids(rubric_text((criterion,)) + "\n")):
            raise UserError(f"criterion {criterion.name!r} holds a special token of this judge; write it another way")
    needed = len(rules.opening) + PinnedForm(rules, 1_000_000, criteria).reserve()
    if max_tokens < needed:
        raise UserError(
            f"{max_tokens} tokens can't hold a judgement by the given criteria; max_tokens must be at least {needed}"
        )
    return partial(PinnedForm, rules, max_tokens, criteria)


def check_forced(criteria: Rubric) -> None:
    """Refuse an instance rubric that could not stand in a sound judgement.

    Raises:
        UserError: other than 3 to 5 criteria, two of one name, one that is no line of the protocol, or a tag in it.
    """
    if len(criteria) not in CRITERIA:
        raise UserError(
            f"the criteria forced on the judge are {len(criteria)}; a judgement has {CRITERIA[0]} to {CRITERIA[-1]}:"
            " split or merge some"
        )
    for criterion in criteria:
        line = rubric_text((criterion,))
        if read_line(line) != criterion or criterion.weight not in WEIGHTS:
            raise UserError(f"criterion {line[:60]!r} is not in the form 'NAME (WEIGHT): MEANING', weight 1 to 5")
        if _TAG.search(line) or inert_judgement(line, ()) != line:
            raise UserError(f"criterion {criterion.name!r} holds a tag, a control token or text that is not NFC")
    names: Sequence[str] = [criterion.name for criterion in criteria]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"the criteria forced on the judge name {twice!r} twice; give each its own name")
