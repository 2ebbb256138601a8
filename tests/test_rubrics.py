"""Rubrics: text <-> Rubric, and the primary rubrics that are shipped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patarm_lite.errors import UserError
from patarm_lite.records import TASKS, Criterion
from patarm_lite.rubrics import parse_rubric, primary_rubric, rubric_text


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_primary_rubric_of_three_criteria(task: str) -> None:
    rubric = primary_rubric(task)
    assert len(rubric) == 3
    assert all(criterion.weight in range(1, 6) and criterion.description for criterion in rubric)
    assert max(criterion.weight for criterion in rubric) == rubric[0].weight == 5


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"task 'maths' is not one of chat, math, code, safety\. Did you mean 'math'\?"):
        primary_rubric("maths")


def test_a_rubric_file_may_have_blank_lines_crlf_and_a_byte_order_mark() -> None:
    assert parse_rubric("\ufefftone (2): is friendly\r\n\r\n  facts (5): is right  \r\n") == (
        Criterion("tone", "is friendly", 2),
        Criterion("facts", "is right", 5),
    )


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tone: is friendly", "line 2 is not 'NAME"),
        ("tone (2) is friendly", "line 2 is not 'NAME"),
        ("tone (2):is friendly", "line 2 is not 'NAME"),
        ("tone (2):", "line 2 is not 'NAME"),
        ("tone (0): is friendly", "line 2 is not 'NAME"),
        ("tone (6): is friendly", "line 2 is not 'NAME"),
        ("tone (02): is friendly", "line 2 is not 'NAME"),
        ("tone (2.5): is friendly", "line 2 is not 'NAME"),
        ("tone (２): is friendly", "line 2 is not 'NAME"),
        ("tone (" + "9" * 5000 + "): is friendly", "line 2 is not 'NAME"),
        ("to<ne (2): is friendly", "line 2 is not 'NAME"),
        ("n" * 61 + " (2): is friendly", "line 2 is not 'NAME"),
        ("facts (2): is friendly", "line 2 names 'facts' again"),
    ],
)
def test_a_line_in_another_form_is_refused_by_its_number(line: str, found: str) -> None:
    with pytest.raises(UserError) as error:
        parse_rubric("facts (5): is right\n" + line, "my.txt")
    assert str(error.value).startswith("my.txt " + found)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("text", ["", " \n\r\n", "\ufeff"])
def test_a_rubric_without_a_criterion_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"my\.txt holds no criterion; write lines 'NAME \(WEIGHT\): MEANING'"):
        parse_rubric(text, "my.txt")


@given(
    st.lists(
        st.builds(
            Criterion,
            st.from_regex(r"[^\s():<>‹\ufeff]([^\n\r():<>‹]{0,10}[^\s():<>‹])?", fullmatch=True),
            st.from_regex(r"\S([^\n\r]{0,30}\S)?", fullmatch=True),
            st.integers(1, 5),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda criterion: criterion.name,
    )
)
def test_a_rubric_written_and_read_is_the_same_rubric(rubric: list[Criterion]) -> None:
    assert parse_rubric(rubric_text(tuple(rubric))) == tuple(rubric)
