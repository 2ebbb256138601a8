"""Metadata of a finished GGUF file: changed by copy and rename, and explained to a person.

A change copies the tensors' bytes as they are, in blocks, and every key that stays with its type and bytes. It works on
anybody's files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from patarm_lite.calibration import Calibration
from patarm_lite.errors import UserError
from patarm_lite.gguf_file import ALIGNMENT, MAGIC, TENSOR_TYPES, GgufFile, read_gguf
from patarm_lite.judge.description import Description, fingerprint, read_description

BLOCK = 1 << 22
"""Bytes copied at once."""
TEMPLATES = {
    "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5": "Qwen3's",
    "32088b6a380e76c324ae0860414aa240a320788ed837aaa95a553bcdba0894fc": "the arena's",
}
"""SHA-256 of chat templates under which our prompt is one user turn."""
_KINDS = {
    "UINT8": (0, "B"),
    "INT8": (1, "b"),
    "UINT16": (2, "H"),
    "INT16": (3, "h"),
    "UINT32": (4, "I"),
    "INT32": (5, "i"),
    "FLOAT32": (6, "f"),
    "BOOL": (7, "?"),
    "UINT64": (10, "Q"),
    "INT64": (11, "q"),
    "FLOAT64": (12, "d"),
}
_STRING, _ARRAY = 8, 9


def rewrite(path: Path, changes: Mapping[str, Any]) -> None:
    """Set metadata keys of a GGUF file. It is written anew beside itself and renamed; after an error nothing changed.

    Args:
        changes: key -> str, bool, int, float or list of str; None removes the key. A key that is there keeps its place,
            and its type where the value fits it; new ones come last.

    Raises:
        UserError: not a sound GGUF file, a key that decides where tensors lie, or a disk that is full.
    """
    file = read_gguf(path)
    if "general.alignment" in changes:
        raise UserError(f"general.alignment of {path} can't be changed here: it decides where the tensors lie")
    part = path.with_name(path.name + ".part")
    try:
        with path.open("rb") as source, part.open("wb") as out:
            _copy_changed(file, changes, source, out)
            out.flush()
            os.fsync(out.fileno())
        shutil.copymode(path, part)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} can't be written anew: {error.strerror}; it needs {file.size} bytes of room") from None
    finally:
        part.unlink(missing_ok=True)


def _copy_changed(file: GgufFile, changes: Mapping[str, Any], source: BinaryIO, out: BinaryIO) -> None:
    kept = [key for key in file.spans if key not in changes or changes[key] is not None]
    added = [key for key, value in changes.items() if value is not None and key not in file.spans]
    out.write(MAGIC + struct.pack("<IQQ", file.version, len(file.tensors), len(kept) + len(added)))
    for key in kept:
        if key in changes:
            out.write(_entry(key, changes[key], file.kinds[key]))
        else:
            start, end = file.spans[key]
            _copy(source, out, start, end - start)
    for key in added:
        out.write(_entry(key, changes[key], None))
    for tensor in file.tensors:
        number = _type_number(tensor.type)
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        out.write(_text(tensor.name) + shape + struct.pack("<IQ", number, tensor.offset - file.data_start))
    alignment = int(file.metadata.get("general.alignment", ALIGNMENT))
    out.write(b"\0" * (-out.tell() % alignment))
    _copy(source, out, file.data_start, max(0, file.size - file.data_start))


def _type_number(name: str) -> int:
    return next(number for number, (known, _, _) in TENSOR_TYPES.items() if known == name)


def _copy(source: BinaryIO, out: BinaryIO, start: int, count: int) -> None:
    source.seek(start)
    while count:
        block = source.read(min(BLOCK, count))
        if not block:
            raise UserError(f"{source.name} was cut while it was copied; nothing was changed")
        out.write(block)
        count -= len(block)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _entry(key: str, value: Any, kind: str | None) -> bytes:
    """A metadata entry: key, type, value."""
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list | tuple):
        if not all(isinstance(item, str) for item in value):
            raise TypeError(f"metadata {key!r} can't hold {value!r}")
        head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
        return _text(key) + head + b"".join(_text(item) for item in value)
    if not isinstance(value, bool | int | float):
        raise TypeError(f"metadata {key!r} can't hold {value!r}")
    number, packed = _number(value, kind)
    return _text(key) + struct.pack("<I", number) + packed


def _number(value: bool | int | float, kind: str | None) -> tuple[int, bytes]:
    """A number in the type it had, where that holds it (a fraction may be rounded to it, or a program that asks for that
    type would refuse the file); else in the first that does."""
    fallbacks = ("BOOL",) if isinstance(value, bool) else ("UINT32", "INT64", "UINT64")
    for name in (kind, *(("FLOAT64",) if isinstance(value, float) else fallbacks)):
        if name not in _KINDS or (name == "BOOL") != isinstance(value, bool):
            continue
        number, form = _KINDS[name]
        if isinstance(value, float) and form not in "fd":
            continue
        try:
            packed = struct.pack("<" + form, value)
        except (struct.error, OverflowError):
            continue
        rounded = isinstance(value, float) and name == kind
        if rounded or struct.unpack("<" + form, packed)[0] == value or value != value:
            return number, packed
    raise TypeError(f"metadata can't hold {value!r}")


# --- inspect ---


def inspect_json(path: Path) -> dict[str, Any]:
    """What a GGUF file is, whoever made it: plain JSON values.

    Keys: `path`, `bytes`, `gguf_version`, `architecture`, `name`, `parameters`, `types` (tensor type -> tensors,
    weights, bytes), `vocabulary`, `context`, `template` (`known`, `sha256`), `ours`, `problem` (why our description
    can't be read, or None), `version`, `trained`, `protocol`, `rubrics` (task -> lines), `rubric_kind`, `about`,
    `calibration`, `fidelity`, `fingerprint`, `fingerprint_matches` (whether calibration and fidelity are of these very
    weights; None where the file doesn't say).

    Raises:
        UserError: not a sound GGUF file.
    """
    file = read_gguf(path)
    problem, description = None, Description()
    try:
        description = read_description(file.metadata)
    except UserError as error:
        problem = str(error)
    actual = fingerprint(path)
    stated = description.fingerprint
    architecture = file.metadata.get("general.architecture")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    protocol = description.protocol
    calibration = description.calibration
    return {
        "path": str(path),
        "bytes": file.size,
        "gguf_version": file.version,
        "architecture": architecture,
        "name": file.metadata.get("general.name"),
        "parameters": sum(prod(tensor.shape) for tensor in file.tensors),
        "types": _types(file),
        "vocabulary": len(tokens) if isinstance(tokens, list) else None,
        "context": file.metadata.get(f"{architecture}.context_length"),
        "template": _template(file.metadata.get("tokenizer.chat_template")),
        "ours": description.ours or problem is not None,
        "problem": problem,
        "version": description.version or None,
        "trained": description.trained,
        "protocol": {"name": protocol.name, "instructions": protocol.instructions, "thinking": protocol.thinking},
        "rubric_kind": description.kind,
        "rubrics": {
            task: [f"{c.name} ({c.weight}): {c.description}" for c in rubric]
            for task, rubric in description.rubrics.items()
        },
        "about": dict(description.about),
        "calibration": json.loads(calibration.to_json()) if calibration else None,
        "fidelity": description.fidelity,
        "fingerprint": actual,
        "fingerprint_matches": None if stated is None else stated == actual,
    }


def _types(file: GgufFile) -> dict[str, dict[str, int]]:
    count, weights, size = Counter[str](), Counter[str](), Counter[str]()
    for tensor in file.tensors:
        count[tensor.type] += 1
        weights[tensor.type] += prod(tensor.shape)
        size[tensor.type] += tensor.bytes
    return {
        kind: {"tensors": count[kind], "weights": weights[kind], "bytes": size[kind]} for kind, _ in size.most_common()
    }


def _template(text: Any) -> dict[str, Any] | None:
    if not isinstance(text, str):
        return None
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return {"known": TEMPLATES.get(digest), "sha256": digest}


def inspect_text(path: Path) -> str:
    """`inspect_json` in words. What others wrote is escaped: no control character reaches the terminal."""
    return "\n".join(_lines(inspect_json(path)))


def _lines(found: Mapping[str, Any]) -> Iterable[str]:
    yield escape(f"{found['path']}: {_bytes(found['bytes'])}, GGUF version {found['gguf_version']}", 400)
    kinds = ", ".join(f"{kind} {_bytes(part['bytes'])}" for kind, part in found["types"].items())
    bits = 8 * sum(part["bytes"] for part in found["types"].values()) / max(1, found["parameters"])
    yield _row("model", f"{found['name'] or 'no name'}, architecture {found['architecture'] or 'not stated'}")
    yield _row("weights", f"{found['parameters']:,} parameters, {bits:.2f} bits each: {kinds or 'none'}")
    yield _row(
        "tokens", f"vocabulary {found['vocabulary'] or 'not stated'}, context {found['context'] or 'not stated'}"
    )
    yield _row("template", _template_words(found["template"]))
    if found["problem"]:
        yield _row("judge", f"can't be used: {found['problem']}")
    else:
        yield from _judge_lines(found)
    yield _row("fingerprint", found["fingerprint"])
    if found["fingerprint_matches"] is False:
        yield _row("", "calibration and fidelity were measured on other weights: don't trust them for this file")


def _judge_lines(found: Mapping[str, Any]) -> Iterable[str]:
    protocol = found["protocol"]
    how = "with" if protocol["instructions"] else "without"
    how = f"{how} instructions, thinking {'on' if protocol['thinking'] else 'off'}"
    if not found["ours"]:
        yield _row("judge", f"untrained: nothing of patarm-lite in it; judged by protocol {protocol['name']}, {how}")
        return
    trained = "trained to the protocol" if found["trained"] else "untrained"
    yield _row(
        "judge", f"{trained}; protocol {protocol['name']}, {how}; scores 1 to 10; by patarm-lite {found['version']}"
    )
    for key, value in found["about"].items():
        yield _row(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    for task, lines in found["rubrics"].items():
        for number, line in enumerate(lines):
            yield _row("" if number else f"rubric {task}", line)
    yield _row("calibration", _calibration_words(found["calibration"]))
    for number, line in enumerate(fidelity_words(found["fidelity"])):
        yield _row("" if number else "fidelity", line)


def _row(label: str, text: str) -> str:
    return f"{escape(label, 24):<14}{escape(text)}"


def escape(text: str, most: int = 300) -> str:
    """Text by others for a terminal: what can't be printed is spelled out, and what is long is cut.

    >>> escape("a\\x1b[31m\\u202eb"), escape("x" * 20, 8)
    ('a\\\\x1b[31m\\\\u202eb', 'xxxxxxx…')
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _template_words(template: Mapping[str, Any] | None) -> str:
    if template is None:
        return "none in the file"
    if template["known"]:
        return f"{template['known']}: known here"
    return f"not known here (SHA-256 {template['sha256'][:16]}…): compare it with Qwen3's before you judge"


def _calibration_words(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "none; fit it with: patarm-lite calibrate FILE --pairs PAIRS"
    fitted = Calibration.from_json(json.dumps(found))
    words = f"a score higher by 1 is preferred with {fitted.p_preferred(1):.0%}, by 3 with {fitted.p_preferred(3):.0%}"
    return f"{words}; fitted on {fitted.pairs} pairs{_held_out(found['how'])}"


def _held_out(how: Mapping[str, Any]) -> str:
    checked = how.get("check")
    if not isinstance(checked, Mapping) or not _numbers(checked, "log_loss", "calibration_error", "pairs"):
        return ""
    return (
        f"; on {checked['pairs']} others log loss {checked['log_loss']:.3f} (coin 0.693), "
        f"calibration error {checked['calibration_error']:.3f}"
    )


def _numbers(found: Mapping[str, Any], *keys: str) -> bool:
    return all(type(found.get(key)) in (int, float) for key in keys)


def fidelity_words(found: Mapping[str, Any] | None) -> list[str]:
    """The fidelity a file states, one line a way of decoding."""
    if found is None:
        return ["not measured"]
    lines = []
    decodings = found.get("decodings")
    for decoding, row in decodings.items() if isinstance(decodings, Mapping) else ():
        if not isinstance(row, Mapping) or not _numbers(
            row,
            "n",
            "accuracy",
            "accuracy_reference",
            "accuracy_loss",
            "accuracy_loss_low",
            "accuracy_loss_high",
            "flips",
        ):
            continue
        lines.append(
            f"{decoding}: accuracy {row['accuracy']:.3f} against {row['accuracy_reference']:.3f} of "
            f"{found.get('reference', 'the original')} on {row['n']} pairs, loss {row['accuracy_loss']:+.3f} "
            f"({row['accuracy_loss_low']:+.3f} to {row['accuracy_loss_high']:+.3f}), "
            f"verdicts changed {row['flips']:.1%}"
        )
    return lines or ["stated in a form that is not known here"]
