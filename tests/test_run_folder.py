"""The run folder: nothing half-written is taken as whole, nothing of somebody's is overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from patarm_lite.errors import UserError
from patarm_lite.training.run_folder import (
    COMPLETE,
    RunFolder,
    checkpoint_step,
    disk_trouble,
    hash_rows,
    last_checkpoint,
    mark_complete,
    read_lines,
    write_json,
    write_lines,
)


def checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "nested").mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"state")
    (path / "nested" / "more").write_bytes(b"state")
    if complete:
        mark_complete(path)
    return path


def test_the_last_complete_checkpoint_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    checkpoint(tmp_path, 100)
    best = checkpoint(tmp_path, 1000)
    checkpoint(tmp_path, 999)
    assert last_checkpoint(tmp_path) == best
    assert checkpoint_step(best) == 1000


def test_a_checkpoint_without_its_marker_is_skipped_and_removed(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 4)
    cut = checkpoint(tmp_path, 6, complete=False)
    assert last_checkpoint(tmp_path) == whole
    assert not cut.exists() and whole.exists()


def test_a_folder_without_a_complete_checkpoint_means_step_0(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2, complete=False)
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "never made") is None
    assert checkpoint_step(None) == 0


def test_the_marker_is_written_after_everything_else(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 2)
    times = {file.name: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    assert max(times, key=lambda name: (times[name], name == COMPLETE)) == COMPLETE


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(b'{"step": 3, "los', id="in the middle of a line"),
        pytest.param('{"text": "ü"}'.encode()[:-3], id="in the middle of a letter"),
        pytest.param(b'{"step": 3}', id="just before the line's end"),
    ],
)
def test_a_last_line_that_was_cut_is_left_out_and_trimmed_away(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole + cut)
    assert [row["step"] for row in read_lines(path)] == [1, 2]
    RunFolder(tmp_path).trim("metrics.jsonl", lambda row: True)
    assert path.read_bytes() == whole
    RunFolder(tmp_path).append("metrics.jsonl", [{"step": 3}])
    assert [row["step"] for row in read_lines(path)] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named_and_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"samples\.jsonl line 2 is damaged"):
        list(read_lines(path))


def test_trimming_drops_what_a_resumed_stage_writes_again_and_keeps_the_rest(tmp_path: Path) -> None:
    rows = [{"stage": "sft", "step": 9}, {"stage": "grpo", "step": 1}, {"stage": "grpo", "step": 2}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    folder = RunFolder(tmp_path)
    folder.trim("metrics.jsonl", lambda row: row["stage"] != "grpo" or row["step"] <= 1)
    assert list(read_lines(tmp_path / "metrics.jsonl")) == rows[:2]
    assert folder.steps("grpo") == rows[1:2]
    folder.trim("not there.jsonl", lambda row: False)
    assert not (tmp_path / "not there.jsonl").exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        write_json(path, {"n": object()})
    assert json.loads(path.read_text()) == {"n": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_stage_times_of_a_resumed_stage_add_up(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", force=False)
    folder.note_stage("sft", 1.5, 2.0)
    folder.note_stage("sft", 0.5, 0.25)
    assert folder.about()["stages"] == {"sft": {"seconds": 2.0, "cpu_seconds": 2.25}}


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError, match=r"out is a file; choose a folder with -o"):
            RunFolder.create(path, force)
    assert path.read_text() == "mine"


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file/run can't be made: .*choose another with -o"):
        RunFolder.create(tmp_path / "file" / "run", force=False)


def test_somebody_elses_folder_is_never_overwritten_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError, match="holds something else"):
            RunFolder.create(tmp_path, force)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, force=False)
    assert (tmp_path / "run.json").is_file()


def test_a_run_is_replaced_only_with_force_and_then_wholly(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, force=False)
    folder.note(status="running")
    (tmp_path / "judge").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"holds a run already; continue it with --resume .*--force"):
        RunFolder.create(tmp_path, force=False)
    RunFolder.create(tmp_path, force=True)
    assert os.listdir(tmp_path) == ["run.json"]


def test_force_through_a_link_keeps_the_link_and_what_links_inside_point_to(tmp_path: Path) -> None:
    real, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    RunFolder.create(real, force=False)
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (real / "link").symlink_to(elsewhere)
    (tmp_path / "run").symlink_to(real)
    RunFolder.create(tmp_path / "run", force=True)
    assert (tmp_path / "run").is_symlink()
    assert os.listdir(real) == ["run.json"]
    assert (elsewhere / "precious").read_text() == "mine"


def test_a_folder_whose_making_was_cut_is_no_obstacle_and_no_run(tmp_path: Path) -> None:
    (tmp_path / "run.json.part").write_text("{")
    RunFolder.create(tmp_path, force=False)
    with pytest.raises(UserError, match="stopped before its run began; give the command that started it again"):
        RunFolder.open(tmp_path)
    RunFolder.create(tmp_path, force=False)


def test_what_is_no_run_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder \(it holds no run.json\)"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": 99}')
    with pytest.raises(UserError, match="written with run schema 99; this version reads 1"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": 1')
    with pytest.raises(UserError, match=r"run\.json can't be read"):
        RunFolder.open(tmp_path)


def test_the_hash_of_data_depends_on_every_text_and_on_the_order() -> None:
    rows = [{"a": "x"}, {"a": "y"}]
    assert hash_rows(rows) == hash_rows([dict(row) for row in rows])
    assert len({hash_rows(rows), hash_rows(rows[::-1]), hash_rows([{"a": "x"}, {"a": "z"}])}) == 3
    assert len(hash_rows([{"a": "\ud800"}])) == 64  # a lone surrogate is data too


def test_a_full_disk_is_one_clear_line_whoever_writes(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no device here that is always full")
    with (
        pytest.raises(UserError, match=r"writing to runs/a failed: No space left on device; make room, then type: .*"),
        disk_trouble(Path("runs/a")),
        full.open("w") as file,
    ):
        file.write("x" * 100_000)


def test_other_errors_keep_their_type_and_traceback() -> None:
    pytest.importorskip("torch")
    for error in (FileNotFoundError(2, "No such file"), RuntimeError("size mismatch"), KeyError("pair")):
        with pytest.raises(type(error)), disk_trouble(Path("runs/a")):
            raise error
