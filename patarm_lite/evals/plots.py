"""Plots that the pages of `bench`, `audit` and `compare` share: points with intervals in rows.

Two series are told apart by colour and by shape, a point that matters by a red diamond. Each plot is one
figure of `page.plot`, with its title, a sentence on how to read it, and the same in words for those who can't see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patarm_lite.page import BAD, FIRST, GRID, INK, MUTED, SECOND, chart, plot

WIDTH = 5.0
"""Inches. A plot is as wide as the page; labels stay readable at 500 pixels."""
STYLES = ((FIRST, "o"), (SECOND, "s"), (INK, "^"))


@dataclass(frozen=True, slots=True)
class Point:
    """A value, and its interval where it has one. `flagged`: drawn as what matters."""

    value: float
    low: float | None = None
    high: float | None = None
    flagged: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A row: series -> its point; `chance`: where a tick stands."""

    label: str
    points: Mapping[str, Point]
    chance: float | None = None


def rows_of_points(
    title: str,
    words: str,
    lines: Sequence[Line],
    axis: str,
    *,
    zero: float | None = None,
    limits: tuple[float, float] | None = None,
    digits: int = 1,
) -> str:
    """Points with intervals, one line a row, the first on top.

    Args:
        axis: what the values are, with their unit. zero: where a line stands through all rows.
        limits: of the axis; None: as the values need.
    """
    series = list(dict.fromkeys(name for line in lines for name in line.points))

    def draw(axes: Any) -> None:
        for name, (colour, shape) in zip(series, STYLES, strict=False):
            shift = 0.0 if len(series) == 1 else 0.36 * (0.5 - series.index(name) / (len(series) - 1))
            named = False
            for row, line in enumerate(reversed(lines)):
                point = line.points.get(name)
                if point is None:
                    continue
                low, high = (point.value if end is None else end for end in (point.low, point.high))
                axes.errorbar(
                    point.value,
                    row + shift,
                    xerr=[[max(0.0, point.value - low)], [max(0.0, high - point.value)]],
                    fmt="D" if point.flagged else shape,
                    color=BAD if point.flagged else colour,
                    markersize=6 if point.flagged else 5,
                    capsize=2.5,
                    linewidth=1.2,
                    label=None if named else name,
                )
                named = True
        chances = [(line.chance, row) for row, line in enumerate(reversed(lines)) if line.chance is not None]
        for number, (chance, row) in enumerate(chances):
            label = None if number else "chance"
            axes.plot([chance] * 2, [row - 0.38, row + 0.38], color=MUTED, linewidth=1, linestyle=":", label=label)
        if zero is not None:
            axes.axvline(zero, color=MUTED, linewidth=0.8)
        if limits is not None:
            axes.set_xlim(*limits)
        axes.set_ylim(-0.6, len(lines) - 0.4)
        axes.set_yticks(range(len(lines)), [line.label for line in reversed(lines)], fontsize=8)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(axis, fontsize=8)
        if len(series) > 1 or chances:
            legend(axes)

    picture = plot(
        title, (WIDTH, 0.75 + 0.27 * max(2, len(lines))), draw, lambda: f"{title}. {in_words(lines, digits)}", True
    )
    return chart(title, words, picture, rows=True)


def legend(axes: Any, columns: int = 3) -> None:
    """The series' names above the axes, where they cover nothing."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(
        handles, labels, loc="outside upper left", frameon=False, fontsize=8, labelcolor=INK, ncols=columns
    )


def in_words(lines: Sequence[Line], digits: int = 1) -> str:
    """What a plot shows, for those who can't see it.

    >>> in_words([Line("chat", {"judge": Point(66.66, 60, 70.04)}, chance=50)])
    'chat: judge 66.7 (60.0 to 70.0), chance 50.0'
    """
    found = []
    for line in lines:
        said = []
        for name, point in line.points.items():
            between = "" if point.low is None else f" ({point.low:.{digits}f} to {point.high:.{digits}f})"
            said.append(f"{name} {point.value:.{digits}f}{between}")
        said += [] if line.chance is None else [f"chance {line.chance:.{digits}f}"]
        found.append(f"{line.label}: {', '.join(said)}")
    return "; ".join(found)
