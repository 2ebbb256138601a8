"""Judging prompts that are too long for a judge: an error, or a response cut in the middle with a mark and a warning.

Nothing is ever cut silently: the judge reads the mark, the user gets a `CutWarning`, and the verdict says how many
characters are missing.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal

from patarm_lite.errors import UserError
from patarm_lite.judge.backend import Backend, Item, Plan

Long = Literal["error", "cut"]
LONG: tuple[Long, ...] = ("error", "cut")
MARK = "\n[... {} characters cut here ...]\n"
CHARACTERS = 8
"""Characters a token that the search for the longest response that fits begins with. More of them (long runs of spaces)
would fit at times; less is kept then."""


class CutWarning(UserWarning):
    """A response was cut in the middle, because its judging prompt was too long for the judge."""


def fitted(backend: Backend, item: Item, plan: Plan, long: Long = "error") -> tuple[Item, int]:
    """An item whose judging prompt and judgement fit the context, and how many characters of its response were cut.

    Args:
        long: `error` refuses what doesn't fit; `cut` takes characters out of the middle of the response, puts
            `MARK` there and warns. The prompt and the reference are never cut.

    Raises:
        UserError: it doesn't fit; with `cut` only where the prompt and the rest leave the response no room.
    """
    if long not in LONG:
        raise UserError(f"the policy {long!r} for long prompts is not one of {', '.join(LONG)}")
    room = backend.context - plan.max_tokens
    used = backend.prompt_tokens(item)
    if used <= room:
        return item, 0
    sizes = f"with {plan.max_tokens} for the judgement the context of {backend.context} tokens is exceeded"
    if long == "error":
        raise UserError(
            f"the judging prompt has {used} tokens, and {sizes}; shorten it, load the judge with a larger context,"
            " or let the middle of the response be cut (--long cut, or long='cut')"
        )
    length = len(item.response)
    fits, too_many = 0, min(length, CHARACTERS * max(room, 0)) + 1
    least = backend.prompt_tokens(_cut(item, 0))
    if least > room:
        raise UserError(
            f"without its response the judging prompt still has {least} tokens, and {sizes}; shorten the prompt,"
            " or load the judge with a larger context"
        )
    while too_many - fits > 1:
        tried = (fits + too_many) // 2
        if backend.prompt_tokens(_cut(item, tried)) <= room:
            fits = tried
        else:
            too_many = tried
    missing = length - fits
    warnings.warn(
        f"{missing} of {length} characters were cut out of the middle of a response: its judging prompt has {used} "
        f"tokens, and {sizes}",
        CutWarning,
        stacklevel=2,
    )
    return _cut(item, fits), missing


def _cut(item: Item, kept: int) -> Item:
    """The item with `kept` characters of its response, half from the beginning and half from the end."""
    text = item.response
    head = (kept + 1) // 2
    return replace(item, response=text[:head] + MARK.format(len(text) - kept) + text[len(text) - (kept - head) :])
