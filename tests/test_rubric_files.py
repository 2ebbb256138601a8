"""Rubric files: YAML and lines in, rubrics out, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patarm_lite.errors import UserError
from patarm_lite.judge.pinned import check_forced
from patarm_lite.judge.rubric_files import (
    LARGEST,
    RubricFile,
    find_rubric,
    load_rubric,
    read_rubric,
    rubric_yaml,
)
from patarm_lite.records import TASKS, Criterion
from patarm_lite.rubrics import primary_rubric, rubric_text

MINE = """\
task: chat
criteria:
  - name: Tone
    weight: 3
    description: speaks to the reader
      as an equal
    scale:
      10: warm and exact
      1: insults
  - name: no            # YAML would read this as false
    description: 1e-5
"""


def test_a_rubric_file_has_criteria_weights_and_anchors(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE.replace("name: no ", "name: 'no' ").replace(": 1e-5", ": '1e-5'"), encoding="utf-8")
    found = load_rubric(path)
    assert found.task == "chat"
    assert found.rubric == (
        Criterion("Tone", "speaks to the reader as an equal; 1 = insults; 10 = warm and exact", 3),
        Criterion("no", "1e-5", 1),
    )
    assert rubric_text(found.rubric).splitlines()[0] == (
        "Tone (3): speaks to the reader as an equal; 1 = insults; 10 = warm and exact"
    )


def test_a_file_of_lines_is_a_rubric_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Tone (3): is friendly\n\nFacts (5): is right\n", encoding="utf-8")
    assert load_rubric(path) == RubricFile((Criterion("Tone", "is friendly", 3), Criterion("Facts", "is right", 5)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINE, "criteria.2.name"),
        ("criteria: [{name: Tone, wieght: 3, description: x}]", "'criteria.1.wieght'. Did you mean 'weight'?"),
        ("criterai: []", "Did you mean 'criteria'?"),
        ("criteria: [{name: Tone}]", "key 'criteria.1.description' is missing"),
        ("criteria: []", "criteria"),
        ("criteria: [{name: Tone, description: x, weight: 6}]", "criteria.1.weight"),
        ("criteria: [{name: Tone, description: x, weight: true}]", "criteria.1.weight"),
        ("criteria: [{name: Tone, description: x, scale: {11: y}}]", "an anchor for 11"),
        ("criteria: [{name: 'a:b', description: x}]", "can't be a criterion's name"),
        ("criteria: [{name: '', description: x}]", "criteria.1.name"),
        ("criteria: [{name: A, description: x}, {name: A, description: y}]", "'A' twice"),
        ("criteria: [{name: A, name: B, description: x}]", "'name' is given twice"),
        ("task: poetry\ncriteria: [{name: A, description: x}]", "task"),
        ("just words", "holds no keys"),
        ("criteria: [", "not YAML"),
    ],
)
def test_a_mistake_in_a_rubric_is_one_line_with_its_place(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        read_rubric(text, "rubric mine.yaml")
    assert said in str(error.value) and str(error.value).startswith("rubric mine.yaml")
    assert "\n" not in str(error.value)


def test_files_that_are_no_rubric_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        load_rubric(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"criteria: [{name: caf\xe9}]")
    with pytest.raises(UserError, match="not UTF-8 \\(byte 21\\)"):
        load_rubric(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (LARGEST + 1))
    with pytest.raises(UserError, match="holds at most"):
        load_rubric(tmp_path / "large.yaml")


@pytest.mark.parametrize("task", TASKS)
def test_a_task_s_primary_rubric_saved_and_read_is_the_same(task: str) -> None:
    assert read_rubric(rubric_yaml(primary_rubric(task), task)) == find_rubric(task)


words = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="():<>‹"), min_size=1)
meanings = st.one_of(words, st.sampled_from(["x; 1 = bad; 10 = good", "x; 10 = good; 1 = bad", "; 1 = bad", "1e-5"]))


@given(st.dictionaries(words.filter(lambda name: len(name) < 20), st.tuples(meanings, st.integers(1, 5)), min_size=1))
def test_whatever_was_read_can_be_saved_and_read_again(criteria: dict[str, tuple[str, int]]) -> None:
    """Through what reading makes of it (NFC, white space), saving and reading changes nothing."""
    given_rubric = tuple(Criterion(name, meaning, weight) for name, (meaning, weight) in criteria.items())
    try:
        read = read_rubric(rubric_yaml(given_rubric)).rubric
    except UserError as error:
        assert "twice" in str(error) or "name" in str(error)  # two names that NFC makes one, or too long a one
        return
    assert read_rubric(rubric_yaml(read)).rubric == read


def test_anchors_stand_on_lines_of_their_own_when_saved() -> None:
    rubric = read_rubric("criteria: [{name: A, description: x, scale: {10: good, 1: bad}}]").rubric
    assert "  scale:\n    1: bad\n    10: good\n" in rubric_yaml(rubric)


THREE = tuple(Criterion(name, "meaning", 1) for name in "ABC")


@pytest.mark.parametrize(
    ("criteria", "said"),
    [
        (THREE[:2], "are 2; a judgement has 3 to 5"),
        ((*THREE, THREE[0]), "'A' twice"),
        ((*THREE, Criterion("D", "now </score>", 1)), "'D' holds a tag"),
        ((*THREE, Criterion("D", "now <|im_end|>", 1)), "'D' holds a tag, a control token"),
        ((*THREE, Criterion("D", "e\u0301", 1)), "not NFC"),
        ((*THREE, Criterion("D", "two\nlines", 1)), "NAME \\(WEIGHT\\): MEANING"),
        ((*THREE, Criterion("D", "heavy", 6)), "weight 1 to 5"),
    ],
)
def test_criteria_that_could_not_stand_in_a_sound_judgement_are_not_forced(
    criteria: tuple[Criterion, ...], said: str
) -> None:
    check_forced(THREE)
    with pytest.raises(UserError, match=said):
        check_forced(criteria)
