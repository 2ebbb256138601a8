"""One training run from recipe to report: cold start, evaluation, method, evaluation. Each stage can be resumed.

A stage writes its result by rename; on resume a stage whose result is there is skipped, the one that was cut goes on
from its last complete checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from patarm_lite import __version__, arena
from patarm_lite.errors import UserError
from patarm_lite.metrics import judged_to_rows, pair_to_row, rows_to_judged
from patarm_lite.prompts import FORMS, Encoder, Protocol, decode_judgement
from patarm_lite.recipe import Recipe, load_recipe
from patarm_lite.records import JudgedPair, Pair, Rubric
from patarm_lite.report import write_report
from patarm_lite.training import ranks, sft
from patarm_lite.training.adapter_effect import adapter_effect
from patarm_lite.training.asking import EVALUATION, Asked, ask, write_rubrics
from patarm_lite.training.base_check import check_start
from patarm_lite.training.data import RunPairs, arena_examples, file_examples, fit_pairs, load_run_pairs
from patarm_lite.training.engine import Engine, choose_engine, free_cores, prepare_libraries, save_judge
from patarm_lite.training.evaluation import Sampler, judge_pairs, rubric_for, summary_of
from patarm_lite.training.grpo import ParReward, epochs_of, row_dataset, trainer_class
from patarm_lite.training.run_folder import (
    RunFolder,
    check_free,
    checkpoint_step,
    disk_trouble,
    last_checkpoint,
    read_lines,
    write_json,
    write_lines,
    write_text,
)
from patarm_lite.training.trainer_settings import check_can_learn, grpo_config
from patarm_lite.training.watch import Doomed, StopSignal, callback, go_on
from patarm_lite.verdicts import RubricPart, parse_rubric_part

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "numpy")
SAMPLES_EVERY = 10
"""Steps between the judgements kept in samples.jsonl."""
RUBRIC_TRIES = 4
"""How often the rubric of a training pair is drawn at most until it can be read."""


@dataclass
class Context:
    """What the stages of one run share."""

    folder: RunFolder
    recipe: Recipe
    engine: Engine
    stop: StopSignal
    rubric: Callable[[str], Rubric]
    pairs: RunPairs
    train: list[Pair] = field(default_factory=list)
    heldout: list[Pair] = field(default_factory=list)
    model: Any = None
    tokenizer: Any = None

    @property
    def protocol(self) -> Protocol:
        section = self.recipe.protocol
        forms = FORMS if self.recipe.sft.shared else FORMS[:1]
        return Protocol(instructions=section.instructions, thinking=section.thinking, forms=forms)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Made at first use, when the tokenizer is there; it remembers contents that come back."""
        return Encoder.from_tokenizer(self.tokenizer, self.protocol)

    def sampler(self) -> Sampler:
        return Sampler(
            self.model,
            self.tokenizer,
            self.encoder,
            self.recipe.grpo.max_completion_tokens,
            self.recipe.eval.batch_size,
        )

    def device_arguments(self) -> dict[str, Any]:
        """Trainer arguments that depend on the machine and the engine."""
        return self.engine.arguments(self.recipe)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        self.folder.note(stage=stage)
        wall, cpu = time.monotonic(), _cpu_seconds()
        try:
            yield
        finally:
            self.folder.note_stage(stage, time.monotonic() - wall, _cpu_seconds() - cpu)


def _give_back_memory() -> None:
    """Free what the cold start left: its trainer holds itself and the optimiser's state until somebody collects it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def train(
    recipe: Recipe,
    out: Path,
    force: bool = False,
    offline: bool = False,
    command: str = "",
    probed: dict[str, Any] | None = None,
    stop: StopSignal | None = None,
) -> Path:
    """Run a recipe into a new run folder.

    Args:
        probed: what the probe found, for `probe.json`.
        stop: what is asked when somebody wants the run to stop; none: Ctrl-C.

    Returns the run folder.

    Raises:
        UserError: bad input (nothing is written then), a run that can't learn, a full disk.
        KeyboardInterrupt: Ctrl-C; the run can be resumed.
    """
    ranks.check_ranks(recipe)
    if ranks.first():
        check_free(out, force)
    engine = choose_engine(recipe)
    check(recipe, offline)
    pairs = load_run_pairs(recipe, offline)
    folder = RunFolder.create(out, force)
    write_recipe(folder, recipe)
    if probed is not None:
        write_json(folder / "probe.json", probed)
    folder.note(
        status="running",
        name=recipe.name,
        seed=recipe.seed,
        engine=engine.name,
        command=command,
        processes=ranks.world(),
        offline=offline,
        versions=_versions(),
        machine={"processor": platform.machine(), "cores": os.cpu_count(), "threads": recipe.threads or free_cores()},
    )
    return _run(folder, recipe, engine, pairs, stop)


def write_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """The recipe in force, as recipe.yaml."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text(folder / "recipe.yaml", text)


def resume(run: Path, stop: StopSignal | None = None) -> Path:
    """Go on with a run that was stopped or killed; a finished run is left as it is. `stop`: see `train`.

    Raises:
        UserError: not a run folder, or its data are not what they were.
    """
    folder = RunFolder.open(run)
    recipe = load_recipe(str(folder / "recipe.yaml"))
    if folder.about().get("status") == "done":
        if not (folder / "report.html").is_file():  # killed while it was written
            write_report(run)
        sys.stderr.write(f"{run} is finished; see {run}/report.html\n")
        return run
    engine = choose_engine(recipe)
    about = folder.about()
    known = (about.get("data") or {}).get("sets") or ()  # the commits this run began with
    pairs = load_run_pairs(recipe, bool(about.get("offline")), known)
    folder.note(status="running")
    return _run(folder, recipe, engine, pairs, stop)


def check(recipe: Recipe, offline: bool) -> None:
    """Refuse a recipe that can't be run here, before anything is written.

    Raises:
        UserError: what of it, and what to set.
    """
    check_can_learn(recipe)
    base = recipe.model.base
    if base == "arena":
        if recipe.model.tuning != "full":
            raise UserError(
                f"model.tuning={recipe.model.tuning} needs a trained base, but model.base is 'arena' (from scratch); "
                "train it in full first, then set model.base=RUN/judge"
            )
        if recipe.sft.source in ("rejection", "none") and recipe.sft.init is None:
            raise UserError(
                f"sft.source={recipe.sft.source} needs a base that can judge already, but model.base is 'arena'"
            )
    elif not Path(base).exists():
        if base.startswith((".", "/", "~")) or base.count("/") != 1:
            raise UserError(f"model.base {base!r} is neither a folder here nor a hub id NAME/MODEL")
        if offline or os.environ.get("HF_HUB_OFFLINE") == "1":
            _check_cached(base, recipe.model.revision)
    elif not any((Path(base) / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"model.base {base!r} is no folder of a model (no config.json in it); give RUN/judge, say")
    for tracker in recipe.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"report_to names {tracker}, which is not installed; type: pip install {tracker}")
    if recipe.sft.init is not None and not (Path(recipe.sft.init) / "sft").is_dir():
        raise UserError(f"sft.init {recipe.sft.init} is not a run folder with a cold-started judge (no sft/ in it)")
    check_start(recipe, offline)


def _check_cached(base: str, revision: str) -> None:
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(base, "config.json", revision=revision), str):
        raise UserError(
            f"model.base {base!r} is a hub id, you are offline and it is not in the cache; give a local folder"
        )


def _versions() -> dict[str, str]:
    found = {"patarm-lite": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _run(folder: RunFolder, recipe: Recipe, engine: Engine, pairs: RunPairs, stop: StopSignal | None) -> Path:
    prepare_libraries(recipe.threads)
    listening: contextlib.AbstractContextManager[StopSignal] = contextlib.nullcontext(stop) if stop else StopSignal()
    with ranks.one_voice(), listening as asked:
        context = Context(folder, recipe, engine, asked, rubric_for(recipe.protocol.rubric), pairs)
        _describe(context)
        try:
            with disk_trouble(folder.path):
                load_start(context)
                ranks.wait()
                _prepare_pairs(context)
                ranks.wait()
                _cold_start(context)
                ranks.wait()
                if recipe.data.filter_votes > 0:
                    from patarm_lite.training.dead_pairs import filter_dead_pairs

                    filter_dead_pairs(context)
                before = _evaluate(context, "before")
                ranks.wait()
                asked.check()
                _give_back_memory()
                _method(context)
                ranks.wait()
                after = _after(context)
        except KeyboardInterrupt:
            folder.note(status="interrupted")
            sys.stderr.write(f"stopped; go on with: patarm-lite train --resume {shlex.quote(str(folder.path))}\n")
            raise
        except UserError as error:
            folder.note(status="stopped", cause=str(error))
            raise
    ranks.wait()
    if ranks.first():
        _finish(context, before, after)
    return folder.path


def _describe(context: Context) -> None:
    recipe, grpo = context.recipe, context.recipe.grpo
    sys.stderr.write(
        f"{recipe.name}: method {recipe.method}, engine {context.engine.name}, seed {recipe.seed}, "
        f"{len(context.pairs.train) + len(context.pairs.heldout)} pairs\n"
        f"cold start: {recipe.sft.source if recipe.sft.init is None else recipe.sft.init}, {recipe.sft.steps} steps of "
        f"{recipe.sft.batch_size}, lr {recipe.sft.lr:g}; GRPO: {grpo.steps} steps of {grpo.pairs_per_step} pairs x 2 x "
        f"n={grpo.n}, lr {grpo.lr:g}, PAR {grpo.form}, findings {grpo.findings:g}\n"
        f"output: {context.folder.path}\n"
    )


def load_start(context: Context) -> None:
    """The tokenizer, and the model that the cold start begins from."""
    recipe = context.recipe
    if (context.folder / "sft").is_dir() or recipe.sft.init is not None:
        start = context.folder / "sft" if (context.folder / "sft").is_dir() else Path(str(recipe.sft.init)) / "sft"
        context.model, context.tokenizer = context.engine.load(str(start), recipe.model)
        if recipe.sft.init is not None and "base" not in context.folder.about():
            known = RunFolder.open(Path(recipe.sft.init)).about().get("base")
            if known is not None:
                context.folder.note(base=known)
        return
    if recipe.model.base != "arena":
        from patarm_lite.quantize.source import base_record

        here = Path(recipe.model.base)  # an adapter remembers its base's path: it must hold from any folder
        name = str(here.resolve()) if here.exists() else recipe.model.base
        loaded, context.tokenizer = context.engine.load(name, recipe.model)
        commit = getattr(loaded.config, "_commit_hash", None)  # what `revision` stood for; None for a local folder
        adapters = getattr(loaded, "peft_config", {})
        under = next((str(known.base_model_name_or_path) for known in adapters.values()), name)
        dtype = str(loaded.dtype).removeprefix("torch.")
        context.folder.note(base=base_record(recipe.model.base, recipe.model.revision, commit, under, dtype))
        context.model = context.engine.adapt(loaded, recipe.model, recipe.seed)
        return
    texts = arena.protocol_texts(recipe.arena, context.protocol, recipe.seed)
    vocab = recipe.model.vocab
    if recipe.data.pairs:
        vocab = recipe.model.vocab_with_pairs
        for pair in context.pairs.train:
            texts += [turn.content for turn in pair.prompt] + [pair.chosen, pair.rejected]
    context.tokenizer = arena.train_tokenizer(texts, vocab)
    section = recipe.model
    context.model = arena.build_judge(
        context.tokenizer,
        hidden=section.hidden,
        layers=section.layers,
        heads=section.heads,
        mlp=section.mlp,
        seed=recipe.seed,
    )


def _prepare_pairs(context: Context) -> None:
    context.train, context.heldout, counts = fit_pairs(context.recipe, context.pairs, context.encoder, context.rubric)
    known = context.folder.about().get("data")
    if known is not None and known.get("sha256_train") != counts["sha256_train"]:
        raise UserError(
            f"the training pairs are not those that {context.folder.path} was started with; start a new run"
        )
    sys.stderr.write(
        f"{counts['train']} pairs to train on, {counts['heldout']} held out, {sum(counts['dropped'].values())} dropped"
        f"{''.join(f'; {reason}: {rows}' for reason, rows in counts['dropped'].items())}\n"
    )
    context.folder.note(data=counts, parameters=sum(p.numel() for p in context.model.parameters()))
    if not (context.folder / "heldout.jsonl").is_file():
        write_lines(context.folder / "heldout.jsonl", [pair_to_row(pair) for pair in context.heldout])


def _cold_start(context: Context) -> None:
    target = context.folder / "sft"
    if target.is_dir():
        return
    with context.timed("sft"):
        if context.recipe.sft.init is None and context.recipe.sft.source != "none":
            if context.recipe.sft.source == "rejection":
                from patarm_lite.training.rejection import rejection_examples

                examples = rejection_examples(context, context.recipe.sft.votes)
            elif context.recipe.sft.source == "file":
                path = Path(str(context.recipe.sft.file))
                examples, dropped = file_examples(
                    path, context.encoder, context.rubric, context.recipe.data.max_prompt_tokens
                )
                context.folder.note(sft_lines_dropped=dropped)
            else:
                examples = arena_examples(context.recipe, context.encoder)
            fine_tune(context, examples, "sft", context.recipe.sft.steps)
        save_judge(context.model, context.tokenizer, context.protocol, context.recipe.protocol.rubric, target)
    if ranks.first():
        shutil.rmtree(context.folder / "checkpoints" / "sft", ignore_errors=True)


def fine_tune(context: Context, examples: list[sft.Example], stage: str, steps: int) -> None:
    """SFT of the context's model on examples, with checkpoints under the stage's name."""
    sft.check_examples(examples, context.encoder.end_id)
    settings = context.recipe.sft
    if settings.by_length:
        examples = sft.by_length(examples, settings.batch_size, context.recipe.seed)
    checkpoints = context.folder / "checkpoints" / stage
    checkpoint = last_checkpoint(checkpoints)
    done = checkpoint_step(checkpoint)
    context.folder.trim("metrics.jsonl", lambda row: row["stage"] != stage or row["step"] <= done)
    watch = callback(
        context.folder,
        stage,
        steps,
        done,
        context.stop,
        row_of_step=lambda logs: {},
        words_of_row=lambda row: f"loss {row['loss']:.3f}",
    )
    trainer = sft_trainer(context, examples, checkpoints, steps, watch)
    fit(context, trainer, watch, checkpoint)


def sft_trainer(context: Context, examples: list[sft.Example], folder: Path, steps: int, watch: Any) -> Any:
    """The trainer of the cold start."""
    recipe = context.recipe
    return sft.trainer_class(in_order=recipe.sft.by_length)(
        model=context.model,
        args=sft.training_arguments(recipe.sft, folder, recipe.seed, steps, context.device_arguments()),
        train_dataset=examples,
        data_collator=sft.collate,
        callbacks=[watch],
    )


def fit(context: Context, trainer: Any, watch: Any, checkpoint: Path | None) -> None:
    """Train to the end of a stage, or to where it was asked to stop, and say so."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    go_on(trainer, checkpoint)
    ranks.wait()
    context.stop.check()
    if watch.cause is not None:
        raise UserError(f"this run can't learn and was stopped: {watch.cause}")


def _evaluate(context: Context, when: str) -> list[JudgedPair]:
    path = context.folder / f"heldout_{when}.jsonl"
    known = _evaluated_already(context) if when == "before" and not path.is_file() else None
    if known is not None:
        write_text(path, known.read_text(encoding="utf-8"))
    if path.is_file():
        return rows_to_judged(read_lines(path), context.heldout)
    recipe = context.recipe
    with context.timed("evaluation"):
        judged = judge_pairs(
            context.sampler(),
            context.heldout,
            context.rubric,
            recipe.eval.votes,
            recipe.seed,
            f"judging {when}",
            recipe.grpo.writes,
        )
        write_lines(path, judged_to_rows(judged))
    found = summary_of(judged)
    sys.stderr.write(
        f"{when}: accuracy {found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}] on {len(judged)} held-out "
        f"pairs, unreadable {found['unreadable']:.1%}\n"
    )
    return judged


def _evaluated_already(context: Context) -> Path | None:
    """Where the judge of `sft.init` was evaluated before, on the same pairs with the same votes and seed."""
    if context.recipe.sft.init is None:
        return None
    other = RunFolder.open(Path(context.recipe.sft.init))
    theirs, path = load_recipe(str(other / "recipe.yaml")), other / "heldout_before.jsonl"
    same = (
        path.is_file()
        and other.about()["data"]["sha256_heldout"] == context.folder.about()["data"]["sha256_heldout"]
        and (theirs.eval, theirs.seed) == (context.recipe.eval, context.recipe.seed)
        and theirs.grpo.max_completion_tokens == context.recipe.grpo.max_completion_tokens
        and theirs.grpo.writes == context.recipe.grpo.writes
    )
    return path if same else None


def _method(context: Context) -> None:
    from patarm_lite.training import baselines, rejection, scalar

    method, target = context.recipe.method, context.folder / "judge"
    if target.is_dir() and method == "scalar":
        context.model = scalar.load_scalar(target)
        return
    if target.is_dir():
        context.model, context.tokenizer = context.engine.load(str(target), context.recipe.model)
        return
    # 'sft' is the cold start's stage: its metrics and checkpoints must not be taken for the method's
    stage = {"par": "grpo", "sft": "more_sft"}.get(method, method)
    with context.timed(stage):
        if method == "par":
            grpo(context)
        elif method == "sft":
            baselines.more_sft(context, stage)
        elif method == "rejection":
            rejection.train_rejection(context, stage)
        else:
            scalar.train_scalar(context, stage)
    save = scalar.save_scalar if method == "scalar" else save_judge
    save(context.model, context.tokenizer, context.protocol, context.recipe.protocol.rubric, target)
    if ranks.first():
        shutil.rmtree(context.folder / "checkpoints" / stage, ignore_errors=True)


def _after(context: Context) -> dict[str, Any]:
    """The summary of the trained judge. A scalar head writes no judgements, so none are read."""
    if context.recipe.method == "scalar":
        from patarm_lite.training.scalar import scalar_summary

        return scalar_summary(context)
    return summary_of(_evaluate(context, "after"))


def grpo(context: Context) -> None:
    """GRPO with PAR on the context's model."""
    settings, folder = context.recipe.grpo, context.folder
    checkpoints = folder / "checkpoints" / "grpo"
    checkpoint = last_checkpoint(checkpoints)
    done = checkpoint_step(checkpoint)
    folder.trim("metrics.jsonl", lambda row: row["stage"] != "grpo" or row["step"] <= done)
    folder.trim("samples.jsonl", lambda row: row["step"] <= done)
    pairs, asked = ask_pairs(context)
    par = par_reward(context, asked)
    watch = callback(
        folder,
        "grpo",
        settings.steps,
        done,
        context.stop,
        row_of_step=lambda logs: {**par.stats, "truncated": _truncated(par.rows)},
        words_of_row=_words,
        doomed=Doomed(settings, folder.steps("grpo")),
        minutes=context.recipe.minutes,
    )
    prompts = [(one.chosen, one.rejected) for one in asked]
    args = grpo_config(context.recipe, checkpoints, context.device_arguments())
    trainer = grpo_trainer(context, par, prompts, args, watch)

    def keep(step: int, rows: list[dict[str, Any]]) -> None:
        if step % SAMPLES_EVERY == 1 or step == settings.steps:
            folder.append("samples.jsonl", [_sample(step, row, pairs[row["pair"]]) for row in rows[: 2 * settings.n]])

    trainer.on_rollouts = keep
    folder.note(epochs=epochs_of(settings.steps, settings.pairs_per_step, len(pairs)))
    fit(context, trainer, watch, checkpoint)
    if context.recipe.model.tuning != "full":
        effect = adapter_effect(context.model, prompts[0][0])
        folder.note(adapter_effect=effect)
        if effect is None:
            sys.stderr.write("the adapter is still zero: nothing was learned, so the judge is its base\n")


def ask_pairs(context: Context) -> tuple[list[Pair], list[Asked]]:
    """The training pairs and what the judge is asked about them.

    With `grpo.writes` evaluation the rubrics are written first, by the judge as it is now; a resumed run reads them
    from rubrics.jsonl. Pairs whose rubric can't be read in RUBRIC_TRIES tries are left out and counted.

    Raises:
        UserError: no rubric can be read.
    """
    recipe, encoder = context.recipe, context.encoder
    parts: list[RubricPart | None] = [None] * len(context.train)
    if recipe.grpo.writes == EVALUATION:
        path = context.folder / "rubrics.jsonl"
        if not path.is_file():
            written = write_rubrics(context.sampler(), context.train, context.rubric, recipe.seed, RUBRIC_TRIES)
            rows = zip(context.train, written, strict=True)
            write_lines(path, [{"pair": pair.id, "problem": p.problem, "rubric": p.text} for pair, p in rows])
        parts = [parse_rubric_part(row["rubric"]) if row["problem"] is None else None for row in read_lines(path)]
        lost = parts.count(None)
        context.folder.note(rubrics={"pairs": len(parts), "unreadable": lost})
        if lost == len(parts):
            raise UserError(
                f"none of the rubrics for {lost} pairs can be read, so there is nothing to evaluate by; train the cold "
                "start longer, or set grpo.writes=judgement"
            )
    kept = [
        (pair, part)
        for pair, part in zip(context.train, parts, strict=True)
        if part is not None or recipe.grpo.writes != EVALUATION
    ]
    asked = [ask(encoder, pair, context.rubric(pair.task), recipe.grpo.writes, part) for pair, part in kept]
    return [pair for pair, _ in kept], asked


def par_reward(context: Context, asked: Sequence[Asked]) -> ParReward:
    """The reward of the context's judgements of the pairs that were asked about."""
    end, tokenizer = context.encoder.end_id, context.tokenizer
    return ParReward(
        context.recipe.grpo,
        lambda ids: decode_judgement(tokenizer, ids, end),
        lambda pair, text, ended: asked[pair].read(text, ended),
        lambda prompts, completions, verdicts: context.sampler().expected_scores(
            [list(ids) for ids in prompts], [list(ids) for ids in completions], verdicts
        ),
    )


def grpo_trainer(
    context: Context,
    par: ParReward,
    prompts: list[tuple[list[int], list[int]]],
    args: Any,
    watch: Any,
    made_of: Callable[[type], type] = trainer_class,
) -> Any:
    """The trainer of GRPO over the prompt ids of both sides of every pair.

    `made_of` turns the engine's trainer class into ours.
    """
    base, _ = context.engine.trainers()
    trainer = made_of(base)(
        model=context.model,
        reward_funcs=par.functions(),
        args=args,
        train_dataset=row_dataset(prompts),
        processing_class=context.tokenizer,
        callbacks=[watch],
    )
    trainer.par = par
    return trainer


def _truncated(rows: list[dict[str, Any]]) -> float:
    return sum(row["problem"] == "truncated" for row in rows) / len(rows)


def _sample(step: int, row: dict[str, Any], pair: Pair) -> dict[str, Any]:
    prompt = [{"role": turn.role, "content": turn.content} for turn in pair.prompt]
    response = pair.chosen if row["side"] == "chosen" else pair.rejected
    return {"step": step, **row, "pair": pair.id, "task": pair.task, "prompt": prompt, "response": response}


def _words(row: dict[str, Any]) -> str:
    return (
        f"won {row['win_share']:.2f}  distance {row['distance']:+.2f}  dead {row['dead_groups']:.2f}  "
        f"unreadable {row['unreadable']:.1%}  faulty {row['faulty']:.1%}  length {row['length']:.0f}  "
        f"loss {row['loss']:.3f}"
    )


def _finish(context: Context, before: list[JudgedPair], after: dict[str, Any]) -> None:
    folder, recipe = context.folder, context.recipe
    about = folder.about()
    stages = about.get("stages", {})
    write_json(
        folder / "summary.json",
        {
            "schema": 1,
            "name": recipe.name,
            "method": recipe.method,
            "seed": recipe.seed,
            "minutes": round(sum(stage["seconds"] for stage in stages.values()) / 60, 2),
            "cpu_seconds": round(sum(stage["cpu_seconds"] for stage in stages.values()), 1),
            "stages": stages,
            "parameters": about["parameters"],
            "data": about["data"],
            "heldout": {
                "n": len(before),
                "decoding": "free",
                "votes": recipe.eval.votes,
                "before": summary_of(before),
                "after": after,
            },
        },
    )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    folder.note(status="done", stage=None)
    write_report(folder.path)
    sys.stderr.write(f"done: {folder.path}/report.html\nnext: patarm-lite eval {folder.path} --pairs FILE\n")
