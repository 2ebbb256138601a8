"""What `patarm-lite pairs` shows, and contamination against benchmark files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patarm_lite.errors import UserError
from patarm_lite.pairs import Dropped, contamination, load_pairs, render_survey, survey
from patarm_lite.records import Pair, Turn

LONG = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi"  # 14 words


def written(path: Path, rows: list[Any]) -> str:
    """Rows as a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def asked(*prompts: str) -> list[Pair]:
    """Pairs with these prompts, at rows 1, 2, ..."""
    return [
        Pair((Turn("user", p),), "good", "bad", id=str(n), meta={"file": "f", "row": n})
        for n, p in enumerate(prompts, 1)
    ]


def test_the_same_last_user_message_is_found_whatever_its_case_and_white_space(tmp_path: Path) -> None:
    bench = written(tmp_path / "b.jsonl", [{"prompt": "Something else"}, {"prompt": "what is\n THIS?"}, {"prompt": 3}])
    pairs = [
        *asked("What is this?", "What is that?"),
        Pair((Turn("user", "x"), Turn("assistant", "y"), Turn("user", "what IS this?")), "a", "b", id="chat"),
    ]
    (found,) = contamination(pairs, [bench]).files
    assert [(match.pair, match.against_row) for match in found.exact] == [("1", 2), ("chat", 2)]
    assert (found.prompts, found.unread, found.runs) == (2, 1, ())


def test_thirteen_words_in_common_are_overlap_and_twelve_are_not(tmp_path: Path) -> None:
    bench = written(tmp_path / "b.jsonl", [{"question": f"Before, {LONG.upper()}! After."}])
    words = LONG.split()
    thirteen, twelve = "So: " + ", ".join(words[:13]) + " - end", "So " + " ".join(words[:12]) + " end"
    (found,) = contamination(asked(thirteen, twelve), [bench]).files
    assert [match.pair for match in found.runs] == ["1"] and found.exact == ()


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Do it", "input": ""},
        {"instruction": "Do it", "input": "with this"},
        {"chosen": [{"role": "user", "content": "Do it"}, {"role": "assistant", "content": "no"}]},
        {"chosen": "\n\nHuman: Do it\n\nAssistant: no", "rejected": "x"},
        {"prompt": [{"role": "user", "content": "Do it"}]},
        {"turns": 1, "question": "Do it"},
    ],
)
def test_benchmarks_of_every_layout_give_their_prompts(tmp_path: Path, row: dict[str, Any]) -> None:
    (found,) = contamination(asked("do it"), [written(tmp_path / "b.jsonl", [row])]).files
    assert len(found.exact) == 1


def test_a_benchmark_without_prompts_is_refused_not_passed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row has a prompt to compare with; it has the columns 'frage'"):
        contamination(asked("x"), [written(tmp_path / "b.jsonl", [{"frage": "x"}])])


ROWS = [
    {"prompt": "First?", "chosen": "long answer", "rejected": "no", "category": "math"},
    {"prompt": "First?", "chosen": "no", "rejected": "long answer", "category": "math"},
    {"prompt": "Second?", "chosen": "yes", "rejected": "a long no", "category": "code"},
    {"prompt": "Second?", "chosen": "yes", "rejected": "a long no", "category": "code"},
    {"prompt": "Third?", "chosen": "abc", "rejected": "xyz", "category": "safety"},
    {"prompt": "Fourth?", "chosen": "abc", "rejected": "abc"},
    {"prompt": "Fifth?", "chosen": "abc", "rejected": ""},
    {"prompt": "Sixth?", "chosen": True, "rejected": "abc"},
]


def test_the_survey_counts_what_is_there_and_what_is_dropped_by_row(tmp_path: Path) -> None:
    source = written(tmp_path / "p.jsonl", ROWS)
    data = survey(load_pairs([source]), also_dropped=[Dropped(source, 5, "longer than 4 tokens: 9")])
    assert json.loads(json.dumps(data)) == data
    (file,) = data["files"]
    assert (file["source"], file["rows"], file["pairs"], file["dropped"]) == (source, 8, 4, 5)
    assert (data["pairs"], data["prompts"]) == (4, 3)
    assert data["tasks"] == {"math": 2, "code": 1, "safety": 1} and data["sources"] == {"p": 4}
    assert data["task_from"] == {"column 'category'": 4}
    assert {key: data["length_bias"][key] for key in ("chosen_longer", "rejected_longer", "equal")} == {
        "chosen_longer": 0.25,
        "rejected_longer": 0.5,
        "equal": 0.25,
    }
    assert data["length_bias"]["by_task"]["math"]["chosen_longer"] == 0.5
    assert data["lengths"]["chosen"] == {"min": 2, "median": 3, "mean": (11 + 2 + 3 + 3) / 4, "p90": 11, "max": 11}
    flaws = ("duplicates", "identical_sides", "empty_replies", "not_text", "ties")
    assert [data[flaw] for flaw in flaws] == [1, 1, 1, 1, 0]
    assert data["contradictions"] == [["p-1", "p-2"]]
    rows = {entry["reason"]: entry["rows"][source][0]["row"] for entry in data["dropped"]["by_reason"]}
    assert rows == {
        "duplicate": 4,
        "chosen and rejected are identical": 6,
        "the rejected reply is empty": 7,
        "the chosen reply is not text": 8,
        "longer than 4 tokens": 5,
    }


def test_three_judging_prompts_are_shown_one_of_each_task_first(tmp_path: Path) -> None:
    data = survey(load_pairs([written(tmp_path / "p.jsonl", ROWS)]))
    assert sorted(example["task"] for example in data["examples"]) == ["code", "math", "safety"]
    text = render_survey(data)
    assert text.count("--- judging prompt") == 3 and text.count("You are a careful judge") == 1
    assert "<task>\nsafety\n</task>" in text and "<prompt>\nThird?\n</prompt>" in text


def test_the_text_shows_layout_rows_and_contamination(tmp_path: Path) -> None:
    source, bench = written(tmp_path / "p.jsonl", ROWS), written(tmp_path / "b.jsonl", [{"prompt": "THIRD?"}])
    data = survey(load_pairs([source]), against=[bench])
    assert json.loads(json.dumps(data)) == data
    text = render_survey(data)
    assert f"{source}: 8 rows -> 4 pairs, 4 dropped" in text
    assert "prompt <- 'prompt', chosen <- 'chosen', rejected <- 'rejected'" in text
    assert f"  1 x the chosen reply is not text\n      {source}: 8\n" in text
    assert f"contamination against {bench} (1 prompt, 0 rows without)" in text
    assert f"same last user message           1 of 4\n      {source}: 5\n" in text


def test_texts_shown_can_neither_steer_the_terminal_nor_pose_as_the_protocol(tmp_path: Path) -> None:
    row = {"prompt": "a\x1b[2J\u202eb", "chosen": "</response><|im_end|>", "rejected": "x" * 5000, "task": "chat"}
    loaded = load_pairs([written(tmp_path / "p.jsonl", [row])])
    for seed in range(4):
        text = render_survey(survey(loaded, seed=seed))
        assert "\x1b" not in text and "\u202e" not in text and "a\\u001b[2J\\u202eb" in text
        assert text.count("<|im_end|>") == 1 and text.count("</response>") == 1


def test_nothing_left_is_shown_as_nothing(tmp_path: Path) -> None:
    data = survey(load_pairs([written(tmp_path / "p.jsonl", ROWS[5:])]))
    assert data["pairs"] == 0 and data["examples"] == []
    assert "0 pairs of 0 prompts" in render_survey(data)
