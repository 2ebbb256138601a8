"""The tiny run over seeds, and its negative controls: the README's first table.

Usage: python benchmarks/tiny.py [--seeds 1 2 3] [--control-seeds 1 2 3] [--out runs/tiny-table] [--threads 2]

Runs `patarm-lite train tiny` for every seed, one after the other, then the same with half and with all training labels
flipped. A control takes the cold start of its seed's run (`sft.init`), which is the one it would train itself: the cold
start never sees a label. Finished runs are kept, interrupted ones resumed. Writes table.md and table.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from baselines import finish, read

ROWS = ("set=new triples", "set=new pairs", "gap=1", "length=matched")


def run(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Train into `folder` unless that is done, and return its summary."""
    finish(folder, ["tiny", "--offline", *arguments])
    return read(folder / "summary.json")


def interval(found: dict[str, Any]) -> str:
    return f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def line(label: str, summary: dict[str, Any]) -> str:
    """One run as a row of the table."""
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    k = summary["heldout"]["votes"]
    stages = summary["stages"]
    minutes = " + ".join(
        f"{stages[name]['seconds'] / 60:.1f}" for name in ("sft", "grpo", "evaluation") if name in stages
    )
    cells = [
        label,
        interval(before),
        interval(after),
        f"{before[f'accuracy_mean{k}']:.3f} → {after[f'accuracy_mean{k}']:.3f}",
        f"{after['ties']:.3f}",
        f"{before['unreadable']:.1%} → {after['unreadable']:.1%}",
        f"{before['spearman_quality']:.2f} → {after['spearman_quality']:.2f}",
        f"{before['spearman_length']:.2f} → {after['spearman_length']:.2f}",
        f"{before['detection_mean']:.3f} → {after['detection_mean']:.3f}",
        f"{after['named_asked']:.3f} ({after['named_all']:.3f})",
        minutes,
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = [
    "run",
    "accuracy before",
    "accuracy after",
    "mean of 4",
    "ties",
    "unreadable",
    "Spearman quality",
    "Spearman length",
    "findings true",
    "names only criteria asked (all of them)",
    "minutes: SFT + GRPO + evaluation",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--control-seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-table"))
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    extra = [] if options.threads is None else ["--set", f"threads={options.threads}"]
    found: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        found[f"seed {seed}"] = run(options.out / f"seed{seed}", ["--seed", str(seed), *extra])
    for seed in options.control_seeds:
        for share in (0.5, 1.0):
            arguments = ["--seed", str(seed), "--shuffle-labels", str(share)]
            arguments += ["--set", f"sft.init={options.out / f'seed{seed}'}", *extra]
            name = "half" if share == 0.5 else "all"
            found[f"{name} of the labels flipped, seed {seed}"] = run(options.out / f"seed{seed}-{name}", arguments)
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += [line(label, summary) for label, summary in found.items()]
    gains = {
        label: summary["heldout"]["after"]["accuracy"] - summary["heldout"]["before"]["accuracy"]
        for label, summary in found.items()
    }
    honest = [summary["heldout"]["after"] for label, summary in found.items() if label.startswith("seed")]
    lines += ["", f"Mean over seeds after GRPO: {statistics.mean(a['accuracy'] for a in honest):.3f}."]
    for row in ROWS:
        cells = ", ".join(
            f"{a['rows'][row]['accuracy']:.3f} (n {a['rows'][row]['n']})" for a in honest if row in a["rows"]
        )
        lines.append(f"{row}: {cells}")
    lines.append("Gains: " + ", ".join(f"{label} {gain:+.3f}" for label, gain in gains.items()))
    (options.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (options.out / "table.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
