"""The front door: what is typed, what is printed, the exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import Typed

from patarm_lite.cli import main
from patarm_lite.recipe import _Loader

ROOT = Path(__file__).resolve().parent.parent
VERBS = [
    [],
    ["train"],
    ["eval"],
    ["pairs"],
    ["report"],
    ["export"],
    ["inspect"],
    ["calibrate"],
    ["judge"],
    ["rank"],
    ["plan"],
    ["bench"],
    ["audit"],
    ["compare"],
    ["bench", "score"],
    ["bench-model"],
    ["doctor"],
    ["bundle"],
    ["store"],
    *(["store", verb] for verb in ("show", "delete")),
    ["rubrics"],
    *(["rubrics", verb] for verb in ("list", "show", "copy", "write")),
    ["recipes"],
    *(["recipes", verb] for verb in ("list", "show", "copy", "schema")),
]
HEAVY = ("torch", "transformers", "numpy", "pydantic", "trl", "datasets", "matplotlib", "yaml")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(typed: Typed) -> Callable[..., str]:
    """Type a command that must end with exit code 2 and one error line: the line."""

    def run(*arguments: str) -> str:
        code, out, err = typed(*arguments)
        assert (code, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        return err.removeprefix("error: ").strip()

    return run


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line as pasted; `patarm-lite` is this checkout's."""
    command = command.replace("patarm-lite ", f"'{sys.executable}' -m patarm_lite ")
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, shell=True, env=env, capture_output=True, text=True, timeout=600)


def python(code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def without(modules: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Type a command in a Python whose finders do not find these modules."""
    return python(f"""
import sys
from importlib.machinery import PathFinder
class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {modules!r}:
            return None
        return PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from patarm_lite.cli import main
sys.exit(main({list(arguments)!r}))
""")


# --- help ---


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb_ends_with_an_example(verb: list[str], typed: Typed) -> None:
    code, out, _ = typed(*verb, "--help")
    assert code == 0
    example = out.rstrip().partition("Example:\n\n")[2].splitlines()[-1]
    assert " ".join(["patarm-lite", *verb]) in example


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_imports_nothing_heavy(verb: list[str]) -> None:
    done = python(f"""
import sys
from patarm_lite.cli import main
assert main({[*verb, "--help"]!r}) == 0
print("loaded:", *sorted(set({HEAVY!r}) & set(sys.modules)))
""")
    assert done.stdout.endswith("loaded:\n"), done.stdout[-200:] + done.stderr


@pytest.mark.parametrize(
    "verb",
    [
        *(["recipes", verb] for verb in ("list", "show", "copy", "schema")),
        ["recipes"],
        ["pairs"],
        ["plan"],
        ["bundle"],
        *(
            pytest.param([verb], marks=pytest.mark.slow)
            for verb in (
                *("train", "eval", "report", "export", "inspect", "calibrate", "judge", "rank", "doctor"),
                "bench-model",
            )
        ),
        *(["rubrics", verb] for verb in ("list", "show", "copy")),
    ],
    ids=" ".join,
)
def test_the_example_in_the_help_works_as_pasted(verb: list[str], typed: Typed) -> None:
    _, out, _ = typed(*verb, "--help")
    example = "\n".join(line.strip() for line in out.partition("Example:\n\n")[2].strip().splitlines())
    done = shell(f"set -e; {example}")
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr


def test_a_command_without_a_verb_prints_the_help_and_fails(typed: Typed) -> None:
    code, out, err = typed()
    assert (code, out) == (2, "")
    assert "Usage: patarm-lite" in err and "train" in err


def test_the_version_is_that_of_the_package(typed: Typed) -> None:
    import patarm_lite

    assert typed("--version") == (0, f"patarm-lite {patarm_lite.__version__}\n", "")


# --- mistyped commands ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tran"], "Did you mean 'train'"),
        (["train", "tiny", "--sed", "1"], "--seed"),
        (["train", "tiny", "--seed", "one"], "'--seed'"),
        (["train", "tiny", "smoke"], "smoke"),
        (["recipes", "shw", "tiny"], "Did you mean 'show'?"),
        (["recipes", "show"], "Missing argument 'NAME'"),
        (["pairs"], "Missing argument"),
        (["eval"], "Missing argument 'RUN'"),
        (["eval", "run", "--votes", "0"], "'--votes'"),
        (["--verbose"], "--verbose"),
        (["export"], "Missing argument 'JUDGE'"),
        (["export", "run", "--votes", "0"], "'--votes'"),
        (["inspect"], "Missing argument 'FILE'"),
        (["calibrate", "judge.gguf"], "--pairs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistyped_command_is_one_line_that_names_the_help(
    arguments: list[str], said: str, refused: Callable[..., str]
) -> None:
    line = refused(*arguments)
    assert said in line
    assert "--help')" in line


# --- recipes that can't be ---


def test_an_unknown_recipe_names_the_nearest(refused: Callable[..., str]) -> None:
    assert "'tinny' not found" in (line := refused("train", "tinny")) and "Did you mean 'tiny'?" in line


@pytest.mark.parametrize("verb", [["train"], ["recipes", "show"]], ids=" ".join)
def test_an_unknown_key_names_the_nearest(verb: list[str], refused: Callable[..., str]) -> None:
    Path("my.yaml").write_text("name: my\ngrpo:\n  learning_rat: 1e-5\n  stepps: 3\n")
    assert "unknown key 'grpo.learning_rat'" in refused(*verb, "my.yaml")
    Path("my.yaml").write_text("name: my\ngrpo:\n  stepps: 3\n")
    assert "unknown key 'grpo.stepps'. Did you mean 'steps'?" in refused(*verb, "my.yaml")


def test_an_unknown_key_in_set_names_the_nearest(refused: Callable[..., str]) -> None:
    assert "'grpo.stepps'. Did you mean 'steps'?" in refused("train", "tiny", "--set", "grpo.stepps=3")


def test_1e_5_in_a_recipe_is_a_number(typed: Typed) -> None:
    Path("my.yaml").write_text("name: my\ngrpo:\n  lr: 1e-5\n")
    code, out, _ = typed("recipes", "show", "my.yaml")
    assert code == 0
    assert yaml.safe_load(out)["grpo"]["lr"] == 0.00001


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: my\ngrpo: {lr: fast}", "grpo.lr"),
        ("name: my\ngrpo: {lr: -1}", "found -1"),
        ("name: my\nsft: {steps: 2.5}", "found 2.5"),
        ("name: my\nsft: 3", "sft"),
        ("name: my\ndata: {shuffle_labels: 1.5}", "found 1.5"),
        ("name: my\nseed: 1\nseed: 2", "line 3: key 'seed' is given twice"),
        ("seed: 1", "key 'name' is missing"),
        ("- a list", "holds no keys"),
        ("name: [", "line 1"),
        ("", "holds no keys"),
        ("name: my\ngrpo: {beta: 0.1}", "grpo.beta must be 0"),
        # 2 sides x 8 rollouts x 3 pairs = 48 rollouts a step, which 32 does not divide
        ("name: my\ngrpo: {pairs_per_step: 3, n: 8, per_device: 32}", "divisor of 48"),
    ],
)
def test_a_recipe_with_a_wrong_value_is_refused_with_its_place(
    text: str, said: str, refused: Callable[..., str]
) -> None:
    Path("my.yaml").write_text(text)
    line = refused("train", "my.yaml")
    assert "recipe my.yaml" in line and said in line


def test_a_recipe_that_is_not_utf_8_is_refused(refused: Callable[..., str]) -> None:
    Path("my.yaml").write_bytes("name: é".encode("latin-1"))
    assert "not UTF-8 (byte 6)" in refused("train", "my.yaml")


def test_a_folder_is_no_recipe(refused: Callable[..., str]) -> None:
    Path("mine").mkdir()
    assert "mine is a folder" in refused("train", "mine")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", "-1"], "seed: "),
        (["--shuffle-labels", "1.5"], "data.shuffle_labels: "),
        (["--method", "dpo"], "method: "),
        (["--set", "grpo.lr"], "'grpo.lr' is not KEY=VALUE"),
        (["--set", "grpo.lr=[1"], "the value is not YAML"),
        (["--set", "name.first=x"], "name is a value, not a section"),
        (["--set", "grpo.lr=1e-4", "sft.steps=none"], "sft.steps: "),
    ],
    ids=" ".join,
)
def test_a_flag_with_a_wrong_value_is_refused_by_the_key_it_stands_for(
    flags: list[str], said: str, refused: Callable[..., str]
) -> None:
    assert said in refused("train", "tiny", *flags)


def test_train_without_a_recipe_says_where_it_goes(refused: Callable[..., str]) -> None:
    assert "needs a RECIPE, before --pairs" in refused("train", "--pairs", "a.jsonl", "tiny")


# --- runs that are not there ---


@pytest.mark.parametrize("verb", [["eval"], ["report"], ["train", "--resume"]], ids=" ".join)
def test_a_run_must_exist_and_be_a_run(verb: list[str], refused: Callable[..., str]) -> None:
    assert "run nowhere not found" in refused(*verb, "nowhere")
    Path("empty").mkdir()
    assert "empty is not a run folder" in refused(*verb, "empty")
    Path("file").touch()
    assert "file is not a run folder" in refused(*verb, "file")


@pytest.mark.parametrize("more", [["tiny"], ["--seed", "0"], ["--force"], ["-o", "out"], ["--set", "seed=2"]])
def test_resume_takes_no_other_setting(more: list[str], refused: Callable[..., str]) -> None:
    assert "the run's own recipe" in refused("train", *more, "--resume", "run")


# --- what is not installed, not there, or in the way ---


@pytest.mark.parametrize("module", ["torch", "transformers", "trl"])
def test_a_missing_extra_gives_the_pip_line_and_leaves_no_folder(module: str) -> None:
    done = without((module,), "train", "smoke")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {module} is not installed and this needs it; type: pip install 'patarm-lite[train]'\n"
    )
    assert os.listdir() == []


def test_a_base_install_shows_recipes_and_pairs() -> None:
    extras = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "matplotlib", "scipy", "pyarrow")
    assert "smoke" in without(extras, "recipes").stdout
    Path("pairs.jsonl").write_text('{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}\n')
    done = without(extras, "pairs", "pairs.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


def test_an_existing_output_is_refused_and_left_as_it_was(refused: Callable[..., str]) -> None:
    Path("out").mkdir()
    Path("out/precious.txt").write_text("mine")
    for force in ([], ["--force"]):
        assert "out is a folder that holds something else" in refused("train", "smoke", "-o", "out", *force)
    Path("out/run.json").write_text("{}")
    line = refused("train", "smoke", "-o", "out")
    assert "out holds a run already" in line and "--force" in line and "--resume out" in line
    assert os.listdir() == ["out"] and sorted(os.listdir("out")) == ["precious.txt", "run.json"]
    assert Path("out/precious.txt").read_text() == "mine"


def test_eval_refuses_an_existing_output_before_it_judges(refused: Callable[..., str]) -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text("{}")
    Path("found.json").write_text("mine")
    assert "found.json exists already" in refused("eval", "run", "-o", "found.json")
    assert Path("found.json").read_text() == "mine"
    assert "run is a folder" in refused("eval", "run", "-o", "run", "--force")


def test_a_file_where_the_run_folder_should_be_is_refused(refused: Callable[..., str]) -> None:
    Path("runs").write_text("not a folder")
    assert "runs" in refused("train", "smoke")
    assert "runs" in refused("train", "smoke", "-o", "runs")
    assert Path("runs").read_text() == "not a folder"


def test_a_gpu_recipe_without_a_gpu_is_refused_before_anything_is_written(refused: Callable[..., str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "GPU" in refused("train", "smoke", "--set", "needs_gpu=true")
    assert os.listdir() == []


def test_a_hub_model_while_offline_is_refused(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused("train", "smoke", "--offline", "--set", "model.base=nobody/no-such-judge")
    assert "nobody/no-such-judge" in line


def test_missing_pairs_stop_a_run_before_anything_is_written(refused: Callable[..., str]) -> None:
    assert "nowhere.jsonl" in refused("train", "smoke", "--pairs", "nowhere.jsonl")
    assert os.listdir() == []


def test_offline_is_set_before_anything_is_imported(tmp_path: Path) -> None:
    done = python("""
import os
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.pop(name, None)
from patarm_lite.cli import main
assert main(["eval", "nowhere", "--offline"]) == 2
print(os.environ["HF_HUB_OFFLINE"], os.environ["TRANSFORMERS_OFFLINE"], os.environ["HF_DATASETS_OFFLINE"])
""")
    assert done.stdout == "1 1 1\n", done.stderr


# --- pairs ---


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n', "line 2"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "\xe9"}\n', "UTF-8"),
        (b"", "pairs.jsonl"),
        (b'{"question": "a", "good": "b", "bad": "c"}\n', "question"),
    ],
    ids=["broken JSON", "not UTF-8", "empty", "unknown layout"],
)
def test_a_pair_file_that_cant_be_read_is_refused_with_the_place(
    content: bytes, said: str, refused: Callable[..., str]
) -> None:
    Path("pairs.jsonl").write_bytes(content)
    line = refused("pairs", "pairs.jsonl")
    assert "pairs.jsonl" in line and said in line


def test_a_pair_file_that_is_not_there_is_refused(refused: Callable[..., str]) -> None:
    assert "nowhere.jsonl" in refused("pairs", "nowhere.jsonl")


def test_a_hub_id_while_offline_is_refused(refused: Callable[..., str]) -> None:
    assert "nobody/no-such-pairs" in refused("pairs", "nobody/no-such-pairs", "--offline")


def test_columns_can_be_named(typed: Typed) -> None:
    Path("pairs.jsonl").write_text('{"question": "2 + 2?", "good": "4", "bad": "5"}\n')
    code, out, err = typed("pairs", "pairs.jsonl", "--map", "prompt=question,chosen=good,rejected=bad", "--json")
    assert code == 0, err
    json.loads(out)


@pytest.mark.parametrize(
    ("mapping", "said"),
    [("prompt", "'prompt' is not OURS=COLUMN"), ("prompt=a,prompt=b", "twice"), ("prompt=", "is not OURS=COLUMN")],
)
def test_a_mistyped_mapping_is_refused(mapping: str, said: str, refused: Callable[..., str]) -> None:
    assert said in refused("pairs", "pairs.jsonl", "--map", mapping)


def test_several_files_may_follow_one_flag(refused: Callable[..., str], typed: Typed) -> None:
    Path("a.jsonl").write_text('{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}\n')
    Path("b.jsonl").write_text('{"prompt": "3 + 3?", "chosen": "6", "rejected": "5"}\n')
    assert typed("pairs", "a.jsonl", "--against", "a.jsonl", "b.jsonl")[0] == 0
    assert "nowhere.jsonl" in refused("pairs", "a.jsonl", "--against", "b.jsonl", "nowhere.jsonl")


# --- recipes ---


def test_recipes_lists_every_shipped_recipe_with_a_line_each(typed: Typed) -> None:
    shipped = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    code, out, _ = typed("recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == shipped
    assert all(len(line.split()) > 4 for line in out.splitlines())
    assert out == typed("recipes", "list")[1]


def test_copy_writes_a_recipe_to_edit_and_never_replaces_a_file(typed: Typed, refused: Callable[..., str]) -> None:
    code, out, err = typed("recipes", "copy", "tiny", "mine.yaml")
    assert (code, out, err) == (0, "mine.yaml\n", "next: patarm-lite train mine.yaml\n")
    assert Path("mine.yaml").read_text() == (ROOT / "recipes" / "tiny.yaml").read_text()
    Path("mine.yaml").write_text("edited")
    assert "mine.yaml exists already" in refused("recipes", "copy", "smoke", "mine.yaml")
    assert Path("mine.yaml").read_text() == "edited"


def test_copy_says_which_folder_is_missing_or_is_a_file(refused: Callable[..., str]) -> None:
    assert "mkdir -p missing" in refused("recipes", "copy", "tiny", "missing/mine.yaml")
    Path("file").touch()
    assert "file/mine.yaml: a part of the path is a file" in refused("recipes", "copy", "tiny", "file/mine.yaml")


def test_a_full_disk_leaves_no_half_file() -> None:
    pytest.importorskip("resource", reason="file size limits are POSIX")
    done = python("""
import resource, sys
from patarm_lite.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
sys.exit(main(["recipes", "copy", "tiny", "mine.yaml"]))
""")
    assert done.returncode == 2
    assert done.stderr.startswith("error: mine.yaml: the file would be larger") and done.stderr.count("\n") == 1
    assert os.listdir() == []


def test_the_schema_takes_shipped_recipes_and_refuses_an_unknown_key(typed: Typed) -> None:
    schema = json.loads(typed("recipes", "schema")[1])
    recipe = yaml.load((ROOT / "recipes" / "tiny.yaml").read_text(), Loader=_Loader)  # noqa: S506 (safe; 4e-3 is a number)
    jsonschema.validate(recipe, schema)
    with pytest.raises(jsonschema.ValidationError, match="stepps"):
        jsonschema.validate({**recipe, "grpo": {"stepps": 3}}, schema)


# --- the process ---


def test_a_reader_that_hangs_up_is_no_error() -> None:
    done = shell("(sleep 0.2; patarm-lite recipes schema; echo ended with $? >&2) | true")
    assert done.stderr == "ended with 1\n"


def test_a_bug_keeps_its_traceback_and_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, typed: Typed) -> None:
    from patarm_lite.recipe import Recipe

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Recipe, "model_json_schema", broken)
    with pytest.raises(ZeroDivisionError):
        main(["recipes", "schema"])

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "model_json_schema", interrupted)
    assert typed("recipes", "schema")[0] == 130


def test_python_m_is_the_same_command() -> None:
    done = shell("patarm-lite train tinny")
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe 'tinny' not found")
