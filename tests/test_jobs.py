"""Judging files with a real judge on the real llama.cpp: every line once, in order, whatever kills the job."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from little_gguf import write_little_gguf

from patarm_lite.errors import UserError
from patarm_lite.judge import jobs, verbs
from patarm_lite.judge.backend import Item, Plan
from patarm_lite.judge.jobs import Work, adaptive, fixed, judge_file, rank_file
from patarm_lite.judge.voting import VotePlan
from patarm_lite.records import Turn, Verdict, Vote
from patarm_lite.store import Store, item_key

pytest.importorskip("llama_cpp")

PLAN = Plan(max_tokens=200)
Rows = list[dict[str, Any]]


def load_judge(file: Path, sequences: int = 8, **settings: Any) -> Any:
    """A judge with exact arithmetic: 32-bit weights and cache, so that a vote does not depend on those beside it."""
    from patarm_lite.gguf_file import read_gguf
    from patarm_lite.judge.description import fingerprint, read_description
    from patarm_lite.judge.judge import Judge
    from patarm_lite.judge.llama_backend import LlamaBackend
    from patarm_lite.judge.llamacpp import LlamaCpp

    model = LlamaCpp.load(
        file, context=900, sequences=sequences, threads=1, cache="f32", flash_attention=False, check=False
    )
    description = read_description(read_gguf(file).metadata)
    backend = LlamaBackend(model, description, fingerprint(file), deterministic=False)
    return Judge(backend, description, **{"plan": PLAN, **settings})


@pytest.fixture(scope="module")
def judge_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_little_gguf(tmp_path_factory.mktemp("little"), dtype="f32")


@pytest.fixture(scope="module")
def judge(judge_gguf: Path) -> Iterator[Any]:
    with load_judge(judge_gguf) as loaded:
        yield loaded


def work(judge: Any, k: int = 1, **changes: Any) -> Work:
    made = Work(judge.backend, judge.plan, judge.description.rubric, fixed(k), str(k), trained=False)
    return replace(made, **changes)


class Watched:
    """A real backend that notes what it is asked for, and dies after some votes like a server would."""

    def __init__(
        self,
        backend: Any,
        last_words: int | None = None,
        last_error: BaseException = UserError("http://127.0.0.1:8080 answers no more"),  # noqa: B008
    ) -> None:
        self.backend, self.last_words, self.last_error = backend, last_words, last_error
        self.asked: list[tuple[str, list[int]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def votes(self, asked: Sequence[tuple[Item, Sequence[int]]], plan: Plan) -> Iterator[tuple[int, int, Vote]]:
        self.asked += [(item.response, list(indices)) for item, indices in asked]
        for number, vote in enumerate(self.backend.votes(asked, plan)):
            if number == self.last_words:
                raise self.last_error
            yield vote


def lines(count: int) -> Rows:
    return [{"id": n, "prompt": "start with so, name a color", "response": "so red" + " day" * n} for n in range(count)]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain(path: Path) -> Rows:
    """An output without what no two runs share: times, and the last digits of probabilities (whether there are any is
    kept; texts and scores are kept)."""
    rows = read(path)
    for verdict in [row["verdict"] for row in rows if row["verdict"] is not None]:
        verdict["seconds"] = 0
        for found in (verdict, *verdict["votes"]):
            for key in ("mass", "expected"):
                found[key] = found[key] is not None
    return rows


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store" / "votes.sqlite") as opened:
        yield opened


# --- lines ---


def test_every_line_gets_its_verdict_in_input_order(judge: Any, tmp_path: Path, store: Store) -> None:
    source = write(tmp_path / "in.jsonl", lines(5))
    totals = judge_file(work(judge, 2), source, tmp_path / "out.jsonl", store)
    rows = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows:
        verdict = row["verdict"]
        assert verdict["score"] == sum(vote["score"] for vote in verdict["votes"]) / 2
        assert verdict["fingerprint"] == judge.backend.fingerprint
        assert (verdict["decoding"], verdict["tokens"], verdict["task"]) == ("constrained", "exact", "chat")
    assert (totals.lines, totals.verdicts, totals.votes, totals.reused, totals.unreadable) == (5, 5, 10, 0, 0)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.jsonl"]


def test_the_verdict_of_a_line_is_that_of_python(judge: Any, tmp_path: Path, store: Store) -> None:
    source = write(tmp_path / "in.jsonl", lines(1))
    judge_file(work(judge, 2), source, tmp_path / "out.jsonl", store)
    row = {"verdict": judge.score("start with so, name a color", "so red", k=2).to_json()}
    expected = plain(write(tmp_path / "python.jsonl", [row]))
    assert plain(tmp_path / "out.jsonl")[0]["verdict"] == expected[0]["verdict"]


def test_other_fields_stay_as_they_are_to_the_byte(judge: Any, tmp_path: Path, store: Store) -> None:
    line = '{"a":1.50,  "big": 12345678901234567890123, "e": 1e400, "a": [ {"x": null} ],"u": "\\ud800 \\u00e9 é",'
    line += ' "prompt" :"p", "response":"so"  }'
    source = write_text(tmp_path / "in.jsonl", line + "\n")
    judge_file(work(judge), source, tmp_path / "out.jsonl", store)
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert text.startswith(line.removesuffix("  }") + ', "verdict": {"schema": ')


def test_lines_that_say_the_same_share_their_votes(judge: Any, tmp_path: Path, store: Store) -> None:
    watched = Watched(judge.backend)
    rows = [lines(2)[number] | {"id": place} for place, number in enumerate([0, 1, 0, 0, 1])]
    source = write(tmp_path / "in.jsonl", rows)
    totals = judge_file(work(judge, 2, backend=watched), source, tmp_path / "out.jsonl", store)
    assert watched.asked == [("so red", [0, 1]), ("so red day", [0, 1])]
    found = plain(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == [0, 1, 2, 3, 4]
    assert found[0]["verdict"] == found[2]["verdict"] == found[3]["verdict"] != found[1]["verdict"]
    assert (totals.votes, totals.reused) == (10, 6)


BAD = {
    "{": "broken JSON (Expecting property name enclosed in double quotes, column 2)",
    "[1]": "it is a list, not a JSON object",
    '{"prompt": "p", "response": "r", "x": NaN}': "broken JSON (NaN is no number in JSON)",
    "[" * 100_000: "broken JSON (nested too deep)",
    '{"response": "r"}': "it has no field 'prompt'",
    '{"prompt": 3, "response": "r"}': "the prompt is a number, not text or chat messages",
    '{"prompt": [{"role": "wizard", "content": "x"}], "response": "r"}': "a chat message has a role that is not",
    '{"prompt": "p"}': "it has no field 'response'",
    '{"prompt": "p", "response": null}': "its response is nothing, not text",
    '{"prompt": "p", "response": "r", "reference": 5}': "its reference is a number, not text",
    '{"prompt": "p", "response": "r", "verdict": 5}': "it has a field 'verdict' already; name the new one",
}


def test_a_line_that_can_not_be_judged_is_told_by_number_and_the_rest_goes_on(
    judge: Any, tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SHOWN", 4)
    good = json.dumps(lines(1)[0])
    source = tmp_path / "in.jsonl"
    source.write_bytes("\n".join([good, *BAD, good]).encode() + b'\n{"prompt": "\xff"}\n')
    totals = judge_file(work(judge), source, tmp_path / "out.jsonl", store)
    rows = read(tmp_path / "out.jsonl")
    assert (totals.lines, totals.bad, len(rows)) == (len(BAD) + 3, len(BAD) + 1, len(BAD) + 3)
    for row, (number, reason) in zip(rows[1:-2], enumerate(BAD.values(), 2), strict=True):
        assert reason in row["error"], number
        assert row.get("verdict", None) is None
    assert rows[0]["verdict"]["score"] == rows[-2]["verdict"]["score"]
    assert rows[-1] == {"line": len(BAD) + 3, "verdict": None, "error": "it is not UTF-8 (byte 13)"}
    assert rows[5] == {"response": "r", "verdict": None, "error": "it has no field 'prompt'"}
    told = [line for line in capsys.readouterr().err.splitlines() if " line " in line]
    assert [line.partition(": ")[0] for line in told] == [f"{source} line {number}" for number in (2, 3, 4, 5)]


def test_strict_stops_at_a_bad_line_before_anything_is_judged(judge: Any, tmp_path: Path, store: Store) -> None:
    watched = Watched(judge.backend)
    source = write(tmp_path / "in.jsonl", [*lines(2), {"prompt": "p"}, *lines(1)])
    with pytest.raises(UserError, match="line 3: it has no field 'response'; mend the line, or leave out --strict"):
        judge_file(work(judge, backend=watched), source, tmp_path / "out.jsonl", store, strict=True)
    assert watched.asked == []
    assert not (tmp_path / "out.jsonl").exists()


def test_blank_lines_crlf_and_a_byte_order_mark_do_not_matter(judge: Any, tmp_path: Path, store: Store) -> None:
    good = [json.dumps(row) for row in lines(2)]
    source = write_text(tmp_path / "in.jsonl", "\ufeff" + good[0] + "\r\n\r\n  \n" + good[1])
    judge_file(work(judge), source, tmp_path / "out.jsonl", store)
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == [0, 1]


def test_an_input_without_lines_is_refused(judge: Any, tmp_path: Path, store: Store) -> None:
    with pytest.raises(UserError, match=r"in\.jsonl holds no lines; give one JSON object a line"):
        judge_file(work(judge), write_text(tmp_path / "in.jsonl", "\n \n"), tmp_path / "out.jsonl", store)


def test_chats_references_and_tasks_of_lines_reach_the_judge(judge: Any, tmp_path: Path, store: Store) -> None:
    chat = [{"role": "system", "content": "be short"}, {"role": "user", "content": "2 + 2?"}]
    source = write(tmp_path / "in.jsonl", [{"prompt": chat, "response": "4", "reference": "four", "task": "math"}])
    judge_file(work(judge), source, tmp_path / "out.jsonl", store)
    turns = (Turn("system", "be short"), Turn("user", "2 + 2?"))
    item = Item(turns, "4", "math", judge.description.rubric("math"), "four")
    backend = judge.backend
    key = item_key(backend.fingerprint, backend.name, backend.tokens, backend.protocol, item, judge.plan)
    assert list(store.votes(key, expected=True)) == [0]


def test_a_text_that_looks_like_a_transcript_is_one_turn_as_in_python(judge: Any, tmp_path: Path, store: Store) -> None:
    prompt = "Human: 2 + 2?\n\nAssistant: 5\n\nHuman: sure?\n\nAssistant:"
    source = write(tmp_path / "in.jsonl", [{"prompt": prompt, "response": "4", "task": "math"}])
    judge_file(work(judge), source, tmp_path / "out.jsonl", store)
    item = judge.item(prompt, "4", task="math")
    assert item.prompt == (Turn("user", prompt),)
    backend = judge.backend
    key = item_key(backend.fingerprint, backend.name, backend.tokens, backend.protocol, item, judge.plan)
    assert list(store.votes(key, expected=True)) == [0]


def test_stdin_goes_to_stdout(
    judge: Any, store: Store, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = "".join(json.dumps(row) + "\n" for row in lines(3))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    judge_file(work(judge), None, None, store)
    assert [json.loads(line)["id"] for line in capsysbinary.readouterr().out.splitlines()] == [0, 1, 2]


def test_a_response_that_is_too_long_is_a_bad_line_or_cut_with_a_mark(
    judge: Any, tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "p", "response": "so red " * 2000}, *lines(1)]
    source = write(tmp_path / "in.jsonl", rows)
    totals = judge_file(work(judge), source, tmp_path / "out.jsonl", store)
    found = read(tmp_path / "out.jsonl")
    assert "the context of 900 tokens is exceeded" in found[0]["error"]
    assert (totals.bad, totals.verdicts, found[1]["verdict"]["cut"]) == (1, 1, 0)
    totals = judge_file(work(judge, long="cut"), source, tmp_path / "cut.jsonl", store)
    found = read(tmp_path / "cut.jsonl")
    assert (totals.bad, totals.verdicts, totals.cut) == (0, 2, 1)
    assert found[0]["verdict"]["cut"] > 10_000
    told = f"line 1: too long for the judge; {found[0]['verdict']['cut']} characters were cut out"
    said = capsys.readouterr().err
    assert told in said, said


# --- votes ---


def test_sixteen_votes_begin_with_the_eight_that_are_there(judge: Any, tmp_path: Path, store: Store) -> None:
    watched = Watched(judge.backend)
    source = write(tmp_path / "in.jsonl", lines(2))
    judge_file(work(judge, 8, backend=watched), source, tmp_path / "8.jsonl", store)
    watched.asked.clear()
    totals = judge_file(work(judge, 16, backend=watched), source, tmp_path / "16.jsonl", store)
    assert watched.asked == [("so red", list(range(8, 16))), ("so red day", list(range(8, 16)))]
    assert (totals.votes, totals.reused) == (32, 16)
    for few, many in zip(read(tmp_path / "8.jsonl"), read(tmp_path / "16.jsonl"), strict=True):
        assert many["verdict"]["votes"][:8] == few["verdict"]["votes"]
    with Store.open(None) as fresh:
        judge_file(work(judge, 16), source, tmp_path / "fresh.jsonl", fresh)
    assert plain(tmp_path / "fresh.jsonl") == plain(tmp_path / "16.jsonl")


def test_another_seed_judge_or_rubric_pays_for_its_own_votes(judge: Any, tmp_path: Path, store: Store) -> None:
    source = write(tmp_path / "in.jsonl", lines(1))
    for number, changes in enumerate([{}, {"plan": replace(PLAN, seed=2)}, {"task": "code"}]):
        totals = judge_file(work(judge, 2, **changes), source, tmp_path / f"{number}.jsonl", store)
        assert totals.reused == 0, changes


def test_adaptive_votes_are_as_many_as_each_line_needs_and_the_same_from_the_store(
    judge: Any, tmp_path: Path, store: Store
) -> None:
    plan = VotePlan(goal="order", most=6)
    prompt = {"prompt": "start with so, name a color"}
    rows = [{**prompt, "responses": ["so red", "day"]}, {**prompt, "responses": ["so", "a color", "so red day"]}]
    source = write(tmp_path / "in.jsonl", rows)
    asked = work(judge, wanted=adaptive(plan), votes="auto")
    rank_file(asked, source, tmp_path / "first.jsonl", store)
    counts = [[len(v["votes"]) for v in row["ranking"]["verdicts"]] for row in read(tmp_path / "first.jsonl")]
    assert all(1 <= count <= 6 for row in counts for count in row)
    judge_file(  # more votes than the rule wants are there now
        work(judge, 6), write(tmp_path / "one.jsonl", [{**prompt, "response": "so red"}]), tmp_path / "6.jsonl", store
    )
    watched = Watched(judge.backend)
    rank_file(replace(asked, backend=watched), source, tmp_path / "again.jsonl", store)
    assert watched.asked == []
    again = [[len(v["votes"]) for v in row["ranking"]["verdicts"]] for row in read(tmp_path / "again.jsonl")]
    assert again == counts


def test_responses_are_ranked_best_first_and_unreadable_ones_last(judge: Any, tmp_path: Path, store: Store) -> None:
    row = {"id": 7, "prompt": "start with so, name a color", "responses": ["so red", "day", "so", "a color"]}
    rank_file(work(judge, 4), write(tmp_path / "in.jsonl", [row]), tmp_path / "out.jsonl", store)
    found = read(tmp_path / "out.jsonl")[0]
    ranking = found["ranking"]
    values = [verdict["expected"] for verdict in ranking["verdicts"]]
    assert found["id"] == 7
    if None not in values:
        assert ranking["by"] == "expected"
        assert [values[place] for place in ranking["order"]] == sorted(values, reverse=True)
    assert ranking["best"] == ranking["order"][0]


def vote(score: int | None, expected: float | None = None) -> Vote:
    return Vote(Verdict(score, None if score else "no_score"), "", expected)


@pytest.mark.parametrize(
    ("votes", "score", "order", "best", "tied", "by"),
    [
        ([vote(3, 3.5), vote(9, 8.0), vote(None)], "both", [1, 0, 2], 1, False, "expected"),
        ([vote(9, 5.0), vote(3, 6.0)], "expected", [1, 0], 1, False, "expected"),
        ([vote(9, 5.0), vote(3, 6.0)], "sampled", [0, 1], 0, False, "sampled"),
        ([vote(9), vote(3, 10.0)], "both", [0, 1], 0, False, "sampled"),
        ([vote(4), vote(7), vote(7)], "both", [1, 2, 0], 1, True, "sampled"),
        ([vote(None), vote(None)], "both", [0, 1], None, False, "expected"),
    ],
)
def test_a_ranking_goes_by_expected_scores_where_all_have_one(
    votes: list[Vote], score: Any, order: list[int], best: int | None, tied: bool, by: str
) -> None:
    made = {"task": "chat", "decoding": "free", "tokens": "exact", "fingerprint": ""}
    found = jobs.ranking([jobs.summarised([one], **made) for one in votes], score)
    assert (found["order"], found["best"], found["tied"], found["by"]) == (order, best, tied, by)


@pytest.mark.parametrize(
    ("responses", "reason"),
    [
        ([], "its responses are an empty list, not a list of texts"),
        ("one", "its responses are text, not a list of texts"),
        (["a", 5], "its response 2 is a number, not text"),
    ],
)
def test_what_is_no_list_of_responses_is_a_bad_line(
    responses: Any, reason: str, judge: Any, tmp_path: Path, store: Store
) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "p", "responses": responses}])
    totals = rank_file(work(judge), source, tmp_path / "out.jsonl", store)
    assert totals.bad == 1
    assert read(tmp_path / "out.jsonl")[0]["error"] == reason


# --- nothing lost ---

KILLED = -signal.SIGKILL


def quick_lines(count: int) -> Rows:
    """Lines of which some say the same, and one can't be judged."""
    rows = [{**lines(1)[0], "response": "so red" + " day" * (n % 5 if n % 3 else n), "id": n} for n in range(count)]
    del rows[count // 2]["response"]
    return rows


def quick_job(source: Path, out: Path, votes: str = "3", **changes: Any) -> verbs.FileJob:
    return verbs.FileJob("judge", str(source), out, votes, store=out.with_suffix(".sqlite"), **changes)


def quick_plan() -> Plan:
    """Judgements of 20 tokens. They can't be read, but they are drawn like any other."""
    return Plan("free", 1.0, 1, 20)


def run_job(gguf: Path, job: verbs.FileJob, log: Path, death: int = 0, largest: int = 0, count: bool = False) -> None:
    """A job as a command runs it, in this process, which ends with it.

    death: the line of our code at which the process kills itself. largest: bytes of any file it may write.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    if largest:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    seen = 0
    ours = ("patarm_lite/store.py", "patarm_lite/judge/jobs.py")

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.endswith(ours):
            return None
        seen += event == "line"
        if death and seen >= death:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    if death or count:
        sys.settrace(trace)
    try:
        verbs.run_file(job, lambda: load_judge(gguf, sequences=2, plan=quick_plan()), gguf)
    except (UserError, OSError) as error:
        sys.settrace(None)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.settrace(None)
    print(f"{seen} lines of code")
    sys.exit(0)


@pytest.fixture(scope="module")
def started(judge_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`started(job)` starts a job as a process of its own; `.log` is what it said."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["llama_cpp", "patarm_lite.judge.verbs", "patarm_lite.judge.judge"])
    folder = tmp_path_factory.mktemp("logs")

    def start(job: verbs.FileJob, **how: Any) -> Any:
        log = folder / f"{time.monotonic_ns()}.log"
        process = server.Process(target=run_job, args=(judge_gguf, job, log), kwargs=how)
        process.log = log
        process.start()
        return process

    return start


def ended(process: Any) -> int:
    process.join(120)
    assert process.exitcode is not None, process.log.read_text()
    return int(process.exitcode)


@pytest.fixture(scope="module")
def undisturbed(started: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """An input, and what a job that nothing disturbs makes of it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = write(folder / "in.jsonl", quick_lines(24))
    process = started(quick_job(source, folder / "out.jsonl"))
    assert ended(process) == 0, process.log.read_text()
    return source, plain(folder / "out.jsonl")


def kill_at_random(
    kills: int, seed: int, source: Path, wanted: Rows, folder: Path, started: Callable[..., Any]
) -> list[int]:
    """Kill jobs at random times, each until it gets through, and check each: how often each one was killed."""
    rng = random.Random(seed)
    found: list[int] = []
    while sum(found) < kills:
        job = quick_job(source, folder / f"{len(found)}.jsonl")
        kept, count = 0, 0
        while True:
            process = started(job)
            if sum(found) + count < kills:
                process.join(rng.uniform(0.05, 0.7))
                process.kill()  # kill -9
            if ended(process) == 0:
                break
            assert process.exitcode == KILLED, process.log.read_text()
            count += 1
            assert job.out is not None
            assert not job.out.exists() or plain(job.out) == wanted  # there whole, or not at all
            now = votes_in(job.store)
            assert now >= kept
            kept = now
        assert job.out is not None
        assert plain(job.out) == wanted
        assert votes_in(job.store) == unique_votes(wanted)
        assert [path for path in folder.iterdir() if path.suffix == ".part"] == []
        found.append(count)
    return found


def votes_in(store: Path | None) -> int:
    if store is None or not store.exists():
        return 0
    with Store.open(store) as opened:
        return int(opened.contents()["votes"])


def unique_votes(rows: Rows) -> int:
    return 3 * len({row["response"] for row in rows if "response" in row})


def test_ten_random_kills_lose_nothing(
    undisturbed: tuple[Path, Rows], tmp_path: Path, started: Callable[..., Any]
) -> None:
    source, wanted = undisturbed
    assert [row["id"] for row in wanted] == list(range(24))
    assert [row["id"] for row in wanted if row["verdict"] is None] == [12]
    assert sum(kill_at_random(10, 1, source, wanted, tmp_path, started)) == 10


@pytest.mark.slow
def test_fifty_random_kills_lose_nothing(
    undisturbed: tuple[Path, Rows], tmp_path: Path, started: Callable[..., Any]
) -> None:
    source, wanted = undisturbed
    assert sum(kill_at_random(50, 2, source, wanted, tmp_path, started)) == 50


def die_at_lines(count: int, seed: int, folder: Path, started: Callable[..., Any]) -> None:
    """Kill a little job at random lines of our own code, opening the store and renaming the output included."""
    source = write(folder / "in.jsonl", quick_lines(4))
    process = started(quick_job(source, folder / "whole.jsonl", "1"), count=True)
    assert ended(process) == 0, process.log.read_text()
    wanted = plain(folder / "whole.jsonl")
    lines_of_code = int(process.log.read_text().split()[-4])
    rng = random.Random(seed)
    for number in range(count):
        job = quick_job(source, folder / f"{number}.jsonl", "1")
        assert job.out is not None
        death = rng.randint(1, lines_of_code)
        assert ended(started(job, death=death)) == KILLED, f"line {death} of {lines_of_code}"
        assert not job.out.exists() or plain(job.out) == wanted
        process = started(job)
        assert ended(process) == 0, process.log.read_text()
        assert plain(job.out) == wanted, f"line {death} of {lines_of_code}"


def test_a_kill_at_any_line_of_our_code_loses_nothing(tmp_path: Path, started: Callable[..., Any]) -> None:
    die_at_lines(6, 1, tmp_path, started)


@pytest.mark.slow
def test_a_kill_at_forty_lines_of_our_code_loses_nothing(tmp_path: Path, started: Callable[..., Any]) -> None:
    die_at_lines(40, 2, tmp_path, started)


def test_the_same_command_again_finds_its_output_finished(judge: Any, tmp_path: Path, store: Store) -> None:
    source, out = write(tmp_path / "in.jsonl", lines(2)), tmp_path / "out.jsonl"
    judge_file(work(judge), source, out, store)
    before = out.read_bytes()
    assert judge_file(work(judge), source, out, store).finished_before
    assert out.read_bytes() == before
    write(source, lines(3))
    with pytest.raises(UserError, match=r"out\.jsonl exists already; give another place, or --force to replace it"):
        judge_file(work(judge), source, out, store)
    totals = judge_file(work(judge), source, out, store, force=True)
    assert (totals.lines, totals.reused) == (3, 2)
    write_text(out, "my own words\n")
    with pytest.raises(UserError, match="exists already"):
        judge_file(work(judge), source, out, store)
    assert out.read_text() == "my own words\n"


def test_an_output_that_is_the_input_is_refused(judge: Any, tmp_path: Path, store: Store) -> None:
    source = write(tmp_path / "in.jsonl", lines(1))
    with pytest.raises(UserError, match="is the input; give another place"):
        judge_file(work(judge), source, source, store, force=True)


def test_two_commands_never_write_one_output(judge: Any, tmp_path: Path, store: Store) -> None:
    out = tmp_path / "out.jsonl"
    with jobs._Output(out), pytest.raises(UserError, match="is being written by another command"):
        judge_file(work(judge), write(tmp_path / "in.jsonl", lines(1)), out, store)


def test_a_server_that_dies_is_one_line_and_the_job_goes_on_from_there(
    judge: Any, tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in.jsonl", lines(3)), tmp_path / "out.jsonl"
    with pytest.raises(
        UserError,
        match=r"8080 answers no more; 4 new votes are kept in .*votes\.sqlite, and the same command goes on from there",
    ):
        judge_file(work(judge, 2, backend=Watched(judge.backend, last_words=4)), source, out, store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "store"]
    watched = Watched(judge.backend)
    capsys.readouterr()
    totals = judge_file(work(judge, 2, backend=watched), source, out, store)
    assert sum(len(indices) for _, indices in watched.asked) == 2
    assert (totals.votes, totals.reused) == (6, 4)
    assert capsys.readouterr().err.startswith("going on: 0 of 3 lines were done before, and every kept vote counts\n")


def test_without_a_store_nothing_is_kept_and_an_error_says_so(judge: Any, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", lines(3)), tmp_path / "out.jsonl"
    with Store.open(None) as store, pytest.raises(UserError, match="nothing was kept, since there is no store"):
        judge_file(work(judge, backend=Watched(judge.backend, last_words=1)), source, out, store)


def test_ctrl_c_says_what_is_kept(judge: Any, tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", lines(2))
    stopped = Watched(judge.backend, last_words=1, last_error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        judge_file(work(judge, backend=stopped), source, tmp_path / "out.jsonl", store)
    assert "stopped; 1 new votes are kept in" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["vanished", "was replaced or changed"])
def test_a_judge_that_changes_while_it_judges_stops_the_job(
    how: str, judge: Any, judge_gguf: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "BLOCK_VOTES", 2)
    file = tmp_path / "judge.gguf"
    file.write_bytes(judge_gguf.read_bytes())
    check = verbs.unchanged(file)
    calls = iter(range(100))

    def check_later() -> None:
        if next(calls) == 2:
            file.unlink()
            if how != "vanished":
                file.write_bytes(b"another")
        check()

    source = write(tmp_path / "in.jsonl", lines(6))
    with pytest.raises(UserError, match=rf"judge\.gguf {how} while it judged; .*are kept"):
        judge_file(work(judge, check=check_later), source, tmp_path / "out.jsonl", store)
    assert store.contents()["votes"] == 4
    assert not (tmp_path / "out.jsonl").exists()


def test_a_job_that_goes_on_with_another_judge_says_so(
    judge: Any, tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in.jsonl", lines(3)), tmp_path / "out.jsonl"
    with pytest.raises(UserError):
        judge_file(work(judge, backend=Watched(judge.backend, last_words=1)), source, out, store)
    other = Watched(judge.backend)
    other.fingerprint = "cd" * 32  # as a replaced file has
    totals = judge_file(work(judge, backend=other), source, out, store)
    assert totals.reused == 0
    first = judge.backend.fingerprint[:12]
    assert f"begun with another judge (fingerprint {first}, now cdcdcdcdcdcd)" in capsys.readouterr().err
    assert {row["verdict"]["fingerprint"] for row in read(out)} == {"cd" * 32}


def test_a_full_disk_is_one_line_and_the_job_goes_on_when_there_is_room(
    undisturbed: tuple[Path, Rows], tmp_path: Path, started: Callable[..., Any]
) -> None:
    source, wanted = undisturbed
    job = quick_job(source, tmp_path / "out.jsonl")
    process = started(job, largest=100_000)  # bytes of any file
    assert ended(process) == 2
    said = process.log.read_text().splitlines()[-1]
    assert said.startswith("error: ")
    assert "out.sqlite can't be used: " in said
    assert "and the same command goes on from there" in said
    assert sorted(path.name for path in tmp_path.iterdir() if "out.jsonl" in path.name) == []
    assert 0 < votes_in(job.store) < unique_votes(wanted)
    assert ended(started(job)) == 0
    assert plain(tmp_path / "out.jsonl") == wanted


def test_an_output_on_a_full_disk_is_one_line_and_no_half_file(
    undisturbed: tuple[Path, Rows], tmp_path: Path, started: Callable[..., Any]
) -> None:
    job = replace(quick_job(undisturbed[0], tmp_path / "out.jsonl"), keep=False)
    process = started(job, largest=5_000)
    assert ended(process) == 2
    assert process.log.read_text().splitlines()[-1].startswith("error: ")
    assert str(job.out) in process.log.read_text().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_stdout_that_takes_no_more_is_told_from_other_files(judge: Any, tmp_path: Path, store: Store) -> None:
    source = write(tmp_path / "in.jsonl", lines(1))
    with open("/dev/full", "wb", buffering=0) as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", SimpleNamespace(buffer=full))
        with pytest.raises(OSError, match="No space left") as error:
            judge_file(work(judge), source, None, store)
    assert error.value.filename == "stdout"


def test_memory_does_not_grow_with_the_file(
    judge: Any, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "BLOCK_VOTES", 32)
    peaks = []
    for count in (100, 100, 800):  # what is loaded or remembered once is there after the first
        source = write(tmp_path / f"{len(peaks)}.jsonl", lines(1) * count)
        tracemalloc.start()
        totals = judge_file(work(judge), source, tmp_path / f"{len(peaks)}.out", store)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert totals.votes == count
    assert peaks[2] < 1.2 * peaks[1]


# --- the command line's part ---


def test_what_can_be_refused_is_refused_before_the_judge_is_loaded(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", lines(1))

    def load() -> Any:
        raise AssertionError("the judge was loaded")

    refused = {
        r"nothing\.jsonl is not found; give a file of JSON lines": {"source": str(tmp_path / "nothing.jsonl")},
        "is a folder; give a file of JSON lines": {"source": str(tmp_path)},
        "is a folder; give a file$": {"out": tmp_path},
        "does not exist; type: mkdir -p": {"out": tmp_path / "new" / "out.jsonl"},
        "'many' is no number of votes; give 1 to 1024, or auto": {"votes": "many"},
        "'0' is no number of votes": {"votes": "0"},
        "the store .* can't be opened": {"store": source / "votes.sqlite"},
    }
    job = quick_job(source, tmp_path / "out.jsonl")
    for reason, change in refused.items():
        with pytest.raises(UserError, match=reason):
            verbs.run_file(replace(job, **change), load)


def test_a_job_says_its_settings_where_votes_are_kept_and_its_totals(
    judge_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = replace(quick_job(write(tmp_path / "in.jsonl", lines(2)), tmp_path / "out.jsonl"), as_json=True)
    verbs.run_file(job, lambda: load_judge(judge_gguf, plan=verbs.plan_of("3", "both", max_tokens=200)))
    said = capsys.readouterr()
    assert "votes 3, decoding constrained, temperature 1, seed 1, at most 200 tokens" in said.err
    assert f"votes are kept, judgements in clear, in {job.store}" in said.err
    assert "2 lines, 2 verdicts of 6 votes (6 new in" in said.err
    assert json.loads(said.out)["votes"] == 6


def test_the_store_is_shown_and_emptied(judge_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = quick_job(write(tmp_path / "in.jsonl", lines(2)), tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"there is no store at .*out\.sqlite"):
        verbs.show_store(job.store)
    verbs.run_file(job, lambda: load_judge(judge_gguf, plan=quick_plan()))
    shown = json.loads(verbs.show_store(job.store, as_json=True))
    assert (shown["votes"], shown["jobs"], shown["unfinished"]) == (6, 1, 0)
    assert shown["judges"][0]["fingerprint"][:12] in verbs.show_store(job.store)
    assert verbs.delete_from_store(job.store, str(judge_gguf)) == f"deleted 6 votes and 1 jobs from {job.store}"
    assert json.loads(verbs.show_store(job.store, as_json=True))["votes"] == 0


def test_with_no_store_no_file_but_the_output_is_written(
    judge_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATARM_STORE", str(tmp_path / "usual.sqlite"))
    source = write(tmp_path / "in.jsonl", lines(2))
    job = replace(quick_job(source, tmp_path / "out.jsonl"), store=None, keep=False)
    verbs.run_file(job, lambda: load_judge(judge_gguf, plan=quick_plan()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    verbs.run_file(replace(job, keep=True, force=True), lambda: load_judge(judge_gguf, plan=quick_plan()))
    assert (tmp_path / "usual.sqlite").exists()
