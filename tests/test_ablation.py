"""The ablation: its arms are recipes, its comparisons are what they say."""

from __future__ import annotations

import doctest
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from patarm_lite.metrics import row_to_pair
from patarm_lite.recipe import load_recipe, shipped_recipes

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def ablation() -> Any:
    """benchmarks/ablation.py as a module."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("ablation_benchmark", FOLDER / "ablation.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def test_its_examples_hold(ablation: Any) -> None:
    assert doctest.testmod(ablation).attempted > 2
    assert doctest.testmod(ablation).failed == 0


def test_every_arm_is_a_recipe_that_differs_from_its_reference(ablation: Any) -> None:
    made = {arm.name: load_recipe(str(ablation.RECIPE), arm.settings) for arm in ablation.ARMS}
    assert len(made) == len(ablation.ARMS) >= 20
    for arm in ablation.ARMS:
        if arm.name != "base":
            changed = made[arm.name] != made[arm.against] or arm.method != "par"
            assert changed, arm.name


def test_every_arm_begins_from_the_cold_start_of_its_seed(ablation: Any) -> None:
    """Taken over, a cold start must be the same: no arm changes what it is made of."""
    made = [load_recipe(str(ablation.RECIPE), arm.settings) for arm in ablation.ARMS]
    assert len({(recipe.model.model_dump_json(), recipe.sft.model_dump_json()) for recipe in made}) == 1


def test_every_question_has_arms(ablation: Any) -> None:
    arms = ablation.BY_NAME
    assert {"constant", "auc", "bradley_terry", "saturating", "expected", "shared", "no_rubric"} <= arms.keys()
    assert {"scalar", "rejection", "noise10", "noise20", "noise30", "pairs32", "n2", "n4"} <= arms.keys()


@pytest.fixture
def runs(little_run: Path, tmp_path: Path, ablation: Any) -> Path:
    """Two seeds of base and two arms: `constant` wins every pair that base does not, `plain` loses them all."""
    for seed in (1, 2):
        for arm in ("base", "constant", "plain"):
            folder = ablation.folder_of(tmp_path, arm, seed)
            shutil.copytree(little_run, folder)
            judged = [json.loads(line) for line in (folder / "heldout_after.jsonl").read_text().splitlines()]
            for row in judged:
                row |= {"score": _score(arm, row["side"]), "problem": None, "rubric": [], "criterion_scores": []}
                row |= {"faults": [], "text": "x", "expected": None, "mass": None}
            text = "".join(json.dumps(row) + "\n" for row in judged)
            (folder / "heldout_after.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def _score(arm: str, side: str) -> int:
    return {"base": 5, "constant": 6 if side == "chosen" else 5, "plain": 4 if side == "chosen" else 5}[arm]


def test_an_arm_is_compared_with_its_reference_on_the_same_pairs(runs: Path, ablation: Any) -> None:
    arms = [ablation.BY_NAME[name] for name in ("base", "constant", "plain")]
    found = ablation.collect(runs, arms, [1, 2, 3])
    assert found["seeds"] == [1, 2]
    base, constant, plain = found["rows"]
    assert base["accuracy"]["value"] == 0.5 and base["difference"] is None
    assert constant["difference"]["value"] == 0.5 and constant["difference"]["says"] == "holds: better"
    assert plain["difference"]["value"] == -0.5 and plain["difference"]["says"] == "holds: worse"
    written = dict(ablation.files(found))
    assert set(written) == {"ablation.json", "ablation.md", "ablation.svg", "ablation.html"}
    assert "| form of PAR | constant |" in written["ablation.md"]
    page = written["ablation.html"]
    said = "Holds (the interval over training runs excludes zero): form of PAR, constant +50.0; share for findings, 0: "
    for text in (written["ablation.md"], page):
        assert f"{said}plain PAR -50.0." in text
        assert "Not shown (which is not: equal): nothing." in text
    assert "| grpo.form | graded | constant (+50.0 points) | holds: better |" in written["ablation.md"]
    assert "<td>constant (+50.0 points)</td><td class=num>holds: better</td>" in page
    assert "<td class=num>+0.500<br><small>+0.500, +0.500</small></td>" in page
    assert page.count("<tr class=group><th colspan=6>form of PAR</th></tr>") == 1 and "<script" not in page


def test_what_the_page_says_of_the_recipes_is_true_of_all_of_them(ablation: Any) -> None:
    """Of all but `smoke`, which only shows that everything runs."""
    names = shipped_recipes().keys() - {"smoke"}
    recipes = [load_recipe(name) for name in names]
    assert len(recipes) > 5
    for key in ablation.SETTINGS.values():
        assert len({getattr(recipe.grpo, key) for recipe in recipes}) == 1, key


def test_runs_on_other_held_out_pairs_are_not_compared(runs: Path, ablation: Any) -> None:
    about = ablation.folder_of(runs, "constant", 1) / "run.json"
    data = json.loads(about.read_text())
    data["data"]["sha256_heldout"] = "other"
    about.write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="not the same held-out pairs"):
        ablation.collect(runs, [ablation.BY_NAME["base"], ablation.BY_NAME["constant"]], [1])


def test_the_pairs_of_a_finished_run_are_in_the_order_of_what_they_earned(runs: Path, ablation: Any) -> None:
    folder = ablation.folder_of(runs, "base", 1)
    heldout = [row_to_pair(json.loads(line)) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    found = ablation.result(folder, ablation.BY_NAME["base"], 1)
    assert found["pairs"]["prompts"] == [str(pair.prompt) for pair in heldout]
    assert found["n"] == len(found["pairs"]["earned"]) == len(heldout)
