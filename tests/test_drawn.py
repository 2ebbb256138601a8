"""Votes for `bench`, `audit` and `compare`: said before they are drawn, shared, kept, and never of two judges."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from little_gguf import write_little_gguf

from patarm_lite import arena
from patarm_lite.cli import main
from patarm_lite.errors import UserError
from patarm_lite.evals.audit_run import audit_judge
from patarm_lite.evals.compare_run import compare_on_pairs
from patarm_lite.evals.drawn import Drawn, Part, draw, pair_part
from patarm_lite.evals.named_judge import Asking, NamedJudge, named_judge
from patarm_lite.judge.judge import Judge
from patarm_lite.metrics import pair_to_row
from patarm_lite.store import Store

pytest.importorskip("llama_cpp")

ASKING = Asking(votes=2, max_tokens=100, context=1500, threads=1, parallel=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two judges of random weights."""
    one, other = (write_little_gguf(tmp_path_factory.mktemp(f"judge{seed}"), seed=seed) for seed in (0, 1))
    return one, other


@pytest.fixture(scope="module")
def judge(files: tuple[Path, Path]) -> Iterator[Judge]:
    with named_judge(str(files[0]), ASKING).load() as loaded:
        yield loaded


def part(judge: Judge, responses: list[str], k: int = 2, name: str = "some", **plan: Any) -> Part:
    items = [judge.item("name a color", response, task="chat") for response in responses]
    return Part(name, items, responses, k, replace(judge.plan, **plan), f"{len(responses)} texts", "nowhere")


def drawn(judge: Judge, parts: list[Part], store: Store, **named: Any) -> Drawn:
    return draw(judge, parts, store, **{"name": "test", "source": "here", "place": "little", **named})


Said = Callable[[], str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: capsys.readouterr().err


def test_what_is_needed_is_said_before_anything_is_drawn_and_votes_are_shared(judge: Judge, said: Said) -> None:
    with Store.open(None) as store:
        more = part(judge, ["red", "green", "x" * 9000], name="more")
        both = drawn(judge, [part(judge, ["red", "blue"]), more], store)
        assert both.needed == both.total.drawn == 6, "red is judged once"
        assert both.votes(0, 0) == both.votes(1, 0) != both.votes(1, 1)
        assert both.votes(1, 2) is None and len(both.of(1)) == 3
        told = said()
    assert "  some: 2 texts, 2 responses; from nowhere\n" in told
    assert "  more: 3 texts, 3 responses, 1 too long to be judged; from nowhere\n" in told
    assert "  6 verdicts needed, 0 in the store, 6 to be drawn, 1 responses are asked for more than once\n" in told
    assert "votes 2, decoding constrained, temperature 1, seed 1, at most 100 tokens" in told


def test_more_votes_begin_with_those_there_are_and_another_way_of_drawing_begins_anew(judge: Judge) -> None:
    with Store.open(None) as store:
        two = drawn(judge, [part(judge, ["red"])], store).votes(0, 0)
        four = drawn(judge, [part(judge, ["red"], k=4)], store)
        assert four.total.drawn == 2 and four.votes(0, 0)[:2] == two  # type: ignore[index]
        for changed in ({"seed": 2}, {"temperature": 0.0}, {"decoding": "free"}, {"max_tokens": 99}):
            assert drawn(judge, [part(judge, ["red"], **changed)], store).total.drawn == 2, changed


def test_the_time_is_told_from_a_warm_up_over_all_lengths(judge: Judge, said: Said) -> None:
    texts = ["red " * n for n in range(1, 25)]
    with Store.open(None) as store:
        found = drawn(judge, [part(judge, texts)], store)
        told = said()
        assert re.search(r"\n  warm-up: [\d.]+ verdicts a second; the other 16 take about \d", told)
        first = {store.votes(key, True)[0].seconds for key in found.keys[0] if key}
        assert len(first) > 1
        drawn(judge, [part(judge, texts)], store)
        assert "warm-up" not in said(), "nothing is left to be drawn"


def test_two_judges_in_one_store_never_share_a_vote(files: tuple[Path, Path], tmp_path: Path) -> None:
    pairs = arena.heldout_pairs(12, seed=1)
    judges = [named_judge(str(file), ASKING) for file in files]
    with Store.open(tmp_path / "votes.sqlite") as store:
        whole = compare_on_pairs(judges, pairs, store, votes=2)
        kept = {one["fingerprint"]: one["votes"] for one in store.contents()["judges"]}
    assert len(kept) == 2 and set(kept.values()) == {48}
    with Store.open(None) as alone:
        assert compare_on_pairs(judges, pairs, alone, votes=2) == whole
    changed = [named_judge(str(file), replace(ASKING, seed=2)) for file in files]
    with Store.open(tmp_path / "votes.sqlite") as store:
        assert compare_on_pairs(changed, pairs, store, votes=2)["judges"] != whole["judges"]
        assert store.contents()["votes"] == 4 * 48, "another seed, other votes"


def test_a_judge_that_is_replaced_while_it_judges_is_refused_and_its_votes_are_kept(
    files: tuple[Path, Path], tmp_path: Path, said: Said
) -> None:
    place = tmp_path / "judge.gguf"
    shutil.copy(files[0], place)
    named = named_judge(str(place), ASKING)

    def load() -> Judge:
        judge = named.load()
        draw_votes = judge.backend.votes

        def votes(asked: Any, plan: Any) -> Iterator[Any]:
            yield from draw_votes(asked, plan)
            shutil.copy(files[1], place)

        judge.backend.votes = votes  # type: ignore[method-assign]
        return judge

    pairs = arena.heldout_pairs(20, seed=1)
    with Store.open(tmp_path / "votes.sqlite") as store:
        with pytest.raises(UserError, match=r"judge.gguf was replaced or changed while it judged; .* are kept"):
            audit_judge(NamedJudge(str(place), load, named.check), pairs, store, votes=2, attacks=0)
        kept = store.contents()["votes"]
        assert 0 < kept < 80
        said()
        shutil.copy(files[0], place)
        found = audit_judge(named_judge(str(place), ASKING), pairs, store, votes=2, attacks=0)
        told = said()
    assert f"80 verdicts needed, {kept} in the store, {80 - kept} to be drawn" in told
    assert "going on with a run that was stopped" in told
    assert found["pairs"] == 20


def test_a_judge_that_is_replaced_during_its_last_votes_is_refused_too(judge: Judge) -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise UserError("was replaced")

    with Store.open(None) as store, pytest.raises(UserError, match="was replaced"):
        drawn(judge, [part(judge, ["red"])], store, check=check)


def test_where_nothing_was_drawn_nothing_is_said_of_kept_votes(judge: Judge, tmp_path: Path) -> None:
    with Store.open(tmp_path / "votes.sqlite") as store, pytest.raises(UserError, match=r"at least 74$"):
        drawn(judge, [part(judge, ["red"], max_tokens=20)], store)


def test_the_other_judge_under_the_same_name_is_told_that_the_votes_are_not_its_own(
    files: tuple[Path, Path], tmp_path: Path, said: Said
) -> None:
    pairs = arena.heldout_pairs(12, seed=1)
    with Store.open(tmp_path / "votes.sqlite") as store:
        with named_judge(str(files[0]), ASKING).load() as judge, pytest.raises(KeyboardInterrupt):
            drawn(judge, [pair_part(judge, pairs, 2)], store, check=_interrupt)
        with named_judge(str(files[1]), ASKING).load() as judge:
            drawn(judge, [pair_part(judge, pairs, 2)], store)
    assert re.search(r"the same was begun with another judge \(fingerprint \w{12}\); its votes don't count", said())


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["audit", "{judge}", "--pairs", "{pairs}", "--n", "3"], "--n 3 pairs can't tell anything; give 10 or more"),
        (["audit", "{judge}", "--pairs", "{few}"], "few.jsonl: 1 usable pairs, and at least 10 are needed"),
        (["audit", "{judge}"], "is no judge of the arena, so it needs pairs of yours; give --pairs FILE"),
        (
            ["audit", "{judge}", "--pairs", "{pairs}", "--context", "140", "--attacks", "0"],
            "0 of 12 pairs fit the judge's context",
        ),
        (["audit", "{judge}", "--decoding", "loose"], "--decoding 'loose' is not one of constrained, free"),
        (["audit", "{judge}", "--long", "skip"], "--long 'skip' is not one of error, cut"),
        (["audit", "{judge}", "--tokenizer", "t.json"], "--tokenizer is for servers"),
        (["audit", "{judge}.gguf"], "not found; give a GGUF file, a folder, a hub id or a URL"),
        (["audit", "{few}"], "is not a sound GGUF file"),
        (["compare", "{judge}", "{few}", "--pairs", "{pairs}"], "is not a sound GGUF file"),
        (["compare", "{judge}", "{other}"], "give --pairs FILE, or --on NAME with --data DIR"),
        (["compare", "{judge}", "{judge}", "--pairs", "{pairs}"], "1 different judges are named"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    words: list[str], told: str, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
    (tmp_path / "few.jsonl").write_text(row)
    (tmp_path / "heldout.jsonl").write_text(
        "".join(json.dumps(pair_to_row(pair)) + "\n" for pair in arena.heldout_pairs(12, seed=1))
    )
    places = {"judge": files[0], "other": files[1], "pairs": tmp_path / "heldout.jsonl", "few": tmp_path / "few.jsonl"}
    out = ["--no-store", "--threads", "1", "--max-tokens", "100", "-o", str(tmp_path / "out")]
    assert main([word.format(**places) for word in words] + out) == 2
    assert re.search(rf"^error: [^\n]*{re.escape(told)}[^\n]*\n\Z", capsys.readouterr().err, re.MULTILINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.jsonl", "heldout.jsonl"]


def test_a_run_folder_is_benched_audited_and_compared_in_free_decoding(
    little_run: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair_to_row(pair)) + "\n" for pair in arena.heldout_pairs(12, seed=1)))
    items = tmp_path / "llmbar-Natural.json"
    items.write_text(json.dumps([{"input": "name a color", "output_1": "Red.", "output_2": "old stone", "label": 1}]))
    store = ["--store", str(tmp_path / "votes.sqlite"), "--threads", "1", "--max-tokens", "99", "--json"]
    run = str(little_run)
    assert main(["bench", run, "--on", "llmbar", "--data", str(items), *store]) == 0
    assert json.loads(capsys.readouterr().out)["judge"]["decoding"] == "free"
    assert main(["audit", run, "--pairs", str(pairs), "--k", "2", "--attacks", "0", *store]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["decoding"], found["backend"], found["votes"]) == ("free", "transformers", 2)
    assert main(["compare", run, str(files[0]), "--pairs", str(pairs), "--context", "1500", *store]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [judge["decoding"] for judge in found["judges"]] == ["free", "constrained"]
    assert main(["audit", run, "--pairs", str(pairs), "--decoding", "constrained", *store]) == 2
    assert "export the judge" in capsys.readouterr().err
