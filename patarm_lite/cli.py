"""The command line: one thin function per verb, heavy imports inside.

Results go to stdout, talk to stderr. `main` is the entry point: a `UserError`, a mistyped command and a disk that
can't be written each end as one `error:` line on stderr and exit code 2; Ctrl-C ends with 130; anything else is a
bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import typer.core
from typer.exceptions import TyperException

from patarm_lite import __version__, cli_audit, cli_bench, cli_bench_model, cli_doctor, cli_machine
from patarm_lite.cli_options import AsJson as JsonFlag
from patarm_lite.cli_options import Force as ForceFlag
from patarm_lite.cli_options import Offline as OfflineFlag
from patarm_lite.cli_options import StoreOption, go_offline
from patarm_lite.cli_options import Tokenizer as TokenizerOption
from patarm_lite.errors import UserError, missing_extra

if TYPE_CHECKING:
    from patarm_lite.judge.judge import Judge
    from patarm_lite.recipe import Recipe

EXTRA_OF = {
    "accelerate": "train",
    "bitsandbytes": "train",
    "datasets": "train",
    "gguf": "export",
    "huggingface_hub": "train",
    "langdetect": "bench-model",
    "llama_cpp": "judge",
    "lm_eval": "bench-model",
    "matplotlib": "train",
    "nltk": "bench-model",
    "peft": "train",
    "pyarrow": "train",
    "safetensors": "train",
    "tokenizers": "train",
    "torch": "train",
    "transformers": "train",
    "trl": "train",
    "unsloth": "unsloth",
}
"""Module -> the extra that brings it."""

NOT_A_BUG = {
    errno.EACCES: "permission denied",
    errno.EDQUOT: "the disk quota is used up",
    errno.EEXIST: "a file of that name is in the way",
    errno.EFBIG: "the file would be larger than this system allows",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENOSPC: "the disk is full",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EROFS: "the disk is read-only",
}
"""Errors of the operating system that no code of ours can cause."""

SPREAD = ("--pairs", "--against", "--set")
"""Options that take several values in a row, as a shell's `*` writes them."""


class _Group(typer.core.TyperGroup):
    """A group that reads its own options only where some are given.

    Typer 0.29 imports pydantic to read even an absent `--help` of a group, on the way to the verb: half the time that
    `patarm-lite VERB --help` takes.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self.add_help_option = not args or args[0].startswith("-")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train, evaluate and inspect your own LLM judge, on one GPU or none.",
    epilog="--version prints the version.\n\nExample:\n\n\b\n  patarm-lite train smoke --force",
)
recipes_app = typer.Typer(
    cls=_Group,
    rich_markup_mode=None,
    help="List, show and copy recipes.\n\nA recipe is the YAML file that states one training run.",
    epilog="Example:\n\n\b\n  patarm-lite recipes show tiny",
)
app.add_typer(recipes_app, name="recipes")
rubrics_app = typer.Typer(
    cls=_Group,
    rich_markup_mode=None,
    help="List, show, copy and write rubrics.\n\nA rubric file is YAML; judge takes it with --rubric or --criteria.",
    epilog="Example:\n\n\b\n  patarm-lite rubrics show chat",
)
app.add_typer(rubrics_app, name="rubrics")
store_app = typer.Typer(
    cls=_Group,
    rich_markup_mode=None,
    help="Show and delete kept votes.\n\nJobs of judge and rank keep every vote in one file, texts in clear.",
    epilog="""Example:

\b
  patarm-lite train smoke --force
  patarm-lite export runs/smoke-seed1 -o my-judge --force
  echo '{"prompt": "name a color", "response": "Red."}' |
  patarm-lite judge my-judge/smoke-seed1-q8_0.gguf - --store votes.sqlite
  patarm-lite store show --store votes.sqlite""",
)
app.add_typer(store_app, name="store")
cli_machine.add(app)
cli_bench.add(app)
cli_bench_model.add(app)
cli_audit.add(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is returned.

    >>> main(["--version"])
    patarm-lite 0.1.0
    0
    >>> main(["recipes", "show", "nothing-like-it"])
    2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:  # as an option of the app it would cost every --help the import of pydantic
        typer.echo(f"patarm-lite {__version__}")
        return 0
    command = shlex.join(["patarm-lite", *arguments])
    try:
        code = app(_spread(arguments), prog_name="patarm-lite", standalone_mode=False, obj=command)
    except UserError as error:
        return _refuse(str(error))
    except TyperException as error:
        place = getattr(error, "ctx", None)
        path = place.command_path if place is not None else "patarm-lite"
        return _refuse(f"{error.format_message()} (see '{path} --help')")
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        return _refuse(str(missing_extra(EXTRA_OF[error.name], error.name)))
    except OSError as error:
        if error.errno not in NOT_A_BUG:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{where}{NOT_A_BUG[error.errno]}; give another place or make room, then type the command again")
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return code if isinstance(code, int) else 0


def _refuse(message: str) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


def _spread(arguments: Sequence[str]) -> list[str]:
    """`--pairs a b` becomes `--pairs a --pairs b`. `--set` goes on as long as a value holds a `=`.

    >>> _spread(["train", "tiny", "--pairs", "a", "b", "--seed", "2"])
    ['train', 'tiny', '--pairs', 'a', '--pairs', 'b', '--seed', '2']
    """
    spread: list[str] = []
    option, first = "", False
    for number, argument in enumerate(arguments):
        if argument == "--":
            return [*spread, *arguments[number:]]
        if argument in SPREAD:
            option, first = argument, True
        elif argument.startswith("-") and argument != "-":
            option = ""
        elif option and not first and (option != "--set" or "=" in argument):
            spread.append(option)
        else:
            option, first = (option if first else ""), False
        spread.append(argument)
    return spread


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@app.command(epilog="Example:\n\n\b\n  patarm-lite train smoke --seed 2 --set grpo.lr=1e-4 --force")
def train(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything drawn.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE...", help="Change keys of the recipe.")
    ] = None,
    pairs: Annotated[
        list[str] | None, typer.Option("--pairs", metavar="FILE...", help="Train on these pair files or hub ids.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="OUT", help="The run folder; none: runs/RECIPE-seedN.")
    ] = None,
    force: ForceFlag = False,
    offline: OfflineFlag = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with an interrupted run; takes no other setting.")
    ] = None,
    shuffle_labels: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Flip this share of the training labels (control).")
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="METHOD", help="par, or a baseline: sft, rejection, scalar.")
    ] = None,
    card: Annotated[
        str | None, typer.Option(metavar="CARD", help="Which of the recipe's cards; none: this machine's.")
    ] = None,
    probe: Annotated[
        bool | None,
        typer.Option(
            "--probe/--no-probe", help="Only measure memory and time; none: before a run on a GPU.", show_default=False
        ),
    ] = None,
    supervise: Annotated[
        bool | None,
        typer.Option(
            "--supervise/--no-supervise", help="Outlive running out of memory; none: on a GPU.", show_default=False
        ),
    ] = None,
) -> None:
    """Train a judge from preference pairs.

    RECIPE comes before --pairs; without one this machine's card decides.
    """
    if offline:
        go_offline()
    if resume is not None:
        if recipe or settings or pairs or out or force or (seed, shuffle_labels, method, card, probe) != (None,) * 5:
            raise UserError(
                "--resume goes on with the run's own recipe; leave out RECIPE and all but --offline and --supervise"
            )
        run = _run_folder(resume)
        _require("torch", "transformers", "trl")
        from patarm_lite.training.supervise import go_on

        out, code = run, go_on(run, supervise)
    else:
        from patarm_lite.recipe_choice import recipe_for_this_machine

        given = _settings(settings or [], seed, pairs or [], shuffle_labels, method)
        chosen = recipe_for_this_machine(recipe, given, card, pairs or [])
        _require("torch", "transformers", "trl")
        from patarm_lite.training.supervise import start

        out = out or _default_out(chosen)
        code = start(chosen, out, force, offline, context.obj, supervise, probe)
    if code:
        raise typer.Exit(code)
    if not probe:
        typer.echo(out)


@app.command(
    name="eval",
    epilog="Example:\n\n\b\n  patarm-lite train smoke --force\n  patarm-lite eval runs/smoke-seed1",
)
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    pairs: Annotated[
        list[str] | None,
        typer.Option("--pairs", metavar="FILE...", help="Pair files or hub ids; none: the run's held-out pairs."),
    ] = None,
    votes: Annotated[int | None, typer.Option(min=1, help="Judgements per side; none: as the recipe says.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled judgements.")] = 1,
    as_json: JsonFlag = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="OUT", help="Also write the JSON to this file.")
    ] = None,
    force: ForceFlag = False,
    offline: OfflineFlag = False,
) -> None:
    """Judge pairs: accuracy with intervals.

    RUN comes before --pairs.
    """
    if offline:
        go_offline()
    folder = _run_folder(run)
    if out is not None:
        _refuse_existing(out, force)
    _require("torch", "transformers")
    from patarm_lite.training.evaluation import evaluate_run

    found = evaluate_run(folder, pairs or [], votes, seed)
    text = json.dumps(found, indent=2, ensure_ascii=False)
    if out is not None:
        _write(out, text + "\n", force)
    typer.echo(text if as_json else _accuracy_table(found))


@app.command(
    name="pairs",
    epilog="""Example:

\b
  echo '{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}' | patarm-lite pairs -""",
)
def show_pairs(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Pair files, hub ids, or - for stdin.")],
    mapping: Annotated[
        str,
        typer.Option("--map", metavar="OURS=COLUMN,...", help="Name the columns, e.g. prompt=question,chosen=good."),
    ] = "",
    task: Annotated[str, typer.Option(help="Task of every pair; auto: column, then heuristic.")] = "auto",
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="FILE...", help="Look for these benchmarks' prompts.")
    ] = None,
    revision: Annotated[str, typer.Option(help="Hub revision: branch, tag or commit.")] = "main",
    as_json: JsonFlag = False,
    offline: OfflineFlag = False,
) -> None:
    """Show what pair files hold.

    Layout, counts, lengths, what training would drop and why, and how a judge would see a pair.
    """
    if offline:
        go_offline()
    columns = _columns(mapping)
    from patarm_lite.pairs import load_pairs, render_survey, survey

    loaded = load_pairs(files, mapping=columns, task=task, revision=revision, offline=offline)
    found = survey(loaded, against=against or ())
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else render_survey(found))


@app.command(
    epilog="""Example:

\b
  patarm-lite train smoke --force
  patarm-lite export runs/smoke-seed1 -o my-judge --type q8_0,q4_0 --force""",
)
def export(
    judge: Annotated[str, typer.Argument(metavar="JUDGE", help="A run folder, a Hugging Face folder or a hub id.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="The output folder; none: exports/JUDGE.")
    ] = None,
    types: Annotated[
        str,
        typer.Option("--type", metavar="TYPE,...", help="hf, lora, f16, q8_0, q4_k_m, ...; none: q8_0,q4_k_m."),
    ] = "",
    auto: Annotated[bool, typer.Option("--auto", help="Keep only the smallest file within --max-loss.")] = False,
    max_loss: Annotated[
        float, typer.Option(metavar="SHARE", help="--auto: largest loss of pair accuracy, by its 95 % bound.")
    ] = 0.01,
    pairs: Annotated[
        list[str] | None, typer.Option("--pairs", metavar="FILE...", help="Held-out pairs; none: those of the run.")
    ] = None,
    imatrix: Annotated[
        str, typer.Option(metavar="FILE", help="Importance matrix: a file, 'judging' (made here) or 'none'.")
    ] = "judging",
    base: Annotated[
        str | None, typer.Option(metavar="FOLDER|ID", help="The 16-bit base of an adapter; none: as it names it.")
    ] = None,
    without_fidelity: Annotated[
        bool, typer.Option("--without-fidelity", help="Export unproved: judge no pairs.")
    ] = False,
    votes: Annotated[int, typer.Option(min=1, help="Judgements a side; one is greedy, more are sampled.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything drawn.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; none: physical cores.")] = None,
    revision: Annotated[str, typer.Option(help="Hub revision: branch, tag or commit.")] = "main",
    as_json: JsonFlag = False,
    force: ForceFlag = False,
    offline: OfflineFlag = False,
) -> None:
    """Turn a trained judge into GGUF files, and prove on held-out pairs that they judge alike.

    An export that was stopped goes on with the same command.
    """
    if offline:
        go_offline()
    if not 0 < max_loss < 1:
        raise UserError(f"--max-loss {max_loss:g} is not a share between 0 and 1, e.g. --max-loss 0.01")
    _require("torch", "transformers", "llama_cpp", "gguf")
    from patarm_lite.quantize import export as stages
    from patarm_lite.quantize.finished import table

    request = stages.Request(
        judge=judge,
        out=out or Path("exports") / Path(judge.rstrip("/")).name,
        types=tuple(dict.fromkeys(name.strip().lower() for name in types.split(",") if name.strip())),
        auto=auto,
        max_loss=max_loss,
        pairs=tuple(pairs or ()),
        imatrix=imatrix,
        fidelity=not without_fidelity,
        base=base,
        revision=revision,
        offline=offline,
        votes=votes,
        seed=seed,
        threads=threads,
    )
    found = stages.export(request, force)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else table(found))
    typer.echo(f"next: patarm-lite inspect {shlex.quote(str(request.out / found['files'][0]['path']))}", err=True)


@app.command(
    epilog="""Example:

\b
  patarm-lite train smoke --force
  patarm-lite export runs/smoke-seed1 -o my-judge --force
  patarm-lite inspect my-judge/smoke-seed1-q8_0.gguf""",
)
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file, of ours or of others.")],
    as_json: JsonFlag = False,
) -> None:
    """Explain a GGUF file: what it is, how it judges, how far that was proved."""
    from patarm_lite.quantize.inspection import inspect_json, inspect_text

    typer.echo(json.dumps(inspect_json(file), indent=2, ensure_ascii=False) if as_json else inspect_text(file))


@app.command(
    epilog="""Example:

\b
  patarm-lite train smoke --force
  patarm-lite export runs/smoke-seed1 -o my-judge --force
  patarm-lite calibrate my-judge/smoke-seed1-q8_0.gguf --pairs runs/smoke-seed1/heldout.jsonl""",
)
def calibrate(
    judge: Annotated[Path, typer.Argument(metavar="JUDGE", help="A GGUF judge; its metadata is rewritten.")],
    pairs: Annotated[list[str], typer.Option("--pairs", metavar="FILE...", help="Pairs the judge never saw.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything drawn.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; none: physical cores.")] = None,
    as_json: JsonFlag = False,
    offline: OfflineFlag = False,
) -> None:
    """Fit score gap -> P(preferred) and score -> percentile on pairs, and write them into the file.

    The file is replaced by rename; its fingerprint stays.
    """
    if offline:
        go_offline()
    _require("llama_cpp", "gguf")
    from patarm_lite.quantize.calibrate import calibrate_file, calibration_table

    found = calibrate_file(judge, pairs, seed=seed, threads=threads)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else calibration_table(found))


JudgeArgument = Annotated[str, typer.Argument(metavar="JUDGE", help="A GGUF judge, a folder or a server's URL.")]
LinesArgument = typer.Argument(metavar="FILE|-", help="JSON lines to judge, or - for stdin.", show_default=False)
LinesOut = Annotated[
    Path | None, typer.Option("-o", "--out", metavar="OUT", help="The new file of JSON lines; none: stdout.")
]
VotesOption = Annotated[
    str, typer.Option("--k", "--votes", metavar="N|auto", help="Votes a response; auto: as many as it takes.")
]
MostVotes = Annotated[int, typer.Option("--max-k", min=2, help="With --votes auto: votes a response at most.")]
ScoreOption = Annotated[
    str, typer.Option(help="expected, sampled (spares the expected one), both; only: nothing written, another judge.")
]
RubricOption = Annotated[Path | None, typer.Option(metavar="FILE", help="A primary rubric, not the task's own.")]
CriteriaOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Pin the criteria; none: the judge's own.")]
TaskOption = Annotated[str, typer.Option(help="chat, math, code, safety; auto: by the line's fields, then by words.")]
DecodingOption = Annotated[
    str | None, typer.Option(help="constrained or free; none: constrained where it can be.", show_default=False)
]
TokensOption = Annotated[int, typer.Option(min=1, help="Tokens of one judgement at most.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of everything drawn.")]
LongOption = Annotated[str, typer.Option(help="A prompt that is too long: error, or cut the response's middle.")]
ContextOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a prompt and its judgement; none: 4096.", show_default=False)
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; none: physical cores.")]
ParallelOption = Annotated[
    int | None, typer.Option(min=1, help="Votes written at once; none: 32, with a URL 8.", show_default=False)
]
FormOption = Annotated[
    str, typer.Option(metavar="own|shared", help="shared: the rubric before the response, one per prompt.")
]
DeterministicFlag = Annotated[bool, typer.Option("--deterministic", help="Equal input, equal bits; slower.")]
FieldOption = Annotated[str | None, typer.Option(metavar="NAME", help="The field that takes the result.")]
StrictFlag = Annotated[bool, typer.Option("--strict", help="Stop at a line that can't be judged.")]
NoStoreFlag = Annotated[bool, typer.Option("--no-store", help="Keep no votes; a stopped job begins anew.")]


@app.command(
    name="judge",
    epilog="""Example:

\b
  patarm-lite train smoke --force
  patarm-lite export runs/smoke-seed1 -o my-judge --force
  patarm-lite judge my-judge/smoke-seed1-q8_0.gguf --prompt 'name a color' --response 'Red.' --k 4""",
)
def judge_responses(
    judge: JudgeArgument,
    file: Annotated[str | None, LinesArgument] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instead of FILE: what was asked; - for stdin.")
    ] = None,
    response: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instead of FILE: what is judged; - for stdin.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --prompt: a known good answer that the judge may read.")
    ] = None,
    out: LinesOut = None,
    votes: VotesOption = "1",
    most: MostVotes = 16,
    score: ScoreOption = "both",
    rubric: RubricOption = None,
    criteria: CriteriaOption = None,
    task: TaskOption = "auto",
    decoding: DecodingOption = None,
    max_tokens: TokensOption = 1024,
    seed: SeedOption = 1,
    long: LongOption = "error",
    context: ContextOption = None,
    threads: ThreadsOption = None,
    parallel: ParallelOption = None,
    tokenizer: TokenizerOption = None,
    deterministic: DeterministicFlag = False,
    form: FormOption = "own",
    field: FieldOption = None,
    strict: StrictFlag = False,
    store: StoreOption = None,
    no_store: NoStoreFlag = False,
    as_json: JsonFlag = False,
    force: ForceFlag = False,
) -> None:
    """Judge responses: score, spread, rubric, findings.

    A FILE's lines are objects with prompt, response and, if any, reference and task. One vote takes the likeliest
    tokens, several are sampled. A server's key is read from PATARM_API_KEY.
    """
    settings = _settings_of_judge(
        judge, votes, score, seed, max_tokens, decoding, rubric, criteria, task, long, context, threads, parallel,
        tokenizer, deterministic, form,
    )  # fmt: skip
    if file is not None:
        if (prompt, response, reference) != (None, None, None):
            raise UserError("a FILE brings its own prompts; leave out --prompt, --response and --reference")
        _judge_file(
            "judge", judge, file, settings, out, votes, most, score, field, strict, force, store, no_store, as_json
        )
        return
    if prompt is None or response is None:
        raise UserError("judge needs a FILE (or -), or --prompt TEXT and --response TEXT")
    if out is not None or store is not None or field is not None or strict or no_store or force:
        raise UserError("a single response has no output and no store; give a FILE for these")
    prompt, response = _from_stdin(prompt, response)
    from patarm_lite.judge.verbs import count_of
    from patarm_lite.judge.verdict_text import SCORE_ONLY, verdict_text

    count = count_of(votes, most, score)
    with _judge(judge, settings) as loaded:
        found = loaded.score(prompt, response, reference, count)
    if found.decoding == "score_only":
        typer.echo(f"warning: {SCORE_ONLY}", err=True)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        typer.echo(verdict_text(found, colour=_colour()))


@app.command(
    epilog="""Example:

\b
  patarm-lite train smoke --force
  patarm-lite export runs/smoke-seed1 -o my-judge --force
  echo '{"prompt": "name a color", "responses": ["Red.", "old stone"]}' |
  patarm-lite rank my-judge/smoke-seed1-q8_0.gguf -""",
)
def rank(
    judge: JudgeArgument,
    file: Annotated[str, LinesArgument],
    out: LinesOut = None,
    votes: VotesOption = "1",
    most: MostVotes = 16,
    score: ScoreOption = "both",
    rubric: RubricOption = None,
    criteria: CriteriaOption = None,
    task: TaskOption = "auto",
    decoding: DecodingOption = None,
    max_tokens: TokensOption = 1024,
    seed: SeedOption = 1,
    long: LongOption = "error",
    context: ContextOption = None,
    threads: ThreadsOption = None,
    parallel: ParallelOption = None,
    tokenizer: TokenizerOption = None,
    deterministic: DeterministicFlag = False,
    form: FormOption = "own",
    field: FieldOption = None,
    strict: StrictFlag = False,
    store: StoreOption = None,
    no_store: NoStoreFlag = False,
    as_json: JsonFlag = False,
    force: ForceFlag = False,
) -> None:
    """Put several responses to each prompt in order.

    A FILE's lines are objects with prompt and responses.
    """
    settings = _settings_of_judge(
        judge, votes, score, seed, max_tokens, decoding, rubric, criteria, task, long, context, threads, parallel,
        tokenizer, deterministic, form,
    )  # fmt: skip
    _judge_file("rank", judge, file, settings, out, votes, most, score, field, strict, force, store, no_store, as_json)


@store_app.callback(invoke_without_command=True)
def _store(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        show_store()


@store_app.command(
    name="show",
    epilog="""Example:

\b
  patarm-lite train smoke --force
  patarm-lite export runs/smoke-seed1 -o my-judge --force
  echo '{"prompt": "name a color", "response": "Red."}' |
  patarm-lite judge my-judge/smoke-seed1-q8_0.gguf - --store votes.sqlite
  patarm-lite store show --store votes.sqlite""",
)
def show_store(store: StoreOption = None, as_json: JsonFlag = False) -> None:
    """Say where the store is and what it holds."""
    from patarm_lite.judge import verbs

    typer.echo(verbs.show_store(store, as_json))


@store_app.command(
    name="delete",
    epilog="""Example:

\b
  patarm-lite train smoke --force
  patarm-lite export runs/smoke-seed1 -o my-judge --force
  echo '{"prompt": "name a color", "response": "Red."}' |
  patarm-lite judge my-judge/smoke-seed1-q8_0.gguf - --store votes.sqlite
  patarm-lite store delete --all --store votes.sqlite""",
)
def delete_store(
    judge: Annotated[
        str | None, typer.Argument(metavar="JUDGE", help="Its fingerprint's beginning, or its GGUF file.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete all votes and jobs.")] = False,
    store: StoreOption = None,
) -> None:
    """Delete the kept votes of one judge, or all."""
    if everything == (judge is not None):
        raise UserError("store delete needs a JUDGE, or --all to delete everything; see: patarm-lite store show")
    from patarm_lite.judge import verbs

    typer.echo(verbs.delete_from_store(store, judge))


@app.command(epilog="Example:\n\n\b\n  patarm-lite train smoke --force\n  patarm-lite report runs/smoke-seed1")
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write a run's report again.

    One HTML file that opens offline.
    """
    folder = _run_folder(run)
    from patarm_lite.report import write_report

    typer.echo(write_report(folder))


@recipes_app.callback(invoke_without_command=True)
def _recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_recipes()


@recipes_app.command(name="list", epilog="Example:\n\n\b\n  patarm-lite recipes list")
def list_recipes() -> None:
    """Name every shipped recipe with the first line of its header."""
    from patarm_lite.recipe import shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        header = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        typer.echo(f"{name:{width}}  {header.removeprefix(f'{name}: ')}")


@recipes_app.command(epilog="Example:\n\n\b\n  patarm-lite recipes show tiny")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe's name, or a YAML file.")],
    card: Annotated[str | None, typer.Option(metavar="CARD", help="As it is on a card: one of its cards.")] = None,
) -> None:
    """Print the effective recipe: every key with its value and meaning."""
    from patarm_lite.recipe import load_recipe

    typer.echo(_commented_yaml(load_recipe(name, card=card)))


@recipes_app.command(epilog="Example:\n\n\b\n  patarm-lite recipes copy tiny ./my-judge.yaml")
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe's name, or a YAML file.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The new YAML file.")],
) -> None:
    """Copy a recipe to edit. An existing file is never replaced."""
    from patarm_lite.recipe import find_recipe

    source = find_recipe(name)
    if path.exists():
        raise UserError(f"{path} exists already; give another PATH")
    _write(path, source.read_text(encoding="utf-8"), force=False)
    typer.echo(path)
    typer.echo(f"next: patarm-lite train {shlex.quote(str(path))}", err=True)


@recipes_app.command(epilog="Example:\n\n\b\n  patarm-lite recipes pin qwen3-4b runs/qwen3-4b-seed1-pairs")
def pin(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of that recipe.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="OUT", help="The new file; none: RECIPE-pinned.yaml here.")
    ] = None,
    force: ForceFlag = False,
) -> None:
    """Copy a recipe with the hub commits that a run of it resolved.

    Comments are kept. Local folders and files have no commit and are named.
    """
    from patarm_lite.pin import pin as pin_recipe
    from patarm_lite.pin import words

    found = pin_recipe(recipe, _run_folder(run))
    place = out or Path(f"{Path(recipe).stem if recipe.endswith(('.yaml', '.yml')) else recipe}-pinned.yaml")
    _write(place, found.text, force)
    typer.echo(words(found.pins, found.local), err=True)
    typer.echo(place)


@recipes_app.command(epilog="Example:\n\n\b\n  patarm-lite recipes schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from patarm_lite.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@rubrics_app.callback(invoke_without_command=True)
def _rubrics(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_rubrics()


@rubrics_app.command(name="list", epilog="Example:\n\n\b\n  patarm-lite rubrics list")
def list_rubrics() -> None:
    """Name the tasks' primary rubrics with their criteria and weights."""
    from patarm_lite.records import TASKS
    from patarm_lite.rubrics import primary_rubric

    for task in TASKS:
        typer.echo(f"{task:6}  " + ", ".join(f"{c.name} ({c.weight})" for c in primary_rubric(task)))


@rubrics_app.command(name="show", epilog="Example:\n\n\b\n  patarm-lite rubrics show math")
def show_rubric(
    name: Annotated[str, typer.Argument(metavar="TASK|FILE", help="A task's primary rubric, or a rubric file.")],
    as_text: Annotated[bool, typer.Option("--as-read", help="The lines a judge reads, instead of YAML.")] = False,
) -> None:
    """Print a rubric, checked."""
    from patarm_lite.judge.rubric_files import find_rubric, rubric_yaml
    from patarm_lite.rubrics import rubric_text

    found = find_rubric(name)
    typer.echo(rubric_text(found.rubric) if as_text else rubric_yaml(found.rubric, found.task).rstrip("\n"))


@rubrics_app.command(name="copy", epilog="Example:\n\n\b\n  patarm-lite rubrics copy chat ./my-rubric.yaml")
def copy_rubric(
    name: Annotated[str, typer.Argument(metavar="TASK|FILE", help="A task's primary rubric, or a rubric file.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The new YAML file.")],
) -> None:
    """Save a rubric as YAML, to edit. An existing file is never replaced."""
    from patarm_lite.judge.rubric_files import find_rubric, rubric_yaml

    found = find_rubric(name)
    _write(path, rubric_yaml(found.rubric, found.task), force=False)
    typer.echo(path)
    typer.echo(f"next: patarm-lite judge JUDGE --rubric {shlex.quote(str(path))} ...", err=True)


@rubrics_app.command(
    name="write",
    epilog="""Example:

\b
  patarm-lite train smoke --force
  patarm-lite export runs/smoke-seed1 -o my-judge --force
  patarm-lite rubrics write my-judge/smoke-seed1-q8_0.gguf --prompt 'name a color' --response 'Red.'""",
)
def write_rubric(
    judge: JudgeArgument,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What was asked; - for stdin.")],
    response: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A response to it; - for stdin; none: form shared.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="OUT", help="The YAML file; none: printed.")
    ] = None,
    task: Annotated[str, typer.Option(help="chat, math, code, safety; auto: by words of the prompt.")] = "auto",
    threads: ThreadsOption = None,
    force: ForceFlag = False,
) -> None:
    """Let a judge write criteria for a prompt, to save, edit and pin.

    The judge sees the response before it writes. One that serves form shared needs none: leave out --response. Pin a
    file with: patarm-lite judge JUDGE --criteria FILE.
    """
    if out is not None:
        _refuse_existing(out, force)
    from patarm_lite.judge.rubric_files import rubric_yaml
    from patarm_lite.judge.verbs import plan_of

    shared = response is None
    prompt, response = _from_stdin(prompt, response or "")
    settings = {"plan": plan_of("1", "sampled"), "or_free": True, "task": task, "threads": threads}
    with _judge(judge, {**settings, "form": "shared" if shared else "own", "key": _key(judge)}) as loaded:
        found = loaded.write_rubric(prompt) if shared else loaded.score(prompt, response).rubric
        of_task = loaded.item(prompt, response).task
    if not found:
        raise UserError("the judge wrote no rubric that can be read; try another response")
    text = rubric_yaml(found, of_task)
    if out is None:
        typer.echo(text.rstrip("\n"))
    else:
        _write(out, text, force)
        typer.echo(out)
        typer.echo(f"next: {shlex.join(['patarm-lite', 'judge', judge, '--criteria', str(out)])} ...", err=True)


cli_doctor.add(app)


@contextlib.contextmanager
def _judge(place: str, settings: Mapping[str, Any]) -> Iterator[Judge]:
    """A loaded judge. What it warns of becomes a line on stderr."""
    import warnings

    from patarm_lite.judge.fitting import CutWarning
    from patarm_lite.judge.judge import Judge

    with Judge.load(place, **settings) as judge, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", CutWarning)
        yield judge
    for warning in warned:
        typer.echo(f"warning: {' '.join(str(warning.message).split())}", err=True)


def _settings_of_judge(
    place: str,
    votes: str,
    score: str,
    seed: int,
    max_tokens: int,
    decoding: str | None,
    rubric: Path | None,
    criteria: Path | None,
    task: str,
    long: str,
    context: int | None,
    threads: int | None,
    parallel: int | None,
    tokenizer: Path | None,
    deterministic: bool,
    form: str,
) -> dict[str, Any]:
    """Options as `Judge.load` takes them. A judge that can't be held to the protocol decodes freely unless told."""
    from patarm_lite.judge.verbs import plan_of

    if decoding not in (None, "constrained", "free"):
        raise UserError(f"--decoding {decoding!r} is not one of constrained, free")
    if decoding is not None and score == "only":
        raise UserError("--score only writes nothing, so there is nothing to decode; leave out --decoding")
    return {
        "plan": plan_of(votes, score, seed, max_tokens, "free" if decoding == "free" else "constrained"),
        "or_free": decoding is None,
        "rubric": rubric,
        "criteria": criteria,
        "task": task,
        "long": long,
        "context": context,
        "threads": threads,
        "sequences": parallel,
        "tokenizer": tokenizer,
        "deterministic": deterministic,
        "form": form,
        "key": _key(place),
    }


def _judge_file(
    kind: Literal["judge", "rank"],
    place: str,
    source: str,
    settings: Mapping[str, Any],
    out: Path | None,
    votes: str,
    most: int,
    score: str,
    field: str | None,
    strict: bool,
    force: bool,
    store: Path | None,
    no_store: bool,
    as_json: bool,
) -> None:
    """Do a job of `judge` or `rank`."""
    if no_store and store is not None:
        raise UserError("--store and --no-store can't both hold; leave out one")
    from patarm_lite.judge.judge import Judge
    from patarm_lite.judge.verbs import SCORES, FileJob, run_file

    job = FileJob(
        kind=kind,
        source=source,
        out=out,
        votes=votes,
        most=most,
        score=next(known for known in SCORES if known == score),
        field=field,
        strict=strict,
        force=force,
        store=store,
        keep=not no_store,
        as_json=as_json,
    )
    run_file(job, lambda: Judge.load(place, **settings), None if _remote(place) else Path(place))


def _key(place: str) -> str | None:
    return (os.environ.get("PATARM_API_KEY") or None) if _remote(place) else None


def _remote(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _from_stdin(prompt: str, response: str) -> tuple[str, str]:
    if prompt == "-" and response == "-":
        raise UserError("--prompt and --response can't both be -; give one of them as TEXT")
    if "-" not in (prompt, response):
        return prompt, response
    text = sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")
    return (text, response) if prompt == "-" else (prompt, text)


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _require(*modules: str) -> None:
    """Raise the pip line of the first module that is not installed; imports nothing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise missing_extra(EXTRA_OF[module], module)


def _settings(
    settings: Sequence[str], seed: int | None, pairs: Sequence[str], shuffle_labels: float | None, method: str | None
) -> list[str]:
    """`--set` values, then the flags that are short for one; the later wins.

    >>> _settings(["grpo.lr=1e-4"], 2, ["a.jsonl"], None, None)
    ['grpo.lr=1e-4', 'seed=2', 'data.pairs=["a.jsonl"]']
    """
    flags = {
        "seed": seed,
        "data.pairs": list(pairs) or None,
        "data.shuffle_labels": shuffle_labels,
        "method": method,
    }
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flags.items() if value is not None]
    return [*settings, *given]


def _default_out(recipe: Recipe) -> Path:
    """runs/NAME-seedN, with what sets the run apart from the plain one.

    >>> from patarm_lite.recipe import load_recipe
    >>> _default_out(load_recipe("tiny", ["seed=2", "data.shuffle_labels=0.5"])).as_posix()
    'runs/tiny-seed2-shuffled0.5'
    """
    parts = [recipe.name, f"seed{recipe.seed}"]
    if recipe.method != "par":
        parts.append(recipe.method)
    if recipe.data.pairs:
        parts.append("pairs")
    if recipe.data.shuffle_labels:
        parts.append(f"shuffled{recipe.data.shuffle_labels:g}")
    return Path("runs") / "-".join(parts)


def _run_folder(run: Path) -> Path:
    if not run.exists():
        raise UserError(f"run {run} not found; 'patarm-lite train' prints the folder it writes")
    if not (run / "run.json").is_file():
        raise UserError(
            f"{run} is not a run folder (no run.json in it); give the folder that 'patarm-lite train' printed"
        )
    return run


def _columns(mapping: str) -> dict[str, str]:
    """
    >>> _columns("prompt=question,chosen=good")
    {'prompt': 'question', 'chosen': 'good'}
    """
    columns: dict[str, str] = {}
    for part in filter(None, mapping.split(",")):
        ours, found, column = part.partition("=")
        if not found or not ours.strip() or not column.strip():
            raise UserError(f"--map {part!r} is not OURS=COLUMN, e.g. --map prompt=question,chosen=good")
        if ours.strip() in columns:
            raise UserError(f"--map names {ours.strip()!r} twice; give each of our columns once")
        columns[ours.strip()] = column.strip()
    return columns


def _refuse_existing(path: Path, force: bool) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file")
    if path.exists() and not force:
        raise UserError(f"{path} exists already; give another place, or --force to replace it")


def _write(path: Path, text: str, force: bool) -> None:
    """Write a text file whole or not at all."""
    _refuse_existing(path, force)
    if not path.parent.exists():
        raise UserError(f"folder {path.parent} does not exist; type: mkdir -p {shlex.quote(str(path.parent))}")
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        if part.is_file():
            part.unlink()
        error.filename = str(path)
        raise


def _commented_yaml(recipe: Recipe) -> str:
    """The recipe with defaults merged, one comment a key; reading it back gives the same recipe."""
    import yaml
    from pydantic import BaseModel

    from patarm_lite.recipe import _Loader

    class Dumper(yaml.SafeDumper):
        """Quotes what the recipes' own loader would not read as text, such as '1e-5'."""

        yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def lines(section: BaseModel, indent: str) -> list[str]:
        written = []
        plain = section.model_dump(mode="json")
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                what = " ".join((type(value).__doc__ or "").split())
                written += ["", f"{indent}{name}:  # {what}", *lines(value, indent + "  ")]
            else:
                text = yaml.dump(
                    plain[name], Dumper=Dumper, default_flow_style=True, width=1_000_000, allow_unicode=True
                )
                written.append(f"{indent}{name}: {text.removesuffix('...' + chr(10)).strip()}  # {field.description}")
        return written

    return "\n".join(lines(recipe, ""))


def _accuracy_table(found: Mapping[str, Any]) -> str:
    """An evaluation as text: one line a row with its interval, then what stands beside accuracy.

    >>> row = {"n": 4, "accuracy": 0.75, "low": 0.5, "high": 1.0}
    >>> print(_accuracy_table({**row, "votes": 2, "ties": 0.0, "unreadable": 0.125, "rows": {"task=chat": row}}))
    decoding free, 2 votes a side
    row            n  accuracy  95 % interval   ties
    all            4     0.750  0.500 to 1.000  0.000
    task=chat      4     0.750  0.500 to 1.000  -
    unreadable 0.125
    """
    rows = {"all": found, **found.get("rows", {})}
    width = max(10, *map(len, rows))

    def number(row: Mapping[str, Any], key: str) -> str:
        value = row.get(key)
        return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"

    text = [f"decoding {found.get('decoding', 'free')}, {found.get('votes', 1)} votes a side"]
    text.append(f"{'row':{width}}  {'n':>4}  accuracy  95 % interval   {'ties':>4}")
    for name, row in rows.items():
        interval = f"{number(row, 'low')} to {number(row, 'high')}"
        cells = [f"{row.get('n', '-'):>4}", f"{number(row, 'accuracy'):>8}", interval, number(row, "ties")]
        text.append("  ".join([f"{name:{width}}", *cells]))
    shown = {"n", "votes", "accuracy", "low", "high", "ties", "seed", "schema", "detection"}
    beside = [key for key, value in found.items() if isinstance(value, int | float) and key not in shown]
    text += [f"{key} {number(found, key)}" for key in beside]
    return "\n".join(text)
