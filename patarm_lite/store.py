"""The durable store of votes: one SQLite file that every judging job writes to and reads from.

    votes   one judgement each, keyed by `item_key` (a hash of everything a vote depends on but its index) and its index
    jobs    one row a job: what it read, where it wrote, with which judge, and whether it is finished
    items   one row a response of a job's input: line, place in the line, its key, or why it was not judged
    replies what an assistant model wrote, keyed by `reply_key` (a hash of everything a reply depends on)

A vote is committed as soon as it is there, so that a job killed at any moment pays for none of its votes twice, and 16
votes begin with the 8 that were paid for already. The file is in WAL mode with `synchronous=NORMAL`: a killed process
loses nothing, a power cut may lose the last votes before it, and never damages the file.

It holds the judgements' texts in clear, and the inputs' hashes, not their texts. It is readable by its owner alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from patarm_lite.errors import UserError
from patarm_lite.judge.backend import Item, Plan
from patarm_lite.metrics import _row_to_vote, _vote_to_row
from patarm_lite.prompts import Protocol, segments
from patarm_lite.records import Vote

SCHEMA = 1
APPLICATION = 0x70617461
"""SQLite's mark of whose file it is ("pata")."""
PATIENCE = 60.0
"""Seconds to wait for another job that is writing to the same store."""
VARIABLE = "PATARM_STORE"
OUTSIDE = ("AUTH", "BUSY", "CANTOPEN", "CORRUPT", "FULL", "IOERR", "LOCKED", "NOLFS", "NOTADB", "PERM", "READONLY")
"""Errors of SQLite that no code of ours can cause."""
TABLES = """
CREATE TABLE votes (
    item BLOB NOT NULL, vote INTEGER NOT NULL, judge TEXT NOT NULL, score INTEGER, measured INTEGER NOT NULL,
    seconds REAL NOT NULL, written REAL NOT NULL, judgement TEXT NOT NULL, PRIMARY KEY (item, vote)
);
CREATE INDEX votes_judge ON votes (judge);
CREATE TABLE jobs (
    job BLOB PRIMARY KEY, kind TEXT NOT NULL, source TEXT NOT NULL, out TEXT NOT NULL, judge TEXT NOT NULL,
    settings TEXT NOT NULL, begun REAL NOT NULL, source_sha256 TEXT, out_sha256 TEXT
);
CREATE TABLE items (
    job BLOB NOT NULL, line INTEGER NOT NULL, place INTEGER NOT NULL, item BLOB, problem TEXT,
    PRIMARY KEY (job, line, place)
);
"""
REPLIES = """
CREATE TABLE IF NOT EXISTS replies (
    request BLOB PRIMARY KEY, model TEXT NOT NULL, tokens INTEGER NOT NULL, ended INTEGER NOT NULL,
    seconds REAL NOT NULL, written REAL NOT NULL, reply TEXT NOT NULL
)
"""
"""Stores that were made before there were replies get this table when they are opened."""


@dataclass(frozen=True, slots=True)
class Job:
    """What makes a job this job: the same command again is the same job. `source` and `out` are absolute paths or `-`;
    `judge` is a fingerprint; `settings` is everything else that changes its output, in words."""

    kind: str
    source: str
    out: str
    judge: str
    settings: str

    @property
    def key(self) -> bytes:
        return _digest([self.kind, self.source, self.out, self.judge, self.settings])


@dataclass(frozen=True, slots=True)
class StoredVote:
    """A vote, and the seconds from the beginning of the call that drew it until it was there; votes that are drawn
    together share this time."""

    vote: Vote
    seconds: float


def default_place() -> Path:
    """Where the store lies: $PATARM_STORE, else `patarm-lite/votes.sqlite` in the user's folder for data."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    home = Path.home()
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = home / "Library" / "Application Support"
    else:
        folder = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return folder / "patarm-lite" / "votes.sqlite"


def item_key(judge: str, backend: str, tokens: str, protocol: Protocol, item: Item, plan: Plan) -> bytes:
    """SHA-256 of everything a vote depends on but its index.

    That is the judge's fingerprint, the backend, the judging prompt as the protocol renders it (its own text, task,
    rubric, prompt, reference, response), a forced rubric, and how is decoded. The seed counts only where something is
    drawn. Whether expected scores are measured doesn't count: they don't change a vote.

    Raises:
        UserError: a prompt that the protocol can't render.
    """
    rendered = segments(
        protocol, item.prompt, item.response, task=item.task, rubric=item.rubric, reference=item.reference
    )
    criteria = None if item.criteria is None else [[c.name, c.weight, c.description] for c in item.criteria]
    seed = plan.seed if plan.temperature else 0
    return _digest(
        [
            SCHEMA,
            judge,
            backend,
            tokens,
            [protocol.name, protocol.thinking],
            [[part.content, part.text] for part in rendered],
            criteria,
            [plan.decoding, float(plan.temperature), seed, plan.max_tokens],
        ]
    )


def reply_key(model: str, backend: str, read: Sequence[Any], max_tokens: int, temperature: float, seed: int) -> bytes:
    """SHA-256 of everything a reply depends on: the model's fingerprint, the backend, what the model reads (token ids
    or messages), and how is drawn. The seed counts only where something is drawn."""
    drawn = [max_tokens, float(temperature), seed if temperature else 0]
    return _digest(["reply", SCHEMA, model, backend, list(read), drawn])


def _digest(values: Sequence[Any]) -> bytes:
    return hashlib.sha256(json.dumps(values, ensure_ascii=True).encode()).digest()


class Store:
    """An open store. `path` is None for one that is kept nowhere: it goes with the process."""

    def __init__(self, path: Path | None, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, path: Path | None) -> Store:
        """Open a store, or make one. None: a temporary one, which nothing outlives.

        Raises:
            UserError: a file that is no store of ours, of another version, or that can't be written.
        """
        if path is None:
            found = cls(None, sqlite3.connect("", isolation_level=None))
            found._prepare()
            return found
        path = Path(path)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # its texts are for the owner alone
        except OSError as error:
            raise UserError(f"the store {path} can't be opened: {error.strerror}; {_elsewhere()}") from None
        found = cls(path, sqlite3.connect(path, timeout=PATIENCE, isolation_level=None))
        try:
            found._prepare()
        except BaseException:
            found.close()
            raise
        return found

    def _prepare(self) -> None:
        with self._told():
            with self._whole():  # of several processes one makes the tables, the others find them
                self._check_or_create()
                self._connection.execute(REPLIES)
            self._write_ahead()
            self._connection.execute("PRAGMA synchronous = NORMAL")

    def _check_or_create(self) -> None:
        run = self._connection.execute
        if not _number(run("SELECT count(*) FROM sqlite_schema")):
            for statement in TABLES.split(";"):
                run(statement)
            run(f"PRAGMA application_id = {APPLICATION}")
            run(f"PRAGMA user_version = {SCHEMA}")
            return
        schema, mark = _number(run("PRAGMA user_version")), _number(run("PRAGMA application_id"))
        if (mark, schema) != (APPLICATION, SCHEMA):
            what = f"of version {schema}, and this is {SCHEMA}" if mark == APPLICATION else "no store of verdicts"
            raise UserError(f"{self.path} is {what}; {_elsewhere()}")

    def _write_ahead(self) -> None:
        """Turn WAL on. SQLite does not wait by itself for another process that is doing the same."""
        last = time.monotonic() + PATIENCE
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if not _name(error).startswith("SQLITE_BUSY") or time.monotonic() > last:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # votes

    def votes(self, item: bytes, expected: bool) -> dict[int, StoredVote]:
        """The votes of an item by index. `expected`: only those whose expected score was measured.

        Raises:
            UserError: a vote that can't be read.
        """
        with self._told():
            rows = self._connection.execute(
                "SELECT vote, judgement, seconds FROM votes WHERE item = ? AND measured >= ?", (item, int(expected))
            ).fetchall()
        try:
            return {index: StoredVote(_row_to_vote(json.loads(text)), seconds) for index, text, seconds in rows}
        except (KeyError, TypeError, ValueError):
            raise UserError(f"the store {self.path} holds a damaged vote; {_elsewhere()}") from None

    def add(self, item: bytes, index: int, judge: str, vote: Vote, seconds: float, measured: bool) -> None:
        """Keep a vote: it is there, whatever happens, when this returns.

        A vote that is there already stays as it is, unless its expected score was not measured and this one's was.
        """
        judgement = json.dumps(_vote_to_row(vote), ensure_ascii=True)
        with self._told():
            self._connection.execute(
                "INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET score = excluded.score, "
                "measured = excluded.measured, seconds = excluded.seconds, written = excluded.written, "
                "judgement = excluded.judgement WHERE excluded.measured > votes.measured",
                (item, index, judge, vote.verdict.score, int(measured), seconds, time.time(), judgement),
            )

    # replies

    def reply(self, request: bytes) -> tuple[str, bool, int] | None:
        """What a model wrote (its text, whether it ended by itself, its tokens); None where nothing is kept.

        Raises:
            UserError: a reply that can't be read.
        """
        with self._told():
            row = self._connection.execute(
                "SELECT reply, ended, tokens FROM replies WHERE request = ?", (request,)
            ).fetchone()
        if row is None:
            return None
        try:
            return str(json.loads(row[0])), bool(row[1]), int(row[2])
        except (TypeError, ValueError):
            raise UserError(f"the store {self.path} holds a damaged reply; {_elsewhere()}") from None

    def add_reply(self, request: bytes, model: str, text: str, ended: bool, tokens: int, seconds: float) -> None:
        """Keep a reply: it is there, whatever happens, when this returns. One that is there already stays."""
        row = (request, model, tokens, int(ended), seconds, time.time(), json.dumps(text, ensure_ascii=True))
        with self._told():
            self._connection.execute("INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", row)

    # jobs

    def begin(self, job: Job) -> int | None:
        """Enter a job. None: it is new; else the number of its lines that were done before."""
        with self._told():
            run = self._connection.execute
            entered = run(
                "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, NULL, NULL) ON CONFLICT DO NOTHING",
                (job.key, job.kind, job.source, job.out, job.judge, job.settings, time.time()),
            )
            if entered.rowcount:
                return None
            return _number(run("SELECT count(DISTINCT line) FROM items WHERE job = ?", (job.key,)))

    def note(self, job: Job, rows: Iterable[tuple[int, int, bytes | None, str | None]]) -> None:
        """Note lines of a job that are done: (line, place in it, the item's key or None, why it was not judged)."""
        with self._told(), self._whole():
            self._connection.executemany(
                "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?)",
                [(job.key, line, place, item, problem and ascii(problem)[1:-1]) for line, place, item, problem in rows],
            )

    def finish(self, job: Job, source_sha256: str, out_sha256: str) -> None:
        """Note that a job's output is whole, and what it was made of."""
        with self._told():
            self._connection.execute(
                "UPDATE jobs SET source_sha256 = ?, out_sha256 = ? WHERE job = ?", (source_sha256, out_sha256, job.key)
            )

    def finished(self, job: Job) -> tuple[str, str] | None:
        """SHA-256 of the input and the output of a finished job."""
        with self._told():
            row = self._connection.execute(
                "SELECT source_sha256, out_sha256 FROM jobs WHERE job = ? AND out_sha256 NOT NULL", (job.key,)
            ).fetchone()
        return None if row is None else (row[0], row[1])

    def other_judges(self, job: Job) -> list[str]:
        """Fingerprints of other judges with which the same job was begun and not finished, the latest first."""
        with self._told():
            rows = self._connection.execute(
                "SELECT judge FROM jobs WHERE (kind, source, out, settings) = (?, ?, ?, ?) AND judge != ? "
                "AND out_sha256 IS NULL ORDER BY begun DESC",
                (job.kind, job.source, job.out, job.settings, job.judge),
            ).fetchall()
        return [row[0] for row in rows]

    def other_settings(self, job: Job) -> list[str]:
        """Other settings with which the same job was begun by the same judge and not finished, the latest first."""
        with self._told():
            rows = self._connection.execute(
                "SELECT settings FROM jobs WHERE (kind, source, out, judge) = (?, ?, ?, ?) AND settings != ? "
                "AND out_sha256 IS NULL ORDER BY begun DESC",
                (job.kind, job.source, job.out, job.judge, job.settings),
            ).fetchall()
        return [row[0] for row in rows]

    # the whole

    def contents(self) -> dict[str, Any]:
        """What the store holds, as plain JSON values."""
        with self._told():
            run = self._connection.execute
            judges = run("SELECT judge, count(*), count(DISTINCT item), max(written) FROM votes GROUP BY judge")
            models = run("SELECT model, count(*), max(written) FROM replies GROUP BY model")
            return {
                "path": None if self.path is None else str(self.path),
                "bytes": 0 if self.path is None else _bytes(self.path),
                "votes": _number(run("SELECT count(*) FROM votes")),
                "jobs": _number(run("SELECT count(*) FROM jobs")),
                "unfinished": _number(run("SELECT count(*) FROM jobs WHERE out_sha256 IS NULL AND out != '-'")),
                "judges": [
                    {"fingerprint": judge, "votes": votes, "items": items, "last": _date(last)}
                    for judge, votes, items, last in judges.fetchall()
                ],
                "replies": _number(run("SELECT count(*) FROM replies")),
                "models": [
                    {"fingerprint": model, "replies": replies, "last": _date(last)}
                    for model, replies, last in models.fetchall()
                ],
            }

    def delete(self, judge: str | None = None) -> Mapping[str, int]:
        """Delete all votes, replies and jobs, or those of one judge or model (the beginning of its fingerprint); how
        many of each.

        The file is written anew without it, so that its texts are no longer in there.

        Raises:
            UserError: no such judge, or more than one.
        """
        with self._told():
            run = self._connection.execute
            if judge is not None:
                judge = self._whole_name(judge)
            which, values = ("", ()) if judge is None else (" WHERE judge = ?", (judge,))
            with self._whole():
                run(f"DELETE FROM items WHERE job IN (SELECT job FROM jobs{which})", values)
                found = {table: run(f"DELETE FROM {table}{which}", values).rowcount for table in ("votes", "jobs")}
                found["replies"] = run(f"DELETE FROM replies{which.replace('judge', 'model')}", values).rowcount
            run("VACUUM")
            run("PRAGMA wal_checkpoint(TRUNCATE)")
        return found

    def _whole_name(self, beginning: str) -> str:
        rows = self._connection.execute(
            "SELECT judge FROM votes UNION SELECT judge FROM jobs UNION SELECT model FROM replies"
        ).fetchall()
        found = [row[0] for row in rows if row[0].startswith(beginning)]
        if len(found) != 1:
            how_many = f"{len(found)} judges" if found else "no judge"
            raise UserError(f"the store holds votes of {how_many} with a fingerprint that begins {beginning!r}")
        return str(found[0])

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """All or nothing of what is written inside."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors in words."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if not _of_the_disk(error):
                raise
            where = f"the store {self.path}" if self.path is not None else "the temporary store"
            raise UserError(f"{where} can't be used: {_reason(error)}") from error


def _of_the_disk(error: sqlite3.DatabaseError) -> bool:
    """Whether an error comes from the file or the disk, and not from our SQL."""
    return _name(error).startswith(tuple(f"SQLITE_{kind}" for kind in OUTSIDE))


def _name(error: sqlite3.DatabaseError) -> str:
    """SQLite's own name of an error, e.g. SQLITE_IOERR_WRITE."""
    return getattr(error, "sqlite_errorname", None) or ""


def _reason(error: sqlite3.DatabaseError) -> str:
    name = _name(error)
    if name.startswith("SQLITE_FULL"):
        return "the disk is full; make room"
    if name.startswith("SQLITE_BUSY"):
        return "another command is writing to it; wait for that one"
    if name.startswith("SQLITE_IOERR"):
        return "it can't be written or read; is the disk full?"
    if name.startswith("SQLITE_NOTADB"):
        return f"it is no store of verdicts; {_elsewhere()}"
    if name.startswith("SQLITE_CORRUPT"):
        return f"the file is damaged; {_elsewhere()}"
    return f"{error}; {_elsewhere()}"


def _elsewhere() -> str:
    return "give another place with --store FILE, or keep nothing with --no-store"


def _number(cursor: sqlite3.Cursor) -> int:
    return int(cursor.fetchone()[0])


def _bytes(path: Path) -> int:
    beside = [path, path.with_name(path.name + "-wal")]
    return sum(file.stat().st_size for file in beside if file.exists())


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
