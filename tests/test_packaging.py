"""What people install: one package, its data files, its extras."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import patarm_lite

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RECIPES = {path.name for path in (ROOT / "recipes").iterdir()}


def built(code: str, folder: Path) -> Path:
    """Call a hook of the build backend on the checkout; the file it wrote."""
    command = [sys.executable, "-c", f"import hatchling.build as b; print(b.{code})", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def python(code: str, folder: Path) -> str:
    """Run code in a folder outside the checkout; its output."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    return zipfile.ZipFile(built("build_wheel(__import__('sys').argv[1])", folder))


@pytest.fixture(scope="module")
def unpacked(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    wheel.extractall(folder)
    return folder


def test_the_wheel_holds_one_top_level_package(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert top == {"patarm_lite", f"patarm_lite-{patarm_lite.__version__}.dist-info"}


def test_the_wheel_holds_every_module_recipe_and_data_file(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    package = ROOT / "patarm_lite"
    sources = {p.relative_to(ROOT).as_posix() for p in package.rglob("*") if p.suffix in (".py", ".txt", ".typed")}
    assert sources <= names
    assert {f"patarm_lite/_recipes/{name}" for name in RECIPES} <= names
    assert {f"patarm_lite/_constraints/{name}.txt" for name in ("cpu", "unsloth", "colab")} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".ipynb_checkpoints")]


def test_the_installed_wheel_finds_its_recipes_and_its_command(unpacked: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r}); from patarm_lite.cli import main; main(['recipes'])"
    listed = python(code, tmp_path)
    assert {f"{line.split()[0]}.yaml" for line in listed.splitlines()} == {n for n in RECIPES if n.endswith(".yaml")}
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "patarm-lite = patarm_lite.cli:main" in entry_points.read_text()


def test_an_editable_install_runs_the_checkout(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    zipfile.ZipFile(built("build_editable(__import__('sys').argv[1])", tmp_path)).extractall(site)
    found = python(
        f"import site; site.addsitedir({str(site)!r})\n"
        "import patarm_lite.quantize, patarm_lite.recipe as r; print(patarm_lite.__file__, r.recipes_folder())",
        tmp_path,
    )
    assert found.split() == [str(ROOT / "patarm_lite" / "__init__.py"), str(ROOT / "recipes")]


def test_the_source_archive_holds_what_a_build_needs_and_not_the_link(tmp_path: Path) -> None:
    with tarfile.open(built("build_sdist(__import__('sys').argv[1])", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "patarm_lite/quantize/__init__.py", "recipes/tiny.yaml"} <= names
    assert not [name for name in names if name == "quantize" or name.startswith("quantize/")]


def test_the_base_install_is_light() -> None:
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {"typer", "pyyaml", "pydantic", "numpy"}


def test_the_extras_are_those_of_the_readme() -> None:
    assert set(PROJECT["optional-dependencies"]) == {
        "train",
        "judge",
        "export",
        "bench-model",
        "unsloth",
        "dev",
        "all",
    }


@pytest.mark.parametrize("file", sorted((ROOT / "constraints").glob("*.txt")), ids=lambda path: path.name)
def test_a_constraints_file_agrees_with_the_extras(file: Path) -> None:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    stated = [Requirement(line) for lines in lists for line in lines]
    bounds = {requirement.name.lower(): requirement.specifier for requirement in stated}
    pins = [Requirement(line) for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert pins
    for pin in pins:
        (version,) = re.findall(r"==([^,]+)", str(pin.specifier))
        assert Version(version) in bounds.get(pin.name.lower(), pin.specifier), f"{pin} against {bounds[pin.name]}"


def test_the_trl_that_cannot_train_on_a_cpu_is_excluded() -> None:
    (trl,) = [Requirement(r) for r in PROJECT["optional-dependencies"]["train"] if Requirement(r).name == "trl"]
    assert [v for v in ("1.14.0", "1.14.2", "1.15.0", "1.16.0", "1.17.0") if Version(v) in trl.specifier] == [
        "1.14.2",
        "1.16.0",
    ]


def test_every_public_name_can_be_imported() -> None:
    for name in patarm_lite.__all__:
        assert getattr(patarm_lite, name).__name__ == name
    assert set(patarm_lite.__all__) <= set(dir(patarm_lite))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = patarm_lite.nothing_like_it


def test_importing_the_package_imports_nothing_else(unpacked: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(unpacked)!r})
import patarm_lite
print(*sorted({{"numpy", "pydantic", "torch", "yaml", "typer"}} & set(sys.modules)))
"""
    assert python(code, tmp_path) == "\n"


def test_the_citation_and_the_package_state_the_same_version() -> None:
    assert f"\nversion: {patarm_lite.__version__}\n" in (ROOT / "CITATION.cff").read_text()
