"""A judge's file in somebody else's hands: llama-cpp-python's own OpenAI server, and the examples of the model card."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from patarm_lite import arena
from patarm_lite.metrics import pair_to_row, row_to_pair
from patarm_lite.prompts import Protocol
from patarm_lite.quantize.modelfile import completion_prompt, documented_prompt
from patarm_lite.verdicts import parse

pytestmark = pytest.mark.slow
PROTOCOL = Protocol(instructions=False)
GREEDY = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repeat_penalty": 1, "max_tokens": 120, "seed": 1}


@pytest.fixture(scope="module")
def judge_file(little_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The little judge as a GGUF file that describes itself."""
    pytest.importorskip("llama_cpp")
    from patarm_lite.judge.description import describe
    from patarm_lite.quantize.convert import convert

    described = describe(protocol=PROTOCOL, rubrics=arena.RUBRICS, kind="arena", trained=True, about={"name": "little"})
    out = tmp_path_factory.mktemp("served") / "little-f16.gguf"
    return convert(little_run / "judge", out, metadata=described).path


@contextlib.contextmanager
def served(model: Path, log: Path, seconds: float = 120) -> Iterator[str]:
    """llama-cpp-python's server on a free port, as the model card starts it; stopped whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--n_ctx", "1024"]
    command += ["--chat_template_kwargs", '{"enable_thinking": false}']
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_threads", "1", "--n_threads_batch", "1"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env={**os.environ})
        try:
            last = time.monotonic() + seconds
            while not _answers(f"http://127.0.0.1:{port}/v1/models"):
                assert process.poll() is None and time.monotonic() < last, log.read_text(errors="replace")[-2000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]


def test_the_file_gives_readable_verdicts_through_llama_cpp_pythons_own_server(
    judge_file: Path, little_run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("fastapi", reason="llama-cpp-python's server needs pip install 'llama-cpp-python[server]'")
    rows = (little_run / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    verdicts = []
    with served(judge_file, tmp_path / "server.log") as url:
        for pair in (row_to_pair(json.loads(row)) for row in rows[:8]):
            rubric = arena.RUBRICS[pair.task]
            turn = documented_prompt(PROTOCOL, pair.prompt, pair.chosen, pair.task, rubric)
            chat = post(f"{url}/chat/completions", {"messages": [{"role": "user", "content": turn}], **GREEDY})
            plain = post(f"{url}/completions", {"prompt": completion_prompt(PROTOCOL, turn), **GREEDY})
            written = chat["message"]["content"]
            assert written == plain["text"], "the chat template renders the protocol's own prompt"
            verdicts.append(parse(written, ended=chat["finish_reason"] == "stop"))
    readable = [verdict for verdict in verdicts if verdict.problem is None]
    assert readable, [verdict.problem for verdict in verdicts]
    assert all(verdict.score in range(1, 11) and verdict.rubric for verdict in readable)


def test_the_examples_of_the_model_card_run_as_pasted(judge_file: Path, tmp_path: Path) -> None:
    from patarm_lite.quantize.card import CardFile, card

    text = card(
        name="little",
        version="0",
        protocol=PROTOCOL,
        context=1024,
        files=[CardFile(judge_file.name, judge_file.stat().st_size, "")],
    )
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program = tmp_path / "pasted.py"
    program.write_text(f"{first}\n{second}\nprint(turn)\n", encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, str(program)], cwd=judge_file.parent, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    score, _, turn = ran.stdout.partition("\n")
    assert int(score.split()[0]) in range(1, 11)
    assert turn.startswith("<task>\nchat\n</task>") and "The door is red." in turn


def test_a_servers_url_is_benched_audited_and_compared_like_a_file(
    judge_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fastapi", reason="llama-cpp-python's server needs pip install 'llama-cpp-python[server]'")
    from patarm_lite.cli import main

    pairs = tmp_path / "heldout.jsonl"
    pairs.write_text("".join(json.dumps(pair_to_row(pair)) + "\n" for pair in arena.heldout_pairs(12, seed=1)))
    items = tmp_path / "llmbar-Natural.json"
    items.write_text(json.dumps([{"input": "name a color", "output_1": "Red.", "output_2": "old stone", "label": 1}]))
    store = ["--store", str(tmp_path / "votes.sqlite"), "--context", "1024", "--max-tokens", "150", "--json"]
    with served(judge_file, tmp_path / "server.log") as url:
        assert main(["bench", url, "--on", "llmbar", "--data", str(items), *store]) == 0
        found = json.loads(capsys.readouterr().out)["judge"]
        assert (found["backend"], found["tokens"], found["decoding"]) == ("openai", "text", "constrained")
        audit = ["audit", url, "--pairs", str(pairs), "--k", "2", "--attacks", "0", *store]
        assert main(audit) == 0
        assert json.loads(capsys.readouterr().out)["pairs"] == 12
        assert main(audit) == 0
        assert " 0 to be drawn" in capsys.readouterr().err
        assert main(["compare", url, str(judge_file), "--pairs", str(pairs), *store]) == 0
        assert json.loads(capsys.readouterr().out)["n"] == 12
    assert main([*audit[:-1], "--k", "3", "-o", str(tmp_path / "out")]) == 2, "the server is gone"
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()
