"""How long every verb's `--help` takes, as a ratio to a bare typer app's in the same run.

    python benchmarks/help_time.py

Each command is started ROUNDS times, in turn with the bare app so that a busy machine troubles both alike; the ratio
is between the fastest starts. The promise is at most 1.5; the exit code is 1 above it.
"""

from __future__ import annotations

import subprocess
import sys
import time

ROUNDS = 7
PROMISE = 1.5
BARE = """
import typer
app = typer.Typer()

@app.command()
def first(name: str, count: int = 1) -> None:
    "The first of two verbs."

@app.command()
def second(name: str, count: int = 1) -> None:
    "The second."

app()
"""
VERBS = ([], ["train"], ["eval"], ["pairs"], ["report"], ["recipes"], ["recipes", "show"])


def seconds(command: list[str]) -> float:
    """Wall clock of one start."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> int:
    """Print one line a verb; 1 if any is slower than promised."""
    commands = {"bare typer app": [sys.executable, "-c", BARE, "--help"]}
    for verb in VERBS:
        commands[" ".join(["patarm-lite", *verb])] = [sys.executable, "-m", "patarm_lite", *verb, "--help"]
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            taken[name].append(seconds(command))
    bare = min(taken["bare typer app"])
    worst = 0.0
    for name, times in taken.items():
        ratio = min(times) / bare
        worst = max(worst, ratio)
        print(f"{name:24} {min(times) * 1000:6.0f} ms  {ratio:.2f}x")
    return int(worst > PROMISE)


if __name__ == "__main__":
    sys.exit(main())
