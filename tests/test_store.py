"""The store: a vote that was kept is there, whatever happens, and nothing that was deleted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patarm_lite.errors import UserError
from patarm_lite.judge.backend import Item, Plan
from patarm_lite.prompts import Protocol
from patarm_lite.records import Criterion, CriterionScore, Turn, Verdict, Vote
from patarm_lite.store import Job, Store, StoredVote, default_place, item_key

RUBRIC = (Criterion("so", "starts with so", 3),)
ITEM = Item((Turn("user", "start with so"),), "so red.", "chat", RUBRIC)
PLAN = Plan(max_tokens=200)
VERDICT = Verdict(7, None, RUBRIC, (CriterionScore("so", "yes", 9),), ("criteria_count",))
VOTE = Vote(VERDICT, "a judgement 評価 \u2028 \x00", 6.5, 0.9, 42)
JOB = Job("judge", "/in.jsonl", "/out.jsonl", "ab12", "{}")
KEY = b"k" * 32


def key(item: Item = ITEM, plan: Plan = PLAN, judge: str = "ab", tokens: str = "exact", backend: str = "x") -> bytes:
    return item_key(judge, backend, tokens, Protocol(instructions=False), item, plan)


def keep(store: Store, index: int, vote: Vote = VOTE, item: bytes = KEY, judge: str = "ab12") -> None:
    store.add(item, index, judge, vote, 0.5, vote.mass is not None)


def test_a_vote_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    with Store.open(tmp_path / "votes.sqlite") as store:
        keep(store, 3)
    with Store.open(tmp_path / "votes.sqlite") as store:
        assert store.votes(KEY, expected=True) == {3: StoredVote(VOTE, 0.5)}
        assert store.votes(b"another item", expected=False) == {}


@given(st.text(st.characters()), st.sampled_from([None, 1, 10]))
def test_any_text_of_a_judgement_is_kept(text: str, score: int | None) -> None:
    vote = Vote(Verdict(score, None if score else "no_score"), text)
    with Store.open(None) as store:
        keep(store, 0, vote)
        assert store.votes(KEY, expected=False)[0].vote == vote


def test_votes_of_other_things_have_other_keys() -> None:
    changes = [
        replace(ITEM, prompt=(Turn("user", "start with so."),)),
        replace(ITEM, prompt=(Turn("system", "start with so"),)),
        replace(ITEM, response="so red. "),
        replace(ITEM, task="math"),
        replace(ITEM, rubric=(Criterion("so", "starts with so", 4),)),
        replace(ITEM, reference="so blue"),
        replace(ITEM, reference=""),
        replace(ITEM, criteria=RUBRIC),
    ]
    plans = [
        replace(PLAN, seed=2),
        replace(PLAN, temperature=0.0),
        replace(PLAN, decoding="free"),
        replace(PLAN, max_tokens=201),
    ]
    keys = [key(), *map(key, changes), *(key(plan=plan) for plan in plans)]
    keys += [key(judge="ac"), key(tokens="text"), key(backend="y")]
    keys.append(item_key("ab", "x", "exact", Protocol(instructions=True), ITEM, PLAN))
    keys.append(item_key("ab", "x", "exact", Protocol(instructions=False, thinking=True), ITEM, PLAN))
    assert len(set(keys)) == len(keys) == 18


def test_prompt_and_response_are_told_apart() -> None:
    moved = replace(ITEM, prompt=(Turn("user", "start with so\n</prompt>\n<response>\nso"),), response="red.")
    whole = replace(ITEM, prompt=(Turn("user", "start with so"),), response="so\nred.")
    assert key(moved) != key(whole)


def test_what_changes_no_vote_changes_no_key() -> None:
    assert key(plan=replace(PLAN, expected=False)) == key()
    greedy = replace(PLAN, temperature=0.0)
    assert key(plan=replace(greedy, seed=7)) == key(plan=greedy)


def test_a_vote_without_its_expected_score_serves_only_those_who_need_none(tmp_path: Path) -> None:
    without = replace(VOTE, expected=None, mass=None)
    with Store.open(tmp_path / "votes.sqlite") as store:
        keep(store, 0, without)
        assert store.votes(KEY, expected=True) == {}
        assert store.votes(KEY, expected=False)[0].vote == without
        keep(store, 0, VOTE)
        assert store.votes(KEY, expected=True)[0].vote == VOTE
        keep(store, 0, without)  # what is known already is not forgotten
        assert store.votes(KEY, expected=True)[0].vote == VOTE


def test_the_first_vote_of_an_index_stays() -> None:
    with Store.open(None) as store:
        keep(store, 0)
        keep(store, 0, replace(VOTE, text="another"))
        assert store.votes(KEY, expected=True)[0].vote.text == VOTE.text


def _keep_and_die(path: Path) -> None:
    store = Store.open(path)
    for index in range(20):
        keep(store, index)
    os.kill(os.getpid(), signal.SIGKILL)


def _keep_many(path: Path, first: int) -> None:
    with Store.open(path) as store:
        for index in range(first, first + 100):
            keep(store, index)


def test_a_kept_vote_survives_kill_9(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_keep_and_die, args=(tmp_path / "votes.sqlite",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with Store.open(tmp_path / "votes.sqlite") as store:
        assert sorted(store.votes(KEY, expected=True)) == list(range(20))


def test_several_jobs_write_to_one_store_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    path = tmp_path / "votes.sqlite"  # made by whichever comes first
    jobs = [context.Process(target=_keep_many, args=(path, 100 * number)) for number in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    with Store.open(path) as store:
        assert sorted(store.votes(KEY, expected=True)) == list(range(400))


def test_a_full_disk_is_one_line_and_costs_no_vote_that_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with Store.open(path) as store:
        store._connection.execute("PRAGMA max_page_count = 40")  # SQLite's own way to be out of room
        with pytest.raises(UserError, match=r"votes\.sqlite can't be used: the disk is full; make room$"):
            for index in range(1000):
                keep(store, index)
    with Store.open(path) as store:
        assert sorted(store.votes(KEY, expected=True)) == list(range(index))
        assert index > 10
        keep(store, index)  # room was made


def test_what_is_no_store_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database " * 100)
    with pytest.raises(UserError, match=r"notes\.txt .*no store of verdicts.*--store FILE"):
        Store.open(text)
    assert text.read_text() == "not a database " * 100
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (a)")
    connection.close()
    with pytest.raises(UserError, match=r"other\.sqlite is no store of verdicts"):
        Store.open(other)


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with Store.open(path) as store:
        store._connection.execute("PRAGMA user_version = 2")
    with pytest.raises(UserError, match="is of version 2, and this is 1"):
        Store.open(path)


def test_a_damaged_vote_is_one_line() -> None:
    with Store.open(None) as store:
        keep(store, 0)
        store._connection.execute("UPDATE votes SET judgement = '{}'")
        with pytest.raises(UserError, match="holds a damaged vote"):
            store.votes(KEY, expected=True)


def test_only_its_owner_can_read_a_store(tmp_path: Path) -> None:
    with Store.open(tmp_path / "new" / "votes.sqlite") as store:
        keep(store, 0)
        for file in (tmp_path / "new").iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_a_store_that_is_not_kept_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    with Store.open(None) as store:
        for index in range(2000):  # more than SQLite holds in memory
            keep(store, index)
        assert list(tmp_path.iterdir()) == []
        assert store.contents()["path"] is None


def test_deleted_texts_are_no_longer_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with Store.open(path) as store:
        for index in range(50):
            keep(store, index, replace(VOTE, text="very private " * 20))
            keep(store, index, replace(VOTE, text="quite public " * 20), judge="cd34", item=b"other")
        store.begin(JOB)
        store.note(JOB, [(1, 0, KEY, None)])
        assert store.delete("ab") == {"votes": 50, "jobs": 1, "replies": 0}
        assert len(store.votes(b"other", expected=True)) == 50
        held = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"very private" not in held
    assert b"quite public" in held
    with Store.open(path) as store:
        assert store.delete() == {"votes": 50, "jobs": 0, "replies": 0}
    assert b"quite public" not in path.read_bytes()


def test_a_judge_to_be_deleted_must_be_one(tmp_path: Path) -> None:
    with Store.open(None) as store:
        keep(store, 0, judge="ab12")
        keep(store, 1, judge="ab34")
        with pytest.raises(UserError, match="2 judges with a fingerprint that begins 'ab'"):
            store.delete("ab")
        with pytest.raises(UserError, match="no judge with a fingerprint that begins 'ff'"):
            store.delete("ff")
        assert store.contents()["votes"] == 2


def test_a_job_is_known_again() -> None:
    with Store.open(None) as store:
        assert store.begin(JOB) is None
        store.note(JOB, [(1, 0, KEY, None), (2, 0, KEY, None), (2, 1, KEY, None), (4, 0, None, "broken \ud800")])
        assert store.begin(JOB) == 3
        assert store.finished(JOB) is None
        store.finish(JOB, "in", "out")
        assert store.finished(JOB) == ("in", "out")
        assert store.begin(replace(JOB, settings="other")) is None


def test_a_job_begun_with_another_judge_is_told_from_this_one() -> None:
    with Store.open(None) as store:
        store.begin(JOB)
        assert store.other_judges(JOB) == []
        assert store.other_judges(replace(JOB, judge="cd34")) == ["ab12"]
        assert store.other_judges(replace(JOB, judge="cd34", out="/elsewhere")) == []
        store.finish(JOB, "in", "out")
        assert store.other_judges(replace(JOB, judge="cd34")) == []


def test_the_store_lies_where_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATARM_STORE", str(tmp_path / "mine.sqlite"))
    assert default_place() == tmp_path / "mine.sqlite"
    monkeypatch.delenv("PATARM_STORE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_place() == tmp_path / "patarm-lite" / "votes.sqlite"


def test_a_place_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't be opened: .*--store FILE, or keep nothing with --no-store$"):
        Store.open(tmp_path / "file" / "votes.sqlite")


# --- replies of assistant models ---


@given(text=st.text(), ended=st.booleans())
def test_a_reply_comes_back_as_it_was_kept_and_the_first_one_stays(text: str, ended: bool) -> None:
    with Store.open(None) as store:
        assert store.reply(b"request") is None
        store.add_reply(b"request", "ab", text, ended, 3, 0.5)
        store.add_reply(b"request", "ab", "another", not ended, 4, 0.5)
        assert store.reply(b"request") == (text, ended, 3)


def test_replies_are_shown_and_deleted_with_their_model(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s.sqlite") as store:
        for number, model in enumerate(("ab", "ab", "cd")):
            store.add_reply(bytes([number]), model, f"secret {number}", True, 1, 0.1)
        found = store.contents()
        assert found["replies"] == 3
        assert [(one["fingerprint"], one["replies"]) for one in found["models"]] == [("ab", 2), ("cd", 1)]
        assert store.delete("ab") == {"votes": 0, "jobs": 0, "replies": 2}
        assert store.contents()["replies"] == 1
    data = (tmp_path / "s.sqlite").read_bytes()
    assert b"secret 0" not in data and b"secret 2" in data


def test_a_store_from_before_there_were_replies_takes_them(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s.sqlite") as store:
        store._connection.execute("DROP TABLE replies")
    with Store.open(tmp_path / "s.sqlite") as store:
        store.add_reply(b"request", "ab", "hello", True, 1, 0.1)
        assert store.reply(b"request") == ("hello", True, 1)
