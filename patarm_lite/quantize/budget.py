"""What an export will need, said before it begins: disk and memory at their peaks, from the model's shape alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from patarm_lite.errors import UserError
from patarm_lite.quantize.convert import ModelShape

GB = 1e9
PARITY_SHARE = 5
"""Parity compares a whole model where its weights in f32 take at most this part of the free memory."""
SPARE = 200e6
"""Bytes for tokenizer files, the importance matrix, judgements and the interpreter itself."""


@dataclass(frozen=True)
class Budget:
    """Bytes: `disk` and `memory` at their peaks, by stage in `disk_parts` and `memory_parts`."""

    parameters: int
    disk: float
    memory: float
    disk_parts: Mapping[str, float]
    memory_parts: Mapping[str, float]

    def lines(self) -> list[str]:
        """What a person reads before an export begins."""
        parts = ", ".join(f"{name} {_size(size)}" for name, size in self.disk_parts.items() if size)
        most = max(self.memory_parts, key=lambda name: self.memory_parts[name])
        return [
            f"{self.parameters:,} parameters",
            f"disk at its peak: {_size(self.disk)} ({parts})",
            f"memory at its peak: {_size(self.memory)} (while {most})",
        ]


def parameters_of(shape: ModelShape) -> int:
    """Parameters of a Qwen3 model of that shape.

    Per layer: q and o projections, k and v, three of the MLP, two norms of `hidden` and two of `head_dim`.
    """
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = 2 * shape.hidden * wide + 2 * shape.hidden * narrow + 3 * shape.hidden * shape.mlp
    layer += 2 * shape.hidden + 2 * shape.head_dim
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    return embeddings + shape.layers * layer + shape.hidden


def budget(
    shape: ModelShape, bits: Mapping[str, float], *, adapter: bool, ways: int, hf: bool, fidelity: bool, context: int
) -> Budget:
    """The needs of an export.

    Args:
        bits: type -> bits a weight, of the quantized types asked for.
        adapter: whether an adapter has to be merged. ways: how many ways of merging are compared.
        hf: whether 16-bit safetensors are asked for. fidelity: whether the files will judge pairs.
        context: tokens a judging prompt and its judgement may take together.
    """
    count = parameters_of(shape)
    largest = 4 * max(shape.vocab * shape.hidden, shape.mlp * shape.hidden)
    f16 = 2.0 * count
    files = {name: count * width / 8 for name, width in bits.items()}
    disk = {
        "merged weights": f16 * ways if adapter else 0.0,
        "safetensors": f16 if hf else 0.0,
        "f16 reference": f16 * ways,
        "parity copy, removed again": _parity_copy(shape),
        "quantized files": sum(files.values()),
        "copy while metadata is written": max([f16, *files.values()]),
    }
    cache = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim * context * 32
    memory = {
        "merging" if adapter else "converting": 3.0 * largest,
        "checking parity": _parity_copy(shape) + 4.0 * 256 * shape.vocab,
        "making the importance matrix": f16 + 4.0 * 512 * shape.vocab,
        "quantizing": 3e8,
        "judging with the f16 file": f16 + cache if fidelity else 0.0,
    }
    return Budget(count, sum(disk.values()) + SPARE, max(memory.values()) + SPARE, disk, memory)


def _parity_copy(shape: ModelShape) -> float:
    """Bytes in f32 of what parity compares: the whole model where it is a fifth of free memory, else three layers."""
    whole = 4.0 * parameters_of(shape)
    if whole <= free_memory() / PARITY_SHARE:
        return whole
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    return 4.0 * (embeddings + 3 * (parameters_of(shape) - embeddings) / shape.layers)


def check_room(found: Budget, out: Path, types: Sequence[str]) -> None:
    """Refuse before work begins what can't be finished.

    Raises:
        UserError: too little disk or memory, with both figures and what to do.
    """
    folder = next(parent for parent in [out, *out.resolve().parents] if parent.is_dir())
    disk, memory = shutil.disk_usage(folder).free, free_memory()
    if found.disk > disk:
        raise UserError(
            f"the export needs {_size(found.disk)} of disk at its peak and {folder} has {_size(disk)} free; make room, "
            f"choose another disk with -o, or fewer types than {','.join(types)}"
        )
    if found.memory > memory:
        raise UserError(
            f"the export needs {_size(found.memory)} of memory at its peak and {_size(memory)} are free; run it on a "
            "larger machine, or leave the judging out with --without-fidelity"
        )


def free_memory() -> float:
    """Bytes of memory that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    return 8 * GB


def _size(count: float) -> str:
    """
    >>> _size(2.5e9), _size(3e6)
    ('2.5 GB', '3 MB')
    """
    return f"{count / GB:.1f} GB" if count >= GB else f"{max(1, count / 1e6):.0f} MB"
