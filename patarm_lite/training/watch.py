"""Watching a stage: progress with time left, metrics lines, Ctrl-C, and stopping a run that can't learn."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from patarm_lite.progress import Progress
from patarm_lite.recipe import GrpoSection
from patarm_lite.training.run_folder import RunFolder, checkpoint_step, mark_complete


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, obeyed where nothing is lost. Ends the command with 130, as any Ctrl-C does."""


class StopSignal:
    """Ctrl-C asks for a stop at the next block; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopSignal:
        self._before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Stop here if that was asked for.

        Raises:
            Interrupted: it was.
        """
        if self.asked:
            raise Interrupted

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr.write("\nstopping at the next checkpoint; press Ctrl-C again to stop at once\n")


class Doomed:
    """Decides when a GRPO run can't learn, from the share of unreadable judgements and of dead groups of each step.

    `before`: the rows of the steps that a resumed run has behind it, so that it stops where it would have stopped.
    """

    def __init__(self, settings: GrpoSection, before: Iterable[dict[str, Any]] = ()) -> None:
        self.settings = settings
        self.unreadable = self.dead = 0
        for row in before:
            self.cause(row)

    def cause(self, row: dict[str, Any]) -> str | None:
        """Why the run should stop after this step, or None.

        `row`: `unreadable` and `dead_groups` of the step, each in [0, 1].
        """
        patience = self.settings.stop_dead_steps
        self.unreadable = self.unreadable + 1 if row["unreadable"] > self.settings.stop_unreadable else 0
        self.dead = self.dead + 1 if row["dead_groups"] >= 1 else 0
        if self.unreadable >= patience:
            return (
                f"over {self.settings.stop_unreadable:.0%} of the judgements could not be read for {patience} steps: "
                f"raise grpo.max_completion_tokens (now {self.settings.max_completion_tokens}) if they are truncated, "
                "else give the cold start more sft.steps"
            )
        if self.dead >= patience:
            return (
                f"every group of rollouts earned one and the same reward for {patience} steps, so nothing can be "
                f"learned: raise grpo.n (now {self.settings.n}) or grpo.temperature, or filter dead pairs with "
                "data.filter_votes=4"
            )
        return None


def go_on(trainer: Any, checkpoint: Path | None) -> None:
    """Train from a checkpoint, or from the beginning; a checkpoint of the last step is only loaded.

    transformers' Trainer would take a step more from it, wherever the last step does not end an epoch.
    """
    if checkpoint_step(checkpoint) >= trainer.args.max_steps:
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def callback(
    folder: RunFolder,
    stage: str,
    total: int,
    done: int,
    stop: StopSignal,
    row_of_step: Callable[[dict[str, Any]], dict[str, Any]],
    words_of_row: Callable[[dict[str, Any]], str],
    doomed: Doomed | None = None,
    minutes: float | None = None,
) -> Any:
    """A trainer callback that writes metrics.jsonl, draws progress, marks checkpoints complete and stops the run.

    `minutes` counts the steps that a resumed stage has behind it, too.

    After training, its `cause` holds why the run was stopped for good.
    """
    from transformers import TrainerCallback

    spent = sum(row["seconds"] for row in folder.steps(stage))

    class Watch(TrainerCallback):  # type: ignore[misc]
        cause: str | None = None

        def __init__(self) -> None:
            self.progress = Progress(stage, total, done)
            self.began = self.last = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if not state.is_world_process_zero or not logs or "loss" not in logs:
                return
            now = time.monotonic()
            row = {"stage": stage, "step": state.global_step, **row_of_step(logs), "loss": float(logs["loss"])}
            row["seconds"] = round(now - self.last, 4)
            self.last = now
            folder.append("metrics.jsonl", [row])
            self.progress.at(state.global_step, words_of_row(row))
            if doomed is not None and self.cause is None:
                self.cause = doomed.cause(row)
            if self.cause is not None:
                control.should_training_stop = True

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop.asked:
                control.should_save = control.should_training_stop = True
            if minutes is not None and spent + time.monotonic() - self.began >= 60 * minutes:
                control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Watch()
