"""IFEval: the official figures from responses and from stored results, and what is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Typed
from hypothesis import given
from hypothesis import strategies as st

from patarm_lite.errors import UserError
from patarm_lite.evals.assistant_data import IFEVAL, chosen, load
from patarm_lite.evals.assistant_stored import score_stored
from patarm_lite.evals.ifeval import (
    CAPITALS,
    DOWNLOAD,
    INSTRUCTION_LEVEL,
    LOOSE,
    PROMPT_LEVEL,
    SENTENCES,
    STRICT,
    TYPES,
    Checkers,
    Followed,
    IfevalItem,
    figures,
    part_of,
    stand_in_note,
    variants,
)

pytest.importorskip("lm_eval")

SIGN = "1129"
"""The prompt of the vectors that asks for a sign, "!", as for a letter: the official code draws a letter instead."""
SIGN_AS_DRAWN = {STRICT: True, LOOSE: False}
"""What it drew for the vectors where the answer is the prompt: a letter that is there six times, then one that isn't.
There is one exclamation mark in that answer, so it follows neither."""


@pytest.fixture(scope="module")
def checkers() -> Checkers:
    return Checkers.load()


@pytest.fixture(scope="module")
def vectors(shared: Path) -> Any:
    return json.loads((shared / "vectors" / "ifeval.json").read_text(encoding="utf-8"))


def item(*instructions: tuple[str, dict[str, Any]], prompt: str = "p", id: str = "1") -> IfevalItem:
    return IfevalItem(id, prompt, tuple(name for name, _ in instructions), tuple(kwargs for _, kwargs in instructions))


def levels(followed: Sequence[Followed]) -> dict[str, dict[str, float]]:
    """Figures in the vectors' form."""
    rows = figures(followed)["rows"]
    names = {"prompt_level": PROMPT_LEVEL, "instruction_level": INSTRUCTION_LEVEL}
    return {column: {key: rows[row][column]["value"] for key, row in names.items()} for column in (STRICT, LOOSE)}


# --- official vectors ---


def test_every_single_case_is_followed_as_in_the_official_code(checkers: Checkers, vectors: Any) -> None:
    assert len(vectors["cases"]) == 27
    found = []
    for case in vectors["cases"]:
        pairs = zip(case["instruction_id_list"], case["kwargs"], strict=True)
        found.append(checkers.followed(item(*pairs, prompt=case["prompt"]), case["response"]))
        assert {column: list(truths) for column, truths in found[-1].lists.items()} == {
            STRICT: case["strict"],
            LOOSE: case["loose"],
        }, case
    assert levels(found) == vectors["aggregate"]


@pytest.mark.parametrize("name", ["echo the prompt", "fixed text", "empty"])
def test_canned_answers_to_387_real_prompts_get_the_official_figures(
    name: str, checkers: Checkers, vectors: Any, shared: Path
) -> None:
    case, real = vectors["real_file"]["canned"][name], vectors["real_file"]
    loaded = load(IFEVAL, [shared / real["file"]])
    assert loaded.part is None
    items = [one for one in loaded.items if set(one.instructions).isdisjoint(real["skip_prompts_having"])]
    assert (len(items), sum(len(one.instructions) for one in items)) == (real["n_prompts"], real["n_instructions"])
    echo = name == "echo the prompt"
    found = [checkers.followed(one, one.prompt if echo else case["response"]) for one in items]
    if echo:
        place = [one.id for one in items].index(SIGN)
        assert found[place].lists == {STRICT: (False, True), LOOSE: (False, True)}
        drawn = {column: (truth, True) for column, truth in SIGN_AS_DRAWN.items()}
        found[place] = Followed(SIGN, found[place].instructions, drawn)
    assert levels(found) == {column: case[column] for column in (STRICT, LOOSE)}


# --- the library, tamed ---


def test_the_library_is_loaded_without_network_without_torch_and_without_a_word() -> None:
    code = """
import socket, sys
def no(*_): raise AssertionError("it reached out")
socket.socket.connect = socket.getaddrinfo = no
import nltk
download = nltk.download
from patarm_lite.evals.ifeval import Checkers
assert "lm_eval" not in sys.modules
Checkers.load()
assert nltk.download is download
print(*sorted({"torch", "transformers", "lm_eval"} & set(sys.modules)))
"""
    env = {**os.environ, "NLTK_DATA": "/nowhere", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("lm_eval\n", 0), done.stderr


def test_languages_are_told_alike_every_time(checkers: Checkers) -> None:
    doubtful = item(("language:response_language", {"language": "fi"}))  # unseeded, every second time
    assert len({checkers.followed(doubtful, "Otec matka syn.").lists[STRICT] for _ in range(20)}) == 1
    french = item(("language:response_language", {"language": "fr"}))
    assert checkers.followed(french, "Le chat dort sur la chaise de la cuisine.").lists[STRICT] == (True,)


def test_a_language_that_can_not_be_told_counts_as_followed_and_is_not_logged(
    checkers: Checkers, caplog: pytest.LogCaptureFixture
) -> None:
    assert checkers.followed(item(("language:response_language", {"language": "fr"})), "123").lists[STRICT] == (True,)
    assert not caplog.records


def test_checking_leaves_random_numbers_as_they_are(checkers: Checkers) -> None:
    random.seed(3)
    before = random.getstate()
    checkers.followed(item(("keywords:letter_frequency", LETTER)), "#")
    assert random.getstate() == before


LETTER = {"letter": "#", "let_frequency": 4, "let_relation": "at least"}


@pytest.mark.parametrize(("response", "wanted"), [("#a #b #c #d", True), ("#a #b #c", False)])
def test_a_sign_is_counted_where_the_official_code_draws_a_letter(
    response: str, wanted: bool, checkers: Checkers
) -> None:
    assert checkers.followed(item(("keywords:letter_frequency", LETTER)), response).lists[STRICT] == (wanted,)


def test_json_too_deep_to_be_read_is_no_json(checkers: Checkers) -> None:
    assert checkers.followed(item(("detectable_format:json_format", {})), "[" * 100_000).lists[STRICT] == (False,)


# --- NLTK's punkt data, and the stand-in ---


@pytest.fixture
def without_punkt(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])


def counts(checkers: Checkers, name: str, text: str) -> int:
    """How many a checker counts: the largest number of which there are "at least" so many."""
    keys = ("num_sentences", "relation") if name == SENTENCES else ("capital_frequency", "capital_relation")
    return max(
        number
        for number in range(20)
        if checkers.followed(item((name, dict(zip(keys, (number, "at least"), strict=True)))), text).lists[STRICT][0]
    )


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One.", 1),
        ("One. Two! Three? Four", 4),
        ("Dr. Smith met Mr. Jones at 5 p.m. in Washington.", 1),
        ("It costs 3.5 dollars, e.g. at Smith Inc. or elsewhere. Cheap!", 2),
        ("I came at 5 p.m. The door was shut.", 2),
        ("J. R. Smith wrote it.", 1),
        ("First line\n\nSecond line. Third", 2),
        ('He said "Go." She went.', 2),
    ],
)
def test_the_stand_in_splits_sentences_as_a_reader_would(text: str, sentences: int, without_punkt: None) -> None:
    found = Checkers.load()
    assert not found.punkt
    assert counts(found, SENTENCES, text) == sentences


@pytest.mark.parametrize(
    ("text", "words"),
    [("NASA and the U.S. said: GO!", 3), ("I am", 1), ("nothing", 0), ("WELL-KNOWN. YES. OK...", 3), ("DON'T. GO", 3)],
)
def test_words_in_capitals_are_counted_without_punkt(text: str, words: int, without_punkt: None) -> None:
    # "DON'T" is the words "DO" and "N'T" for NLTK, at the end of a sentence too
    assert counts(Checkers.load(), CAPITALS, text) == words


def test_punkt_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).write_text("")
    (folder / "abbrev_types.txt").write_text("zqx")
    text = "He met zqx. Smith. Dr. Jones left."
    monkeypatch.setattr(nltk.data, "path", [])
    assert counts(Checkers.load(), SENTENCES, text) == 3
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    found = Checkers.load()
    assert found.punkt
    assert counts(found, SENTENCES, text) == 3  # "zqx." is an abbreviation now, and "Dr." none
    assert counts(found, SENTENCES, "He met zqx. Smith.") == 1
    assert found.stand_ins([item((SENTENCES, {}))]) == {}


def test_figures_of_the_stand_in_say_so_with_the_command_that_gets_the_data(without_punkt: None, shared: Path) -> None:
    loaded = load(IFEVAL, [shared / "data" / "ifeval" / "input_data.jsonl.gz"])
    found = Checkers.load().stand_ins(loaded.items)  # type: ignore[arg-type]
    assert found == {SENTENCES: 52, CAPITALS: 25}
    note = stand_in_note(found, sum(TYPES.values()))
    assert note is not None
    assert "52 of 834 instructions (number of sentences)" in note
    assert "25 of 834" in note
    assert DOWNLOAD in note
    assert stand_in_note({}, 834) is None


# --- strict, loose, levels ---


@given(response=st.text(alphabet="a*\n ,.", max_size=30))
def test_loose_follows_whatever_strict_does(response: str, checkers: Checkers) -> None:
    found = checkers.followed(
        item(
            ("punctuation:no_comma", {}),
            ("detectable_format:number_bullet_lists", {"num_bullets": 1}),
            ("length_constraints:number_words", {"num_words": 2, "relation": "less than"}),
        ),
        response,
    )
    assert all(b or not a for a, b in zip(found.lists[STRICT], found.lists[LOOSE], strict=True))
    assert response.strip() or found.lists == {STRICT: (False,) * 3, LOOSE: (False,) * 3}


def test_the_eight_variants_drop_lines_and_asterisks() -> None:
    assert variants("a\n*b*\nc") == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]
    assert variants("*one*") == ["*one*", "", "", "", "one", "", "", ""]


def test_levels_families_and_types_are_shares_of_what_is_there() -> None:
    names = ("keywords:existence", "keywords:frequency", "punctuation:no_comma")
    found = [
        Followed("1", names, {STRICT: (True, True, True), LOOSE: (True, True, True)}),
        Followed("2", names[:1], {STRICT: (False,), LOOSE: (True,)}),
    ]
    rows = figures(found)["rows"]
    assert {row: (one["n"], one[STRICT]["value"], one[LOOSE]["value"]) for row, one in rows.items()} == {
        PROMPT_LEVEL: (2, 1 / 2, 1.0),
        INSTRUCTION_LEVEL: (4, 3 / 4, 1.0),
        "keywords": (3, 2 / 3, 1.0),
        "punctuation": (1, 1.0, 1.0),
        "keywords:existence": (2, 1 / 2, 1.0),
        "keywords:frequency": (1, 1.0, 1.0),
        "punctuation:no_comma": (1, 1.0, 1.0),
    }


def test_instructions_of_a_prompt_are_drawn_together() -> None:
    names = ("punctuation:no_comma",) * 9
    found = [Followed(str(n), names, {STRICT: (n % 2 == 0,) * 9}) for n in range(400)]
    one = figures(found)["rows"][INSTRUCTION_LEVEL][STRICT]
    half = 1.96 * (0.25 / 400) ** 0.5  # of 400 prompts, not of 3,600 instructions
    assert (one["low"], one["high"]) == (pytest.approx(0.5 - half, abs=0.006), pytest.approx(0.5 + half, abs=0.006))


def test_a_part_is_called_a_part() -> None:
    whole = [[name] for name, count in TYPES.items() for _ in range(count)]
    joined = [[*whole[n], *(whole[541 + n] if 541 + n < len(whole) else [])] for n in range(541)]
    assert part_of(joined) is None
    assert part_of(joined[:-1]) == "in part: 540 of 541 prompts"
    assert part_of([*joined, ["punctuation:no_comma"]]) == "not the official items: 542 prompts, where there are 541"
    assert part_of([["punctuation:no_comma"]] * 67) == "not the official items: 67 prompts, where there are 541"


# --- files of items that are refused ---

ROW = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kwargs": ...}, "line 2: field 'kwargs' missing; IFEval has key, prompt"),
        ({"kwargs": {}}, "line 2: 'kwargs' is an object, not a list of objects"),
        ({"kwargs": []}, "line 2: 1 instructions and 0 kwargs"),
        ({"prompt": None}, "line 2: 'prompt' is nothing, not text"),
        ({"instruction_id_list": []}, "line 2: 'instruction_id_list' is empty"),
        ({"instruction_id_list": ["punctuation:no_coma"]}, "'punctuation:no_coma' is not known. Did you mean"),
        ({"key": 1}, "line 2: item '1' is there a second time"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_items_of_another_schema_are_refused_with_their_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    row = {key: value for key, value in {**ROW, "key": 2, **change}.items() if value is not ...}
    file = tmp_path / "ifeval.jsonl"
    file.write_text(f"{json.dumps(ROW)}\n{json.dumps(row)}\n")
    with pytest.raises(UserError) as caught:
        load(IFEVAL, [file])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("keywords:existence", {}, "its kwargs lack keywords"),
        ("length_constraints:number_words", {"num_words": 3}, "its kwargs lack relation"),
        ("length_constraints:number_words", {"num_words": -1, "relation": "at least"}, "its kwargs are not possible"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "about"}, "about is given"),
        ("length_constraints:number_words", {"num_words": "three", "relation": "at least"}, "not supported"),
        ("punctuation:no_comma", {"number": 1}, "unexpected keyword argument"),
        ("keywords:existence", {"keywords": ["("]}, "unterminated subpattern"),
        ("keywords:letter_frequency", {**LETTER, "letter": "ab"}, "its kwargs are not possible"),
        (SENTENCES, {"num_sentences": "three", "relation": "at least"}, "not supported"),
    ],
)
def test_instructions_that_can_not_be_checked_are_refused_before_anything_is_generated(
    name: str, kwargs: dict[str, Any], said: str, checkers: Checkers, tmp_path: Path
) -> None:
    file = tmp_path / "ifeval.jsonl"
    file.write_text(json.dumps({**ROW, "instruction_id_list": [name], "kwargs": [kwargs]}) + "\n")
    with pytest.raises(UserError) as caught:
        checkers.check(load(IFEVAL, [file]).items)  # type: ignore[arg-type]
    assert f"{file} line 1: instruction {name!r} can't be checked: " in str(caught.value)
    assert said in str(caught.value)


def test_arguments_that_the_hub_fills_up_with_nothing_are_left_out(checkers: Checkers, tmp_path: Path) -> None:
    file = tmp_path / "ifeval.jsonl"
    file.write_text(json.dumps({**ROW, "kwargs": [{"num_words": None, "keywords": None}]}) + "\n")
    checkers.check(load(IFEVAL, [file]).items)  # type: ignore[arg-type]


# --- from the hub ---


def test_items_come_from_the_hub_at_one_commit_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from hub_folders import COMMIT, cached, json_lines, use_cache

    from patarm_lite.evals.assistant_data import IFEVAL

    whole = {"num_words": None, "relation": None}  # the hub's records have every argument, most of them empty
    cache, files = use_cache(monkeypatch, tmp_path), {"train.jsonl": json_lines({**ROW, "kwargs": [whole]})}
    for commit in (IFEVAL.commit, COMMIT):
        cached(cache, "dataset", "google/IFEval", files, commit)
    (found,) = chosen("ifeval", offline=True)
    assert (found.source, found.part) == (f"google/IFEval at {IFEVAL.commit}", "in part: 1 of 541 prompts")
    (newest,) = chosen("ifeval", revisions={"ifeval": "main"}, offline=True)
    assert newest.source == f"google/IFEval at {COMMIT}"
    assert [dict(one) for item in found.items for one in item.arguments] == [{}]  # type: ignore[union-attr]
    with pytest.raises(
        UserError, match=r"kqsong/InFoBench .* not, or not wholly, in the cache.*; or give the data set"
    ):
        chosen("infobench", offline=True)


# --- bench score ---

RESPONSES = {"1": "no comma", "2": "a, b", "3": "Sure, here:\nwithout"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "ifeval.jsonl"
    rows = [{**ROW, "key": int(key), "prompt": f"prompt {key}"} for key in RESPONSES]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def verdicts(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "verdicts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("by", ["prompt", "key", "id"])
def test_stored_responses_are_checked_anew_whichever_way_they_name_their_prompt(
    by: str, data: Path, tmp_path: Path, typed: Typed
) -> None:
    rows = [{by: f"prompt {key}" if by == "prompt" else int(key), "response": text} for key, text in RESPONSES.items()]
    code, out, err = typed(
        "bench", "score", "ifeval", "--verdicts", verdicts(tmp_path, *rows), "--data", data, "--json"
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["part"] == "in part: 3 of 541 prompts"
    assert [found["rows"][PROMPT_LEVEL][column]["value"] for column in (STRICT, LOOSE)] == [
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
    ]


def test_stored_results_of_the_official_code_are_counted_without_the_benchmark(tmp_path: Path, typed: Typed) -> None:
    known = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"]}
    rows = [{"prompt": str(n), **known, "follow_instruction_list": [n < 3, n < 1]} for n in range(4)]
    code, out, err = typed("bench", "score", "IFEval", "--verdicts", verdicts(tmp_path, *rows))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("IFEval (in part: 4 of 541 prompts), 4 items; official rule: ")
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["n", "as", "stored", "95"],
        ["Prompt", "level", "4", "25.0"],
        ["Instruction", "level", "8", "50.0"],
    ]


OFFICIAL = {"prompt": "x", "instruction_id_list": ["punctuation:no_comma"], "follow_instruction_list": [True]}
OURS = {"key": 1, "instruction_id_list": ["startend:quotation"], "strict": [True], "loose": [True]}


@pytest.mark.parametrize(
    ("rows", "with_data", "said"),
    [
        ([{"key": 1, "response": "a"}], True, "misses 2 of 3 items (first: '2')"),
        ([{"key": k, "response": "a"} for k in (1, 2, 3, 9)], True, "holds 1 ids that are no item (first: '9')"),
        ([{"key": 1, "response": "a"}] * 2, True, "line 2: item '1' is there twice, first at 1"),
        ([{"key": 1, "prompt": "prompt 2", "response": "a"}], True, "line 1: its fields are of two items, '1' and '2'"),
        ([{"key": k, "response": None} for k in (1, 2, 3)], True, "line 1: 'response' is nothing, not text"),
        ([{"key": 1, "response": "a"}, {"key": 2}], True, "line 2: there is no 'response', and other records have one"),
        ([{"key": k} for k in (1, 2, 3)], True, "line 1: field 'follow_instruction_list' missing"),
        ([{"key": 1, "response": "a"}], False, "line 1: a response is checked by the benchmark's own file"),
        ([{"response": "a"}], True, "line 1: field 'key' missing"),
        ([{**OFFICIAL, "model": "a"}, {**OFFICIAL, "prompt": "y", "model": "b"}], False, "verdicts of 2 models"),
        ([OFFICIAL, OFFICIAL], False, "line 2: item 'x' is there twice, first at 1"),
        ([{**OFFICIAL, "follow_instruction_list": [1]}], False, "is no list of true and false"),
        ([{**OFFICIAL, "follow_instruction_list": []}], False, "has 0 values, and the prompt 1 instructions"),
        ([{**OFFICIAL, "instruction_id_list": ["title"]}], False, "instruction 'title' is not known"),
        ([OFFICIAL, OURS], False, "line 2: it holds strict, loose, and the first record as stored"),
    ],
)  # fmt: skip
def test_bad_verdicts_are_one_line_and_nothing_is_scored(
    rows: list[dict[str, Any]], with_data: bool, said: str, data: Path, tmp_path: Path, typed: Typed
) -> None:
    more = ["--data", data] if with_data else []
    code, out, err = typed("bench", "score", "ifeval", "--verdicts", verdicts(tmp_path, *rows), *more)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert said in err


def test_a_judge_is_not_run_on_ifeval(tmp_path: Path, typed: Typed) -> None:
    code, _, err = typed("bench", tmp_path / "judge.gguf", "--on", "ifeval", "--no-store")
    assert code == 2
    assert "patarm-lite bench-model MODEL --on ifeval" in err
    code, _, err = typed("bench", "score", "ifeval", "--verdicts", verdicts(tmp_path, OFFICIAL), "--unreadable", "-1")
    assert (code, "--unreadable is for scores" in err) == (2, True)


def test_stored_responses_of_the_whole_benchmark_are_the_whole(shared: Path, tmp_path: Path) -> None:
    file = shared / "data" / "ifeval" / "input_data.jsonl.gz"
    rows = [{"prompt": one.prompt, "response": ""} for one in load(IFEVAL, [file]).items]
    found = score_stored(IFEVAL, verdicts(tmp_path, *rows), file, 1)
    assert (found["part"], found["items"]) == (None, 541)
    assert found["rows"][INSTRUCTION_LEVEL]["n"] == 834
    assert {found["rows"][row][column]["value"] for row in found["rows"] for column in (STRICT, LOOSE)} == {0.0}
