"""What `patarm-lite judge JUDGE FILE`, `rank JUDGE FILE` and `store` do, behind the command line's options."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from patarm_lite.errors import UserError
from patarm_lite.judge.backend import Decoding, Plan
from patarm_lite.judge.jobs import Score, Totals, Wanted, Work, adaptive, check_out, fixed, judge_file, rank_file
from patarm_lite.judge.verdict_text import SCORE_ONLY
from patarm_lite.judge.voting import VotePlan
from patarm_lite.store import Store, default_place

if TYPE_CHECKING:
    from patarm_lite.judge.judge import Judge

AUTO = "auto"
SCORES: tuple[Score, ...] = ("expected", "sampled", "both", "only")
MOST_VOTES = 1024
"""More votes of one response are surely a typing error; their spread would be known to a thirtieth of a point."""


@dataclass(frozen=True, slots=True)
class FileJob:
    """A judging job as the command line states it.

    Attributes:
        kind: `judge` or `rank`.
        source: a file of JSON lines, or `-` for stdin.
        out: the new file, None for stdout.
        votes: a number, or `auto`: as many as it takes, `most` at the most.
        score: which score a ranking goes by; `sampled` spares the expected one, `only` all writing.
        field: the field that takes the verdict or ranking; None: `verdict`, `ranking`.
        strict: whether a line that can't be judged stops the job.
        force: whether an existing output is replaced.
        store: where votes are kept; None: the usual place. `keep`: whether they are kept at all.
        as_json: whether the totals go to stdout as JSON too (where the output is a file).
    """

    kind: Literal["judge", "rank"]
    source: str
    out: Path | None = None
    votes: str = "1"
    most: int = 16
    score: Score = "both"
    field: str | None = None
    strict: bool = False
    force: bool = False
    store: Path | None = None
    keep: bool = True
    as_json: bool = False


def plan_of(votes: str, score: str, seed: int = 1, max_tokens: int = 1024, decoding: Decoding = "constrained") -> Plan:
    """How judgements are drawn: a single vote takes the likeliest tokens, several are sampled at temperature 1.

    `only` reads the expected score and writes nothing, whatever `decoding` says.

    Raises:
        UserError: a number of votes or a score that there isn't.

    >>> plan_of("1", "both").temperature, plan_of("8", "both").temperature, plan_of("auto", "sampled").expected
    (0.0, 1.0, False)
    >>> plan_of("1", "only").decoding
    'score_only'
    """
    if score not in SCORES:
        raise UserError(f"--score {score!r} is not one of {', '.join(SCORES)}")
    number = _number(votes)
    if score == "only":
        if number != 1:
            raise UserError("--score only draws nothing, so more votes say the same; leave out --k")
        decoding = "score_only"
    return Plan(decoding, 0.0 if number == 1 else 1.0, seed, max_tokens, score != "sampled")


def count_of(votes: str, most: int, score: str) -> int | VotePlan:
    """Votes a response as typed: a number, or the plan of `auto`, for the goal `score`.

    >>> count_of("8", 16, "both"), count_of("auto", 4, "sampled").reading
    (8, 'sampled')
    """
    number = _number(votes)
    return number or VotePlan(goal="score", most=most, reading="sampled" if score == "sampled" else "expected")


def run_file(job: FileJob, load: Callable[[], Judge], file: Path | None = None) -> Totals:
    """Do a job: what can be refused is refused before the judge is loaded; totals and the next command on stderr.

    Args:
        load: loads the judge, with the plan of `plan_of`.
        file: the judge's file, where it is one. It must stay as it is while it judges.

    Raises:
        UserError: see `jobs.judge_file`; and the judge's file vanished or was replaced.
    """
    wanted, words = _wanted(job)
    source = None if job.source == "-" else Path(job.source)
    if source is not None and not source.is_file():
        what = "a folder" if source.is_dir() else "not found"
        raise UserError(f"{source} is {what}; give a file of JSON lines, or - for stdin")
    if job.out is not None:
        check_out(job.out, force=True)
    place = (job.store or default_place()) if job.keep else None
    with Store.open(place) as store:
        check = unchanged(file)
        with load() as judge:
            work = Work(
                backend=judge.backend,
                plan=judge.plan,
                rubric=lambda task: judge.description.rubric(task) if judge.rubric is None else judge.rubric,
                wanted=wanted,
                votes=words,
                criteria=judge.criteria,
                task=judge.task,
                long=judge.long,
                score=job.score,
                trained=getattr(judge.backend, "trained", None),
                check=check,
            )
            _say(settings(work, place))
            if work.plan.decoding == "score_only":
                _say(f"warning: {SCORE_ONLY}")
            run, field = (judge_file, "verdict") if job.kind == "judge" else (rank_file, "ranking")
            totals = run(work, source, job.out, store, name=job.field or field, strict=job.strict, force=job.force)
    if not totals.finished_before:
        _say(totals.sentence())
    if job.out is not None:
        print(json.dumps(asdict(totals)) if job.as_json else job.out)
    return totals


def settings(work: Work, place: Path | None) -> str:
    """A job's effective settings in one line."""
    plan = work.plan
    how = f"temperature {plan.temperature:g}" + (f", seed {plan.seed}" if plan.temperature else "")
    kept = "kept nowhere" if place is None else f"kept, judgements in clear, in {place}"
    trained = "" if work.trained is not False else " untrained,"
    return (
        f"judge {work.backend.fingerprint[:12]} ({work.backend.name},{trained} tokens {work.backend.tokens}), "
        f"votes {work.votes}, decoding {plan.decoding}, {how}, at most {plan.max_tokens} tokens, task {work.task}; "
        f"votes are {kept}"
    )


def unchanged(file: Path | None) -> Callable[[], None]:
    """A check that raises UserError as soon as a file is no longer the one that is there now."""
    if file is None or not file.is_file():
        return lambda: None
    before = _stamp(file)

    def check() -> None:
        now = _stamp(file) if file.exists() else None
        if now != before:
            what = "vanished" if now is None else "was replaced or changed"
            raise UserError(
                f"{file} {what} while it judged; the votes so far are of the file that was loaded, and are kept: put "
                "that file back and type the same command again, or judge anew with the new one"
            )

    return check


def store_place(given: Path | None) -> Path:
    """The store that a command is about.

    Raises:
        UserError: there is none there.
    """
    place = given or default_place()
    if not place.is_file():
        raise UserError(f"there is no store at {place}; judging a file makes one, or name another with --store FILE")
    return place


def show_store(given: Path | None, as_json: bool = False) -> str:
    """What a store holds, as text or JSON."""
    with Store.open(store_place(given)) as store:
        found = store.contents()
    if as_json:
        return json.dumps(found, indent=2)
    lines = [
        f"{found['path']}  {found['bytes'] / 1e6:.1f} MB, judgements in clear",
        f"{found['votes']} votes, {found['jobs']} jobs ({found['unfinished']} not finished)",
    ]
    if found["judges"]:
        lines.append("judge         votes   responses  last")
    for judge in found["judges"]:
        lines.append(f"{judge['fingerprint'][:12]}  {judge['votes']:<7} {judge['items']:<10} {judge['last']}")
    if found["models"]:
        lines.append("model         replies            last")
    for model in found["models"]:
        lines.append(f"{model['fingerprint'][:12]}  {model['replies']:<18} {model['last']}")
    return "\n".join(lines)


def delete_from_store(given: Path | None, judge: str | None = None) -> str:
    """Delete what a store holds, or what it holds of one judge; what was deleted, in words.

    Args:
        judge: the beginning of a fingerprint (as `show_store` prints it), or a judge's GGUF file. None: everything.
    """
    if judge is not None and Path(judge).is_file():
        from patarm_lite.judge.description import fingerprint

        judge = fingerprint(Path(judge))
    place = store_place(given)
    with Store.open(place) as store:
        found = store.delete(judge)
    replies = f", {found['replies']} replies" if found["replies"] else ""
    return f"deleted {found['votes']} votes{replies} and {found['jobs']} jobs from {place}"


def _wanted(job: FileJob) -> tuple[Wanted, str]:
    """The rule that says how many votes, and the same in words."""
    count = count_of(job.votes, job.most, job.score)
    if isinstance(count, int):
        return fixed(count), str(count)
    plan = replace(count, goal="order") if job.kind == "rank" else count
    about = f"at most {plan.most}, until the {plan.goal} is settled at error {plan.error:g} by {plan.reading} scores"
    return adaptive(plan), f"auto ({about})"


def _number(votes: str) -> int | None:
    """A number of votes, None for `auto`."""
    if votes == AUTO:
        return None
    if not (votes.isascii() and votes.isdigit() and 1 <= int(votes[:9]) <= MOST_VOTES):
        raise UserError(f"{votes!r} is no number of votes; give 1 to {MOST_VOTES}, or {AUTO}")
    return int(votes)


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
