"""Finished files of an export: put into the output folder, counted, hashed, and told in words."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def place_finished(path: Path, target: Path) -> None:
    """Put a finished file into OUT. What lies under `.work` stays until the end: a kill in between costs nothing."""
    if path.is_dir():
        os.replace(path, target)
        return
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        part = target.with_name(target.name + ".part")
        shutil.copyfile(path, part)
        os.replace(part, target)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*"))


def digests_of(out: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(SHA-256, name) of every file, those in folders included, as `sha256sum -c SHA256SUMS` reads them."""
    for name in names:
        path = out / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            with file.open("rb") as opened:
                yield hashlib.file_digest(opened, "sha256").hexdigest(), file.relative_to(out).as_posix()


def served(files: Sequence[Mapping[str, Any]]) -> str | None:
    """The file that the Modelfile runs: q8_0 where it was made, else the first GGUF file."""
    judges = {row["type"]: row["path"] for row in files if row["type"] not in ("hf", "lora")}
    return judges.get("q8_0", next(iter(judges.values()), None))


def what_it_is(row: Mapping[str, Any]) -> str:
    """A file in a few words, for the model card."""
    if row["type"] == "hf":
        return "16-bit safetensors, for vLLM and transformers"
    if row["type"] == "lora":
        return "the adapter alone, for the base in any quantization; its fidelity was not measured"
    fallbacks = row.get("fallbacks", ())
    fallen = f"; {len(fallbacks)} weights fell back to other types" if fallbacks else ""
    return f"{'not quantized, ' if row['type'] in ('f16', 'bf16', 'f32') else ''}{row['type']}{fallen}"


def table(found: Mapping[str, Any]) -> str:
    """An export as text: one line a file."""
    rows = [("file", "MB", "accuracy", "loss", "at most", "flips")]
    for file in found["files"]:
        size = f"{file['bytes'] / 1e6:.2f}"
        if file.get("reference"):
            rows.append((file["path"], size, "-", "the reference", "-", "-"))
        elif file["flips"] is None:
            rows.append((file["path"], size, *["-"] * 4))
        else:
            low, high = file["accuracy_loss_low"], file["accuracy_loss_high"]
            loss = f"{file['accuracy_loss']:+.3f} [{low:+.3f}, {high:+.3f}]"
            bound = f"{file['loss_bound']:.3f}"
            rows.append((file["path"], size, f"{file['accuracy']:.3f}", loss, bound, f"{file['flips']:.1%}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if found["choice"] is not None:
        lines.append(found["choice"]["reason"])
    return "\n".join(lines)
