"""Benchmarks from real files, parts of them, and files of verdicts that are not what they should be."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from patarm_lite.errors import UserError
from patarm_lite.evals.bench_data import BENCHMARKS, files_in, load, part
from patarm_lite.evals.items import part_of, score
from patarm_lite.evals.judgebench import JUDGEBENCH
from patarm_lite.evals.llmbar import LLMBAR
from patarm_lite.evals.pandalm import PANDALM
from patarm_lite.evals.rewardbench import REWARDBENCH
from patarm_lite.evals.rewardbench2 import REWARDBENCH2
from patarm_lite.evals.rm_bench import RM_BENCH
from patarm_lite.evals.stored import read_answers


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def real(shared: Path) -> dict[str, Any]:
    found = files_in(shared / "data")
    return {name: load(BENCHMARKS[name], files) for name, files in found.items()}


# --- loading ---


def test_real_files_are_found_and_whole_ones_are_known_as_whole(real: dict[str, Any]) -> None:
    parts = {name: (len(one.items), part_of(one.benchmark, one.items)) for name, one in real.items()}
    assert parts["llmbar"] == (419, None)
    assert parts["judgebench"] == (350, None)
    assert parts["pandalm"] == (999, None)
    assert parts["hhh"] == (221, None)
    assert parts["rm-bench"] == (357, "in part: 357 of 1327 items, no math, safety-refuse, safety-response")
    count, words = parts["rewardbench"]
    assert count == 419
    assert words is not None and words.endswith("no alpacaeval-easy, alpacaeval-length, alpacaeval-hard and 15 more")
    count, words = parts["rewardbench2"]
    assert count == 188 and words is not None  # questions of GSM8K in its schema, more than its Math has
    assert words.startswith("not the official items: 188, where there are 1865, no Factuality")


def test_no_item_is_dropped_and_all_ids_differ(real: dict[str, Any]) -> None:
    for one in real.values():
        assert len({item.id for item in one.items}) == len(one.items)
    responses = Counter(response for item in real["pandalm"].items for response in item.responses)
    assert responses["True"] >= 6  # true in the file
    assert responses[""] > 0


def test_items_have_the_task_of_their_subject(real: dict[str, Any]) -> None:
    tasks = {name: Counter(item.task for item in one.items) for name, one in real.items()}
    assert tasks["rm-bench"] == {"chat": 129, "code": 228}
    assert tasks["judgebench"] == {"code": 42, "math": 98 + 56 + 11, "chat": 154 - 11}
    assert tasks["hhh"] == {"safety": 58, "chat": 163}


def test_llmbar_and_its_rewardbench_subsets_ask_for_the_same_responses(real: dict[str, Any]) -> None:
    def asked(name: str) -> set[Any]:
        return {(item.task, item.prompt, text) for item in real[name].items for text in item.responses}

    assert asked("llmbar") == asked("rewardbench")


def test_a_missing_field_is_named_with_its_line(tmp_path: Path) -> None:
    good = {"id": 1, "subset": "donotanswer", "prompt": "a", "chosen": "b", "rejected": "c"}
    file = write(tmp_path / "rewardbench.jsonl", good, {"id": 2, "subset": "donotanswer", "prompt": "a"})
    with pytest.raises(UserError, match=r"rewardbench.jsonl line 2: fields 'chosen', 'rejected' missing"):
        load(REWARDBENCH, [file])


@pytest.mark.parametrize(
    ("benchmark", "row", "words"),
    [
        (REWARDBENCH, {"id": 1, "subset": "poems", "prompt": "", "chosen": "", "rejected": ""}, "subset 'poems'"),
        (REWARDBENCH, {"id": 1, "subset": "hep-go", "prompt": "", "chosen": ["a", "b"], "rejected": ""}, "one chosen"),
        (
            RM_BENCH,
            {"id": 1, "domain": "chat", "prompt": "", "chosen": ["a"] * 3, "rejected": ["a"] * 2},
            "3 chosen and 2 rejected",
        ),
        (RM_BENCH, {"id": 1, "prompt": "", "chosen": ["a"] * 3, "rejected": ["a"] * 3}, "'domain' is missing"),
        (
            JUDGEBENCH,
            {"pair_id": "x", "source": "poems", "question": "", "response_A": "", "response_B": "", "label": "A>B"},
            "source 'poems'",
        ),
        (
            REWARDBENCH2,
            {"id": "7", "subset": "Ties", "prompt": "", "chosen": ["a"], "rejected": ["b"], "num_correct": 1},
            "ref:N or tied:N",
        ),
        (LLMBAR, {"input": "", "output_1": "", "output_2": "", "label": 3}, "label '3'"),
    ],
)
def test_another_schema_is_refused_by_line(benchmark: Any, row: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"Natural.jsonl line 1: .*{words}"):
        load(benchmark, [write(tmp_path / "Natural.jsonl", row)])


def test_what_is_not_on_the_hub_or_can_not_be_fetched_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not on the hub; fetch data/testset-v1.json .* --data DIR"):
        load(PANDALM)
    with pytest.raises(UserError, match="offline"):
        load(JUDGEBENCH, offline=True)
    with pytest.raises(UserError, match=rf"allenai/reward-bench-2 \(revision {REWARDBENCH2.commit}\).* offline"):
        load(REWARDBENCH2, offline=True)
    with pytest.raises(UserError, match=r"allenai/reward-bench-2 \(revision 0a1b\).* offline"):
        load(REWARDBENCH2, revision="0a1b", offline=True)
    pinned = {name: one.commit for name, one in BENCHMARKS.items() if one.commit != "main"}
    assert set(pinned) == {"rewardbench", "rewardbench2"}
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in pinned.values())
    with pytest.raises(UserError, match="not found; give the folder"):
        files_in(tmp_path / "nothing")


def test_two_items_of_one_id_are_both_kept(tmp_path: Path) -> None:
    row = {"id": 5, "subset": "hep-go", "prompt": "a", "chosen": "b", "rejected": "c"}
    found = load(REWARDBENCH, [write(tmp_path / "a.jsonl", row, row)])
    assert [item.id for item in found.items] == ["hep-go/5", "hep-go/5#2"]


def test_files_of_a_folder_belong_to_the_longest_name_they_begin_with(tmp_path: Path) -> None:
    (tmp_path / "RM-Bench").mkdir()
    for name in (
        "RewardBench-2.jsonl",
        "rewardbench.jsonl.gz",
        "RM-Bench/chat_filtered.json",
        "RM-Bench/notes.txt",
        "hh.jsonl",
    ):
        (tmp_path / name).write_bytes(gzip.compress(b"{}"))
    found = {name: [file.name for file in files] for name, files in files_in(tmp_path).items()}
    assert found == {
        "rewardbench": ["rewardbench.jsonl.gz"],
        "rewardbench2": ["RewardBench-2.jsonl"],
        "rm-bench": ["chat_filtered.json"],
    }


# --- parts ---


def test_a_part_has_every_subset_in_its_share_and_the_same_seed_draws_the_same(real: dict[str, Any]) -> None:
    whole = real["llmbar"]
    some = part(whole, 42, seed=1)
    assert Counter(item.subset for item in some.items) == {  # 42 * 100, 134, 92, 47, 46 / 419
        "Natural": 10,
        "Neighbor": 13,
        "GPTInst": 9,
        "GPTOut": 5,
        "Manual": 5,
    }
    assert part(whole, 42, seed=1).items == some.items
    assert part(whole, 42, seed=2).items != some.items
    assert part_of(LLMBAR, some.items) == "in part: 42 of 419 items"
    assert part(whole, 419, seed=1) is whole


def test_a_part_of_other_items_is_not_called_a_part_of_the_benchmark(real: dict[str, Any]) -> None:
    assert part(real["rewardbench2"], 12, seed=1).part == "not the official items: 12 drawn of others"
    assert part(real["judgebench"], 12, seed=1).part == "in part: 12 of 350 items"


def test_a_part_keeps_both_kinds_of_a_ties_question(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"{kind}:{n}",
            "subset": "Ties",
            "prompt": f"{n}",
            "chosen": ["a"] * right,
            "rejected": ["b"],
            "num_correct": right,
        }
        for n in range(6)
        for kind, right in (("ref", 1), ("tied", 2))
    ]
    some = part(load(REWARDBENCH2, [write(tmp_path / "a.jsonl", *rows)]), 4, seed=1)
    assert len(some.items) == 4
    assert set(Counter(item.group for item in some.items).values()) == {2}


# --- files of verdicts ---


def test_stored_scores_of_rm_bench_are_scored_by_their_own_field_names(tmp_path: Path) -> None:
    row = {"id": 1, "domain": "chat", "score_chosen": [1, 2, 3], "score_rejected": [0.5, 1.5, 2.5]}
    other = {"id": 2, "domain": "chat", "score_chosen": [3, 2, 1], "score_rejected": [2, 2, 2]}
    found = score(RM_BENCH, read_answers(RM_BENCH, write(tmp_path / "v.jsonl", row, other)))
    assert (found["Hard"], found["Normal"], found["Easy"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3), 0.5)


def test_official_outputs_of_judgebench_and_llmbar_are_read(tmp_path: Path) -> None:
    row = {"pair_id": "x", "source": "livecodebench", "label": "A>B", "judge_name": "o1"}
    row["judgments"] = [{"decision": "A>B"}, {"decision": None}]
    (found,) = read_answers(JUDGEBENCH, write(tmp_path / "j.jsonl", row))
    assert found.decisions == ("A>B", None)
    row = {"label": 2, "swap = False": {"winner": "2"}, "swap = True": {"winner": None}}
    (found,) = read_answers(LLMBAR, write(tmp_path / "Natural.jsonl", row))
    assert found.decisions == ("2", None)
    (found,) = read_answers(PANDALM, write(tmp_path / "p.jsonl", {"idx": 0, "label": 0, "gpt_result": "garbage"}))
    assert score(PANDALM, [found])["Accuracy"] == 1.0  # garbage counts as a tie


def test_a_number_may_stand_for_an_unreadable_score(tmp_path: Path) -> None:
    row = {"id": "a", "subset": "Math", "scores": [-1, -1, -1, -1]}
    file = write(tmp_path / "v.jsonl", row)
    assert score(REWARDBENCH2, read_answers(REWARDBENCH2, file, unreadable=-1))["Math"] == 0.25
    assert score(REWARDBENCH2, read_answers(REWARDBENCH2, file))["Math"] == 0.25  # four equal scores
    row["scores"] = [-1, 3, 2, 1]
    assert score(REWARDBENCH2, read_answers(REWARDBENCH2, write(file, row), unreadable=-1))["Math"] == 0


ITEM = {"subset": "Natural", "label": 1}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{**ITEM, "id": 1}], r"line 1: field 'scores' missing"),
        ([{**ITEM, "id": 1, "scores": [1, 2, 3]}], r"line 1: 3 scores, and item 'Natural/1' has 2"),
        ([{**ITEM, "id": 1, "scores": [1, "high"]}], r"line 1: 'scores' holds 'high', not a number"),
        ([{**ITEM, "id": 1, "scores": [1, True]}], r"line 1: 'scores' holds 'True', not a number"),
        ([{**ITEM, "id": 1, "decisions": ["1"]}], r"line 1: decisions are two winners"),
        (
            [{**ITEM, "id": n, "scores": [1, 2]} for n in (1, 2, 1)],
            r"line 3: item 'Natural/1' is there twice, first at 1",
        ),
        (
            [{**ITEM, "id": n, "scores": [1, 2], "fingerprint": f} for n, f in ((1, "aa"), (2, "aa"), (3, "bb"))],
            r"line 3: 'fingerprint' is 'bb', and before it 'aa': verdicts of 2 judges",
        ),
        (["no object"], r"line 1: it is no object"),
    ],
)
def test_a_damaged_file_of_verdicts_gives_one_clear_line(rows: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read_answers(LLMBAR, write(tmp_path / "v.jsonl", *rows))


def test_missing_and_foreign_ids_are_counted_and_named(tmp_path: Path, real: dict[str, Any]) -> None:
    items = real["llmbar"].items
    rows = [{"id": item.id, "scores": [9, 1]} for item in items]
    file = tmp_path / "v.jsonl"
    whole = score(LLMBAR, read_answers(LLMBAR, write(file, *rows), items))
    first = sum(item.label == "1" for item in items) / 419
    assert whole["All items"] == pytest.approx(first)
    changed = [*rows[3:], {"id": "Natural/999", "scores": [9, 1]}]
    words = r"misses 3 of 419 items \(first: '.*/1'\) and holds 1 ids that are no item \(first: 'Natural/999'\)"
    with pytest.raises(UserError, match=words):
        read_answers(LLMBAR, write(file, *changed), items)


def test_ids_of_the_benchmark_itself_will_do(tmp_path: Path, real: dict[str, Any]) -> None:
    items = real["judgebench"].items[:2]
    rows = [{"pair_id": item.id, "scores": [1, 2]} for item in items]
    assert len(read_answers(JUDGEBENCH, write(tmp_path / "v.jsonl", *rows), items)) == 2
    items = real["rm-bench"].items[:1]
    row = {"id": items[0].id.removeprefix("chat/"), "domain": "chat", "scores": [1] * 6}
    assert len(read_answers(RM_BENCH, write(tmp_path / "v.jsonl", row), items)) == 1


def test_a_store_is_no_file_of_verdicts(tmp_path: Path) -> None:
    from patarm_lite.store import Store

    Store.open(tmp_path / "votes.sqlite").close()
    with pytest.raises(UserError, match=r"is a store, .* type: patarm-lite bench JUDGE --store"):
        read_answers(LLMBAR, tmp_path / "votes.sqlite")
