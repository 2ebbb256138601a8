"""Merge an adapter into its base, tensor by tensor: a Hugging Face folder of 16-bit safetensors.

A judge trained by QLoRA learned its adapter on 4-bit weights. It can be merged into the 16-bit original or into the
dequantized 4-bit weights, those it was trained on; which of the two judges better is a matter of measuring both.

One tensor is in memory at a time, as float32 with its 16-bit copy beside it. Sums are made in float32 and rounded
once. Torch is imported inside functions.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from patarm_lite.errors import UserError
from patarm_lite.quantize import four_bits
from patarm_lite.quantize.adapter import EMBEDDING, HEAD, Adapter, logical_shapes, read_adapter, read_json
from patarm_lite.quantize.source import Source
from patarm_lite.quantize.tensors import Entry, TensorFolder, replacing, write_sharded

STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80}
"""Bits that are all set in a 16-bit infinity or NaN, and in no other number."""
LARGEST_F16 = 65504.0
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Merged:
    """What `merge` or `cast` wrote.

    `onto`: `original` or `dequantized`. `dtype`: of every tensor. `largest_bytes`: of the largest tensor in float32.
    """

    folder: Path
    onto: str
    tensors: int
    largest_bytes: int
    dtype: str


def merge(
    source: Source,
    out: Path,
    *,
    onto: str = "original",
    dtype: str = "base",
    progress: Progress | None = None,
) -> Merged:
    """Merge a judge's adapter into its base.

    Args:
        source: a judge with an adapter.
        out: the folder to write; it appears by rename.
        onto: `original`: the base's weights as they are. `dequantized`: its linear layers rounded to 4 bits as in
            training and back.
        dtype: `float16`, `bfloat16` or `float32`; `base`: the base's where that has 16 bits, otherwise float16;
            `finest`: float16 whatever the base's. These two turn to bfloat16 where a value is too large for float16.
            A change of 1 % of its weights is lost to a sixth in bfloat16 and to a fiftieth in float16 (norms of the
            rounding errors against that of the change; measured on random weights), so what is converted further
            had better be `finest`.
        progress: called with (tensors done, tensors to do); it begins anew when bfloat16 is turned to.

    Raises:
        UserError: `out` is there already, weights that are not finite or too large for `dtype`, a base in 4 bits
            where its original is asked for, no room.
    """
    if not source.adapter:
        raise ValueError("a judge without an adapter is cast, not merged")
    if onto not in ("original", "dequantized"):
        raise ValueError(f"onto={onto!r}")
    weights = _Weights(source.weights, onto == "dequantized", source.dtype)
    if onto == "original" and weights.packed:
        raise UserError(
            f"base {source.weights} holds 4-bit weights, and there is no 16-bit original to merge into; "
            "give the original with --base"
        )
    return _write(source, out, _Judge(weights, read_adapter(source.folder), _tied(source)), onto, dtype, progress)


def cast(source: Source, out: Path, *, dtype: str = "base", progress: Progress | None = None) -> Merged:
    """Write a judge without an adapter as a folder of 16-bit safetensors; arguments and errors as for `merge`."""
    if source.adapter:
        raise ValueError("a judge with an adapter is merged, not cast")
    weights = _Weights(source.weights, False, None)
    onto = "dequantized" if weights.packed else "original"
    return _write(source, out, _Judge(weights, None, _tied(source)), onto, dtype, progress)


class _TooLarge(UserError):
    """A value that float16 can't hold."""


class _Weights:
    """A folder's weights as float32 torch tensors, one at a time.

    Args:
        rounded: round every linear layer to 4 bits and back, as `TransformersEngine.load` holds them for QLoRA:
            transformers quantizes all linear layers but the head, from weights already in the type computed in.
        compute: that type; none: the one the weights are stored in.
    """

    def __init__(self, folder: Path, rounded: bool, compute: str | None) -> None:
        self.tensors = TensorFolder(folder)
        self.shapes = logical_shapes(self.tensors)
        self.packed = four_bits.parts_of(self.tensors)
        sizes: Counter[str] = Counter()
        for name in self.shapes.keys() - self.packed.keys():
            sizes[self.tensors.info(name).dtype] += self.tensors.info(name).bytes
        self.stored = max(sizes, key=lambda dtype: sizes[dtype])
        self.rounded = rounded and not self.packed
        self.compute = compute or {stored: dtype for dtype, stored in STORED.items()}.get(self.stored, "float32")

    def read(self, name: str) -> Any:
        import torch

        if name in self.packed:
            return four_bits.read_packed(self.tensors, name, self.packed[name])
        weight = torch.from_numpy(self.tensors.f32(name))
        if not self.rounded:
            return weight
        dtype = getattr(torch, self.compute)
        if dtype != torch.float32:
            weight.copy_(weight.to(dtype))
        linear = weight.ndim == 2 and name not in (HEAD, EMBEDDING)
        return four_bits.round_nf4(weight, dtype) if linear else weight

    def as_stored(self, name: str, stored: str) -> Any:
        """The bytes of a weight that needs no change to be of that type; None if it does."""
        if self.rounded or name in self.packed or stored != self.tensors.info(name).dtype or stored not in EXPONENT:
            return None
        found = self.tensors.raw(name)
        for piece in np.array_split(found.view("<u2"), range(four_bits.PIECE, found.size // 2, four_bits.PIECE)):
            if ((piece & EXPONENT[stored]) == EXPONENT[stored]).any():
                raise UserError(_not_finite(self.tensors.folder, name))
        return found


@dataclass(frozen=True)
class _Judge:
    """The tensors of a judge: those of its base, changed by the adapter if there is one.

    An adapter that changes the embedding or the head of a tied base leaves them different: the judge is untied then.
    """

    weights: _Weights
    adapter: Adapter | None
    tied_base: bool

    @property
    def tied(self) -> bool:
        return self.tied_base and not (self.adapter and self.adapter.touched & {HEAD, EMBEDDING})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = dict(self.weights.shapes)
        if self.tied:
            shapes.pop(HEAD, None)  # never read: the model uses its embedding
        elif self.tied_base:
            shapes[HEAD] = shapes[EMBEDDING]
        return dict(sorted(shapes.items()))

    def _origin(self, name: str) -> str:
        return EMBEDDING if name == HEAD and self.tied_base else name

    def changed(self, name: str) -> bool:
        return self.adapter is not None and name in self.adapter.touched

    def read(self, name: str) -> Any:
        """A tensor of the judge in float32, and its largest magnitude.

        Raises:
            UserError: it holds a value that is not finite.
        """
        import torch

        weight = self._merged(name)
        low, high = torch.aminmax(weight)
        largest = max(-float(low), float(high))
        if not math.isfinite(largest):
            raise UserError(_not_finite(self.adapter.folder if self.adapter else self.weights.tensors.folder, name))
        return weight, largest

    def _merged(self, name: str) -> Any:
        import torch

        if self.adapter is None:
            return self.weights.read(self._origin(name))
        tensors = self.adapter.tensors
        if name in self.adapter.replaced:
            weight = torch.from_numpy(tensors.f32(self.adapter.replaced[name]))
        else:
            weight = self.weights.read(self._origin(name))
        change = self.adapter.changes.get(name)
        if change is not None:
            a, b = (torch.from_numpy(tensors.f32(part)) for part in (change.a, change.b))
            if change.embedding:
                a, b = b.T, a.T
            weight.addmm_(b, a, alpha=change.scale)
        return weight

    def bytes_of(self, name: str, dtype: str) -> Any:
        """A tensor's bytes in that type."""
        import torch

        unchanged = None if self.changed(name) else self.weights.as_stored(self._origin(name), STORED[dtype])
        if unchanged is not None:
            return unchanged
        weight, largest = self.read(name)
        if dtype == "float16" and largest > LARGEST_F16:
            raise _TooLarge(
                f"tensor {name!r} holds {largest:.3g}, and float16 ends at {LARGEST_F16:.0f}; use --type bf16"
            )
        return weight.to(getattr(torch, dtype)).reshape(-1).view(torch.uint8).numpy()


def _not_finite(folder: Path, name: str) -> str:
    return f"{folder}: tensor {name!r} holds a value that is not finite (NaN or infinity); train or fetch it again"


def _tied(source: Source) -> bool:
    return read_json(source.weights / "config.json").get("tie_word_embeddings") is True


def _choices(dtype: str, stored: str) -> list[str]:
    """Types to try in turn; the next one is for values too large for float16."""
    if dtype not in ("base", "finest"):
        return [dtype]
    return ["bfloat16"] if dtype == "base" and stored == "BF16" else ["float16", "bfloat16"]


def _write(source: Source, out: Path, judge: _Judge, onto: str, dtype: str, progress: Progress | None) -> Merged:
    shapes = judge.shapes()
    choices = _choices(dtype, judge.weights.stored)
    with _new_folder(out) as part:
        for chosen in choices:
            try:
                _write_tensors(part, judge, shapes, chosen, progress)
                break
            except _TooLarge:
                if chosen == choices[-1]:
                    raise
        _copy_rest(source, part, chosen, judge.tied)
    largest = max(math.prod(shape) for shape in shapes.values())
    return Merged(out, onto, len(shapes), 4 * largest, chosen)


def _write_tensors(
    folder: Path, judge: _Judge, shapes: dict[str, tuple[int, ...]], dtype: str, progress: Progress | None
) -> None:
    made = itertools.count(1)

    def produce(name: str) -> Any:
        data = judge.bytes_of(name, dtype)
        if progress is not None:
            progress(next(made), len(shapes))
        return data

    entries = [Entry(name, STORED[dtype], shape, partial(produce, name)) for name, shape in shapes.items()]
    write_sharded(folder, entries)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name when the block ends well; otherwise nothing is left of it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"output {out} is there already; remove it or choose another")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, out)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        if error.errno not in NO_ROOM:
            raise
        raise UserError(f"writing {out} failed: {error.strerror}; make room and give the same command again") from None
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _copy_rest(source: Source, out: Path, dtype: str, tied: bool) -> None:
    """Everything of a judge's folder but its tensors."""
    for name in TOKENIZER_FILES:
        if (source.tokenizer / name).is_file():
            _put(out / name, (source.tokenizer / name).read_bytes())
    config = read_json(source.weights / "config.json")
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    config["tie_word_embeddings"] = tied
    _put_json(out / "config.json", config)
    generation = source.weights / "generation_config.json"
    if generation.is_file():
        settings = read_json(generation)
        if source.trained:  # a base's own temperature and top_p would be what vLLM judges with
            settings = {key: value for key, value in settings.items() if key.endswith("_token_id")}
        _put_json(out / generation.name, settings)
    if (source.folder / "protocol.json").is_file():
        _put(out / "protocol.json", (source.folder / "protocol.json").read_bytes())


def _put_json(path: Path, data: dict[str, Any]) -> None:
    _put(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def _put(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)
