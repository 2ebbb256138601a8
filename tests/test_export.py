"""`patarm-lite export` as a user types it: what it writes, that a kill costs nothing, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from patarm_lite.cli import main
from patarm_lite.gguf_file import read_gguf
from patarm_lite.judge.description import fingerprint, read_description

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

TYPES = "f16,q8_0,q4_0,hf"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """One command in this process: exit code, stdout, stderr."""
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def exported(
    command: Callable[..., Command], little_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A finished export of the little run: (folder, what --json printed). Not to be written to."""
    out = tmp_path_factory.mktemp("export") / "out"
    done = command("export", little_run, "-o", out, "--type", TYPES, "--threads", 1, "--json")
    assert done.wait() == 0, done.said()
    return out, json.loads(done.out.read_text(encoding="utf-8"))


def test_an_export_prints_what_scripts_need(exported: tuple[Path, dict[str, Any]]) -> None:
    out, found = exported
    assert [file["type"] for file in found["files"]] == ["f16", "q8_0", "q4_0", "hf"]
    for file in found["files"]:
        assert (out / file["path"]).exists() and file["bytes"] > 0
        assert {"flips", "accuracy_loss"} <= file.keys()
    assert found["parity"]["tokens_equal"] is True
    assert 0 <= found["parity"]["max_logit_diff"] <= 1e-3 * found["parity"]["logit_std"]


def test_the_folder_holds_files_a_stranger_can_use(exported: tuple[Path, dict[str, Any]]) -> None:
    out, found = exported
    names = {path.name for path in out.iterdir()}
    assert {"Modelfile", "README.md", "fidelity.json", "SHA256SUMS", "export.json", "imatrix.gguf", "hf"} <= names
    assert not [name for name in names if name.startswith(".") or name.endswith(".part")]
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    covered = {line.split("  ")[1].split("/")[0] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert covered == names - {"SHA256SUMS", "export.json"}
    assert f"FROM ./{found['files'][1]['path']}" in (out / "Modelfile").read_text(), "q8_0 is the one to run"


def test_every_file_describes_the_judge_in_it(exported: tuple[Path, dict[str, Any]]) -> None:
    out, found = exported
    for row in found["files"]:
        if row["type"] == "hf":
            continue
        said = read_description(read_gguf(out / row["path"]).metadata)
        assert said.trained and not said.protocol.instructions and said.kind == "arena"
        assert set(said.rubrics) == {"chat", "math", "code", "safety"}
        assert said.fingerprint == fingerprint(out / row["path"])
        assert (said.fidelity is None) == (row["type"] == "f16")
    assert json.loads((out / "fidelity.json").read_text())["n"] == 10


def test_safetensors_of_the_export_load_as_the_judge(exported: tuple[Path, dict[str, Any]], little_run: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported[0] / "hf")
    own = AutoModelForCausalLM.from_pretrained(little_run / "judge")
    assert model.dtype == torch.float16
    for name, weight in own.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.half()), name
    assert (exported[0] / "hf" / "protocol.json").read_bytes() == (little_run / "judge" / "protocol.json").read_bytes()


def test_an_existing_export_is_replaced_only_by_force_and_only_what_it_wrote(
    exported: tuple[Path, dict[str, Any]],
    little_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(exported[0], out)
    (out / "my notes.txt").write_text("keep")
    code, _, said = run(capsys, "export", little_run, "-o", out, "--type", "q8_0", "--threads", 1)
    assert code == 2 and "holds an export already" in said and "--force" in said
    code, _, said = run(capsys, "export", little_run, "-o", out, "--type", "q4_1", "--threads", 1, "--force")
    assert code == 0, said
    assert (out / "my notes.txt").read_text() == "keep"
    assert [path.name for path in out.glob("*.gguf")] != [] and not list(out.glob("*q8_0.gguf"))


def test_a_killed_export_goes_on_and_ends_with_the_same_files(
    command: Callable[..., Command], little_run: Path, exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    work = out / ".work"
    arguments = ("export", little_run, "-o", out, "--type", TYPES, "--threads", 1, "--json")
    marks = ["f16.gguf", "parity.json", "imatrix.gguf", "q8_0.json", "judged-f16.json", "divergence.json"]
    killed = 0
    for mark in marks:
        started = command(*arguments)
        if started.until(lambda mark=mark: (work / mark).exists()):  # type: ignore[misc]
            started.kill()
            killed += 1
        assert not (out / "export.json").exists()
    assert killed >= len(marks) - 1
    done = command(*arguments)
    assert done.wait() == 0, done.said()
    assert "going on with the export that was stopped" in done.said()
    for name in ("q8_0", "q4_0", "f16"):
        (one,), (other,) = out.glob(f"*-{name}.gguf"), exported[0].glob(f"*-{name}.gguf")
        assert fingerprint(one) == fingerprint(other)
    ours, theirs = (json.loads(done.out.read_text()), exported[1])
    for a, b in zip(ours["files"], theirs["files"], strict=True):
        assert {k: v for k, v in a.items() if "second" not in k} == {k: v for k, v in b.items() if "second" not in k}


def test_a_stopped_export_of_other_settings_is_not_taken_for_this_one(
    command: Callable[..., Command], little_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    started = command("export", little_run, "-o", out, "--type", "q8_0", "--threads", 1)
    assert started.until(lambda: (out / ".work" / "f16.gguf").exists())
    started.kill()
    other = command("export", little_run, "-o", out, "--type", "q4_0", "--threads", 1)
    assert other.wait() == 2
    assert "unfinished export of other settings" in other.said()


def test_auto_with_too_few_pairs_keeps_q8_0_and_says_how_many_it_takes(
    little_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, printed, said = run(
        capsys, "export", little_run, "-o", out, "--auto", "--type", "q8_0,q4_0", "--threads", 1, "--json"
    )
    assert code == 0, said
    found = json.loads(printed)
    assert [file["type"] for file in found["files"]] == ["q8_0"]
    assert found["choice"]["enough"] is False and found["choice"]["needed"] == 299
    assert [path.suffix for path in out.glob("*-q*.gguf")] == [".gguf"]


def test_a_file_that_loses_nothing_is_exported_without_a_matrix_and_unproved_when_asked(
    little_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, printed, said = run(
        capsys,
        *("export", little_run / "judge", "-o", out, "--type", "q5_0", "--imatrix", "none"),
        *("--without-fidelity", "--threads", 1, "--json"),
    )
    assert code == 0, said
    found = json.loads(printed)
    assert found["files"][0]["flips"] is None and found["importance"] is None
    assert found["parity"]["tokens_equal"] is True
    assert not (out / "fidelity.json").exists()


def test_an_adapter_trained_in_four_bits_is_merged_both_ways_and_the_better_one_kept(
    little_qlora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, printed, said = run(
        capsys, "export", little_qlora_run, "-o", out, "--type", "q8_0,lora,hf", "--threads", 1, "--json"
    )
    assert code == 0, said
    found = json.loads(printed)
    merging = found["merging"]
    ways = {"original", "dequantized"}
    assert set(merging["choosing"]) == set(merging["reporting"]) == ways
    best = max(row["accuracy"] for row in merging["choosing"].values())
    assert merging["choosing"][merging["onto"]]["accuracy"] == best
    assert merging["choosing"]["original"]["n"] + merging["reporting"]["original"]["n"] == found["pairs"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert all(f"{row['accuracy']:.3f}" in card for row in merging["reporting"].values())
    (judge,) = out.glob("*-q8_0.gguf")
    assert read_gguf(judge).metadata["patarm.merge"] == f"merged into the {merging['onto']} base"
    (lora,) = out.glob("*-lora.gguf")
    assert read_gguf(lora).metadata["general.type"] == "adapter"
    assert (out / "hf" / "model.safetensors").is_file()


def test_an_adapter_alone_is_exported_without_its_base_being_touched(
    little_qlora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, printed, said = run(capsys, "export", little_qlora_run, "-o", out, "--type", "lora", "--json")
    assert code == 0, said
    found = json.loads(printed)
    assert [file["type"] for file in found["files"]] == ["lora"] and found["parity"] is None
    assert {path.name for path in out.iterdir()} == {
        found["files"][0]["path"],
        "README.md",
        "SHA256SUMS",
        "export.json",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--type", "q4_k_l"], ["q4_k_l", "Did you mean 'q4_k_"]),
        (["--type", "iq2_xs", "--imatrix", "none"], ["iq2_xs", "importance matrix"]),
        (["--max-loss", "1.5", "--auto"], ["--max-loss 1.5", "between 0 and 1"]),
        (["--auto", "--without-fidelity"], ["--auto", "--without-fidelity"]),
        (["--type", "lora"], ["whole model", "lora"]),
        (["--imatrix", "nowhere.gguf"], ["nowhere.gguf"]),
        (["--pairs", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--base", "somewhere"], ["--base", "whole model"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_request_that_cannot_work_ends_before_anything_is_written(
    little_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    out = tmp_path / "out"
    code, printed, said = run(capsys, "export", little_run, "-o", out, "--threads", 1, *arguments)
    line = said.strip().splitlines()[-1]
    assert code == 2 and printed == "" and line.startswith("error: ")
    assert all(word in line for word in words), line
    assert not out.exists()


def test_an_output_that_is_something_else_is_never_touched(
    little_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "mine", tmp_path / "file"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    file.write_text("x")
    for out, words in ((folder, "holds something else"), (file, "is a file")):
        code, _, said = run(capsys, "export", little_run, "-o", out, "--type", "q8_0", "--force")
        assert code == 2 and words in said
    assert (folder / "letter.txt").read_text() == "dear" and file.read_text() == "x"


def test_a_model_folder_without_pairs_says_that_nothing_can_be_proved(
    little_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(little_run / "judge", model)
    code, _, said = run(capsys, "export", model, "-o", tmp_path / "out", "--type", "q8_0")
    assert code == 2 and "--pairs FILE" in said and "--without-fidelity" in said


def test_a_model_folder_with_pairs_keeps_those_of_the_matrix_apart_from_those_of_the_proof(
    little_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from patarm_lite import arena

    model, pairs, out = tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "out"
    shutil.copytree(little_run / "judge", model)
    rows = [
        {"prompt": pair.prompt[0].content, "chosen": pair.chosen, "rejected": pair.rejected, "task": pair.task}
        for pair in arena.heldout_pairs(30, seed=7)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, printed, said = run(
        capsys, "export", model, "-o", out, "--type", "q8_0", "--pairs", pairs, "--threads", 1, "--json"
    )
    assert code == 0, said
    prompts = len({row["prompt"] for row in rows})
    assert 30 - 30 // 2 < json.loads(printed)["pairs"] < 30
    assert json.loads((out / "fidelity.json").read_text())["prompts"] == prompts - max(1, prompts // 10)
    assert (out / "imatrix.gguf").is_file()


def test_pairs_of_the_proof_never_make_the_matrix_of_a_run(little_run: Path, tmp_path: Path) -> None:
    from patarm_lite.metrics import pair_to_row
    from patarm_lite.quantize.request import Request, pairs_of
    from patarm_lite.quantize.source import open_source
    from patarm_lite.recipe import load_recipe
    from patarm_lite.training.data import load_run_pairs

    recipe = load_recipe(str(little_run / "recipe.yaml"))
    seen = load_run_pairs(recipe, offline=True).train[:4]
    file = tmp_path / "seen.jsonl"
    file.write_text("".join(json.dumps(pair_to_row(pair)) + "\n" for pair in seen), encoding="utf-8")
    request = Request(judge=str(little_run), out=tmp_path / "out", pairs=(str(file),))
    heldin, heldout = pairs_of(request, open_source(str(little_run)), recipe)
    assert len(heldout) == 4 and heldin
    assert {pair.prompt for pair in heldin}.isdisjoint(pair.prompt for pair in heldout)


def test_weights_that_are_not_numbers_are_refused_and_nothing_is_left(
    little_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(little_run / "judge", model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    code, _, said = run(capsys, "export", model, "-o", out, "--type", "q8_0", "--imatrix", "none", "--without-fidelity")
    assert code == 2 and "model.norm.weight" in said
    assert not list(out.glob("*.gguf")) and not list((out / ".work").glob("*.gguf*"))


def test_too_little_disk_is_said_with_both_figures_before_work_begins(
    little_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    out = tmp_path / "out"
    code, _, said = run(capsys, "export", little_run, "-o", out, "--type", "q8_0")
    assert code == 2 and "3 MB free" in said and "of disk at its peak" in said
    assert not out.exists()
