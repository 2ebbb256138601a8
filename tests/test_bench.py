"""`bench` through the front door: a real judge, the real llama.cpp, a few items of every benchmark there is data of."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Typed
from little_gguf import write_little_gguf

from patarm_lite.cli import main
from patarm_lite.evals.bench_data import BENCHMARKS, files_in
from patarm_lite.pairs.files import read_rows
from patarm_lite.store import Store

pytest.importorskip("llama_cpp")

QUICK = ("--threads", "1", "--parallel", "8", "--context", "1500", "--max-tokens", "100", "--offline")
EACH = 2
"""Items of each benchmark."""


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_little_gguf(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def data(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shortest real items of every benchmark, in the official schema."""
    folder = tmp_path_factory.mktemp("data")
    for name, files in files_in(shared / "data").items():
        chosen = [file for file in files if name != "llmbar" or file.stem == "Adversarial_Manual"]
        rows = [row.value for file in chosen for row in read_rows(str(file))]
        if name == "rewardbench":
            rows = [row for row in rows if row["subset"] == "llmbar-adver-manual"]
        short = sorted(
            rows, key=lambda row: len(json.dumps(row.get("prompt", row.get("input", row)))) + len(json.dumps(row))
        )
        text = "".join(json.dumps(row) + "\n" for row in short[:EACH])
        (folder / f"{name}{'-Manual' if name == 'llmbar' else ''}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(judge: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of two judges on everything: its folder and its store."""
    folder = tmp_path_factory.mktemp("finished")
    other = write_little_gguf(folder, seed=1)
    arguments = ["bench", judge, "--before", other, "--data", data, "--k", "2", "--store", folder / "votes.sqlite"]
    assert main([*map(str, arguments), *QUICK, "-o", str(folder / "out")]) == 0
    return folder / "out", folder / "votes.sqlite"


def scored(out: Path) -> Any:
    return json.loads((out / "bench.json").read_text(encoding="utf-8"))


def test_every_benchmark_gets_its_official_score_with_what_stands_beside_it(finished: tuple[Path, Path]) -> None:
    found = scored(finished[0])
    assert list(found["benchmarks"]) == list(BENCHMARKS)
    for name, known in found["benchmarks"].items():
        assert known["items"] == EACH
        assert re.match(r"in part: 2 of \d+ items", known["part"]), known["part"]
        assert re.fullmatch(r"[0-9a-f]{64}", known["sha256"])
        for side in ("before", "judge"):
            one = found[side]["benchmarks"][name]
            head = one["rows"][known["headline"]]
            assert head["low"] <= head["value"] <= head["high"]
            assert head["chance"] == (0.0 if name == "pandalm" else 0.25 if name == "rewardbench2" else 0.5)
            assert set(one["rules"]) == {"lose", "half", "win"}
            if one["rules"]["lose"] is not None:  # people call all these pairs of PandaLM ties
                assert one["rules"]["lose"] <= one["rules"]["half"] <= one["rules"]["win"]
            assert {"ties", "unreadable", "no_score", "too_long", "expected"} <= set(one)
            change = found["difference"][name][known["headline"]]
            assert change["low"] <= change["value"] <= change["high"]
    assert found["before"]["fingerprint"] != found["judge"]["fingerprint"]
    assert found["judge"]["trained"] is False


def test_the_figures_are_those_of_the_stored_verdicts(finished: tuple[Path, Path], typed: Typed) -> None:
    out, _ = finished
    found = scored(out)
    for side, ending in (("judge", ""), ("before", "-before")):
        for name in found["benchmarks"]:
            verdicts = out / f"verdicts-{name}{ending}.jsonl"
            code, text, err = typed("bench", "score", name, "--verdicts", verdicts, "--json")
            assert code == 0, err
            again = json.loads(text)
            assert again["part"] == found["benchmarks"][name]["part"]
            one = found[side]["benchmarks"][name]
            for key in ("rows", "rules", "ties", "no_score"):
                assert again[key] == one[key], (name, key)


def test_tables_and_page_name_a_part_and_load_nothing(finished: tuple[Path, Path]) -> None:
    out, _ = finished
    text = (out / "bench.md").read_text(encoding="utf-8")
    page = (out / "bench.html").read_text(encoding="utf-8")
    for known in scored(out)["benchmarks"].values():
        named = f"{known['title']} ({known['part']})"
        assert f"| {named} | before: " in text
        rows = [line for line in text.splitlines() if line.startswith(f"| {named} |") and "difference" not in line]
        assert len(rows) == 2 and all(re.search(r" (0\.0|25\.0|50\.0) \|$", row) for row in rows)  # chance
        assert f"\n## {named}\n" in text
        assert f"<h2>{named}</h2>" in page
        assert not re.search(rf"\| {re.escape(known['title'])} \|", text)  # nowhere as if it were whole
    assert ", untrained |" in text
    plots = len(BENCHMARKS) + 2  # one of each, the headline figures, and what ties are worth
    assert page.count("<svg") == page.count('role="img" aria-label="') == plots
    assert len(set(re.findall(r' id="([^"]+)"', page))) == len(re.findall(r' id="([^"]+)"', page))
    assert "was never trained to judge" in page
    assert not re.search(r"""(?:src|href)=["'](?!#)|@import|url\((?!#)""", page)


def test_responses_without_an_expected_score_are_counted_under_the_figures(finished: tuple[Path, Path]) -> None:
    from patarm_lite.evals.scoreboard import markdown

    found = scored(finished[0])
    said = "without an expected score"
    for side in ("before", "judge"):
        for one in found[side]["benchmarks"].values():
            if one["expected"]:
                one["expected"]["no_score"] = 0.0
    assert said not in markdown(found)
    llmbar = found["judge"]["benchmarks"]["llmbar"]
    llmbar["expected"] = {"rows": llmbar["rows"], "no_score": 0.25}
    assert f"{said} (little probability on scores): 25.0% of LLMBar." in markdown(found)


def test_an_interval_of_no_width_is_explained(finished: tuple[Path, Path]) -> None:
    from patarm_lite.evals.scoreboard import markdown

    found = scored(finished[0])
    rows = [
        row
        for side in ("before", "judge")
        for one in found[side]["benchmarks"].values()
        for row in one["rows"].values()
    ]
    for row in rows:
        row |= {"low": 0.1, "high": 0.9}
    assert "of no width" not in markdown(found)
    rows[0]["low"] = rows[0]["high"] = 0.5
    assert "- An interval of no width says that all items of the row came out alike" in markdown(found)


def test_benchmarks_share_the_verdicts_on_equal_responses(finished: tuple[Path, Path]) -> None:
    out, store = finished
    rows = {name: (out / f"verdicts-{name}.jsonl").read_text().splitlines() for name in ("llmbar", "rewardbench")}
    by_name = {name: [json.loads(row) for row in found] for name, found in rows.items()}
    # the same three pairs: RewardBench puts the chosen one first, LLMBar either
    sides = [sorted(map(sorted, (row["scores"] for row in found))) for found in by_name.values()]
    assert sides[0] == sides[1]
    found = scored(out)["judge"]
    with Store.open(store) as opened:
        kept = {one["fingerprint"]: one["votes"] for one in opened.contents()["judges"]}
    assert kept[found["fingerprint"]] == found["votes"] == found["drawn"]
    responses = 2 * (2 + 2 + 2 + 2 + 2 + 6 + 4) * EACH
    too_long = 2 * sum(one["too_long"] for one in found["benchmarks"].values())
    assert found["votes"] <= responses - too_long - 2 * 2 * EACH


def test_the_same_command_again_draws_nothing_and_says_the_same(
    finished: tuple[Path, Path], judge: Path, data: Path, typed: Typed
) -> None:
    _, store = finished
    wanted = scored(finished[0])["judge"]
    code, text, err = typed("bench", judge, "--data", data, "--k", "2", "--store", store, *QUICK, "--json")
    assert code == 0, err
    assert "0 to be drawn" in err
    again = json.loads(text)["judge"]
    assert again["drawn"] == 0
    assert again["benchmarks"] == wanted["benchmarks"]


def test_the_plan_comes_before_the_start_and_the_table_after(
    judge: Path, data: Path, tmp_path: Path, typed: Typed
) -> None:
    arguments = (
        "bench",
        judge,
        "--on",
        "llmbar,RM-Bench",
        "--data",
        data,
        "--n",
        "2",
        "--store",
        tmp_path / "v.sqlite",
    )
    code, text, err = typed(*arguments, *QUICK)
    assert code == 0, err
    assert re.search(r"RM-Bench: 2 items, 12 responses.*; from .*rm-bench.jsonl", err)
    assert re.search(r"LLMBar: 2 items, 4 responses", err)
    assert re.search(r"(\d+) verdicts needed, 0 in the store, \1 to be drawn", err)
    assert text.startswith("# Benchmarks\n")
    assert "| RM-Bench (in part: 2 of 1327 items" in text


def test_what_is_too_long_has_no_score_and_is_counted(judge: Path, data: Path, tmp_path: Path, typed: Typed) -> None:
    short = ("--threads", "1", "--context", "260", "--max-tokens", "120", "--no-store", "--json")
    code, text, err = typed("bench", judge, "--on", "rewardbench", "--data", data, *short)
    assert code == 0, err
    one = json.loads(text)["judge"]["benchmarks"]["rewardbench"]
    assert one["too_long"] == 4
    assert one["no_score"] == 1.0
    assert one["rows"]["Chat Hard"]["value"] == 0.5  # the official rule for unreadable ratings
    assert one["rules"] == {"lose": 0.0, "half": 0.0, "win": 0.0}


def test_a_stock_model_is_the_row_before(judge: Path, data: Path, tmp_path: Path, typed: Typed) -> None:
    from stock_gguf import write_stock

    stock = write_stock(tmp_path / "stock.gguf", "llama3")
    arguments = ("--on", "hhh", "--data", data, "--threads", "1", "--context", "6000", "--max-tokens", "150")
    code, text, err = typed("bench", judge, "--before", stock, *arguments, "--store", tmp_path / "votes.sqlite")
    assert code == 0, err
    assert re.search(r"judge \S+stock.gguf \(fingerprint \w{12}, llamacpp, untrained, tokens exact\)", err)
    assert re.search(r"\| before: \S+stock.gguf, untrained \|", text)
    assert re.search(r"\| HHH alignment \(in part: 2 of 221 items[^|]*\| difference \|", text)


# --- kill -9 ---


def run_quietly(arguments: list[str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.exit(main(arguments))


def test_a_killed_run_goes_on_and_gives_each_item_once(judge: Path, data: Path, tmp_path: Path) -> None:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["llama_cpp", "matplotlib.backends.backend_svg", "patarm_lite.evals.scoreboard"])
    store, out = tmp_path / "votes.sqlite", tmp_path / "out"
    arguments = ["bench", str(judge), "--on", "llmbar,pandalm,hhh", "--data", str(data), "--k", "8"]
    arguments += ["--store", str(store), *QUICK, "-o", str(out)]
    kept = 0
    for number in range(2):
        process = server.Process(target=run_quietly, args=(arguments, tmp_path / f"{number}.log"))
        process.start()
        last = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < last and votes_in(store) <= kept + 5:
            time.sleep(0.01)
        process.kill()  # kill -9
        process.join()
        assert process.exitcode == -9, (tmp_path / f"{number}.log").read_text()
        assert not out.exists()
        now = votes_in(store)
        assert now > kept
        kept = now
    process = server.Process(target=run_quietly, args=(arguments, tmp_path / "last.log"))
    process.start()
    process.join(120)
    said = (tmp_path / "last.log").read_text()
    assert process.exitcode == 0, said
    needed, had, drawn = map(int, re.search(r"(\d+) verdicts needed, (\d+) in the store, (\d+) to", said).groups())
    assert (had, drawn) == (kept, needed - kept)
    assert "going on with a run that was stopped" in said
    assert votes_in(store) == needed
    for name in scored(out)["benchmarks"]:
        ids = Counter(json.loads(row)["id"] for row in (out / f"verdicts-{name}.jsonl").read_text().splitlines())
        assert len(ids) == EACH
        assert set(ids.values()) == {1}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def votes_in(store: Path) -> int:
    if not store.exists():
        return 0
    with Store.open(store) as opened:
        return int(opened.contents()["votes"])


# --- what is refused ---


def test_bad_input_is_one_line_and_nothing_is_written(judge: Path, data: Path, tmp_path: Path, typed: Typed) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    store = ("--store", tmp_path / "votes.sqlite")
    for arguments, words in [
        (["--on", "rewardbench3"], "benchmark 'rewardbench3' is not one of .* Did you mean 'rewardbench"),
        (["--data", tmp_path / "empty"], "holds no file of any benchmark"),
        (["--data", tmp_path / "empty", "--on", "hhh"], "holds no file of HHH alignment"),
        (["--data", data / "hhh.jsonl"], "is one file, and --on names 0 benchmarks"),
        (["--data", data, "-o", tmp_path / "there"], "exists already"),
        (["--data", data, "-o", tmp_path / "there", "--force"], "is not a folder of this verb"),
        (["--data", data, "-o", tmp_path / "no" / "where"], "mkdir -p"),
        (["--data", data, "--revision", "hhh"], "is not NAME=COMMIT"),
        (["--data", data, "--score", "some"], "is not one of both, sampled"),
        (["--data", data, "--no-store"], "can't both hold"),
    ]:
        code, out, err = typed("bench", judge, *arguments, *store, *QUICK)
        assert (code, out) == (2, ""), arguments
        assert re.fullmatch(rf"error: [^\n]*{words}[^\n]*\n", err), err
    assert not (tmp_path / "votes.sqlite").exists()
    assert (tmp_path / "there" / "mine.txt").read_text() == "mine"


def test_another_schema_is_refused_before_a_judge_is_loaded(data: Path, tmp_path: Path, typed: Typed) -> None:
    file = tmp_path / "llmbar-Natural.jsonl"
    file.write_text('{"input": "a", "output_1": "b"}\n')
    code, _, err = typed("bench", tmp_path / "no-such.gguf", "--data", tmp_path, "--no-store")
    assert code == 2
    assert "llmbar-Natural.jsonl line 1: fields 'output_2', 'label' missing" in err


def test_help_of_bench_and_of_bench_score_ends_with_an_example(typed: Typed) -> None:
    for verb in (["bench"], ["bench", "score"]):
        code, out, _ = typed(*verb, "--help")
        assert code == 0
        assert " ".join(["patarm-lite", *verb]) in out.rstrip().splitlines()[-1]
