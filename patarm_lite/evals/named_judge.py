"""A judge as it is typed, and how it is asked: what `bench`, `audit` and `compare` share.

with named_judge("judge.gguf", Asking(votes=4)).load() as judge: ...
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patarm_lite.errors import UserError
from patarm_lite.judge.backend import Decoding
from patarm_lite.judge.fitting import LONG

if TYPE_CHECKING:
    from patarm_lite.judge.judge import Judge

SCORES = ("both", "sampled")
DECODINGS: tuple[Decoding, ...] = ("constrained", "free")
KEY = "PATARM_API_KEY"


@dataclass(frozen=True, slots=True)
class Asking:
    """How judges are asked.

    Attributes:
        votes: of a response. One takes the likeliest tokens, several are drawn at temperature 1.
        score: `sampled` spares the expected scores.
        seed: of the votes.
        max_tokens: of one judgement at most.
        decoding: None: constrained where the judge can be held to the protocol (a GGUF file, a server that obeys a
            grammar), else free.
        long: a prompt that is too long has no votes (`error`), or the response is cut in the middle (`cut`).
        context, threads, parallel, deterministic: see `Judge.load`.
        tokenizer: of a judge that is a URL.
        offline: a hub id must be in the cache.

    Raises:
        UserError: a setting that there isn't.
    """

    votes: int = 1
    score: str = "both"
    seed: int = 1
    max_tokens: int = 1024
    decoding: str | None = None
    long: str = "error"
    context: int | None = None
    threads: int | None = None
    parallel: int | None = None
    tokenizer: Path | None = None
    deterministic: bool = False
    offline: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("--score", self.score, SCORES),
            ("--decoding", self.decoding, (None, *DECODINGS)),
            ("--long", self.long, LONG),
        ):
            if value not in known:
                raise UserError(f"{name} {value!r} is not one of {', '.join(filter(None, known))}")


@dataclass(frozen=True, slots=True)
class NamedJudge:
    """A judge that is not loaded yet. `place`: as it was typed. `check` raises UserError once its file is no longer the
    one that was there when it was named."""

    place: str
    load: Callable[[], Judge]
    check: Callable[[], None]


def named_judge(place: str, asking: Asking) -> NamedJudge:
    """A judge by its name: a GGUF file, a folder, a URL, or a hub id (which is fetched).

    Raises:
        UserError: nothing there, a file that is no GGUF model to judge with, a hub id that can't be fetched. Of several
            judges so none judges before the last is known to be one.
    """
    from patarm_lite.judge.judge import Judge
    from patarm_lite.judge.verbs import plan_of, unchanged

    where = _fetched(place, asking.offline)
    remote = is_url(where)
    if not remote:
        _check_place(Path(where))
    decoding: Decoding = "free" if asking.decoding == "free" else "constrained"

    def load() -> Judge:
        return Judge.load(
            where,
            plan=plan_of(str(asking.votes), asking.score, asking.seed, asking.max_tokens, decoding),
            or_free=asking.decoding is None,
            long=asking.long,  # type: ignore[arg-type]  # checked there
            context=asking.context,
            threads=asking.threads,
            sequences=asking.parallel,
            tokenizer=asking.tokenizer if remote else None,
            deterministic=asking.deterministic,
            key=(os.environ.get(KEY) or None) if remote else None,
        )

    return NamedJudge(place, load, unchanged(None if remote else Path(where)))


def is_url(place: str) -> bool:
    """Whether a judge is a server."""
    return place.startswith(("http://", "https://"))


def _check_place(place: Path) -> None:
    from patarm_lite.judge.loading import check_header

    if not place.exists():
        raise UserError(f"judge {str(place)!r} not found; give a GGUF file, a folder, a hub id or a URL")
    if place.is_file():
        check_header(place)


def _fetched(place: str, offline: bool) -> str:
    """Where a judge is: a file, a folder or a URL as it stands, and the folder of a hub id, fetched."""
    if is_url(place) or Path(place).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place):
        return place
    if place.endswith(".gguf"):
        return place
    from patarm_lite.quantize.source import fetch

    return str(fetch(place, offline=offline))
