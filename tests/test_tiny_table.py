"""What the tiny recipe promises, over three seeds and with flipped labels. Trains for most of an hour: slow.

Runs stand in $PATARM_TINY_TABLE (default runs/tiny-table) and finished ones are used again, so that
`python benchmarks/tiny.py` and this test share them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(os.environ.get("PATARM_TINY_TABLE") or ROOT / "runs" / "tiny-table")
SEEDS = ("seed 1", "seed 2", "seed 3")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    """Label -> summary of each run, from the benchmark's own command."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tiny.py"), "--out", str(OUT), "--control-seeds", "1"]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads((OUT / "table.json").read_text(encoding="utf-8"))


def held_out(table: dict[str, Any], label: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return table[label]["heldout"]["before"], table[label]["heldout"]["after"]


def gain(table: dict[str, Any], label: str) -> float:
    before, after = held_out(table, label)
    return after["accuracy"] - before["accuracy"]


def test_the_judge_gets_better_on_every_seed(table: dict[str, Any]) -> None:
    pairs = [held_out(table, seed) for seed in SEEDS]
    assert all(table[seed]["heldout"]["n"] >= 400 for seed in SEEDS)
    assert all(before["accuracy"] <= 0.70 for before, _ in pairs)
    assert min(after["accuracy"] for _, after in pairs) >= 0.85
    assert statistics.mean(after["accuracy"] for _, after in pairs) >= 0.88
    assert statistics.mean(after["accuracy_mean4"] for _, after in pairs) >= 0.92
    assert all(after["unreadable"] <= 0.01 for _, after in pairs)


def test_scores_move_from_length_to_quality(table: dict[str, Any]) -> None:
    for before, after in (held_out(table, seed) for seed in SEEDS):
        assert after["spearman_quality"] > before["spearman_quality"]
        assert after["spearman_length"] < before["spearman_length"]


def test_findings_stay_true_and_criteria_those_asked_for(table: dict[str, Any]) -> None:
    for before, after in (held_out(table, seed) for seed in SEEDS):
        assert after["detection_mean"] >= before["detection_mean"]
        assert after["named_asked"] >= 0.95


def test_without_true_labels_there_is_no_gain(table: dict[str, Any]) -> None:
    assert gain(table, "half of the labels flipped, seed 1") <= gain(table, "seed 1") / 4
    before, after = held_out(table, "all of the labels flipped, seed 1")
    assert after["accuracy"] <= before["accuracy"] - 0.05
