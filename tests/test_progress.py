"""What the progress line says is left."""

from __future__ import annotations

import pytest

from patarm_lite import progress
from patarm_lite.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_rest_takes_as_long_as_the_steps_so_far(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress("x", 10, even=False)
    clock[0] += 20
    shown.at(4)
    assert capsys.readouterr().err == "x 4/10    30 s left\n"


def test_steps_of_a_warm_up_foretell_the_rest_where_few_others_are_done(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers written side by side come late and together: the first one says nothing of how fast they are."""
    shown = Progress("x", 80, done=32, even=False, before=18.0)
    clock[0] += 15
    shown.at(33)
    assert capsys.readouterr().err == "x 33/80    47 s left\n"  # (18 + 15) / 33 a step, 47 steps


def test_steps_that_were_done_before_and_not_timed_foretell_nothing(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Progress("x", 10, done=8, even=False)
    clock[0] += 20
    shown.at(9)
    assert capsys.readouterr().err == "x 9/10    20 s left\n"
