"""Changing the metadata of a GGUF file by copy and rename, and explaining a file."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patarm_lite.calibration import fit
from patarm_lite.errors import UserError
from patarm_lite.gguf_file import read_gguf
from patarm_lite.judge.description import describe, fingerprint
from patarm_lite.prompts import Protocol
from patarm_lite.quantize import metadata
from patarm_lite.quantize.inspection import inspect_json, inspect_text
from patarm_lite.quantize.metadata import rewrite
from patarm_lite.rubrics import primary_rubric

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202eevil\r\nfake line\x9b31m"


def write(path: Path, fields: dict[str, Any] | None = None, alignment: int | None = None, rows: int = 4) -> Path:
    """A file by the gguf package, with every type of value."""
    writer = gguf.GGUFWriter(str(path), "qwen3")
    if alignment:
        writer.add_custom_alignment(alignment)
    kinds = {"uint8": 200, "int8": -5, "uint16": 60_000, "int16": -300, "uint32": 7, "int32": -7, "uint64": 1 << 60}
    for kind, number in {**kinds, "int64": -(1 << 60), "float32": 0.5, "float64": 0.1, "bool": True}.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", number)
    writer.add_uint32("qwen3.context_length", 4096)
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("tokenizer.ggml.tokens", ["x", "", "ж"])
    for key, value in (fields or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, value)
    writer.add_tensor("one.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two.weight", np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def content(path: Path) -> dict[str, tuple[tuple[int, ...], str, str]]:
    """Tensors as the gguf package reads them: shape, type, hash of the bytes."""
    return {
        tensor.name: (tuple(tensor.shape), tensor.tensor_type.name, hashlib.sha256(tensor.data.tobytes()).hexdigest())
        for tensor in gguf.GGUFReader(str(path)).tensors
    }


@pytest.mark.parametrize("alignment", [None, 64, 256])
def test_only_what_was_asked_for_changes(tmp_path: Path, alignment: int | None) -> None:
    path = write(tmp_path / "f.gguf", {"general.name": "old"}, alignment)
    path.chmod(0o640)
    before, weights = read_gguf(path), content(path)
    changes: dict[str, Any] = {
        "general.name": "ein anderer Name ☂" * 20,
        "a.uint32": 8,
        "a.float32": 0.25,
        "patarm.calibration": "{}",
        "patarm.list": ["a", "ü", ""],
        "a.int8": None,
        "not.there": None,
    }
    rewrite(path, changes)
    after = read_gguf(path)
    assert content(path) == weights
    expected = {**before.metadata, **changes}
    assert after.metadata == {key: value for key, value in expected.items() if value is not None}
    assert {key: after.kinds[key] for key in before.kinds if key != "a.int8"} == {
        key: kind for key, kind in before.kinds.items() if key != "a.int8"
    }
    assert list(after.metadata)[: len(before.metadata) - 1] == [key for key in before.metadata if key != "a.int8"]
    assert (after.kinds["patarm.calibration"], after.kinds["patarm.list"]) == ("STRING", "ARRAY:STRING")
    assert path.stat().st_mode & 0o777 == 0o640 and [p.name for p in tmp_path.iterdir()] == ["f.gguf"]


def test_changes_taken_back_give_the_same_file_byte_for_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf", {"general.name": "old"})
    before = path.read_bytes()
    rewrite(path, {})
    assert path.read_bytes() == before
    rewrite(path, {"general.name": "new", "patarm.x": 1})
    assert path.read_bytes() != before
    rewrite(path, {"general.name": "old", "patarm.x": None})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("a.uint8", 255, "UINT8"),
        ("a.uint8", 256, "UINT32"),
        ("a.uint8", -1, "INT64"),
        ("a.bool", False, "BOOL"),
        ("a.uint32", True, "BOOL"),
        ("a.bool", 1, "UINT32"),
        ("a.float32", 0.1, "FLOAT32"),
        ("new.int", 1 << 63, "UINT64"),
        ("new.float", float("inf"), "FLOAT64"),
        ("a.uint32", "words", "STRING"),
    ],
)
def test_a_number_keeps_its_type_where_that_holds_it(tmp_path: Path, key: str, value: Any, kind: str) -> None:
    path = write(tmp_path / "f.gguf")
    rewrite(path, {key: value})
    found = read_gguf(path)
    if kind == "FLOAT32":
        value = struct.unpack("<f", struct.pack("<f", value))[0]  # rounded: other programs ask for this type
    assert found.metadata[key] == value and type(found.metadata[key]) is type(value) and found.kinds[key] == kind


def test_a_file_without_tensors_can_be_changed(shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    path.write_bytes((shared / "models" / "ggml-vocab-qwen2.gguf").read_bytes())
    before = read_gguf(path).metadata
    rewrite(path, {"patarm.note": "x"})
    assert read_gguf(path).metadata == {**before, "patarm.note": "x"}


def test_a_large_file_is_copied_in_small_pieces(tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf", rows=200_000)  # 25 MB
    tracemalloc.start()
    rewrite(path, {"patarm.note": "x"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 25e6 and peak < 12e6


def test_after_an_error_the_file_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "f.gguf")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        rewrite(path, {"a": object()})
    with pytest.raises(UserError, match="alignment"):
        rewrite(path, {"general.alignment": 64})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metadata.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        rewrite(path, {"a": 1})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["f.gguf"]


def test_a_damaged_file_is_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf")
    path.write_bytes(path.read_bytes()[:-40])
    before = path.read_bytes()
    with pytest.raises(UserError, match="not a sound GGUF"):
        rewrite(path, {"a": 1})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["f.gguf"]


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda key: key != "general.alignment"),
        st.one_of(
            st.text(st.characters(codec="utf-8")),
            st.booleans(),
            st.integers(-(1 << 63), (1 << 64) - 1),
            st.floats(allow_nan=False),
            st.lists(st.text(st.characters(codec="utf-8")), max_size=3),
        ),
        max_size=6,
    )
)
def test_whatever_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any.gguf")
    rewrite(path, changes)
    found = read_gguf(path)
    assert {key: found.metadata[key] for key in changes} == changes
    assert found.tensor("one.weight").bytes == 24


# --- inspect ---

FIDELITY = {
    "reference": "f16",
    "decodings": {
        "free": {
            **{"n": 240, "accuracy": 0.91, "accuracy_reference": 0.92, "flips": 0.0125},
            **{"accuracy_loss": 0.01, "accuracy_loss_low": -0.002, "accuracy_loss_high": 0.022},
        }
    },
}


def judge_file(path: Path, **changes: Any) -> Path:
    fields = describe(
        protocol=Protocol(),
        rubrics={"chat": primary_rubric("chat")},
        kind="standard",
        trained=True,
        about={"name": "mine", "seed": 3, "method": "par", "base": {"name": "Qwen/Qwen3-0.6B"}, "sources": ["a", "b"]},
    )
    calibration = fit([2.0] * 10, [1.0] * 10, [5.0])  # P(2) = 10.5 / 11, so P(1) = 1 / (1 + 21 ** -0.5) = 0.82
    fields |= {"patarm.calibration": calibration.to_json(), "patarm.fidelity": json.dumps(FIDELITY)}
    return write(path, {**fields, **changes})


def words_of(path: Path) -> str:
    """What inspect says, whatever its columns."""
    return " ".join(inspect_text(path).split())


def test_a_judge_file_is_explained(tmp_path: Path) -> None:
    path = judge_file(tmp_path / "judge.gguf")
    rewrite(path, {"patarm.fingerprint": fingerprint(path)})
    found = inspect_json(path)
    json.dumps(found)
    assert (found["architecture"], found["parameters"], found["context"], found["vocabulary"]) == (
        "qwen3",
        262,
        4096,
        3,
    )
    assert found["types"] == {
        "F16": {"tensors": 1, "weights": 256, "bytes": 512},
        "F32": {"tensors": 1, "weights": 6, "bytes": 24},
    }
    assert found["trained"] and found["fingerprint_matches"] is True and found["problem"] is None
    assert found["about"]["base.name"] == "Qwen/Qwen3-0.6B" and "chat" in found["rubrics"]
    text = words_of(path)
    for words in (
        "262 parameters",
        "trained to the protocol; protocol patarm-lite/1, with instructions, thinking off; scores 1 to 10",
        "base.name Qwen/Qwen3-0.6B",
        "data.sources a, b",
        "higher by 1 is preferred with 82%",
        "free: accuracy 0.910 against 0.920 of f16 on 240 pairs, loss +0.010 (-0.002 to +0.022), verdicts changed 1.2%",
    ):
        assert words in text


def test_figures_of_other_weights_are_not_passed_off_as_this_files(tmp_path: Path) -> None:
    path = judge_file(tmp_path / "judge.gguf", **{"patarm.fingerprint": "00" * 32})
    assert inspect_json(path)["fingerprint_matches"] is False
    assert "measured on other weights" in inspect_text(path)


def test_somebody_elses_file_is_explained_too(shared: Path, tmp_path: Path) -> None:
    found = inspect_json(shared / "models" / "ggml-vocab-qwen2.gguf")
    assert (found["ours"], found["trained"], found["vocabulary"], found["types"]) == (False, False, 151_936, {})
    text = words_of(write(tmp_path / "f.gguf"))
    assert "untrained: nothing of patarm-lite in it" in text and "template none in the file" in text


def test_a_description_of_a_newer_version_is_said_and_the_rest_still_explained(tmp_path: Path) -> None:
    text = inspect_text(judge_file(tmp_path / "judge.gguf", **{"patarm.schema": 9}))
    assert "can't be used: the file's description has schema 9" in text and "262 parameters" in text


def test_the_real_template_is_known(shared: Path, tmp_path: Path) -> None:
    template = (shared / "models" / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    text = inspect_text(write(tmp_path / "f.gguf", {"tokenizer.chat_template": template}))
    assert "Qwen3's: known here" in text
    text = inspect_text(write(tmp_path / "g.gguf", {"tokenizer.chat_template": template + " "}))
    assert "not known here" in text


def test_no_control_character_of_a_file_reaches_the_terminal(tmp_path: Path) -> None:
    fields = {
        "general.name": HOSTILE,
        "patarm.base.name": HOSTILE * 50,
        "patarm.data.sources": [HOSTILE],
        f"patarm.{HOSTILE}": HOSTILE,
        "patarm.version": HOSTILE,
        "patarm.fidelity": json.dumps({"decodings": {HOSTILE: FIDELITY["decodings"]["free"]}, "reference": HOSTILE}),
    }
    lines = inspect_text(judge_file(tmp_path / "judge.gguf", **fields)).split("\n")
    assert all(line.isprintable() for line in lines) and max(map(len, lines)) < 340
    assert not any(line.startswith("fake line") for line in lines)
    raw = write(tmp_path / "raw.gguf", {"general.name": "AAAA"})
    raw.write_bytes(raw.read_bytes().replace(b"AAAA", b"\xff\xfe\x1b\xc2"))
    assert all(line.isprintable() for line in inspect_text(raw).split("\n"))
    json.dumps(inspect_json(raw)).encode()


@pytest.mark.parametrize(
    "fidelity", [{}, {"decodings": 3}, {"decodings": {"free": {"n": "x"}}}, {"decodings": {"free": 1}}]
)
def test_a_fidelity_of_unknown_form_is_said(tmp_path: Path, fidelity: dict[str, Any]) -> None:
    path = judge_file(tmp_path / "judge.gguf", **{"patarm.fidelity": json.dumps(fidelity)})
    assert "in a form that is not known" in inspect_text(path)


def test_an_architecture_that_is_no_text_is_shown_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf")
    data = path.read_bytes()
    key = b"general.architecture"
    place = data.index(key) + len(key)
    length = struct.unpack_from("<Q", data, place + 4)[0]
    path.write_bytes(data[:place] + struct.pack("<IQ", 8, length) + b"\0" * length + data[place + 12 + length :])
    assert "architecture \\x00" in inspect_text(path)
