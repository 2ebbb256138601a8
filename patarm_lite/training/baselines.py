"""What PAR is compared with: other ways to spend the same minutes on the same cold-started judge.

`sft` goes on with the cold start, on judgements it has not seen; `rejection` and `scalar` have files of their own. All
stop at `recipe.minutes` of wall clock, everything they need counted in, or without it after `grpo.steps` optimiser
steps; all go on from a checkpoint. Their learning rate is constant after a short warm-up, as GRPO's is, since a
schedule needs a number of steps and minutes have none.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from patarm_lite import arena
from patarm_lite.training import run, sft
from patarm_lite.training.data import file_examples
from patarm_lite.training.run_folder import checkpoint_step, last_checkpoint
from patarm_lite.training.watch import callback

Row = dict[str, Any]

ENDLESS = 1_000_000
"""Optimiser steps of a stage that only the clock ends."""
WARMUP = 5
BLOCK = 256
"""Fresh judgements of the arena drawn at once."""
FRESH = 1_000_000
"""Added to the seed for every block of fresh judgements, so that no block repeats the cold start's."""
MORE_SFT_LR = 0.25
"""Share of `sft.lr` at which SFT goes on. The cold start ended at 0.05 of it."""


class Rows:
    """A data set of `length` rows, each made by its number when the trainer asks for it."""

    def __init__(self, length: int, row: Callable[[int], Any]) -> None:
        self._length, self._row = length, row

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._row(index)


def in_order(trainer: type) -> type:
    """A Trainer that takes its rows from first to last."""
    from torch.utils.data import SequentialSampler

    class InOrder(trainer):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    return InOrder


class Clock:
    """Progress of a stage that ends at a time and not at a step. Printed every `every` seconds."""

    def __init__(self, stage: str, minutes: float, every: float = 15.0) -> None:
        self.stage, self.every = stage, every
        self.shown = time.monotonic()
        self.end = self.shown + 60 * minutes

    def at(self, done: int, words: str = "") -> None:
        now = time.monotonic()
        if now - self.shown >= self.every or now >= self.end:
            self.shown = now
            sys.stderr.write(f"{self.stage} step {done}  {words}  {max(0.0, self.end - now):.0f} s left\n")
            sys.stderr.flush()


def train_stage(
    context: run.Context,
    stage: str,
    model: Any,
    trainer: type,
    collate: Callable[[Any], Row],
    row: Callable[[int], Any],
    *,
    lr: float,
    batch_size: int,
    save_every: int,
    began: float,
    row_of_step: Callable[[Row], Row] = lambda logs: {},
    words_of_row: Callable[[Row], str] = lambda row: f"loss {row['loss']:.3f}",
) -> None:
    """Train `model` in place on rows 0, 1, 2, ... until the recipe's minutes, or grpo.steps, are over.

    `began`: when the stage began by `time.monotonic()`, so that its preparations count. After a resume the minutes
    already used are those of the steps in metrics.jsonl that the checkpoint holds.
    """
    recipe, folder = context.recipe, context.folder
    checkpoints = folder / "checkpoints" / stage
    checkpoint = last_checkpoint(checkpoints)
    done = checkpoint_step(checkpoint)
    folder.trim("metrics.jsonl", lambda row: row["stage"] != stage or row["step"] <= done)
    steps, minutes = recipe.grpo.steps, None
    if recipe.minutes is not None:
        minutes = recipe.minutes - (time.monotonic() - began) / 60
        left = minutes - sum(row["seconds"] for row in folder.steps(stage)) / 60
        steps = ENDLESS if left > 0 or not done else done  # killed when the time was up: nothing is left to train
    watch = callback(
        folder, stage, steps, done, context.stop, row_of_step=row_of_step, words_of_row=words_of_row, minutes=minutes
    )
    if recipe.minutes is not None:
        watch.progress = Clock(stage, left)
    settings = recipe.sft.model_copy(
        update={"lr": lr, "batch_size": batch_size, "save_every": save_every, "warmup": WARMUP}
    )
    arguments = sft.training_arguments(settings, checkpoints, recipe.seed, steps, context.device_arguments())
    arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs = "constant_with_warmup", {}
    made = in_order(trainer)(
        model=model,
        args=arguments,
        train_dataset=Rows(steps * batch_size, row),
        data_collator=collate,
        callbacks=[watch],
    )
    run.fit(context, made, watch, checkpoint)


def more_sft(context: run.Context, stage: str) -> None:
    """Go on with the cold start: fresh judgements of the arena's teacher, or the file's once more in a new order."""
    began = time.monotonic()
    settings = context.recipe.sft
    row = _fresh(context) if settings.source == "arena" else _again(context)
    train_stage(
        context,
        stage,
        context.model,
        sft.trainer_class(),
        sft.collate,
        row,
        lr=MORE_SFT_LR * settings.lr,
        batch_size=settings.batch_size,
        save_every=settings.save_every,
        began=began,
    )


def _fresh(context: run.Context) -> Callable[[int], sft.Example]:
    """Number -> example, drawn in blocks that don't depend on each other, so that a resumed run skips for nothing."""
    recipe, encoder = context.recipe, context.encoder

    @functools.lru_cache(maxsize=2)
    def block(number: int) -> list[sft.Example]:
        drawn: Iterator[Any] = arena.sft_examples(recipe.arena, recipe.seed + FRESH * (number + 1))
        return [
            sft.Example.of(
                encoder.prompt_ids(pair.prompt, response, task=pair.task, rubric=arena.RUBRICS[pair.task]),
                encoder.judgement_ids(judgement),
            )
            for pair, response, judgement in itertools.islice(drawn, BLOCK)
        ]

    return lambda index: block(index // BLOCK)[index % BLOCK]


def _again(context: run.Context) -> Callable[[int], sft.Example]:
    recipe = context.recipe
    limit = recipe.data.max_prompt_tokens
    examples, _ = file_examples(Path(str(recipe.sft.file)), context.encoder, context.rubric, limit)
    at = endless_order(len(examples), f"more sft {recipe.seed}")
    return lambda index: examples[at(index)]


def endless_order(count: int, seed: str) -> Callable[[int], int]:
    """Position in an endless stream -> item: one shuffled pass over all after another.

    >>> at = endless_order(3, "x")
    >>> sorted(at(i) for i in range(3)), sorted(at(i) for i in range(3, 6))
    ([0, 1, 2], [0, 1, 2])
    """

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> Sequence[int]:
        return random.Random(f"{seed} {epoch}").sample(range(count), count)

    return lambda index: order(index // count)[index % count]
