"""An f16 GGUF file -> a quantized one, by llama.cpp's `llama_model_quantize` in a child process of ours.

A type such as `q4_k_m` is a mixture: llama.cpp gives some weights more bits on purpose. Apart from that, a weight
whose rows don't divide into a type's blocks gets another type in silence. Those fallbacks are found by reading the
written file: the row lengths, and what each mixture may hold (source: `src/llama-quant.cpp`, version 0.3.36 of
llama-cpp-python; a test asks llama.cpp itself).

`python -m patarm_lite.quantize.quantizer` is the child: one job as JSON on stdin, llama.cpp's talk on stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patarm_lite.errors import UserError, missing_extra, nearest
from patarm_lite.gguf_file import TENSOR_TYPES, GgufFile, GgufTensor, read_gguf

BUFFER = 256 << 20
"""Bytes of rows that llama.cpp holds at a time. Its own default of 8 GiB takes an embedding whole."""

_BLOCKS = {name: (weights, size) for name, weights, size in TENSOR_TYPES.values()}
_FALLBACKS = {
    "Q8_0": ("Q6_K", "Q5_K"),  # Q5_K: only the embedding of mixtures without Q6_K
    "Q5_1": ("Q5_K",),
    "Q5_0": ("Q4_K",),
    "Q4_0": ("Q3_K", "Q2_K", "TQ1_0", "TQ2_0"),
    "IQ4_NL": ("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
}
"""What llama.cpp writes where blocks of 256 don't fit -> what it wanted. Where 32 don't fit either it writes F16."""


@dataclass(frozen=True)
class QuantType:
    """A type that llama.cpp quantizes a model to.

    `ftype`: its number in llama.h. `base`: what most weights get. `others`: what some get on purpose, in a dense
    model. `needs_importance`: llama.cpp refuses it without an importance matrix.
    """

    name: str
    ftype: int
    base: str
    others: tuple[str, ...]
    needs_importance: bool = False

    @property
    def block(self) -> int:
        """Weights in a block of `base`; rows of another length fall back."""
        return _BLOCKS[self.base][0]

    @property
    def bits(self) -> float:
        """Bits a weight, for planning: three quarters of the weights in `base`, the rest in the widest type."""
        widest = max(_bits(kind) for kind in (self.base, *self.others))
        return (3 * _bits(self.base) + widest) / 4


def _bits(kind: str) -> float:
    weights, size = _BLOCKS[kind]
    return 8 * size / weights


_BIG = ("Q4_K", "Q5_K", "Q6_K")
TYPES = {
    found.name: found
    for found in (
        QuantType("q8_0", 7, "Q8_0", ()),
        QuantType("q6_k", 18, "Q6_K", ()),
        QuantType("q5_k_m", 17, "Q5_K", ("Q6_K",)),
        QuantType("q5_k_s", 16, "Q5_K", ("Q6_K",)),
        QuantType("q5_1", 9, "Q5_1", ("Q6_K",)),
        QuantType("q5_0", 8, "Q5_0", ("Q5_1", "Q6_K")),
        QuantType("q4_k_m", 15, "Q4_K", ("Q5_K", "Q6_K")),
        QuantType("q4_k_s", 14, "Q4_K", ("Q5_K", "Q6_K")),
        QuantType("q4_1", 3, "Q4_1", ("Q6_K",)),
        QuantType("q4_0", 2, "Q4_0", ("Q4_1", "Q6_K")),
        QuantType("iq4_nl", 25, "IQ4_NL", ("Q5_K", "Q6_K")),
        QuantType("iq4_xs", 30, "IQ4_XS", ("Q5_K", "Q6_K")),
        QuantType("q3_k_l", 13, "Q3_K", ("Q5_K", "Q6_K")),
        QuantType("q3_k_m", 12, "Q3_K", _BIG),
        QuantType("q3_k_s", 11, "Q3_K", ("Q6_K",)),
        QuantType("iq3_m", 27, "IQ3_S", ("Q4_K", "Q6_K")),
        QuantType("iq3_s", 26, "IQ3_S", ("Q4_K", "Q6_K")),
        QuantType("iq3_xs", 22, "IQ3_S", ("IQ3_XXS", "Q4_K", "Q6_K"), True),
        QuantType("iq3_xxs", 23, "IQ3_XXS", ("IQ2_S", "IQ3_S", "Q3_K", "Q4_K", "Q5_K"), True),
        QuantType("q2_k", 10, "Q2_K", ("Q3_K", "Q4_K", "Q6_K")),
        QuantType("q2_k_s", 21, "Q2_K", ("Q4_K", "Q6_K"), True),
        QuantType("iq2_m", 29, "IQ2_S", ("IQ3_S", "Q4_K", "Q5_K"), True),
        QuantType("iq2_s", 28, "IQ2_XS", ("IQ3_S", "Q4_K", "Q5_K"), True),
        QuantType("iq2_xs", 20, "IQ2_XS", ("Q2_K", "Q4_K", "Q5_K"), True),
        QuantType("iq2_xxs", 19, "IQ2_XXS", ("Q2_K", "Q4_K", "Q5_K"), True),
        QuantType("iq1_m", 31, "IQ1_M", ("IQ2_XXS", "Q2_K", "Q4_K", "Q5_K"), True),
        QuantType("iq1_s", 24, "IQ1_S", ("IQ2_XXS", "Q2_K", "Q4_K", "Q5_K"), True),
        QuantType("tq2_0", 37, "TQ2_0", ("Q4_K", "Q6_K")),
        QuantType("tq1_0", 36, "TQ1_0", ("Q4_K", "Q6_K")),
    )
}
"""Name -> type, roughly from the largest to the smallest."""

UNQUANTIZED = ("hf", "lora", "f32", "f16", "bf16")
"""What can be exported besides: 16-bit safetensors, and GGUF files as the converter writes them."""

REFUSED = {
    "mxfp4_moe": "is for mixtures of experts; a dense judge would become q8_0",
    "nvfp4": "is not written by llama.cpp's quantizer",
    "q1_0": "is too new to be read back and checked here",
    "q2_0": "is too new to be read back and checked here",
}
"""Types that llama.cpp knows and this refuses, with the reason."""


@dataclass(frozen=True)
class Fallback:
    """A weight that got another type than its mixture says, since its rows don't divide into blocks."""

    tensor: str
    wanted: str
    got: str


@dataclass(frozen=True)
class Quantized:
    """A written file: its size, how many tensors have which type, and which of them fell back."""

    path: Path
    type: str
    bytes: int
    tensors_by_type: dict[str, int]
    fallbacks: tuple[Fallback, ...]


def check_types(names: Sequence[str], importance: bool) -> None:
    """Refuse before any work what can't be exported.

    Args:
        importance: whether there will be an importance matrix.

    Raises:
        UserError: no type, an unknown one (with the nearest name), or one that needs an importance matrix.

    >>> check_types(["f16", "q4_k_m"], importance=False)
    >>> check_types(["q4_km"], importance=True)
    Traceback (most recent call last):
    ...
    patarm_lite.errors.UserError: type 'q4_km' is not known. Did you mean 'q4_k_m'? Known: hf, lora, f32, ...
    """
    known = (*UNQUANTIZED, *TYPES)
    if not names:
        raise UserError("no type is given; type for example: --type q8_0,q4_k_m")
    for name in names:
        if name.lower() in REFUSED:
            raise UserError(f"type {name!r} {REFUSED[name.lower()]}; choose another, e.g. q4_k_m")
        if name not in known:
            raise UserError(f"type {name!r} is not known.{nearest(name.lower(), known)} Known: {', '.join(known)}")
        if name in TYPES and TYPES[name].needs_importance and not importance:
            raise UserError(
                f"type {name!r} needs an importance matrix and none is to be made; leave out --imatrix none, or choose"
                f" {'iq3_s' if name.startswith('iq3') else 'q2_k'}, which does without"
            )


def quantize(
    source: Path,
    out: Path,
    type: str,
    *,
    importance: Path | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Write `source` (f32, f16 or bf16) as `out` in another type.

    Memory: some hundred megabytes beside the pages of the mapped source, whatever the model. The file appears by
    rename; a child that dies takes nothing with it, and dies with this process.

    Args:
        threads: None: as many as there are cores.
        progress: called with tensors done and tensors in all.

    Raises:
        UserError: an unknown type, a source that is damaged or quantized already, an importance matrix that is
            missing, damaged or of another model, a full disk, or whatever else llama.cpp refused.
    """
    check_types([type], importance is not None)
    if type not in TYPES:
        raise UserError(f"{type} is not a quantized type; the converter writes it")
    header = read_gguf(source)
    _check_source(header)
    job: dict[str, str | int] = {
        "source": os.fspath(source.resolve()),
        "out": os.fspath(out.resolve()) + ".part",
        "ftype": TYPES[type].ftype,
        "threads": threads or os.cpu_count() or 1,
    }
    if importance is not None:
        from patarm_lite.quantize.importance import check_fits

        check_fits(importance, header)
        job["importance"] = os.fspath(importance.resolve())
    part = Path(str(job["out"]))
    try:
        code, said = _run_child(job, progress)
        if code:
            raise _refused(source, out, type, code, said)
        written = read_gguf(part)
        if {tensor.name: tensor.shape for tensor in written.tensors} != {t.name: t.shape for t in header.tensors}:
            raise UserError(f"llama.cpp left tensors out of {out}; install llama-cpp-python==0.3.36 and try again")
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    types = Counter(tensor.type for tensor in written.tensors)
    return Quantized(out, type, written.size, dict(types), fallbacks(written, type, said))


def fallbacks(written: GgufFile, type: str, said: Sequence[str] = ()) -> tuple[Fallback, ...]:
    """The weights of a quantized file that got another type since their rows don't divide into blocks.

    Args:
        type: the name the file was asked for by.
        said: lines of llama.cpp's log, where there is one: they tell apart what several wanted types fall back to.
    """
    wanted_by_log = dict(found for line in said for found in _WANTED.findall(line))
    mixture = (TYPES[type].base, *TYPES[type].others)
    found = []
    for tensor in written.tensors:
        if not _quantizable(tensor):
            continue
        possible = mixture if tensor.type == "F16" else _FALLBACKS.get(tensor.type, ())
        wanted = wanted_by_log.get(tensor.name, "").upper() or next((kind for kind in possible if kind in mixture), "")
        if wanted and tensor.shape[0] % _BLOCKS[wanted][0]:
            found.append(Fallback(tensor.name, wanted, tensor.type))
    return tuple(found)


_WANTED = re.compile(r"(\S+)\s+- ncols +\d+ not divisible by +\d+ \(required for type +(\S+)\)")
_DONE = re.compile(r"^\[ *(\d+)/ *(\d+)\]")


def _quantizable(tensor: GgufTensor) -> bool:
    return len(tensor.shape) > 1 and tensor.name.endswith("weight") and not tensor.name.endswith("_norm.weight")


def _check_source(header: GgufFile) -> None:
    if header.metadata.get("general.type", "model") != "model" or "general.architecture" not in header.metadata:
        raise UserError(f"{header.path} holds no model; give the f16 GGUF file of one")
    done = sorted({tensor.type for tensor in header.tensors} - {"F32", "F16", "BF16"})
    if done:
        raise UserError(
            f"{header.path} is quantized already ({', '.join(done)}); quantizing twice loses twice: give the f16 file"
        )


def _run_child(job: dict[str, str | int], progress: Callable[[int, int], None] | None) -> tuple[int, list[str]]:
    """Exit code and lines of stderr. The child ends when its stdin does, so it can't outlive this process."""
    package = os.fspath(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-P", "-m", __name__]  # -P: a file of the current folder must not pass for a module
    said: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as child:
        assert child.stdin is not None and child.stderr is not None
        try:
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
            for raw in child.stderr:
                said.append(raw.decode("utf-8", "replace").rstrip())
                done = _DONE.match(said[-1])
                if done and progress is not None:
                    progress(int(done[1]), int(done[2]))
            return child.wait(), said
        except BrokenPipeError:
            return child.wait() or 1, said
        except BaseException:
            child.kill()
            raise


def _refused(source: Path, out: Path, type: str, code: int, said: list[str]) -> UserError:
    """What llama.cpp's talk means."""
    text = "\n".join(said)
    if "Traceback (most recent call last)" in text:
        raise RuntimeError(text)
    if code == MISSING:
        return missing_extra("judge", "llama-cpp-python")
    if "iostream error" in text or "failed to write" in text:
        return UserError(f"{out} could not be written to its end, as when a disk is full; make room and try again")
    invalid = re.search(r"tensor '([^']+)' has invalid data", text)
    if invalid:
        return UserError(
            f"{source} has weights that are not numbers in {invalid[1]}; the file is damaged: export it again"
        )
    unknown = re.search(r"unknown model architecture: '([^']*)'", text)
    if unknown:
        return UserError(f"{source} is of the architecture {unknown[1]!r}, which llama.cpp doesn't know; give a Qwen3")
    reason = next((line for line in reversed(said) if "failed to quantize" in line), said[-1] if said else "no reason")
    how = f"ended with code {code}" if code > 0 else f"was killed by signal {-code}"
    return UserError(
        f"llama.cpp could not quantize {source} to {type} ({how}): {reason.split('failed to quantize: ')[-1]};"
        " check the file with patarm-lite inspect, or export the judge again"
    )


MISSING = 4
"""The child's exit code where llama-cpp-python is not installed."""


def _child() -> int:
    """Do the job on stdin; 0 when it is done."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        import llama_cpp as api
    except ImportError:
        return MISSING
    api.llama_log_set(api.llama_log_callback(), None)  # llama.cpp's own: straight to stderr
    options = api.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.max_buf_size = job["ftype"], job["threads"], BUFFER
    kept: list[object] = []
    if "importance" in job:
        kept = _use_importance(options, Path(job["importance"]))
    code = int(api.llama_model_quantize(os.fsencode(job["source"]), os.fsencode(job["out"]), ctypes.byref(options)))
    kept.clear()
    return 1 if code else 0


def _die_with_parent() -> None:
    """Ends this process once its stdin is closed: the parent is gone, or another may be writing the same file."""
    sys.stdin.read()
    os._exit(1)


def _use_importance(options: Any, path: Path) -> list[object]:
    """Hand an importance matrix to llama.cpp; what is returned must live until it is done."""
    import llama_cpp
    import numpy as np

    from patarm_lite.quantize.importance import read, source_of

    found = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in read(path).items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(found) + 1))()  # the last stays empty: it ends the list
    for entry, (name, values) in zip(entries, found.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    dataset, chunks = source_of(path)
    says: dict[str, str | int] = {"quantize.imatrix.file": path.name, "quantize.imatrix.entries_count": len(found)}
    if dataset:
        says["quantize.imatrix.dataset"] = Path(dataset).name
    if chunks > 0:
        says["quantize.imatrix.chunks_count"] = chunks
    overrides = (llama_cpp.llama_model_kv_override * (len(says) + 1))()
    for override, (key, value) in zip(overrides, says.items(), strict=False):
        override.key = key.encode()
        if isinstance(value, int):
            override.tag, override.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            text = value.encode()[:127].decode("utf-8", "ignore").encode()
            override.tag, override.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, text
    options.imatrix, options.kv_overrides = entries, overrides
    return [found, entries, overrides]


if __name__ == "__main__":
    # Not sys.exit: it would wait for the thread that reads stdin.
    status = _child()
    sys.stderr.flush()
    os._exit(status)
