"""InFoBench: the official figure from an evaluator's answers, the dialogue that gets them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Typed

from patarm_lite.errors import UserError
from patarm_lite.evals.assistant_data import INFOBENCH, chosen, load
from patarm_lite.evals.assistant_stored import score_stored
from patarm_lite.evals.infobench import (
    ALL,
    DRFR,
    OFFICIAL,
    Evaluated,
    InfobenchItem,
    dialogue,
    figures,
    is_over,
    part_of,
    read_answer,
)
from patarm_lite.prompts import prompt_text

SAMPLE = Path("data") / "infobench" / "sample_with_gpt4_eval.jsonl"


@pytest.fixture(scope="module")
def vectors(shared: Path) -> Any:
    return json.loads((shared / "vectors" / "infobench.json").read_text(encoding="utf-8"))


def write(folder: Path, *rows: dict[str, Any], name: str = "verdicts.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


# --- official vectors ---


def test_every_answer_is_read_as_in_the_official_code(vectors: Any) -> None:
    assert len(vectors["answer_parsing"]) == 9
    for case in vectors["answer_parsing"]:
        assert read_answer(case["generation"]) is case["parsed"], case


@pytest.mark.parametrize("number", [0, 1])
def test_drfr_is_the_official_share_of_yes(number: int, vectors: Any, tmp_path: Path) -> None:
    case = vectors["cases"][number]
    found = score_stored(INFOBENCH, write(tmp_path, *case["entries"]), None, 1)
    assert found["rows"][DRFR][OFFICIAL]["value"] == case["drfr"]
    answers = [answer for entry in case["entries"] for answer in entry["eval"]]
    assert (found["answers"], found["rows"][DRFR]["n"]) == (len(answers), len(answers))


def test_questions_that_were_not_answered_or_not_asked_count_as_no_beside_it(vectors: Any, tmp_path: Path) -> None:
    # 13 questions, 5 yes; of the last instruction's five questions three were never asked
    found = score_stored(INFOBENCH, write(tmp_path, *vectors["cases"][1]["entries"]), None, 1)
    assert found["rows"][DRFR][ALL]["value"] == 5 / 13
    assert (found["questions"], found["unreadable"], found["unasked"]) == (13, 1 / 10, 3 / 13)


# --- figures ---


def test_a_figure_weighs_questions_and_not_instructions() -> None:
    found = [
        Evaluated("a", "Easy_set", (True,), 1, (("Content",),)),
        Evaluated("b", "Hard_set", (False, False, True), 3, (("Format",), ("Content", "Number"), ("Number",))),
    ]
    rows = figures(found)["rows"]
    assert {name: (row["n"], row[OFFICIAL]["value"]) for name, row in rows.items()} == {
        DRFR: (4, 2 / 4),
        "Easy_set": (1, 1.0),
        "Hard_set": (3, 1 / 3),
        "Content": (2, 1 / 2),
        "Format": (1, 0.0),
        "Number": (2, 1 / 2),
    }


def test_labels_of_questions_that_were_not_asked_count_only_in_the_second_column() -> None:
    found = [Evaluated("a", "Easy_set", (True, None), 3, (("Style",), ("Style",), ("Style",)))]
    row = figures(found)["rows"]["Style"]
    assert (row["n"], row[OFFICIAL]["value"], row[ALL]["value"]) == (2, 1 / 2, 1 / 3)


def test_instructions_are_drawn_with_all_their_questions() -> None:
    found = [Evaluated(str(n), "Easy_set", (n % 2 == 0,) * 9, 9) for n in range(400)]
    one = figures(found)["rows"][DRFR][OFFICIAL]
    half = 1.96 * (0.25 / 400) ** 0.5
    assert (one["low"], one["high"]) == (pytest.approx(0.5 - half, abs=0.006), pytest.approx(0.5 + half, abs=0.006))


def test_a_part_is_called_a_part(shared: Path) -> None:
    assert part_of(500, 2250) is None
    assert part_of(500, 2249) == "not the official items: 500 instructions, where there are 500 with 2250 questions"
    assert load(INFOBENCH, [shared / SAMPLE]).part == "in part: 7 of 500 instructions"
    (drawn,) = chosen("infobench", shared / SAMPLE, count=3, seed=1)
    assert (len(drawn.items), drawn.part) == (3, "in part: 3 of 500 instructions")
    assert {item.subset for item in drawn.items} == {"Easy_set", "Hard_set"}


# --- the dialogue ---

ITEM = InfobenchItem("a", "Easy_set", ("Is it red?", "Is it short?"), "Name a color.", "Colors: red, blue")


def test_questions_are_asked_one_by_one_in_a_growing_chat() -> None:
    first = dialogue(ITEM, "Red.", [])
    assert [turn.role for turn in first] == ["user"]
    assert first[0].content == (
        f"{prompt_text('evaluator')}\n\nMaterial:\nColors: red, blue\n\nText:\nRed.\n\nQuestion:\nIs it red?"
    )
    second = dialogue(ITEM, "Red.", ["YES, it is."])
    assert second[0] == first[0]
    assert [(turn.role, turn.content) for turn in second[1:]] == [
        ("assistant", "YES, it is."),
        ("user", "Is it short?"),
    ]
    bare = InfobenchItem("a", "Easy_set", ("Is it red?",), "Name a color.")
    assert "Material" not in dialogue(bare, "Red.", [])[0].content


def test_an_answer_that_can_not_be_read_ends_the_instruction() -> None:
    assert [is_over(ITEM, answers) for answers in ([], [True], [None], [True, False], [False, None])] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_the_model_is_given_the_instruction_and_the_material_behind_it() -> None:
    assert ITEM.prompt == "Name a color.\n\nColors: red, blue"
    assert InfobenchItem("a", "Easy_set", ("q",), "Name a color.").prompt == "Name a color."


# --- what is refused ---

ROW = {"id": "a", "input": "", "instruction": "i", "decomposed_questions": ["q", "r"], "subset": "Easy_set"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subset": ...}, "line 1: field 'subset' missing; InFoBench has id, input, instruction"),
        ({"subset": "Middle"}, "line 1: subset 'Middle' is none of Easy_set, Hard_set"),
        ({"decomposed_questions": "q"}, "line 1: 'decomposed_questions' is text, not a list"),
        ({"decomposed_questions": []}, "line 1: 'decomposed_questions' is an empty list"),
        ({"input": 3}, "line 1: 'input' is a number, not text"),
        ({"question_label": [["Content"]]}, "line 1: 2 questions and 1 lists of labels"),
        ({"question_label": ["Content", "Style"]}, "line 1: 'question_label' is no list of lists of texts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_items_of_another_schema_are_refused_with_their_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = write(tmp_path, {key: value for key, value in {**ROW, **change}.items() if value is not ...}, name="i.jsonl")
    with pytest.raises(UserError) as caught:
        load(INFOBENCH, [file])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "with_data", "said"),
    [
        ([{"id": "a", "eval": [True, False]}], True, "misses 1 of 2 items (first: 'b')"),
        ([{"id": k, "eval": [True, None]} for k in "abc"], True, "holds 1 ids that are no item (first: 'c')"),
        ([{"id": "a", "eval": [True, True]}] * 2, True, "line 2: item 'a' is there twice, first at 1"),
        ([{"id": k, "eval": [True]} for k in "ab"], True, "line 1: 'eval' has 1 answers, and the instruction 2"),
        ([{"id": k, "eval": [True] * 3} for k in "ab"], True, "line 1: 'eval' has 3 answers, and the instruction 2"),
        ([{"id": "a", "eval": []}], False, "line 1: 'eval' is an empty list"),
        ([{"id": "a", "eval": ["yes"]}], False, "not a list of true, false and null"),
        ([{"id": "a", "eval": None}], False, "line 1: 'eval' is nothing, not a list"),
        ([{"id": "a"}], False, "line 1: field 'eval' missing"),
        ([{"eval": [True]}], False, "line 1: field 'id' missing"),
        ([{"id": "a", "eval": [True]}] * 2, False, "line 2: item 'a' is there twice, first at 1"),
        ([{"id": k, "eval": [True], "eval_model": k} for k in "ab"], False, "'eval_model' is 'b', and before it 'a'"),
    ],
)
def test_bad_verdicts_are_one_line_and_nothing_is_scored(
    rows: list[dict[str, Any]], with_data: bool, said: str, tmp_path: Path, typed: Typed
) -> None:
    data = write(tmp_path, ROW, {**ROW, "id": "b"}, name="infobench.jsonl")
    more = ["--data", data] if with_data else []
    code, out, err = typed("bench", "score", "infobench", "--verdicts", write(tmp_path, *rows), *more)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert said in err


def test_the_official_output_of_gpt_4_is_scored_with_and_without_the_benchmark(
    shared: Path, tmp_path: Path, typed: Typed
) -> None:
    lines = (shared / SAMPLE).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "eval" in row]
    yes = sum(answer for row in rows for answer in row["eval"])
    asked = sum(len(row["eval"]) for row in rows)
    data = write(tmp_path, *rows, name="infobench.jsonl")
    short = [{"id": row["id"], "eval": row["eval"]} for row in rows]
    for given, more in ((rows, []), (short, ["--data", data]), (short, [])):
        code, out, err = typed("bench", "score", "InFoBench", "--verdicts", write(tmp_path, *given), *more, "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert (found["part"], found["items"]) == ("in part: 6 of 500 instructions", 6)
        assert found["rows"][DRFR][OFFICIAL]["value"] == yes / asked
        assert (found["rows"][DRFR][ALL] is None) == (given is short and not more)
    code, out, _ = typed("bench", "score", "InFoBench", "--verdicts", write(tmp_path, *short))
    assert code == 0
    assert out.startswith("InFoBench (in part: 6 of 500 instructions), 6 items; official rule: share of yes")
    assert "0.0 % of 18 answers could not be read." in out
