"""PAR taken apart on the arena: one change at a time, from the same cold-started judge, over seeds.

    python benchmarks/ablation.py                                  # every arm, seeds 1 2 3: about 4 CPU hours
    python benchmarks/ablation.py --seeds 1 --arms base constant   # some
    python benchmarks/ablation.py --show                           # tables and page from what is finished

Each seed has one cold start, that of its arm `base` (`benchmarks/ablation.yaml`); every other arm takes it over with
`sft.init` and is the run that `patarm-lite train` makes with the arm's `--set`. Finished runs in OUT are kept and read,
interrupted ones resumed: the command can be typed again at any time, and with --jobs 2 two runs share the machine.
Arms that stop by the clock (rejection sampling, scalar head) get the minutes that GRPO took in `base` and run last, one
at a time.

An arm is compared with its reference on the same held-out pairs, seed by seed. Two intervals stand beside the mean
difference: over prompts (bootstrap, given these trained judges) and over seeds (Student's t: what another training run
would do, wide with three). `holds` means that the one over seeds excludes zero, `likely` that all seeds agree and the
one over prompts excludes it; anything else is no difference shown.

Writes OUT/ablation.json, ablation.md, ablation.html and ablation.svg.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from baselines import STAGES, finish, minutes_of, read
from numpy.typing import NDArray

from patarm_lite.evals.resampled import figure, ratio
from patarm_lite.metrics import earned, row_to_pair, rows_to_judged
from patarm_lite.page import (
    FIRST,
    GRID,
    INK,
    MUTED,
    SECOND,
    THIRD,
    caption,
    chart,
    document,
    escape,
    plot,
    section,
    stacked,
    table,
)
from patarm_lite.recipe import load_recipe
from patarm_lite.training.run_folder import read_lines

RECIPE = Path(__file__).with_name("ablation.yaml")
Json = dict[str, Any]
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Number of seeds -> 97.5 % quantile of Student's t with one degree of freedom less."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One change. `against`: the arm it is compared with. `x`: where it stands on its question's curve."""

    name: str
    question: str
    words: str
    settings: tuple[str, ...] = ()
    against: str = "base"
    method: str = "par"
    x: float | None = None


FORM, OTHER, FINDINGS = "form of PAR", "the other side's mean", "share for findings"
RUBRIC, INSTEAD, NOISE = "rubric", "instead of GRPO", "label noise"
PAIRS, SAME_PAIRS, SAME_ROLLOUTS = "training pairs", "n, same pairs a step", "n, same rollouts a step"
ARMS = (
    Arm("base", "", "graded PAR, n = 8, 2,000 pairs, half of PAR for findings"),
    Arm("constant", FORM, "constant", ("grpo.form=constant",)),
    Arm("auc", FORM, "auc (rollouts beaten)", ("grpo.form=auc",)),
    Arm("bradley_terry", FORM, "bradley_terry (mean sigmoid)", ("grpo.form=bradley_terry",)),
    Arm("saturating", FORM, "saturating (at 3 points)", ("grpo.form=saturating",)),
    Arm("expected", OTHER, "from expected scores", ("grpo.other_side=expected",)),
    Arm("plain", FINDINGS, "0: plain PAR", ("grpo.findings=0",)),
    Arm("shared", RUBRIC, "shared: written once, before any response", ("grpo.writes=evaluation",)),
    Arm("no_rubric", RUBRIC, "none: the score alone", ("grpo.writes=score", "grpo.findings=0"), against="plain"),
    Arm("noise10", NOISE, "10 % of the labels flipped", ("data.shuffle_labels=0.1",), x=0.1),
    Arm("noise20", NOISE, "20 %", ("data.shuffle_labels=0.2",), x=0.2),
    Arm("noise30", NOISE, "30 %", ("data.shuffle_labels=0.3",), x=0.3),
    Arm("pairs32", PAIRS, "32 (seen 30 times)", ("arena.train_pairs=32",), x=32),
    Arm("pairs128", PAIRS, "128 (7.5 times)", ("arena.train_pairs=128",), x=128),
    Arm("pairs512", PAIRS, "512 (1.9 times)", ("arena.train_pairs=512",), x=512),
    Arm("n2", SAME_PAIRS, "2 (a quarter of the rollouts)", ("grpo.n=2",), x=2),
    Arm("n4", SAME_PAIRS, "4 (half of them)", ("grpo.n=4",), x=4),
    Arm("n2_wide", SAME_ROLLOUTS, "2, with 32 pairs", ("grpo.n=2", "grpo.pairs_per_step=32"), x=2),
    Arm("n4_wide", SAME_ROLLOUTS, "4, with 16 pairs", ("grpo.n=4", "grpo.pairs_per_step=16"), x=4),
    Arm("rejection", INSTEAD, "rejection sampling, same minutes", method="rejection"),
    Arm("scalar", INSTEAD, "scalar head (Bradley-Terry), same minutes", method="scalar"),
)
BASE_X = {NOISE: 0.0, PAIRS: 2000.0, SAME_PAIRS: 8.0, SAME_ROLLOUTS: 8.0}
"""Where `base` stands on a question's curve."""
BY_NAME = {arm.name: arm for arm in ARMS}


def folder_of(out: Path, arm: str, seed: int) -> Path:
    return out / f"seed{seed}-{arm}"


def train(out: Path, arm: Arm, seed: int) -> None:
    """Bring one arm of one seed to its end."""
    folder, base = folder_of(out, arm.name, seed), folder_of(out, "base", seed)
    settings = list(arm.settings)
    if arm.name != "base":
        settings.append(f"sft.init={base.resolve()}")
    if arm.method != "par":
        settings.append(f"minutes={minutes_of(read(base / 'run.json')['stages']['grpo']):.4f}")
    asked = ["--set", *settings] if settings else []
    finish(folder, [str(RECIPE), "--seed", str(seed), "--method", arm.method, "--offline", *asked])


def train_all(out: Path, arms: Sequence[Arm], seeds: Sequence[int], jobs: int) -> None:
    """Cold starts first, then seed after seed; what the clock stops, last and alone."""

    def together(tasks: Sequence[tuple[Arm, int]], at_once: int) -> None:
        with ThreadPoolExecutor(at_once) as pool:
            for task in [pool.submit(train, out, arm, seed) for arm, seed in tasks]:
                task.result()

    together([(BY_NAME["base"], seed) for seed in seeds], jobs)
    rest = [(arm, seed) for seed in seeds for arm in arms if arm.name != "base"]
    together([task for task in rest if task[0].method == "par"], jobs)
    together([task for task in rest if task[0].method != "par"], 1)


# --- reading ---


def result(folder: Path, arm: Arm, seed: int) -> Json:
    """What one finished run says; `earned` by held-out pair stands under `pairs`, for paired differences."""
    summary, about = read(folder / "summary.json"), read(folder / "run.json")
    heldout = [row_to_pair(row) for row in read_lines(folder / "heldout.jsonl")]
    if arm.method == "scalar":
        scores = [row["score"] for row in read_lines(folder / "heldout_scores.jsonl")]
        got = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(scores[::2], scores[1::2], strict=True)]
    else:
        got = earned(rows_to_judged(read_lines(folder / "heldout_after.jsonl"), heldout)).tolist()
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    k = summary["heldout"]["votes"]
    stage = about["stages"][STAGES.get(arm.method, arm.method)]
    steps = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == "grpo"]
    return {
        "arm": arm.name,
        "seed": seed,
        "n": len(heldout),
        "sha256_heldout": about["data"]["sha256_heldout"],
        "before": before["accuracy"],
        "accuracy": after["accuracy"],
        "mean_of_k": after[f"accuracy_mean{k}"],
        "k": k,
        "ties": after["ties"],
        "unreadable": after["unreadable"] if arm.method != "scalar" else None,
        "findings_true": after.get("detection_mean"),
        "quality": after["spearman_quality"],
        "length": after["spearman_length"],
        "dead_groups": mean(row["dead_groups"] for row in steps) if steps else None,
        "curve": [row["win_share"] for row in steps],
        "minutes": stage["cpu_seconds"] / 60,
        "cpu_hours": summary["cpu_seconds"] / 3600,
        "pairs": {"prompts": [str(pair.prompt) for pair in heldout], "earned": got},
    }


def collect(out: Path, arms: Sequence[Arm], seeds: Sequence[int]) -> Json:
    """All finished runs, and each arm against its reference."""
    runs: dict[str, list[Json]] = {}
    for arm in arms:
        done = [seed for seed in seeds if (folder_of(out, arm.name, seed) / "summary.json").is_file()]
        runs[arm.name] = [result(folder_of(out, arm.name, seed), arm, seed) for seed in done]
    rows = []
    for arm in arms:
        if not runs[arm.name]:
            continue
        row: Json = {"arm": arm.name, "question": arm.question, "words": arm.words, "x": arm.x, "method": arm.method}
        row["settings"], row["against"] = list(arm.settings), arm.against
        row["runs"] = [{key: value for key, value in run.items() if key != "pairs"} for run in runs[arm.name]]
        row["accuracy"] = _over_prompts([(run, run["pairs"]["earned"]) for run in runs[arm.name]])
        row["difference"] = None if arm.name == "base" else _difference(runs[arm.name], runs.get(arm.against, []))
        rows.append(row)
    seen = sorted({run["seed"] for found in runs.values() for run in found})
    hours = sum(run["cpu_hours"] for found in runs.values() for run in found)
    return {"seeds": seen, "cpu_hours": hours, "rows": rows}


def _over_prompts(runs: Sequence[tuple[Json, Sequence[float]]]) -> Json | None:
    """Mean over all pairs of all seeds with its interval over prompts. Every seed has as many pairs."""
    groups = [(run["seed"], prompt) for run, _ in runs for prompt in run["pairs"]["prompts"]]
    values = [value for _, found in runs for value in found]
    return figure(groups, [values, np.ones(len(values))], ratio, len(values))


def _difference(runs: Sequence[Json], reference: Sequence[Json]) -> Json | None:
    """The arm's accuracy minus its reference's on the seeds that both have."""
    other = {run["seed"]: run for run in reference}
    both = [(run, other[run["seed"]]) for run in runs if run["seed"] in other]
    if not both:
        return None
    changes = []
    for run, before in both:
        if run["sha256_heldout"] != before["sha256_heldout"]:
            raise SystemExit(f"{run['arm']} and {before['arm']}, seed {run['seed']}: not the same held-out pairs")
        changes.append([a - b for a, b in zip(run["pairs"]["earned"], before["pairs"]["earned"], strict=True)])
    found = _over_prompts([(run, change) for (run, _), change in zip(both, changes, strict=True)])
    assert found is not None
    by_seed = {run["seed"]: mean(change) for (run, _), change in zip(both, changes, strict=True)}
    low, high = over_seeds(list(by_seed.values()))
    return {**found, "by_seed": by_seed, "seeds_low": low, "seeds_high": high, "says": says(found, by_seed, low, high)}


def over_seeds(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean over training runs by Student's t; None with one run.

    >>> low, high = over_seeds([0.01, 0.02, 0.03])            # 0.02 -+ 4.303 * 0.01 / sqrt(3)
    >>> round(low, 4), round(high, 4)
    (-0.0048, 0.0448)
    """
    if len(values) < 2:
        return None, None
    half = T_975[len(values)] * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def says(over_prompts: Mapping[str, float], by_seed: Mapping[int, float], low: float | None, high: float | None) -> str:
    """`holds`, `likely` or `not shown`, and the direction.

    >>> says({"low": 0.01, "high": 0.03}, {1: 0.02, 2: 0.01}, -0.04, 0.07), says({"low": -1, "high": 1}, {1: 0.1}, None, None)
    ('likely better', 'not shown')
    """  # noqa: E501
    values = list(by_seed.values())
    way = "better" if mean(values) > 0 else "worse"
    if low is not None and high is not None and (low > 0 or high < 0):
        return f"holds: {way}"
    agree = all(v > 0 for v in values) or all(v < 0 for v in values)
    if len(values) > 1 and agree and (over_prompts["low"] > 0 or over_prompts["high"] < 0):
        return f"likely {way}"
    return "not shown"


# --- in words ---

SETTINGS = {
    FORM: "form",
    OTHER: "other_side",
    FINDINGS: "findings",
    RUBRIC: "writes",
    SAME_PAIRS: "n",
    SAME_ROLLOUTS: "n",
}
"""Questions that are about a setting of recipes -> its key in their section `grpo`."""
TAKEN = ("setting", "in the recipes", "instead", "says")
WEIGHED = {
    "holds": "Holds (the interval over training runs excludes zero)",
    "likely": "Likely (all seeds agree, and the interval over prompts excludes zero)",
    "not shown": "Not shown (which is not: equal)",
}


def conclusions(found: Json) -> list[str]:
    """What holds, what is likely and what is not shown: a sentence each."""
    rows = [row for row in found["rows"] if row["difference"] is not None]
    said = []
    for begins, words in WEIGHED.items():
        named = [_moved(row) for row in rows if row["difference"]["says"].startswith(begins)]
        said.append(f"{words}: {'; '.join(named) or 'nothing'}.")
    return said


def _moved(row: Json) -> str:
    return f"{row['question']}, {row['words']} {_points(row)}"


def _points(row: Json) -> str:
    return f"{100 * row['difference']['value']:+.1f}"


def taken(found: Json) -> list[list[str]]:
    """Each setting with what the recipes have, and what every other value got instead."""
    recipe = load_recipe("tiny")
    rows = []
    for row in found["rows"]:
        key = SETTINGS.get(row["question"])
        if key is not None and row["difference"] is not None:
            words = f"{row['words']} ({_points(row)} points)"
            rows.append([f"grpo.{key}", str(getattr(recipe.grpo, key)), words, row["difference"]["says"]])
    return rows


# --- tables ---

COMPARED = ("question", "arm", "accuracy", "difference, over prompts", "over seeds", "by seed", "says")
BESIDE = (
    "question", "arm", "before", "mean of 4", "unreadable", "findings true", "quality", "length", "dead groups",
    "CPU min",
)  # fmt: skip


def compared(found: Json, put: Callable[[str, str], str] = "{} [{}]".format) -> list[list[str]]:
    """One row an arm: its accuracy, and the difference to its reference; `put` sets an interval to its figure."""
    rows = []
    for row in found["rows"]:
        one, change = row["accuracy"], row["difference"]
        cells = [row["question"], row["words"], put(f"{one['value']:.3f}", f"{one['low']:.3f}, {one['high']:.3f}")]
        if change is None:
            rows.append([*cells, "", "", "", "the reference" if row["arm"] == "base" else "no reference yet"])
            continue
        cells.append(put(f"{change['value']:+.3f}", f"{change['low']:+.3f}, {change['high']:+.3f}"))
        over = (change["seeds_low"], change["seeds_high"])
        cells.append("one seed" if over[0] is None else f"[{over[0]:+.3f}, {over[1]:+.3f}]")
        cells.append(", ".join(f"{value:+.3f}" for value in change["by_seed"].values()))
        rows.append([*cells, change["says"]])
    return rows


def beside(found: Json) -> list[list[str]]:
    """One row an arm: what stands beside its accuracy, means over seeds."""
    columns = (
        ("before", "{:.3f}"), ("mean_of_k", "{:.3f}"), ("unreadable", "{:.1%}"), ("findings_true", "{:.3f}"),
        ("quality", "{:.2f}"), ("length", "{:.2f}"), ("dead_groups", "{:.2f}"), ("minutes", "{:.1f}"),
    )  # fmt: skip
    return [
        [row["question"], row["words"], *(_mean(row["runs"], key, form) for key, form in columns)]
        for row in found["rows"]
    ]


def _mean(runs: Sequence[Json], key: str, form: str) -> str:
    known = [run[key] for run in runs if run[key] is not None]
    return form.format(mean(known)) if known else ""


def notes(found: Json) -> list[str]:
    first = found["rows"][0]["runs"][0]
    against = ", ".join(f"{row['words']} with {BY_NAME[row['against']].words}" for row in found["rows"]
                        if row["against"] != "base")  # fmt: skip
    return [
        f"Recipe {RECIPE.stem}, seeds {', '.join(map(str, found['seeds']))}; each with {first['n']} held-out pairs, "
        f"{first['k']} judgements a side, decoding free. Accuracy is that of one judgement: a tie earns half, an "
        "unreadable side nothing. All figures are means over seeds, taken at the last step.",
        "Every arm of a seed begins from the same weights and is compared with base"
        + (f" ({against})" if against else "")
        + ". Over prompts: 95 % bootstrap, given these judges. Over seeds: 95 % by Student's t over training runs. "
        "'holds': the one over seeds excludes zero; 'likely': all seeds agree and the one over prompts excludes it. "
        f"With {len(found['rows']) - 1} comparisons about one in twenty would be called different by chance.",
        "Findings true: share of written yes/no findings that are true. Quality, length: rank correlation of the score "
        "with the response's true quality and its length. Dead groups: share of groups whose rollouts all earned the "
        "same. CPU min: of the stage after the cold start.",
        f"{found['cpu_hours']:.1f} CPU hours in all, the cold starts included.",
    ]  # fmt: skip


def markdown(found: Json) -> str:
    grids = [(COMPARED, compared(found)), (BESIDE, beside(found)), (TAKEN, taken(found))]
    lines = []
    for header, rows in grids:
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += [*("| " + " | ".join(row) + " |" for row in rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in (*conclusions(found), *notes(found))), ""])


# --- plots ---

SERIES = ((FIRST, "-", "o"), (SECOND, "--", "s"), (THIRD, "-.", "^"), (INK, ":", "v"), (MUTED, (0, (5, 1)), "D"))
LIGHT = {INK: "#1b1f24", MUTED: "#5b6470", GRID: "#d9dde3", FIRST: "#2563eb", SECOND: "#b45309", THIRD: "#0f7a5e"}
"""The page's colours where no style sheet gives them."""
Draw = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: its title, how to read it, its size in inches, what draws it, and the same in words."""

    title: str
    words: str
    inches: tuple[float, float]
    draw: Draw
    said: str


def panels(found: Json) -> list[Panel]:
    """Differences with intervals, curves of what has a scale, and how the forms learn."""
    shown = [row for row in found["rows"] if row["difference"] is not None]
    made = []
    if shown:
        said = "; ".join(
            f"{row['question']}, {row['words']}: {_points(row)} points, {row['difference']['says']}" for row in shown
        )
        words = (
            "Accuracy of one judgement minus that of the reference, points. Thick: 95 % over prompts; thin: over seeds "
            "(cut at the edge); small marks: single seeds. Round: a difference is shown; diamond: none is."
        )
        size = (8.4, 0.9 + 0.27 * len(shown))
        made.append(Panel("One change at a time", words, size, lambda axes: _differences(axes, shown), said))
    for title, questions in (
        ("Label noise", (NOISE,)),
        ("Training pairs", (PAIRS,)),
        ("Rollouts a side (n)", (SAME_PAIRS, SAME_ROLLOUTS)),
    ):
        curves = [(question, _curve(found, question)) for question in questions]
        if any(len(points) > 1 for _, points in curves):
            said = "; ".join(
                f"{question}: " + ", ".join(f"{x:g} {row['accuracy']['value']:.3f}" for x, row in points)
                for question, points in curves
            )
            words = "Accuracy of one judgement, with 95 % over prompts; small marks: single seeds."
            made.append(Panel(title, words, (4.4, 2.9), partial(_scale, curves=curves), said))
    for title, names in (
        ("Learning, by form of PAR", ("base", "constant", "auc", "bradley_terry", "saturating")),
        ("Learning, by label noise", ("base", "noise10", "noise20", "noise30")),
    ):
        lines = [line for name in names if (line := _learning_curve(found, name)) is not None]
        if len(lines) > 1:
            said = ", ".join(f"{label}: ends at {curve[-1]:.2f}" for label, _, curve in lines)
            words = "Share of training pairs whose preferred side has the higher mean (mean of 15 steps and of seeds)."
            made.append(Panel(title, words, (4.4, 2.9), partial(_learning, lines=lines), said))
    return made


def _differences(axes: Any, rows: Sequence[Json]) -> None:
    labels = []
    for place, row in enumerate(reversed(rows)):
        change = row["difference"]
        sure = change["says"] != "not shown"
        colour = (FIRST if change["value"] > 0 else SECOND) if sure else MUTED
        if change["seeds_low"] is not None:
            axes.plot([100 * change["seeds_low"], 100 * change["seeds_high"]], [place] * 2, color=colour, linewidth=0.9)
        axes.plot([100 * change["low"], 100 * change["high"]], [place] * 2, color=colour, linewidth=3.2)
        axes.plot([100 * change["value"]], [place], "o" if sure else "D", color=colour, markersize=6)
        seeds = [100 * value for value in change["by_seed"].values()]
        axes.plot(seeds, [place + 0.3] * len(seeds), "|", color=MUTED, markersize=6)
        labels.append(f"{row['question']}: {row['words']}")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(-0.6, len(labels) - 0.3)
    shown = [100 * row["difference"][key] for row in rows for key in ("low", "high")]
    shown += [100 * value for row in rows for value in row["difference"]["by_seed"].values()]
    axes.set_xlim(min([*shown, -1]) - 1.5, max([*shown, 1]) + 1.5)
    axes.set_xlabel("points of accuracy")
    axes.grid(axis="x", color=GRID, linewidth=0.6)


def _curve(found: Json, question: str) -> list[tuple[float, Json]]:
    """(x, row) of the arms of a question, the base among them."""
    rows = [(row["x"], row) for row in found["rows"] if row["question"] == question and row["x"] is not None]
    return sorted([*rows, (BASE_X[question], found["rows"][0])], key=lambda one: one[0])


def _scale(axes: Any, curves: Sequence[tuple[str, Sequence[tuple[float, Json]]]]) -> None:
    for (colour, dash, marker), (question, points) in zip(SERIES, curves, strict=False):
        x, figures = [at for at, _ in points], [row["accuracy"] for _, row in points]
        below = [one["value"] - one["low"] for one in figures]
        above = [one["high"] - one["value"] for one in figures]
        axes.errorbar(
            x,
            [one["value"] for one in figures],
            yerr=[below, above],
            marker=marker,
            color=colour,
            linestyle=dash,
            capsize=3,
            markersize=5,
            label=question.partition(", ")[2],
        )
        for at, row in points:
            axes.plot([at] * len(row["runs"]), [run["accuracy"] for run in row["runs"]], "_", color=MUTED, markersize=9)
    question = curves[0][0]
    if question == PAIRS:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(x, [f"{at:.0%}" if question == NOISE else f"{at:,.0f}" for at in x])
    axes.set_ylabel("accuracy")
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8, loc="lower right", labelcolor=INK)


def _learning_curve(found: Json, name: str) -> tuple[str, NDArray[np.float64], NDArray[np.float64]] | None:
    """Label, steps and smoothed share of pairs won, mean of seeds; None where the arm has no run."""
    runs = next((row["runs"] for row in found["rows"] if row["arm"] == name), [])
    curves = [run["curve"] for run in runs if run["curve"]]
    if not curves:
        return None
    shortest = min(map(len, curves))
    whole = np.mean([curve[:shortest] for curve in curves], axis=0)
    width = min(15, shortest)
    smooth = np.convolve(whole, np.ones(width) / width, mode="valid")
    label = "graded, no noise" if name == "base" else BY_NAME[name].words.partition(" (")[0]
    return label.removesuffix(" of the labels flipped"), np.arange(len(smooth)) + width / 2, smooth


def _learning(axes: Any, lines: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]]) -> None:
    for (colour, dash, _), (label, steps, curve) in zip(SERIES, lines, strict=False):
        axes.plot(steps, curve, color=colour, linestyle=dash, label=label)
    axes.set_xlabel("GRPO step")
    axes.set_ylabel("pairs won")
    axes.legend(frameon=False, fontsize=7, loc="best", labelcolor=INK)


def picture(made: Sequence[Panel]) -> str:
    """All plots as one SVG file, for the documentation."""
    import matplotlib
    from matplotlib.figure import Figure

    first, others = made[0], made[1:]
    rows = -(-len(others) // 2)
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "ablation", "font.size": 9, "text.parse_math": False, "text.color": INK,
        "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.edgecolor": GRID,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.0, first.inches[1] + 3.0 * rows), layout="constrained")
        top, *rest = figure.subfigures(1 + bool(rows), 1, height_ratios=[first.inches[1], *[3.0 * rows] * bool(rows)],
                                       squeeze=False)[:, 0]  # fmt: skip
        places = [top.add_subplot(), *(rest[0].subplots(rows, 2, squeeze=False).flat if rest else [])]
        for axes, one in zip(places, made, strict=False):
            axes.grid(axis="y", color=GRID, linewidth=0.6)
            axes.tick_params(length=0)
            one.draw(axes)
            axes.set_title(one.title, loc="left", fontsize=10)
        for axes in places[len(made) :]:
            axes.set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    for name, colour in LIGHT.items():
        text = text.replace(name, colour)
    return text


KEPT = (
    "A recipe changes where another value is shown to be better over training runs; none was tuned with more steps or "
    "another learning rate than the reference has."
)


def _grouped(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Rows that begin with their question, under a heading a question."""
    grouped: list[Sequence[str]] = []
    for question, same in groupby(rows, key=itemgetter(0)):
        grouped += [[question]] if question else []
        grouped += [cells for _, *cells in same]
    return grouped


def page(found: Json, made: Sequence[Panel]) -> str:
    """One HTML page that opens offline."""
    charts = [
        chart(one.title, one.words, plot(one.title, one.inches, one.draw, lambda one=one: one.said, fitted=True))  # type: ignore[misc]
        for one in made
    ]
    facts = f"recipe {RECIPE.stem}, seeds {', '.join(map(str, found['seeds']))}, {found['cpu_hours']:.1f} CPU hours"
    return document(
        "PAR taken apart",
        [
            f"<header><h1>PAR taken apart</h1><p class=facts>{escape(facts)}</p></header>",
            *charts[:1],
            f"<div class=charts>{''.join(charts[1:])}</div>",
            section("What holds, and what does not", "".join(map(caption, conclusions(found)))),
            section("What the recipes take from it", table(TAKEN, taken(found), 3) + caption(KEPT)),
            section("Every arm", table(COMPARED[1:], _grouped(compared(found, stacked)))),
            section("What stands beside", table(BESIDE[1:], _grouped(beside(found)))),
            section("How to read this", "".join(map(caption, notes(found)))),
        ],
    )


def files(found: Json) -> Iterator[tuple[str, str]]:
    made = panels(found)
    yield "ablation.json", json.dumps(found, indent=1) + "\n"
    yield "ablation.md", markdown(found)
    yield "ablation.html", page(found, made)
    if made:
        yield "ablation.svg", picture(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=list(BY_NAME), choices=list(BY_NAME), metavar="ARM")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of runs, tables and page")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--show", action="store_true", help="train nothing: read what is finished")
    given = parser.parse_args()
    arms = [BY_NAME[name] for name in dict.fromkeys(["base", *given.arms])]
    if not given.show:
        train_all(given.out, arms, given.seeds, given.jobs)
    found = collect(given.out, arms, given.seeds)
    if not found["rows"]:
        raise SystemExit(f"{given.out} holds no finished run of seeds {given.seeds}; leave out --show")
    for name, text in files(found):
        part = given.out / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(given.out / name)
    print(markdown(found))
    print(f"page: {given.out / 'ablation.html'}", file=sys.stderr)


if __name__ == "__main__":
    main()
