"""PAR against other ways to spend the same minutes: more SFT, rejection sampling, a scalar reward model.

    python benchmarks/baselines.py                       # tiny, seeds 1 2 3: about an hour on two idle cores
    python benchmarks/baselines.py --seeds 1 --recipe smoke --out runs
    python benchmarks/baselines.py --par 'runs/tiny-table/seed{seed}'      # with the PAR runs of benchmarks/tiny.py

For each seed PAR is trained first, as `patarm-lite train RECIPE --seed N`. Every other method starts from that run's
cold-started judge (`sft.init`), on the same pairs, and stops after the minutes that GRPO took there. Finished runs in
OUT are kept and read, interrupted ones resumed, so the command can be typed again at any time. With --jobs above 1
the methods of a seed run side by side: minutes then no longer buy the same work, which the table says.

Writes OUT/baselines.md and OUT/baselines.json, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

METHODS = ("sft", "rejection", "scalar", "par")
NAMES = {
    "before": "cold start",
    "sft": "more SFT",
    "rejection": "rejection sampling",
    "scalar": "scalar head (Bradley-Terry)",
    "par": "GRPO with PAR",
}
STAGES = {"par": "grpo", "sft": "more_sft"}
"""Method -> its stage in run.json, where that is not the method's own name."""

Json = dict[str, Any]


def run_folder(out: Path, recipe: str, seed: int, method: str) -> Path:
    """Where a run stands: the name that `patarm-lite train` gives it by itself."""
    name = f"{Path(recipe).stem}-seed{seed}"
    return out / (name if method == "par" else f"{name}-{method}")


def read(path: Path) -> Json:
    data = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(data, dict), path
    return data


def finish(folder: Path, train: list[str]) -> None:
    """Bring one run to its end: skip it, resume it or start it. Its talk goes to FOLDER.log."""
    command = [sys.executable, "-m", "patarm_lite", "train"]
    if (folder / "run.json").is_file():
        if read(folder / "run.json").get("status") == "done":
            print(f"{folder}: finished before", file=sys.stderr)
            return
        command += ["--resume", str(folder)]
    else:
        command += [*train, "-o", str(folder)]
    print(" ".join(command), file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(folder.name + ".log")
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ}).returncode
    if code:
        raise SystemExit(f"{folder} failed with exit code {code}; see {log}")


def one(out: Path, recipe: str, seed: int, method: str, par: Path) -> None:
    """Train one baseline from the PAR run of its seed, for the minutes and on the threads that GRPO took there."""
    minutes = minutes_of(read(par / "run.json")["stages"]["grpo"])
    threads = yaml.safe_load((par / "recipe.yaml").read_text(encoding="utf-8"))["threads"]
    settings = [f"sft.init={par.resolve()}", f"minutes={minutes:.4f}", *([f"threads={threads}"] if threads else [])]
    finish(
        run_folder(out, recipe, seed, method),
        [recipe, "--seed", str(seed), "--method", method, "--set", *settings],
    )


def minutes_of(stage: Json) -> float:
    """Minutes that a stage would take on a quiet machine: its wall clock, or its CPU time where that is less.

    >>> minutes_of({"seconds": 120.0, "cpu_seconds": 60.0})
    1.0
    """
    return float(min(stage["seconds"], stage["cpu_seconds"])) / 60


def result(folder: Path, method: str) -> Json:
    """What the table needs of one finished run; `before` is the cold start that its method began from."""
    summary, about = read(folder / "summary.json"), read(folder / "run.json")
    heldout = summary["heldout"]
    return {
        "seed": summary["seed"],
        "method": method,
        "n": heldout["n"],
        "votes": heldout["votes"],
        "minutes": minutes_of(about["stages"][STAGES.get(method, method)]),
        "before": figures(heldout["before"], heldout["votes"]),
        "after": figures(heldout["after"], heldout["votes"]),
    }


def figures(heldout: Json, votes: int) -> Json:
    keys = ("accuracy", "low", "high", "unreadable", "ties", "spearman_quality", "spearman_length")
    return {key: heldout[key] for key in keys} | {"accuracy_mean": heldout[f"accuracy_mean{votes}"]}


def spread(values: list[float]) -> Json:
    """Mean, lowest, highest and standard deviation over seeds (None for one seed).

    >>> spread([0.5, 0.75, 1.0])
    {'mean': 0.75, 'lowest': 0.5, 'highest': 1.0, 'deviation': 0.25}
    """
    deviation = stdev(values) if len(values) > 1 else None
    return {"mean": mean(values), "lowest": min(values), "highest": max(values), "deviation": deviation}


def collect(results: list[Json]) -> Json:
    """Results of single runs -> per method the runs and their mean and spread over seeds, the cold start included.

    The cold start of a seed is taken from its PAR run.
    """
    rows: dict[str, list[Json]] = {"before": [], **{method: [] for method in METHODS}}
    for item in sorted(results, key=lambda item: item["seed"]):
        rows[item["method"]].append({"seed": item["seed"], "minutes": item["minutes"], **item["after"]})
        if item["method"] == "par":
            rows["before"].append({"seed": item["seed"], "minutes": None, **item["before"]})
    keys = ("accuracy", "accuracy_mean", "unreadable", "spearman_quality", "spearman_length")
    over_seeds = {}
    for method, runs in rows.items():
        known = {key: [run[key] for run in runs if run[key] is not None] for key in keys}
        over_seeds[method] = {key: spread(values) for key, values in known.items() if values}
    return {"n": results[0]["n"], "votes": results[0]["votes"], "runs": rows, "over_seeds": over_seeds}


def markdown(found: Json, recipe: str, jobs: int) -> str:
    """The table: a row a method, a column a seed, then the mean over seeds with its spread."""
    rows, over = found["runs"], found["over_seeds"]
    seeds = sorted({run["seed"] for runs in rows.values() for run in runs})
    header = ["method", *(f"seed {seed}" for seed in seeds), "mean (lowest to highest)"]
    header += [f"mean of {found['votes']}", "unreadable", "quality", "length", "minutes"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for method in ("before", *METHODS):
        by_seed = {run["seed"]: run for run in rows[method]}
        if not by_seed:
            continue
        cells = [NAMES[method]]
        for seed in seeds:
            run = by_seed.get(seed)
            cells.append(f"{run['accuracy']:.3f} [{run['low']:.3f}, {run['high']:.3f}]" if run else "")
        seen = over[method]
        all_seeds = seen["accuracy"]
        cells.append(f"**{all_seeds['mean']:.3f}** ({all_seeds['lowest']:.3f} to {all_seeds['highest']:.3f})")
        cells.append(f"{seen['accuracy_mean']['mean']:.3f}")
        cells.append(f"{seen['unreadable']['mean']:.1%}" if method != "scalar" else "none written")
        for key in ("spearman_quality", "spearman_length"):
            cells.append(f"{seen[key]['mean']:.2f}" if key in seen else "")
        minutes = [run["minutes"] for run in rows[method] if run["minutes"] is not None]
        cells.append(f"{mean(minutes):.1f}" if minutes else "")
        lines.append("| " + " | ".join(cells) + " |")
    together = f" Up to {jobs} runs shared the machine, so minutes are not equal work." if jobs > 1 else ""
    return "\n".join(
        [
            *lines,
            "",
            f"Recipe {Path(recipe).stem}. Accuracy of one judgement on {found['n']} held-out pairs, decoding free, "
            "with 95 % bootstrap intervals over prompts; then means over seeds. Quality and length: Spearman of a "
            "response's score with its true quality and its length in words. Every method starts from the same "
            "cold-started judge of its seed and stops after the minutes that GRPO took; the last step counts. A scalar "
            f"head gives one number and no reasons, so it has no votes to average.{together}",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipe", default="tiny", help="a shipped recipe's name or a YAML file")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the run folders and the table")
    parser.add_argument("--par", help="where the PAR runs stand, with {seed}; none: they are made in OUT")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    given = parser.parse_args()

    def folder_of(seed: int, method: str) -> Path:
        if method == "par" and given.par:
            return Path(given.par.format(seed=seed))
        return run_folder(given.out, given.recipe, seed, method)

    def together(seeds: list[int], method: str | None) -> None:
        """PAR of every seed (`method` "par"), or all the others, with at most --jobs at a time."""
        tasks = []
        with ThreadPoolExecutor(given.jobs) as pool:
            for seed in seeds:
                if method == "par":
                    train = [given.recipe, "--seed", str(seed)]
                    tasks.append(pool.submit(finish, folder_of(seed, "par"), train))
                else:
                    par = folder_of(seed, "par")
                    tasks += [pool.submit(one, given.out, given.recipe, seed, m, par) for m in METHODS if m != "par"]
            for task in tasks:
                task.result()

    together(given.seeds, "par")
    together(given.seeds, None)
    results = [result(folder_of(seed, m), m) for seed in given.seeds for m in METHODS]
    found = collect(results)
    table = markdown(found, given.recipe, given.jobs)
    for name, text in (("baselines.json", json.dumps(found, indent=1) + "\n"), ("baselines.md", table)):
        part = given.out / (name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(given.out / name)
    print(table)


if __name__ == "__main__":
    main()
