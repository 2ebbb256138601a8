"""Fixtures of the whole suite."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, vectors and models: $PATARM_SHARED, or `../shared` beside the checkout."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared"
    folder = Path(os.environ.get("PATARM_SHARED") or beside)
    if not folder.is_dir():
        pytest.skip("the folder of real data is not here (set PATARM_SHARED)")
    return folder


Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    """Type a command: (exit code, stdout, stderr)."""
    from patarm_lite.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


# --- a little run: every stage of the real thing, in seconds ---

LITTLE = """
name: little
seed: 1
threads: 1
model: {base: arena, tuning: full, hidden: 64, layers: 1, heads: 2, mlp: 64, vocab: 500, dtype: float32}
protocol: {instructions: false, rubric: arena}
data: {heldout: 10, max_prompt_tokens: 384}
arena: {train_pairs: 13}
sft: {steps: 80, batch_size: 8, lr: 2e-2, warmup: 10, save_every: 30}
grpo: {steps: 10, pairs_per_step: 2, n: 2, per_device: 4, lr: 1e-3, warmup: 0, max_completion_tokens: 99, save_every: 2}
eval: {votes: 1}
"""
"""A recipe whose judge writes half its judgements readable after two seconds of cold start. 13 pairs, two a step: the
epoch ends in the middle of step 7."""


def little_recipe(**changes: Any) -> Any:
    """The little recipe with changes: `little_recipe(seed=3, grpo={"n": 4})`."""
    from patarm_lite.recipe import _Loader, check_recipe

    data = yaml.load(LITTLE, Loader=_Loader)  # noqa: S506 (a safe loader)
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    return check_recipe(data, "the little recipe")


def write_recipe(path: Path, **changes: Any) -> Path:
    """The little recipe with changes, as a file."""
    data = little_recipe(**changes).model_dump(mode="json")
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


class Command:
    """`patarm-lite ARGUMENTS` as a process, forked from a server that holds the libraries already (no slow import).

    `largest_file` limits the bytes of any file it writes (RLIMIT_FSIZE): a full disk.
    """

    def __init__(self, server: Any, log: Path, arguments: Sequence[object], largest_file: int | None = None) -> None:
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        words = [str(word) for word in arguments]
        self.process = server.Process(target=_run_command, args=(words, self.out, self.err, largest_file))
        self.process.start()

    def wait(self, seconds: float = 300) -> int:
        """The exit code; -9 for a killed one."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds:g} s: {self.err.read_text(encoding='utf-8')[-2000:]}")
        return int(self.process.exitcode)

    def until(self, happened: Callable[[], bool], seconds: float = 120) -> bool:
        """Wait for something to happen; False when the command ended before it was seen."""
        last = time.monotonic() + seconds
        while time.monotonic() < last:
            if happened():
                return True
            if not self.process.is_alive():
                return False
            time.sleep(0.0005)
        raise AssertionError(f"not seen in {seconds:g} s: {self.err.read_text(encoding='utf-8')[-2000:]}")

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone."""
        self.process.kill()
        self.process.join()

    def said(self) -> str:
        """Its standard error."""
        return self.err.read_text(encoding="utf-8")


PRELOADED = [
    "matplotlib.backends.backend_svg",
    "patarm_lite.cli",
    "patarm_lite.report",
    "patarm_lite.training.run",
    "peft",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.trainer",
    "trl.trainer.grpo_trainer",
]
"""What a training command imports: loaded once, in the server."""


def _run_command(arguments: list[str], out: Path, err: Path, largest_file: int | None) -> None:
    gc.freeze()  # the server's modules need not be searched for garbage again and again
    for number, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    if largest_file is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from patarm_lite.cli import main

    sys.exit(main(arguments))


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Command]:
    """`command("train", recipe, "-o", out)` starts patarm-lite and returns the running `Command`."""
    pytest.importorskip("trl")
    logs = tmp_path_factory.mktemp("logs")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    count = itertools.count()

    def start(*arguments: object, largest_file: int | None = None) -> Command:
        return Command(server, logs / str(next(count)), arguments, largest_file)

    return start


@pytest.fixture(scope="session")
def little_run(command: Callable[..., Command], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished little run that nothing disturbed. Not to be written to."""
    folder = tmp_path_factory.mktemp("little")
    run = folder / "run"
    train = command("train", write_recipe(folder / "little.yaml"), "-o", run)
    assert train.wait() == 0, train.said()
    return run


@pytest.fixture(scope="session")
def trained_run(command: Callable[..., Command], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe: $PATARM_TRAINED_RUN, or (for slow tests alone) one whose cold start was cut to
    a quarter, which takes some minutes and writes sound judgements of little worth."""
    given = os.environ.get("PATARM_TRAINED_RUN")
    if given:
        return Path(given)
    run = tmp_path_factory.mktemp("trained") / "run"
    short = ["sft.steps=250", "grpo.steps=1", "grpo.pairs_per_step=1", "data.heldout=40", "eval.votes=1", "threads=1"]
    train = command("train", "tiny", "-o", run, "--set", *short)
    assert train.wait(1200) == 0, train.said()
    return run


@pytest.fixture(scope="session")
def little_qlora_run(
    command: Callable[..., Command], little_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder of an adapter trained for two steps over the little judge in 4 bits. Not to be written to."""
    pytest.importorskip("bitsandbytes")
    from patarm_lite import arena

    folder = tmp_path_factory.mktemp("little-qlora")
    rows = [
        {"prompt": pair.prompt[0].content, "chosen": pair.chosen, "rejected": pair.rejected, "task": pair.task}
        for pair in arena.training_pairs(24, seed=4)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = write_recipe(
        folder / "little-qlora.yaml",
        model={"base": str(little_run / "judge"), "tuning": "qlora", "lora_r": 4, "lora_alpha": 8},
        data={"pairs": [str(folder / "pairs.jsonl")], "heldout": 8},
        sft={"source": "none"},
        grpo={"steps": 2, "n": 4, "per_device": None, "lr": 1e-2, "save_every": 1},
    )
    train = command("train", recipe, "-o", folder / "run")
    assert train.wait() == 0, train.said()
    return folder / "run"


# --- TRL's trainer as `patarm-lite train` builds it, in this process ---


@functools.cache
def little_tokenizer() -> Any:
    """The arena's tokenizer, learned once a session."""
    from patarm_lite import arena

    return arena.tiny_tokenizer(vocab=500)


@dataclass
class Rollouts:
    """One reward call: pair numbers, sides (0 chosen, 1 rejected) and completion ids, as TRL handed them over."""

    pairs: list[int]
    sides: list[int]
    completion_ids: list[list[int]]

    def order(self) -> list[int]:
        """The pairs in the call's order, each once."""
        return list(dict.fromkeys(self.pairs))


@dataclass
class Little:
    """A GRPO trainer, the reward calls it made, and what went into it."""

    trainer: Any
    calls: list[Rollouts]
    prompts: list[tuple[list[int], list[int]]]
    recipe: Any
    end_id: int
    pad_id: int


def little_trainer(
    folder: Path, pairs: int = 5, judge: Path | None = None, config: dict[str, Any] | None = None, **changes: Any
) -> Little:
    """A trainer of the little recipe with `changes`, on `pairs` arena pairs.

    Args:
        folder: where its checkpoints go.
        judge: a judge's folder; none: a judge of random weights that never ends a judgement.
        config: changes to TRL's configuration after our own settings.

    Every reward call is checked: both whole groups of every pair in it, and of no pair a part.
    """
    import torch
    from transformers.trainer_callback import PrinterCallback

    from patarm_lite import arena
    from patarm_lite.prompts import Encoder, Protocol, decode_judgement
    from patarm_lite.training.engine import TransformersEngine
    from patarm_lite.training.grpo import ParReward, row_dataset, trainer_class
    from patarm_lite.training.trainer_settings import grpo_config

    torch.set_num_threads(1)
    recipe = little_recipe(**changes)
    engine = TransformersEngine()
    if judge is None:
        tokenizer = little_tokenizer()
        model = arena.build_judge(tokenizer, hidden=16, layers=1, heads=2, mlp=32, seed=1)
    else:
        model, tokenizer = engine.load(str(judge), recipe.model)
    encoder = Encoder.from_tokenizer(tokenizer, Protocol(instructions=False))
    prompts = [encoder.pair_ids(pair, arena.RUBRICS[pair.task]) for pair in arena.training_pairs(pairs, seed=1)]
    calls: list[Rollouts] = []

    class Recorded(ParReward):
        def _judge(self, *, completion_ids: list[list[int]], pair: list[int], side: list[int], **others: Any) -> None:
            n = recipe.grpo.n
            found = Counter(zip(pair, side, strict=True))
            assert found == {(number, which): n for number in set(pair) for which in (0, 1)}, found
            super()._judge(completion_ids=completion_ids, pair=pair, side=side, **others)
            calls.append(Rollouts(list(pair), list(side), [list(ids) for ids in completion_ids]))

    par = Recorded(recipe.grpo, lambda ids: decode_judgement(tokenizer, ids, encoder.end_id))
    args = grpo_config(recipe, folder, {"bf16": False, "fp16": False, "use_cpu": True})
    for key, value in (config or {}).items():
        setattr(args, key, value)
    trainer = trainer_class(engine.trainers()[0])(
        model=model,
        reward_funcs=par.functions(),
        args=args,
        train_dataset=row_dataset(prompts),
        eval_dataset=row_dataset(prompts),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.par = par
    return Little(trainer, calls, prompts, recipe, encoder.end_id, tokenizer.pad_token_id)


def train_as_rank(out: Path) -> None:
    """Four GRPO steps as one of several processes (RANK and the rest are in the environment, as torchrun sets them).

    Writes `rank<N>.json`: number of processes, their backend, and (pairs, completion ids) of every reward call.
    """
    import torch.distributed as dist

    grpo = {"max_completion_tokens": 8, "steps": 4, "per_device": 4}
    little = little_trainer(out, pairs=5, grpo=grpo, config={"ddp_backend": "gloo"})
    little.trainer.train()
    found = [[call.order(), call.completion_ids] for call in little.calls]
    text = json.dumps([dist.get_world_size(), dist.get_backend(), found])
    (out / f"rank{dist.get_rank()}.json").write_text(text)
    dist.barrier()
    dist.destroy_process_group()


def train_as_forked_rank(rank: int, port: int, out: Path) -> None:
    """The same in a process of the server, which holds the libraries already."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    train_as_rank(out)
