"""Every shipped recipe loads, says what it needs, and explains its keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from patarm_lite.cli import main
from patarm_lite.recipe import load_recipe, shipped_recipes

NAMES = sorted(shipped_recipes())


def test_the_recipes_of_the_checkout_are_shipped() -> None:
    folder = Path(__file__).resolve().parent.parent / "recipes"
    assert sorted(path.stem for path in folder.glob("*.yaml")) == NAMES
    assert {"tiny", "smoke"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_loads_under_its_own_name(name: str) -> None:
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_begins_with_what_it_is_and_needs(name: str) -> None:
    lines = shipped_recipes()[name].read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"# {name}: ")
    header = [line for line in lines if line.startswith("#")]
    for word in ("hardware:", "memory:", "time:", "command:", "expect:"):
        assert any(line.startswith(f"# {word} ") for line in header), f"no '# {word}' line"
    assert any(f"patarm-lite train {name}" in line for line in header)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_shipped_recipe_has_a_comment(name: str) -> None:
    lines = shipped_recipes()[name].read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if re.match(r"\s*[a-z_]+: *[^ #]", line) and " # " not in line]
    assert bare == []


@pytest.mark.parametrize("name", NAMES)
def test_what_show_prints_is_the_same_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", name]) == 0
    copy = tmp_path / "shown.yaml"
    copy.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(str(copy)) == load_recipe(name)


def test_show_keeps_values_that_yaml_could_misread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "odd.yaml"
    recipe.write_text(
        "name: 'no'\nsft: {source: file, file: 'a # b: [c].jsonl', lr: 1e-7}\n"
        "data: {pairs: [\"été\\n, x\", '1e-5'], map: {prompt: 'yes', chosen: '007'}}\n",
        encoding="utf-8",
    )
    assert main(["recipes", "show", str(recipe)]) == 0
    copy = tmp_path / "shown.yaml"
    copy.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(str(copy)) == load_recipe(str(recipe))
    assert load_recipe(str(copy)).data.pairs == ["été\n, x", "1e-5"]


def test_smoke_is_tiny_cut_short() -> None:
    tiny, smoke = load_recipe("tiny"), load_recipe("smoke")
    assert (smoke.model, smoke.protocol, smoke.arena) == (tiny.model, tiny.protocol, tiny.arena)
    assert smoke.grpo.steps == 20 < tiny.grpo.steps
    assert smoke.sft.steps < tiny.sft.steps
