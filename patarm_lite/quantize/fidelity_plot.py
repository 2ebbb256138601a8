"""The picture of a fidelity report: size of each file against the accuracy it loses, with intervals."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from patarm_lite.errors import missing_extra

INK, MUTED, GRID = "#1f2328", "#57606a", "#d8dee4"
MARKS = {"constrained": ("o", "#0b5cad", 1.0), "free": ("s", "#b35900", -1.0)}


def plot(found: Mapping[str, Any], form: str) -> bytes:
    """The picture as `svg` or `png`.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("train", "matplotlib") from None
    settings = {"svg.fonttype": "none", "svg.hashsalt": "fidelity", "text.parse_math": False, "font.size": 9}
    with matplotlib.rc_context({**settings, "text.color": INK, "axes.labelcolor": INK}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, found)
        file = io.BytesIO()
        bare = dict.fromkeys(("Creator", "Date", "Format", "Type")) if form == "svg" else {"Software": None}
        figure.savefig(file, format=form, dpi=150, metadata=bare)
    return file.getvalue()


def _draw(axes: Any, found: Mapping[str, Any]) -> None:
    rows = sorted(found["files"], key=lambda row: row["bytes"])
    places = {row["type"]: place for place, row in enumerate(rows)}
    for decoding in found["decodings"]:
        marker, colour, side = MARKS.get(decoding, ("^", INK, 0.0))
        for number, row in enumerate(rows):
            part = row["decodings"][decoding]
            loss, low, high = (100 * part[key] for key in ("accuracy_loss", "accuracy_loss_low", "accuracy_loss_high"))
            axes.errorbar(
                places[row["type"]] + 0.1 * side,
                loss,
                yerr=[[max(0.0, loss - low)], [max(0.0, high - loss)]],
                fmt=marker,
                color=colour,
                markersize=5,
                capsize=3,
                linewidth=1.2,
                label=f"{decoding} decoding" if number == 0 else None,
            )
    axes.axhline(0, color=MUTED, linewidth=0.8)
    choice = found["choice"]
    if choice is not None:
        axes.axhline(100 * choice["max_loss"], color=MUTED, linewidth=0.8, linestyle="--", label="largest loss allowed")
    axes.set_xticks(range(len(rows)), [f"{row['type']}\n{_megabytes(row['bytes'])}" for row in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("file, by size")
    axes.set_ylabel("accuracy lost, points of 100")
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    axes.tick_params(length=0, colors=MUTED)
    axes.set_title(_title(found), loc="left", fontsize=9, wrap=True)
    axes.legend(frameon=False, fontsize=8, loc="best")


def _title(found: Mapping[str, Any]) -> str:
    reference = found["reference"]
    against = f"{reference['type']} ({_megabytes(reference['bytes'])})"
    return f"Accuracy lost against {against}, {found['n']} pairs, 95 % intervals\n{found['headline']}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e8 else f"{count / 1e9:.2f} GB"
