"""A run that was killed ends as if nothing had happened. Nothing is simulated: the command is really killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, little_recipe, little_tokenizer, write_recipe

Start = Callable[..., Command]
SFT_STEPS, GRPO_STEPS = 80, 10
RESULTS = ("samples.jsonl", "heldout.jsonl", "heldout_before.jsonl", "heldout_after.jsonl", "judge/model.safetensors")


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


def steps(run: Path, stage: str) -> list[dict[str, Any]]:
    return [row for row in lines(run) if row["stage"] == stage]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def has_line(run: Path, stage: str, step: int) -> Callable[[], bool]:
    """Whether the metrics of that step, or of a later one, have been written."""

    def seen() -> bool:
        path = run / "metrics.jsonl"
        if not path.is_file():
            return False
        whole = path.read_bytes().rpartition(b"\n")[0].splitlines()
        return any(row["stage"] == stage and row["step"] >= step for row in map(json.loads, whole))

    return seen


def is_writing_checkpoint(run: Path, stage: str, step: int) -> Callable[[], bool]:
    """Whether that checkpoint is there but not complete."""
    checkpoint = run / "checkpoints" / stage / f"checkpoint-{step}"
    return lambda: any(checkpoint.glob("*.safetensors")) and not (checkpoint / "COMPLETE").exists()


def assert_same(run: Path, undisturbed: Path) -> None:
    """Every step once and in order, with the undisturbed run's losses and rewards; and the same judge, bit by bit."""
    assert [row["step"] for row in steps(run, "sft")] == list(range(1, SFT_STEPS + 1))
    assert [row["step"] for row in steps(run, "grpo")] == list(range(1, GRPO_STEPS + 1))
    assert without_time(lines(run)) == without_time(lines(undisturbed))
    for name in RESULTS:
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (run, undisturbed))
    assert summary["heldout"] == expected["heldout"]
    assert summary.keys() == expected.keys()
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert (run / "report.html").is_file()
    assert not list(run.rglob("*.pt")) and not list(run.rglob("*.part"))


def test_the_little_run_learns_so_that_comparing_two_of_them_means_something(little_run: Path) -> None:
    rewards = [row["reward"] for row in steps(little_run, "grpo")]
    assert len(set(rewards)) > GRPO_STEPS // 2
    assert (little_run / "judge/model.safetensors").read_bytes() != (little_run / "sft/model.safetensors").read_bytes()


def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(
    command: Start, little_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "little.yaml")
    samples = run / "samples.jsonl"
    kills: list[tuple[str, Callable[[], bool], float]] = [
        ("while a cold-start checkpoint is written", is_writing_checkpoint(run, "sft", 60), 0),
        ("in an optimiser step: the rollouts of step 1 are there, its metrics are not", samples.is_file, 0),
        ("in the generation of step 4", has_line(run, "grpo", 3), 0.02),
        ("while a checkpoint is written in epoch 0", is_writing_checkpoint(run, "grpo", 6), 0),
        ("in epoch 1, after a checkpoint in epoch 1", has_line(run, "grpo", 9), 0.01),
    ]
    going = command("train", recipe, "-o", run)
    for when, seen, delay in kills:
        assert going.until(seen), f"ended before it could be killed {when}: {going.said()}"
        going.process.join(delay)
        assert going.process.is_alive(), when
        going.kill()
        going = command("train", "--resume", run)
    assert going.wait() == 0, going.said()
    assert_same(run, little_run)


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_nothing(command: Start, little_run: Path, tmp_path: Path) -> None:
    draw = random.Random(5)
    kills, number = 0, 0
    recipe = write_recipe(tmp_path / "little.yaml")
    while kills < 50:
        run = tmp_path / str(number)
        number += 1
        going = command("train", recipe, "-o", run)
        assert going.until((run / "heldout.jsonl").is_file)
        while True:
            going.process.join(draw.uniform(0, 6))
            if not going.process.is_alive():
                break
            going.kill()
            kills += 1
            going = command("train", "--resume", run)
        assert going.wait() == 0, going.said()
        assert_same(run, little_run)


def back_to_grpo(finished: Path, run: Path) -> None:
    """A copy of a finished run as if it had been killed when its GRPO began."""
    shutil.copytree(finished, run)
    shutil.rmtree(run / "judge")
    for name in ("samples.jsonl", "heldout_after.jsonl", "summary.json", "report.html"):
        (run / name).unlink()
    cold = [json.dumps(row) + "\n" for row in steps(finished, "sft")]
    (run / "metrics.jsonl").write_text("".join(cold), encoding="utf-8")
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps({**about, "status": "running"}), encoding="utf-8")


def test_cut_checkpoints_and_cut_lines_are_dropped(command: Start, little_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    back_to_grpo(little_run, run)
    going = command("train", "--resume", run)
    assert going.until(has_line(run, "grpo", 5)), going.said()
    going.kill()
    checkpoints = run / "checkpoints" / "grpo"
    whole = checkpoints / "checkpoint-4"
    assert (whole / "COMPLETE").is_file()
    cut = checkpoints / "checkpoint-6"
    shutil.rmtree(cut, ignore_errors=True)
    shutil.copytree(whole, cut)
    (cut / "COMPLETE").unlink()
    with (cut / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"stage": "grpo", "step": 6, "loss"')
    with (run / "samples.jsonl").open("ab") as file:
        file.write('{"step": 11, "text": "ü"}'.encode()[:-3])  # in the middle of a letter
    going = command("train", "--resume", run)
    assert going.wait() == 0, going.said()
    assert_same(run, little_run)


def test_resuming_a_finished_run_changes_nothing(command: Start, little_run: Path) -> None:
    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(little_run.rglob("*")) if path.is_file()}

    before = contents()
    again = command("train", "--resume", little_run)
    assert again.wait() == 0, again.said()
    assert "is finished" in again.said()
    assert contents() == before


def test_a_run_killed_while_its_report_is_written_gets_it_when_resumed(
    command: Start, little_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(little_run, run)
    (run / "report.html").unlink()
    again = command("train", "--resume", run)
    assert again.wait() == 0, again.said()
    assert_same(run, little_run)


def test_a_run_folder_is_overwritten_only_with_force(command: Start, little_run: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "little.yaml", sft={"steps": 2}, grpo={"steps": 1})
    before = (little_run / "run.json").read_bytes()
    refused = command("train", recipe, "-o", little_run)
    assert refused.wait() == 2
    assert refused.said() == (
        f"error: output {little_run} holds a run already; continue it with --resume {little_run}, replace it with "
        "--force, or choose another with -o\n"
    )
    assert (little_run / "run.json").read_bytes() == before
    run = tmp_path / "run"
    shutil.copytree(little_run, run)
    (run / "left behind").write_text("by the old run")
    forced = command("train", recipe, "-o", run, "--force")
    assert forced.wait() == 0, forced.said()
    assert not (run / "left behind").exists()
    assert [(row["stage"], row["step"]) for row in lines(run)] == [("sft", 1), ("sft", 2), ("grpo", 1)]


def test_ctrl_c_stops_after_the_step_says_how_to_go_on_and_loses_nothing(
    command: Start, little_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    going = command("train", write_recipe(tmp_path / "little.yaml"), "-o", run)
    for stage, step in (("sft", 35), ("grpo", 3)):
        assert going.until(has_line(run, stage, step)), going.said()
        os.kill(going.process.pid, signal.SIGINT)
        assert going.wait() == 130, going.said()
        assert going.said().splitlines()[-1] == f"stopped; go on with: patarm-lite train --resume {run}"
        assert "Traceback" not in going.said()
        last = steps(run, stage)[-1]["step"]
        assert step <= last < {"sft": SFT_STEPS, "grpo": GRPO_STEPS}[stage]
        assert (run / "checkpoints" / stage / f"checkpoint-{last}" / "COMPLETE").is_file()
        assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
        going = command("train", "--resume", run)
    assert going.wait() == 0, going.said()
    assert_same(run, little_run)


def test_a_stop_between_a_stages_last_checkpoint_and_its_result_trains_no_step_more(
    command: Start, little_run: Path, tmp_path: Path
) -> None:
    """A file where the result is to be written stops the run at just that moment."""
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "little.yaml")
    going = command("train", recipe, "-o", run)
    for name, stage, last in (("sft", "sft", SFT_STEPS), ("judge", "grpo", GRPO_STEPS)):
        assert going.until((run / "recipe.yaml").is_file), going.said()
        (run / f"{name}.part").write_text("in the way")
        assert going.wait() == 2, going.said()
        assert (run / "checkpoints" / stage / f"checkpoint-{last}" / "COMPLETE").is_file()
        assert not (run / name).exists()
        (run / f"{name}.part").unlink()
        going = command("train", "--resume", run)
    assert going.wait() == 0, going.said()
    assert_same(run, little_run)


def test_a_full_disk_ends_the_run_with_one_line_and_nothing_cut_is_taken_as_whole(
    command: Start, little_run: Path, tmp_path: Path
) -> None:
    """First the weights of the first checkpoint don't fit, then its optimiser state, then all does."""
    run = tmp_path / "run"
    first: tuple[object, ...] = ("train", write_recipe(tmp_path / "little.yaml"), "-o", run)
    again: tuple[object, ...] = ("train", "--resume", run)
    weights = (little_run / "judge" / "model.safetensors").stat().st_size
    for arguments, largest_file, cut in (
        (first, weights // 2, "model.safetensors"),
        (again, weights * 3 // 2, "optimizer.pt"),
    ):
        full = command(*arguments, largest_file=largest_file)
        assert full.wait() == 2, full.said()
        assert "Traceback" not in full.said()
        told = [line for line in full.said().splitlines() if line.startswith("error: ")]
        assert len(told) == 1
        assert told[0].startswith(f"error: writing to {run} failed: ")
        assert told[0].endswith(f"make room, then type: patarm-lite train --resume {run}")
        assert [path.name for path in (run / "checkpoints" / "sft").iterdir()] == ["checkpoint-30"]
        assert not (run / "checkpoints" / "sft" / "checkpoint-30" / "COMPLETE").exists(), cut
    whole = command(*again)
    assert whole.wait() == 0, whole.said()
    assert_same(run, little_run)


def cold_start(folder: Path, checkpoint: int | None = None) -> tuple[list[float], bytes]:
    """Losses and final weights of 7 steps of cold start on 24 examples, 8 a step: an epoch is 3 steps."""
    torch = pytest.importorskip("torch")
    from patarm_lite import arena
    from patarm_lite.training import sft
    from patarm_lite.training.watch import go_on

    model = arena.build_judge(little_tokenizer(), hidden=16, layers=1, heads=2, mlp=16, seed=1)
    draw = random.Random(2)
    examples = [sft.Example([draw.randrange(20, 300) for _ in range(12)], prompt_length=4) for _ in range(24)]
    settings = little_recipe(sft={"steps": 7, "batch_size": 8, "save_every": 1, "lr": 1e-3, "warmup": 0}).sft
    device = {"bf16": False, "fp16": False, "use_cpu": True}
    args = sft.training_arguments(settings, folder, 1, 7, device)
    args.save_total_limit = None
    trainer = sft.trainer_class()(model=model, args=args, train_dataset=examples, data_collator=sft.collate)
    torch.rand(3)
    go_on(trainer, folder / f"checkpoint-{checkpoint}" if checkpoint else None)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses, b"".join(weight.detach().numpy().tobytes() for weight in model.parameters())


def test_a_cold_start_over_several_epochs_resumes_to_the_same_losses_and_weights(tmp_path: Path) -> None:
    losses, weights = cold_start(tmp_path / "run")
    assert len(losses) == len(set(losses)) == 7
    for checkpoint in (2, 3, 5):  # in epoch 0, between the two, in epoch 1
        assert cold_start(tmp_path / "run", checkpoint) == (losses, weights), checkpoint
    # the last step ends no epoch; nothing is left to train
    assert cold_start(tmp_path / "run", 7) == ([], weights)


@pytest.mark.slow
def test_the_command_as_typed_goes_on_too(little_run: Path, tmp_path: Path) -> None:
    """The same through `python -m patarm_lite`, with no server behind it."""
    run = tmp_path / "run"
    back_to_grpo(little_run, run)
    done = subprocess.run(
        [sys.executable, "-m", "patarm_lite", "train", "--resume", str(run)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run}\n"
    assert_same(run, little_run)
