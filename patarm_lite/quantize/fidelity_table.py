"""A fidelity report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(found: Mapping[str, Any]) -> str:
    """The report as Markdown: one table a way of decoding."""
    reference = found["reference"]
    votes = "one judgement at temperature 0" if found["votes"] == 1 else f"{found['votes']} judgements at temperature 1"
    lines = [
        f"**{found['headline']}**",
        "",
        f"{found['n']} held-out pairs ({found['prompts']} prompts), {votes} a response, seed {found['seed']}. Loss: "
        f"accuracy of {reference['type']} minus the file's, with its 95 % interval; 'at most': one-sided 95 % bound. "
        "Flips: pairs whose outcome (right, tied, wrong, unreadable) changed. Score r and shift: correlation with the "
        "original's expected scores and mean difference from them (sampled ones where there are none). KL: nats a "
        "token of the original's own judgements; top-1: same likeliest token.",
    ]
    for decoding in found["decodings"]:
        lines += [
            "",
            f"Decoding: {decoding}",
            "",
            _markdown_row(_HEAD),
            _markdown_row(["---", *["---:"] * (len(_HEAD) - 1)]),
        ]
        lines.append(_markdown_row(_reference_cells(reference, decoding)))
        lines += [_markdown_row(_cells(row, decoding)) for row in found["files"]]
    if found["choice"] is not None:
        lines += ["", f"Choice: {found['choice']['reason']}. The figures above are of the other half of the pairs."]
    return "\n".join(lines) + "\n"


_HEAD = [
    "type",
    "MB",
    "accuracy",
    "loss",
    "at most",
    "flips",
    "score r",
    "shift",
    "unreadable",
    "KL mean (99 %)",
    "top-1",
    "tokens/s",
]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _reference_cells(reference: Mapping[str, Any], decoding: str) -> list[str]:
    row = reference["decodings"][decoding]
    speed = f"{reference['tokens_per_second'][decoding]:.0f}"
    return [
        reference["type"],
        _megabytes(reference["bytes"]),
        f"{row['accuracy']:.3f}",
        *["-"] * 5,
        f"{row['unreadable']:.1%}",
        *["-"] * 2,
        speed,
    ]


def _cells(file: Mapping[str, Any], decoding: str) -> list[str]:
    row, kl = file["decodings"][decoding], file["kl"]
    scores = row["scores"]["expected"] or row["scores"]["sampled"]
    r = None if scores is None else scores["pearson"]
    return [
        file["type"],
        _megabytes(file["bytes"]),
        f"{row['accuracy']:.3f}",
        f"{row['accuracy_loss']:+.3f} ({row['accuracy_loss_low']:+.3f} to {row['accuracy_loss_high']:+.3f})",
        f"{row['loss_bound']:.3f}",
        f"{row['flips']:.1%}",
        "-" if r is None else f"{r:.4f}",
        "-" if scores is None else f"{scores['shift']:+.3f}",
        f"{row['unreadable']:.1%}",
        "-" if kl is None else f"{kl['mean']:.2g} ({kl['p99']:.2g})",
        "-" if kl is None else f"{kl['top1']:.2%}",
        f"{row['tokens_per_second']:.0f}",
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}" if count < 1e8 else f"{count / 1e6:.0f}"
