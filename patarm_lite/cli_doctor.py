"""The verbs `doctor` and `bundle`: what they take and print. `cli.py` adds them with `add(app)`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from patarm_lite.errors import UserError

DOCTOR_EXAMPLE = "Example:\n\n\b\n  patarm-lite doctor"
BUNDLE_EXAMPLE = """Example:

\b
  for n in $(seq 10); do
  echo '{"prompt": "add 1 to '$n'", "chosen": "'$((n + 1))'", "rejected": "'$n'"}'; done > my_pairs.jsonl
  patarm-lite bundle smoke --pairs my_pairs.jsonl -o to-colab"""


def add(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(epilog=DOCTOR_EXAMPLE)(doctor)
    app.command(epilog=BUNDLE_EXAMPLE)(bundle)


def doctor(
    seconds: Annotated[float, typer.Option(min=1, metavar="S", help="Time limit of one trial.")] = 90.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Check this machine by doing: torch, 4-bit, Triton, resume, GGUF, versions, disk, flags.

    Trials run in child processes and fetch nothing. The exit code is 1 if something failed, else 0; what is not
    installed is skipped.
    """
    from patarm_lite.doctor import examine, table, to_json

    findings = examine(seconds)
    if as_json:
        typer.echo(json.dumps(to_json(findings), indent=2, ensure_ascii=False))
    else:
        typer.echo(table(findings, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)


def bundle(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A recipe's name or YAML file; with --back the bundle sent.", show_default=False
        ),
    ] = None,
    pairs: Annotated[
        list[str] | None, typer.Option("--pairs", metavar="FILE...", help="Train on these pair files or hub ids.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE...", help="Change keys of the recipe.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="FILE...", help="Look for these benchmarks' prompts.")
    ] = None,
    back: Annotated[
        Path | None, typer.Option(metavar="FOLDER|ZIP", help="Take back what was trained elsewhere.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="OUT", help="The new folder; none: RECIPE-bundle.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Touch no network; a hub id must be in the cache.")
    ] = False,
) -> None:
    """Pack a training run to take to a Colab or a friend's card, or take the run back.

    RECIPE comes before --pairs. A run that comes back is not trusted: its adapter and its figures are read, checked
    and written anew, nothing else.
    """
    if offline:
        from patarm_lite.cli_options import go_offline

        go_offline()
    if back is not None:
        if pairs or settings or against:
            raise UserError("--back takes a run back and packs nothing; leave out --pairs, --set and --against")
        if out is None:
            raise UserError(f"--back needs a place for the run, e.g. -o runs/{back.stem}")
        from patarm_lite.bundle_back import bring_back

        run, told = bring_back(back, out, Path(recipe) if recipe else None, force=force)
        for line in told:
            typer.echo(line, err=True)
        typer.echo(json.dumps({"run": str(run), "told": told}, indent=2, ensure_ascii=False) if as_json else run)
        typer.echo(f"next: patarm-lite export {shlex.quote(str(run))}", err=True)
        return
    if recipe is None:
        raise UserError("bundle needs a RECIPE, before --pairs, e.g. patarm-lite bundle tiny --pairs FILE")
    from patarm_lite.bundle import RECIPE, bundle_table, make_bundle, size_of
    from patarm_lite.recipe import load_recipe

    given = [f"data.pairs={json.dumps(pairs, ensure_ascii=False)}"] if pairs else []
    chosen = load_recipe(recipe, [*(settings or []), *given])
    place = out or Path(f"{chosen.name}-bundle")
    about = make_bundle(chosen, place, against=against or (), offline=offline, force=force)
    if as_json:
        typer.echo(json.dumps({"folder": str(place), "bytes": size_of(place), **about}, indent=2, ensure_ascii=False))
    else:
        typer.echo(bundle_table(about, place))
    there = f"cd {shlex.quote(str(place))} && patarm-lite train {RECIPE} -o run"
    typer.echo(f"next, on the other machine: {there} (README.md has it all)", err=True)
