"""The probe: the worst steps that a run can meet, taken before it begins, to measure its memory and foretell its hours.

The longest prompt of the data, filled up to `data.max_prompt_tokens`, is judged by as many judgements as the recipe
says, each forced to its full length: a batch of the cold start, a batch of the evaluation and a step of GRPO, with the
same trainers as the run. Each kind of step is taken twice, since the second one meets the optimiser's state that the
first one leaves and no compiling. It runs in a process of its own (`supervise.py`), so nothing of it is left in the
run: no weight, no random number, no fragment of memory.

On a GPU the peak is that of torch's allocator; on a CPU it is the largest resident memory of the process, beyond what
the libraries take. The hours are an upper bound: judgements mostly end before their full length. Left out: writing and
reading checkpoints, and what `minutes` cuts off.
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from patarm_lite import plan
from patarm_lite.errors import UserError
from patarm_lite.progress import span
from patarm_lite.recipe import Recipe
from patarm_lite.training import sft
from patarm_lite.training.asking import Asked
from patarm_lite.training.data import fit_pairs, load_run_pairs
from patarm_lite.training.engine import accelerator, choose_engine, prepare_libraries
from patarm_lite.training.evaluation import rubric_for
from patarm_lite.training.grpo import trainer_class
from patarm_lite.training.run import Context, check, grpo_trainer, load_start, par_reward, sft_trainer
from patarm_lite.training.run_folder import RunFolder
from patarm_lite.training.trainer_settings import grpo_config
from patarm_lite.training.watch import StopSignal
from patarm_lite.verdicts import parse

HEAD_ROOM = 0.05
"""Share of the free memory that must stay free in the worst step, for fragments: what the shipped recipes are planned
with. Not measured on a GPU."""
STEPS = 2
OUT_OF_MEMORY = (
    "out of memory",  # CUDA, HIP and XPU allocators; CUDA and HIP drivers
    "can't allocate memory",  # torch's allocator on a CPU
    "CUBLAS_STATUS_ALLOC_FAILED",
    "OUT_OF_DEVICE_MEMORY",  # Level Zero, under XPU
    "OUT_OF_HOST_MEMORY",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that memory ran out, on a card or on the machine.

    >>> out_of_memory(RuntimeError("CUDA error: out of memory")), out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        words = str(found)
        if isinstance(found, MemoryError) or (
            isinstance(found, RuntimeError) and any(part in words for part in OUT_OF_MEMORY)
        ):
            return True
        found = found.__cause__ or found.__context__
    return False


class Card:
    """Memory of the GPU that torch computes on."""

    measured = "torch's allocator"

    def __init__(self, module: Any) -> None:
        self._module = module
        self.name = str(module.get_device_name())
        self.free, self.total = (int(value) for value in module.mem_get_info())

    def begin(self) -> None:
        self._module.reset_peak_memory_stats()

    def peak(self) -> dict[str, int]:
        """Bytes since `begin`: `peak` is what tensors took, `reserved` what was taken from the card for them."""
        self._module.synchronize()
        return {
            "peak": int(self._module.max_memory_allocated()),
            "reserved": int(self._module.max_memory_reserved()),
        }

    def now(self) -> float:
        self._module.synchronize()
        return time.perf_counter()


class Machine:
    """Memory of this machine, for a run without a GPU. The largest resident memory of a process can't be set back."""

    measured = "resident memory of the process, beyond the libraries'"
    name = "CPU"

    def __init__(self) -> None:
        import psutil

        memory = psutil.virtual_memory()
        self.free, self.total = int(memory.available), int(memory.total)
        self._before = _resident_peak()

    def begin(self) -> None:
        pass

    def peak(self) -> dict[str, int]:
        """Bytes beyond what the process had when this object was made."""
        return {"peak": _resident_peak() - self._before}

    def now(self) -> float:
        return time.perf_counter()


def _resident_peak() -> int:
    """The largest resident memory that this process ever had, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(largest) if sys.platform == "darwin" else 1024 * largest  # bytes on macOS, KiB elsewhere


def memory_here() -> Card | Machine:
    """What the run's memory is taken from."""
    import torch

    seen = accelerator()
    return Machine() if seen is None else Card(getattr(torch, seen))


def measure(recipe: Recipe, offline: bool, stop: StopSignal) -> dict[str, Any]:
    """Take the worst steps of a recipe. To be called in a process of its own.

    Returns:
        `fits`; `device`, `measured` (how), `free`, `total`; `parts`: for every kind of step its `peak` (bytes) and
        `seconds`; `peak`, the largest of them; `planned`, the plan's (None: no plan for this base); `hours`, an upper
        bound by stage. A part that ran out of memory ends the probe: `fits` is then False, and `failed` and `why` name
        it; `hours` and `peak` are then missing.

    Raises:
        UserError: as for the run itself.
    """
    engine = choose_engine(recipe)
    check(recipe, offline)
    pairs = load_run_pairs(recipe, offline)
    prepare_libraries(recipe.threads)
    memory = memory_here()
    found: dict[str, Any] = {
        "device": memory.name,
        "measured": memory.measured,
        "free": memory.free,
        "total": memory.total,
        "planned": _planned(recipe.model_copy(update={"engine": engine.name}), memory),
        "parts": {},
    }
    with tempfile.TemporaryDirectory(prefix="patarm-lite-probe-") as scratch:
        folder = RunFolder.create(Path(scratch) / "run", force=False)
        context = Context(folder, recipe, engine, stop, rubric_for(recipe.protocol.rubric), pairs)
        part = "loading"
        try:
            load_start(context)
            context.train, context.heldout, counts = fit_pairs(recipe, pairs, context.encoder, context.rubric)
            prompt = _longest_prompt(context)
            for part, step in _worst_steps(context):
                stop.check()
                memory.begin()
                seconds = step(context, prompt, memory)
                found["parts"][part] = {**memory.peak(), "seconds": seconds}
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            why = str(error).splitlines()[0] if str(error) else "out of memory"
            return {**found, "fits": False, "failed": part, "why": why}
    found["peak"] = max(row["peak"] for row in found["parts"].values())
    found["fits"] = found["peak"] <= (1 - HEAD_ROOM) * memory.free
    times = {part: row["seconds"] for part, row in found["parts"].items()}
    found["hours"] = hours(recipe, counts["train"], counts["heldout"], times)
    return found


def _planned(recipe: Recipe, memory: Card | Machine) -> int | None:
    """The plan's peak in bytes: on a card with the context that torch's allocator does not see taken off."""
    try:
        found = plan.memory(recipe, plan.shape_of(recipe), memory.total if isinstance(memory, Card) else None)
    except UserError:
        return None
    return found.peak - found.context


def _worst_steps(context: Context) -> Iterator[tuple[str, Callable[[Context, list[int], Card | Machine], Any]]]:
    """The kinds of steps of this run, in its order."""
    recipe = context.recipe
    learns_sft = recipe.sft.source != "none" and recipe.sft.init is None
    if learns_sft or recipe.method in ("sft", "rejection"):
        yield "sft", _sft
    if recipe.method != "scalar":
        yield "evaluation", _evaluation
    if recipe.method == "par":
        yield "grpo", _grpo


def _longest_prompt(context: Context) -> list[int]:
    """The ids of the data's longest judging prompt, repeated up to the recipe's limit; it ends as a prompt does."""
    prompts = (ids for pair in context.train for ids in context.encoder.pair_ids(pair, context.rubric(pair.task)))
    longest = max(prompts, key=len)
    limit = context.recipe.data.max_prompt_tokens
    return (longest * (limit // len(longest) + 1))[-limit:]


class _Times:
    """Seconds of each step of a trainer."""

    def __init__(self, memory: Card | Machine) -> None:
        self.seconds: list[float] = []
        self._memory = memory

    def callback(self) -> Any:
        from transformers import TrainerCallback

        times = self

        class Timed(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.began = times._memory.now()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                times.seconds.append(times._memory.now() - self.began)

        return Timed()


def _train(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.args.save_strategy = "no"
    trainer.train()


def _sft(context: Context, prompt: list[int], memory: Card | Machine) -> dict[str, float]:
    recipe = context.recipe
    judgement = (prompt * (recipe.grpo.max_completion_tokens // len(prompt) + 1))[: recipe.grpo.max_completion_tokens]
    examples = [sft.Example.of(prompt, judgement)] * (STEPS * recipe.sft.batch_size)
    times = _Times(memory)
    _train(sft_trainer(context, examples, context.folder / "sft_probe", STEPS, times.callback()))
    return {"step": times.seconds[-1]}


def _evaluation(context: Context, prompt: list[int], memory: Card | Machine) -> dict[str, float]:
    recipe = context.recipe
    judges_all = recipe.data.filter_votes or (recipe.sft.source == "rejection" and recipe.sft.init is None)
    most = 2 * max(len(context.heldout), len(context.train) if judges_all else 0)
    rows = min(judged_together(recipe), most)
    with _full_length(context.model, recipe.grpo.max_completion_tokens):
        began = memory.now()
        votes = context.sampler().votes([prompt] * rows, recipe.eval.votes, recipe.seed)
        seconds = memory.now() - began
    _assert_full_length(recipe, [vote.tokens for row in votes for vote in row])
    return {"step": seconds}


@contextlib.contextmanager
def _full_length(model: Any, tokens: int) -> Iterator[None]:
    """Within this context no judgement of the model ends before so many tokens."""
    model.generation_config.min_new_tokens = tokens
    try:
        yield
    finally:
        model.generation_config.min_new_tokens = None


def _grpo(context: Context, prompt: list[int], memory: Card | Machine) -> dict[str, float]:
    recipe, tokens = context.recipe, context.recipe.grpo.max_completion_tokens
    short = recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update={"steps": STEPS}), "report_to": []})
    args = grpo_config(short, context.folder / "grpo_probe", context.device_arguments())
    vllm = recipe.grpo.rollouts == "vllm"
    args.generation_kwargs = {"min_tokens": tokens} if vllm else {"min_new_tokens": tokens}
    times, generating = _Times(memory), []

    def made_of(base: type) -> type:
        class Probed(trainer_class(base)):  # type: ignore[misc]
            def _generate_and_score_completions(self, inputs: Any) -> Any:
                began = memory.now()
                output = super()._generate_and_score_completions(inputs)
                generating.append(memory.now() - began)
                return output

            def _compare(self, *arguments: Any) -> None:
                # forced to go on, a judgement has other probabilities than the trainer's: their gap means nothing here
                with contextlib.suppress(UserError):
                    super()._compare(*arguments)

        return Probed

    thinking = recipe.protocol.thinking
    asked = Asked(prompt, prompt, lambda text, ended: parse(text, ended, thinking))
    par = par_reward(context, [asked] * recipe.grpo.pairs_per_step)
    trainer = grpo_trainer(
        context, par, [(prompt, prompt)] * recipe.grpo.pairs_per_step, args, times.callback(), made_of
    )
    _train(trainer)
    _assert_full_length(recipe, [row["tokens"] for row in par.rows])
    return {"step": times.seconds[-1], "rollouts": generating[-1], "training": times.seconds[-1] - generating[-1]}


def _assert_full_length(recipe: Recipe, lengths: list[int]) -> None:
    """A judgement that ended early makes a step that is not the worst."""
    if set(lengths) != {recipe.grpo.max_completion_tokens}:
        raise AssertionError(
            f"a judgement of the probe ended after {min(lengths)} of {recipe.grpo.max_completion_tokens} tokens"
        )


def judged_together(recipe: Recipe) -> int:
    """Responses in one batch of the evaluation."""
    return max(1, recipe.eval.batch_size // recipe.eval.votes)


def hours(recipe: Recipe, train: int, heldout: int, seconds: dict[str, dict[str, float]]) -> dict[str, float]:
    """Hours of a run by stage and as a `total`, if every step takes as long as the worst.

    Args:
        train, heldout: pairs.
        seconds: part -> seconds of its `step`: a step of sft or grpo, a batch of the evaluation.
    """

    def judging(pairs: int, votes: int) -> float:
        # a batch of other votes holds about as many judgements
        batches = math.ceil(2 * pairs / max(1, recipe.eval.batch_size // votes))
        return batches * seconds["evaluation"]["step"]

    found = {}
    if "sft" in seconds:
        steps = recipe.sft.steps if recipe.sft.source != "none" and recipe.sft.init is None else 0
        steps += recipe.grpo.steps if recipe.method in ("sft", "rejection") else 0
        found["sft"] = steps * seconds["sft"]["step"]
    if "evaluation" in seconds:
        found["evaluation"] = 2 * judging(heldout, recipe.eval.votes)
        if recipe.sft.source == "rejection" and recipe.sft.init is None:
            drawn = min(train, recipe.sft.draw_pairs or train)
            found["drawing"] = judging(drawn, recipe.sft.votes)
        if recipe.data.filter_votes:
            found["filter"] = judging(train, recipe.data.filter_votes)
    if "grpo" in seconds:
        found["grpo"] = recipe.grpo.steps * seconds["grpo"]["step"]
    return {stage: spent / 3600 for stage, spent in {**found, "total": sum(found.values())}.items()}


def words(found: dict[str, Any]) -> str:
    """One line on what `measure` found."""
    if "peak" not in found:
        return f"out of memory in {found['failed'] or 'one of its steps'} ({found['why']})"
    compared = ""
    if found["planned"]:
        apart = found["peak"] - found["planned"]
        compared = f"; planned {size(found['planned'])}, so {apart / found['planned']:+.0%}"
    verdict = "fits" if found["fits"] else f"does not leave {HEAD_ROOM:.0%} free, so does not fit"
    return f"{size(found['peak'])} of {size(found['free'])} free on {found['device']}{compared}: {verdict}"


def time_words(found: dict[str, Any]) -> str:
    """One line on the time that a run takes at most."""
    grpo = found["parts"].get("grpo", {}).get("seconds")
    step = ""
    if grpo:
        step = (
            f"a step of GRPO takes at most {span(grpo['step'])} ({span(grpo['rollouts'])} rollouts, "
            f"{span(grpo['training'])} training), "
        )
    stages = ", ".join(f"{stage} {span(3600 * h)}" for stage, h in found["hours"].items() if stage != "total")
    return f"{step}the run at most {span(3600 * found['hours']['total'])} ({stages}), every judgement at full length"


def size(count: int) -> str:
    """Bytes in the unit that cards are sold in.

    >>> size(9_800_000_000), size(64_000_000)
    ('9.13 GiB', '61 MiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
