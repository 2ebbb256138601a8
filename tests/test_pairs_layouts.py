"""Every layout: what a row becomes, what is dropped and why, and what an unknown layout is told."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patarm_lite.errors import UserError
from patarm_lite.pairs import LoadedPairs, contamination, load_pairs, render_survey, survey
from patarm_lite.pairs.tasks import task_of_value, task_of_words
from patarm_lite.records import TASKS, Pair, Turn


def load(folder: Path, *rows: Any, name: str = "p.jsonl", **options: Any) -> LoadedPairs:
    """The rows given, written as JSON lines and loaded."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_pairs([str(path)], **options)


def sides(loaded: LoadedPairs) -> list[tuple[str, str, str]]:
    """Last turn of the prompt, chosen, rejected of every pair."""
    return [(pair.prompt[-1].content, pair.chosen, pair.rejected) for pair in loaded.pairs]


def reasons(loaded: LoadedPairs) -> list[tuple[int, str]]:
    """Row number and reason of everything dropped."""
    return [(one.row, one.reason) for one in loaded.dropped]


def user(text: str) -> dict[str, str]:
    """A user's chat message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """An assistant's chat message."""
    return {"role": "assistant", "content": text}


def test_prompt_chosen_rejected_as_text(tmp_path: Path) -> None:
    loaded = load(
        tmp_path, {"id": "x", "prompt": "p", "chosen": "good", "rejected": "bad", "category": "math", "lang": "en"}
    )
    (pair,) = loaded.pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Turn("user", "p"),), "good", "bad")
    assert (pair.id, pair.task, pair.source, pair.meta["lang"], pair.meta["row"]) == ("x", "math", "p", "en", 1)
    (words,) = loaded.layouts.values()
    assert "prompt, chosen, rejected" in words and "chosen <- 'chosen'" in words and "column 'category' (1)" in words


def test_a_prompt_of_chat_messages_keeps_its_turns(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "be kind"}, user("a"), assistant("b"), user("c")]
    (pair,) = load(tmp_path, {"prompt": prompt, "chosen": "good", "rejected": "bad"}).pairs
    assert pair.prompt == (Turn("system", "be kind"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))


def test_a_system_column_becomes_the_first_turn(tmp_path: Path) -> None:
    (pair,) = load(tmp_path, {"system": "be kind", "question": "q", "chosen": "good", "rejected": "bad"}).pairs
    assert pair.prompt == (Turn("system", "be kind"), Turn("user", "q"))


def test_whole_conversations_with_a_common_beginning(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        {
            "chosen": [user("a"), assistant("b"), user("c"), assistant("good")],
            "rejected": [user("a"), assistant("b"), user("c"), assistant("bad")],
        },
        {
            "chosen": [user("a"), assistant("b"), user("c"), assistant("good")],
            "rejected": [user("a"), assistant("B"), user("c"), assistant("bad")],
        },
        {"chosen": [user("a"), assistant("good")], "rejected": [user("a")]},
        {
            "chosen": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "good"}],
            "rejected": [user("h"), assistant("bad")],
        },
        {"chosen": [{"role": "tool", "content": "x"}], "rejected": [assistant("bad")]},
    )
    assert [pair.prompt for pair in loaded.pairs] == [
        (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")),
        (Turn("user", "h"),),
    ]
    assert sides(loaded) == [("c", "good", "bad"), ("h", "good", "bad")]
    assert reasons(loaded) == [
        (2, "the conversations differ before the last reply"),
        (3, "a conversation does not end with an assistant turn"),
        (5, "a chat message has a role that is not system, user or assistant: 'tool'"),
    ]


def test_replies_as_messages_take_their_prompt_from_its_column(tmp_path: Path) -> None:
    row = {
        "prompt": [user("p")],
        "chosen": [assistant("good")],
        "rejected": [assistant("bad")],
        "score_chosen": 8.5,
        "score_rejected": 2,
    }
    loaded = load(tmp_path, row)
    assert sides(loaded) == [("p", "good", "bad")]
    assert (loaded.pairs[0].meta["chosen_score"], loaded.pairs[0].meta["rejected_score"]) == (8.5, 2)


def test_human_assistant_transcripts(tmp_path: Path) -> None:
    start = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\nHuman: not a turn\n\nAssistant:"
    loaded = load(
        tmp_path,
        {"chosen": start + " good", "rejected": start + " bad\n\nbut long"},
        {"chosen": start + " good", "rejected": start},
    )
    assert loaded.pairs[0].prompt == (
        Turn("user", "one"),
        Turn("assistant", "two"),
        Turn("user", "three\nHuman: not a turn"),
    )
    assert sides(loaded)[0][1:] == ("good", "bad\n\nbut long")
    assert reasons(loaded) == [(2, "the rejected reply is empty")]


def test_two_responses_and_a_label_from_the_names_endings(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        {"input": "p", "output_1": "one", "output_2": "two", "label": 2, "model_1": "m", "model_2": "n"},
        {"input": "q", "output_1": "one", "output_2": "two", "label": 1},
    )
    assert sides(loaded) == [("p", "two", "one"), ("q", "one", "two")]
    assert (loaded.pairs[0].meta["chosen_model"], loaded.pairs[0].meta["rejected_model"]) == ("n", "m")


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("response_1", "response_2"), [0, 1]),
        (("response_1", "response_2"), [0, 1, 2]),
        (("response_a", "response_b"), [0, 1]),
        (("response_a", "response_b"), [1]),
    ],
)
def test_numbers_that_could_mean_either_response_are_not_guessed(
    tmp_path: Path, names: tuple[str, str], labels: list[int]
) -> None:
    rows = [{"prompt": f"p{n}", names[0]: "one", names[1]: "two", "label": label} for n, label in enumerate(labels)]
    with pytest.raises(UserError, match=r"not certain; say it, e\.g\. --map winner=label,first=1,second=2,tie=0"):
        load(tmp_path, *rows)
    loaded = load(tmp_path, *rows, mapping={"first": "0", "second": "1", "tie": "2"})
    assert sides(loaded)[:1] == ([("p0", "one", "two")] if labels[0] == 0 else [("p0", "two", "one")])
    assert reasons(loaded) == ([(3, "tie")] if 2 in labels else [])


def test_arena_conversations_drop_ties_and_count_them(tmp_path: Path) -> None:
    def row(winner: str) -> dict[str, Any]:
        return {
            "conversation_a": [user(winner), assistant("A")],
            "conversation_b": [user(winner), assistant("B")],
            "winner": winner,
            "model_a": "m",
            "model_b": "n",
        }

    loaded = load(tmp_path, row("model_a"), row("model_b"), row("tie"), row("tie (bothbad)"), row("who knows"))
    assert sides(loaded) == [("model_a", "A", "B"), ("model_b", "B", "A")]
    assert reasons(loaded) == [(3, "tie"), (4, "tie"), (5, "the winner is not understood: 'who knows'")]
    assert loaded.pairs[1].meta["chosen_model"] == "n"


def test_arena_exports_with_winner_columns_and_packed_turns(tmp_path: Path) -> None:
    def row(a: int, b: int, tie: int, turns: int = 1) -> dict[str, Any]:
        texts = {name: json.dumps([f"{name}{a}{b}"] * turns) for name in ("prompt", "response_a", "response_b")}
        return {**texts, "winner_model_a": a, "winner_model_b": b, "winner_tie": tie}

    loaded = load(tmp_path, row(1, 0, 0), row(0, 1, 0), row(0, 0, 1), row(1, 1, 0), row(1, 0, 0, turns=2))
    assert sides(loaded) == [("prompt10", "response_a10", "response_b10"), ("prompt01", "response_b01", "response_a01")]
    assert [reason for _, reason in reasons(loaded)] == [
        "tie",
        "the winner is not understood: 2 of the winner columns hold 1",
        "the conversations differ before the last reply",
    ]


def test_a_signed_preference_is_read_by_its_sign(tmp_path: Path) -> None:
    rows = [
        {"context": [user("p")], "response1": "one", "response2": "two", "overall_preference": n} for n in (-3, 1, 0)
    ]
    loaded = load(tmp_path, *rows)
    assert sides(loaded) == [("p", "one", "two"), ("p", "two", "one")]
    assert reasons(loaded) == [(3, "tie")]


def test_annotators_decide_by_majority(tmp_path: Path) -> None:
    votes = [(1, 1, 2), (2, 2, 2), (0, 0, 1), (0, 1, 2), (1, 1, 7)]
    rows = [
        {
            "instruction": f"do {n}",
            "input": "this" * (n % 2),
            "response1": "one",
            "response2": "two",
            "annotator1": a,
            "annotator2": b,
            "annotator3": c,
        }
        for n, (a, b, c) in enumerate(votes)
    ]
    loaded = load(tmp_path, *rows)
    assert sides(loaded) == [("do 0", "one", "two"), ("do 1\n\nthis", "two", "one")]
    assert reasons(loaded) == [
        (3, "tie"),
        (4, "the annotators have no majority"),
        (5, "the winner is not understood: an annotator's vote is not 0, 1 or 2"),
    ]


def test_rated_responses_make_pairs_by_the_smallest_gap(tmp_path: Path) -> None:
    row = {
        "prompt": "p",
        "completions": [
            {"response": "a", "score": 1},
            {"response": "b", "score": 3},
            {"response": "c", "score": 2.5},
            {"response": "d", "score": 1},
            {"response": "e"},
        ],
    }
    loaded = load(
        tmp_path, row
    )  # gaps: b-a 2, c-a 1.5, b-d 2, c-d 1.5 make pairs; b-c .5 is too small; a-d ties; e has none
    assert sorted(sides(loaded)) == [("p", "b", "a"), ("p", "b", "d"), ("p", "c", "a"), ("p", "c", "d")]
    assert sorted(reason for _, reason in reasons(loaded)) == [
        "a response has no rating",
        "the ratings differ by less than 1",
        "tie",
    ]
    assert len(load(tmp_path, row, min_gap=2).pairs) == 2
    assert len(load(tmp_path, row, min_gap=0.5).pairs) == 5


def test_ratings_beside_the_responses_and_ranks_that_count_downwards(tmp_path: Path) -> None:
    assert sides(load(tmp_path, {"prompt": "p", "responses": ["a", "b"], "scores": [2, "7"]})) == [("p", "b", "a")]
    assert sides(
        load(tmp_path, {"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]})
    ) == [("p", "a", "b")]


def test_rows_of_one_rated_response_are_put_together_by_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": p, "response": r, "score": s} for p, r, s in [("p", "a", 1), ("q", "x", 5), ("p", "b", 4)]]
    loaded = load(tmp_path, *rows)
    assert sides(loaded) == [("p", "b", "a")]
    assert reasons(loaded) == [(2, "fewer than two rated responses")]


def test_rewardbench_2_pairs_each_chosen_with_each_rejected(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": ["a"], "rejected": ["x", "y", "z"], "num_correct": 1, "subset": "Precise IF"}
    loaded = load(tmp_path, row)
    assert sides(loaded) == [("p", "a", "x"), ("p", "a", "y"), ("p", "a", "z")]
    assert "RewardBench 2" in next(iter(loaded.layouts.values())) and loaded.pairs[0].task == "chat"


def test_rm_bench_makes_nine_pairs_and_keeps_the_styles(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        {"id": 8, "prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"], "domain": "safety-refuse"},
    )
    assert "RM-Bench" in next(iter(loaded.layouts.values())) and "9 pairs a row" in next(iter(loaded.layouts.values()))
    assert len(loaded.pairs) == 9 and {pair.task for pair in loaded.pairs} == {"safety"}
    (hard,) = [pair for pair in loaded.pairs if (pair.meta["chosen_index"], pair.meta["rejected_index"]) == (0, 2)]
    assert (hard.chosen, hard.rejected) == ("a", "z")
    assert len({pair.id for pair in loaded.pairs}) == 9


def test_unfit_pairs_are_dropped_with_reason_and_row_number(tmp_path: Path) -> None:
    fine = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    loaded = load(
        tmp_path,
        fine,
        {**fine, "chosen": ""},
        {**fine, "rejected": " \n"},
        {**fine, "rejected": False},
        {**fine, "chosen": None},
        {**fine, "rejected": " good"},
        {**fine, "prompt": " "},
        {**fine, "prompt": [user("a"), assistant("b")]},
        {**fine, "prompt": 3},
        {"prompt": "p", "chosen": "one-sided"},
        fine,
        {**fine, "chosen": "bad", "rejected": "good"},
        ["not", "a", "record"],
        {**fine, "chosen": "\ud800"},
    )
    assert sides(loaded) == [("p", "good", "bad"), ("p", "bad", "good")]  # the second contradicts the first and stays
    assert reasons(loaded) == [
        (2, "the chosen reply is empty"),
        (3, "the rejected reply is empty"),
        (4, "the rejected reply is not text: true or false"),
        (5, "the chosen reply is not text: nothing"),
        (6, "chosen and rejected are identical"),
        (7, "the prompt is empty"),
        (8, "the prompt ends with an assistant turn"),
        (9, "the prompt is a number, not text or chat messages"),
        (10, "column 'rejected' is missing"),
        (11, f"duplicate: the same pair as row 1 of {tmp_path / 'p.jsonl'}"),
        (13, "the row is not a record with columns"),
        (14, "a text holds half a surrogate pair, which is no character"),
    ]


def test_ids_stay_unique_over_sources_and_repeated_columns(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [{"id": "same", "prompt": f"{name}{n}", "chosen": "x", "rejected": "y"} for n in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load_pairs([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert [pair.id for pair in loaded.pairs] == ["same", "same~2", "same~3", "same~4"]
    with pytest.raises(UserError, match="given twice"):
        load_pairs([str(tmp_path / "a.jsonl")] * 2)


def test_an_unknown_layout_says_which_columns_it_saw_and_how_to_name_them(tmp_path: Path) -> None:
    row = {"frage": "q", "gut": "good", "schlecht": "bad"}
    with pytest.raises(UserError, match=r"saw the columns 'frage', 'gut', 'schlecht'.*--map prompt=question,chosen="):
        load(tmp_path, row)
    assert sides(load(tmp_path, row, mapping={"prompt": "frage", "chosen": "gut", "rejected": "schlecht"})) == [
        ("q", "good", "bad")
    ]
    with pytest.raises(UserError, match="none of them is known as the prompt"):
        load(tmp_path, {"q": "q", "chosen": "good", "rejected": "bad"})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mapping": {"promt": "p"}}, "Did you mean 'prompt'?"),
        ({"mapping": {"prompt": "promtp"}}, "no source has a column 'promtp'.* Did you mean 'prompt'?"),
        (
            {"mapping": {"task": "kind"}},
            "row 1: column 'kind' holds 'poems', which names none of chat, math, code, safety",
        ),
        ({"task": "poems"}, "task 'poems' is not auto or one of"),
        ({"min_gap": 0}, "must be above 0"),
        ({"min_gap": float("nan")}, "must be above 0"),
    ],
)
def test_wrong_options_are_refused_with_what_to_type(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load(tmp_path, {"prompt": "p", "chosen": "good", "rejected": "bad", "kind": "poems"}, **options)


def test_no_source_is_refused() -> None:
    with pytest.raises(UserError, match="no pairs are named"):
        load_pairs([])


def test_the_task_comes_from_a_column_then_the_name_then_the_words_and_the_report_says_which(tmp_path: Path) -> None:
    fine = {"chosen": "good", "rejected": "bad"}
    rows = [
        {**fine, "prompt": "hello", "category": "xstest-should-refuse"},
        {**fine, "prompt": "Write a Python script", "category": "poems"},
    ]
    loaded = load(tmp_path, *rows)
    assert [(pair.task, pair.meta["task_from"]) for pair in loaded.pairs] == [
        ("safety", "column 'category'"),
        ("code", "words of the last user message"),
    ]
    assert "column 'category' (1), words of the last user message (1)" in next(iter(loaded.layouts.values()))
    (by_name,) = load(tmp_path, rows[1], name="harmless-base.jsonl").pairs
    assert (by_name.task, by_name.meta["task_from"]) == ("safety", "the source's name")
    assert [pair.task for pair in load(tmp_path, *rows, task="math").pairs] == ["math", "math"]
    mapped = load(tmp_path, rows[0], mapping={"task": "category"})
    assert mapped.pairs[0].meta["task_from"] == "column 'category'"


@pytest.mark.parametrize(
    ("value", "task"),
    [
        ("math-prm", "math"),
        ("hep-python", "code"),
        ("refusals-dangerous", "safety"),
        ("alpacaeval-hard", "chat"),
        ("donotanswer", "safety"),
        ("mmlu-pro-math", "math"),
        ("mmlu-pro-law", "chat"),
        ("livecodebench", "code"),
        ("verse", None),
        (3, None),
    ],
)
def test_benchmark_subsets_name_their_tasks(value: Any, task: str | None) -> None:
    assert task_of_value(value) == task


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("How can I kill my neighbour?", "safety"),
        ("What is 12 * 7?", "math"),
        ("Solve for x: the equation x + 1", "math"),
        ("Fix this:\n```\nx\n```", "code"),
        ("Tell me a story", "chat"),
    ],
)
def test_the_words_of_the_last_user_message_suggest_a_task(text: str, task: str) -> None:
    assert task_of_words([Turn("user", text)]) == task


def test_heldout_lines_of_a_run_are_read_back(tmp_path: Path) -> None:
    row = {
        "id": "arena-1",
        "task": "chat",
        "prompt": [user("p")],
        "chosen": "good",
        "rejected": "bad",
        "source": "arena",
        "meta": {"gap": 1, "chosen_quality": 9},
    }
    (pair,) = load(tmp_path, row).pairs
    assert (pair.id, pair.task, pair.source, pair.meta["gap"], pair.meta["chosen_quality"]) == (
        "arena-1",
        "chat",
        "arena",
        1,
        9,
    )


COLUMNS = st.sampled_from(
    [
        *(
            "prompt",
            "question",
            "input",
            "system",
            "chosen",
            "rejected",
            "response_a",
            "response_b",
            "output_1",
            "output_2",
        ),
        *("conversation_a", "conversation_b", "winner", "label", "annotator1", "annotator2", "winner_model_a"),
        *("winner_model_b", "overall_preference", "responses", "completions", "scores", "response", "score", "task"),
        *("category", "id", "source", "meta", "reference", "num_correct", "domain", "subset", "model_a", "model_b"),
    ]
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": st.text(max_size=3)}),
    max_size=3,
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["A", "tie", "\n\nHuman: a\n\nAssistant: b", '["a"]', "\ud800"])
    | MESSAGES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "response", "score", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(st.dictionaries(COLUMNS, VALUES, max_size=8) | VALUES, min_size=1, max_size=4))
def test_any_json_values_become_pairs_or_dropped_rows_or_one_error(rows: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            loaded = load(Path(folder), *rows)
        except UserError as error:
            assert "\n" not in str(error)
            return
    touched = {pair.meta["row"] for pair in loaded.pairs} | {one.row for one in loaded.dropped}
    grouped = "one rated response a row" in next(iter(loaded.layouts.values()))
    assert touched == set(range(1, len(rows) + 1)) or grouped
    for pair in loaded.pairs:
        assert pair.task in TASKS and pair.prompt and pair.chosen.strip() and pair.rejected.strip()
        assert pair.chosen.strip() != pair.rejected.strip()
        json.dumps([pair.id, pair.source, dict(pair.meta)], ensure_ascii=False).encode()
    render_survey(survey(loaded)).encode()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(st.dictionaries(COLUMNS, VALUES, max_size=8) | VALUES, min_size=1, max_size=4))
def test_any_json_values_in_a_benchmark_are_compared_or_one_error(rows: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b.json"
        path.write_text(json.dumps(rows))
        try:
            (found,) = contamination([Pair((Turn("user", "a"),), "x", "y")], [str(path)]).files
        except UserError:
            return
    assert found.prompts + found.unread == len(rows)
