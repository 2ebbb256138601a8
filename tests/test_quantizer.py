"""Quantizing: which types there are, what falls back, that nothing half-written stays; llama.cpp as the oracle."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_cpp_tools import tool, write_model

from patarm_lite.errors import UserError
from patarm_lite.gguf_file import GgufFile, read_gguf
from patarm_lite.quantize import importance, quantizer
from patarm_lite.quantize.quantizer import TYPES, Fallback, check_types, fallbacks, quantize

np = pytest.importorskip("numpy")
gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

SHAPE: dict[str, Any] = {"hidden": 256, "mlp": 256, "layers": 1, "heads": 4, "head_dim": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "f16.gguf", **SHAPE)


@pytest.fixture(scope="module")
def matrix(model: Path) -> Path:
    ids = np.random.default_rng(1).integers(0, 256, 700).tolist()
    return importance.compute(model, [ids], model.with_name("importance.gguf"), threads=1).path


def types_of(file: GgufFile) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in file.tensors}


def tensor_bytes(file: GgufFile) -> dict[str, bytes]:
    data = file.path.read_bytes()
    return {tensor.name: data[tensor.offset : tensor.offset + tensor.bytes] for tensor in file.tensors}


def test_types_have_the_numbers_of_llama_h() -> None:
    for kind in TYPES.values():
        assert getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.name.upper()}") == kind.ftype
    known = {name[19:].lower() for name in dir(llama_cpp) if name.startswith("LLAMA_FTYPE_MOSTLY_")}
    assert known == {*TYPES, *quantizer.REFUSED, "f16", "bf16"}


def test_bits_and_blocks_are_those_of_the_formats() -> None:
    """Q8_0: 34 bytes for 32 weights. Q4_K: 144 for 256 (4.5 bits), Q6_K: 210 (6.5625): (3 * 4.5 + 6.5625) / 4."""
    assert (TYPES["q8_0"].block, TYPES["q8_0"].bits) == (32, 8.5)
    assert (TYPES["q4_k_m"].block, TYPES["q4_k_m"].bits) == (256, 5.015625)


@pytest.mark.parametrize(
    ("names", "importance", "words"),
    [
        ([], True, "no type"),
        (["q8_0", "q4_km"], True, "'q4_km' is not known. Did you mean 'q4_k_m'"),
        (["Q4_K_M"], True, "Did you mean 'q4_k_m'"),
        (["int4"], True, "'int4' is not known. Known: hf, lora, f32"),
        (["mxfp4_moe"], True, "mixtures of experts"),
        (["f16", "iq2_xs"], False, "'iq2_xs' needs an importance matrix"),
        (["iq3_xs"], False, "iq3_s, which does without"),
    ],
)
def test_a_type_that_can_not_be_made_is_refused(names: list[str], importance: bool, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_types(names, importance)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_type_is_allowed_once_there_is_an_importance_matrix() -> None:
    check_types(["hf", "f32", "f16", "bf16", *TYPES], importance=True)


def test_q8_0_holds_the_bytes_that_the_gguf_package_computes(model: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    found = quantize(model, tmp_path / "q8.gguf", "q8_0", threads=1, progress=lambda *call: calls.append(call))
    assert found.tensors_by_type == {"F32": 5, "Q8_0": 8} and found.fallbacks == ()
    assert found.bytes == (tmp_path / "q8.gguf").stat().st_size
    assert calls == [(done, 13) for done in range(1, 14)]
    written = tensor_bytes(read_gguf(tmp_path / "q8.gguf"))
    for tensor in gguf.GGUFReader(model).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            expected = gguf.quants.quantize(tensor.data.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
            assert written[tensor.name] == expected.tobytes()


def test_metadata_stays_and_the_matrix_is_named_without_its_folder(model: Path, matrix: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "q4.gguf", "q4_k_m", importance=matrix, threads=1)
    before, after = read_gguf(model).metadata, read_gguf(tmp_path / "q4.gguf").metadata
    assert {key: after[key] for key in before} == {**before, "general.file_type": 15}
    assert {key: after[key] for key in after if key not in before} == {
        "general.quantization_version": 2,
        "quantize.imatrix.file": "importance.gguf",
        "quantize.imatrix.dataset": "judging prompts and judgements",
        "quantize.imatrix.entries_count": 7,
        "quantize.imatrix.chunks_count": 1,
    }


def test_the_importance_matrix_changes_the_weights(model: Path, matrix: Path, tmp_path: Path) -> None:
    with_it = quantize(model, tmp_path / "with.gguf", "q4_k_s", importance=matrix, threads=1)
    without = quantize(model, tmp_path / "without.gguf", "q4_k_s", threads=1)
    assert with_it.tensors_by_type == without.tensors_by_type
    one, other = tensor_bytes(read_gguf(with_it.path)), tensor_bytes(read_gguf(without.path))
    assert {name for name in one if one[name] != other[name]} == set(importance.read(matrix))


def test_what_a_mixture_gives_more_bits_on_purpose_is_no_fallback(model: Path, tmp_path: Path) -> None:
    found = quantize(model, tmp_path / "q4.gguf", "q4_k_m", threads=1)
    types = types_of(read_gguf(tmp_path / "q4.gguf"))
    assert types["blk.0.ffn_down.weight"] == "Q6_K" and types["blk.0.ffn_up.weight"] == "Q4_K"
    assert found.fallbacks == ()


def test_rows_that_do_not_divide_into_blocks_are_reported(tmp_path: Path) -> None:
    """Rows of 320 and 800 don't divide into 256; the output of attention has rows of 256."""
    source = write_model(tmp_path / "f16.gguf", hidden=320, mlp=800, layers=1, tied=False)
    found = quantize(source, tmp_path / "q4.gguf", "q4_k_m", threads=1)
    fell = {fallback.tensor: (fallback.wanted, fallback.got) for fallback in found.fallbacks}
    assert fell == {
        "output.weight": ("Q6_K", "Q8_0"),
        "token_embd.weight": ("Q4_K", "Q5_0"),
        "blk.0.attn_q.weight": ("Q4_K", "Q5_0"),
        "blk.0.attn_k.weight": ("Q4_K", "Q5_0"),
        "blk.0.attn_v.weight": ("Q6_K", "Q8_0"),
        "blk.0.ffn_gate.weight": ("Q4_K", "Q5_0"),
        "blk.0.ffn_up.weight": ("Q4_K", "Q5_0"),
        "blk.0.ffn_down.weight": ("Q6_K", "Q8_0"),
    }
    types = types_of(read_gguf(found.path))
    assert types["blk.0.attn_output.weight"] == "Q4_K"
    assert {name: types[name] for name in fell} == {name: got for name, (_, got) in fell.items()}
    without_log = fallbacks(read_gguf(found.path), "q4_k_m")
    assert set(without_log) == set(found.fallbacks)


def test_types_of_small_blocks_do_not_mind_rows_of_320(tmp_path: Path) -> None:
    source = write_model(tmp_path / "f16.gguf", hidden=320, mlp=800, layers=1)
    assert quantize(source, tmp_path / "q8.gguf", "q8_0", threads=1).fallbacks == ()
    found = quantize(source, tmp_path / "q5.gguf", "q5_0", threads=1)
    assert found.fallbacks == (Fallback("token_embd.weight", "Q6_K", "Q8_0"),)


def test_rows_that_no_block_fits_stay_f16_and_are_reported(tmp_path: Path) -> None:
    source = write_model(tmp_path / "f16.gguf", hidden=96, mlp=200, layers=1, head_dim=24)
    found = quantize(source, tmp_path / "q8.gguf", "q8_0", threads=1)
    assert found.fallbacks == (Fallback("blk.0.ffn_down.weight", "Q8_0", "F16"),)
    found = quantize(source, tmp_path / "q2.gguf", "q2_k", threads=1)
    fell = {fallback.tensor: (fallback.wanted, fallback.got) for fallback in found.fallbacks}
    assert fell["blk.0.ffn_down.weight"] == ("Q3_K", "F16") and fell["blk.0.ffn_up.weight"] == ("Q2_K", "Q4_0")
    assert fell["blk.0.attn_v.weight"] == ("Q3_K", "Q4_0") and fell["token_embd.weight"] == ("Q6_K", "Q8_0")


def test_a_quantized_source_and_an_adapter_are_refused(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "q8.gguf", "q8_0", threads=1)
    with pytest.raises(UserError, match=r"quantized already \(Q8_0\)"):
        quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "q4_0", threads=1)
    with pytest.raises(UserError, match="the converter writes it"):
        quantize(model, tmp_path / "f32.gguf", "f32", threads=1)
    adapter = gguf.GGUFWriter(str(tmp_path / "adapter.gguf"), "qwen3")
    adapter.add_type("adapter")
    adapter.add_tensor("x.lora_a", np.zeros((2, 2), np.float32))
    adapter.write_header_to_file()
    adapter.write_kv_data_to_file()
    adapter.write_tensors_to_file()
    adapter.close()
    with pytest.raises(UserError, match="holds no model"):
        quantize(tmp_path / "adapter.gguf", tmp_path / "q4.gguf", "q4_0", threads=1)


def test_weights_that_are_not_numbers_and_unknown_architectures_are_named(model: Path, tmp_path: Path) -> None:
    spoilt = write_model(tmp_path / "nan.gguf", **SHAPE, spoil={"blk.0.ffn_up.weight": np.nan})
    with pytest.raises(UserError, match=r"not numbers in blk\.0\.ffn_up\.weight"):
        quantize(spoilt, tmp_path / "q8.gguf", "q8_0", threads=1)
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(model.read_bytes().replace(b"qwen3", b"qwxn3"))
    with pytest.raises(UserError, match="architecture 'qwxn3'"):
        quantize(foreign, tmp_path / "q8.gguf", "q8_0", threads=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.gguf", "nan.gguf"]


def test_a_matrix_of_another_model_is_refused_before_work_begins(matrix: Path, tmp_path: Path) -> None:
    wider = write_model(tmp_path / "wider.gguf", **{**SHAPE, "mlp": 512})
    with pytest.raises(UserError, match="256 channels there, 512 in"):
        quantize(wider, tmp_path / "q4.gguf", "q4_k_m", importance=matrix, threads=1)


def test_a_full_disk_is_one_line_and_leaves_what_was_there(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "q8.gguf"
    out.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="when a disk is full"):
            quantize(model, out, "q8_0", threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"q8.gguf": b"before"}


def test_an_interruption_ends_the_child_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "q8.gguf", "iq4_nl", threads=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_child_ends_when_the_process_that_started_it_is_gone(tmp_path: Path) -> None:
    """With nobody left at the other end of stdin it is over before the first weight is done."""
    big = write_model(tmp_path / "big.gguf", **{**SHAPE, "layers": 12, "mlp": 2048, "vocab": 2000})
    job = {"source": str(big), "out": str(tmp_path / "out.part"), "ftype": TYPES["iq3_s"].ftype, "threads": 1}
    command = [sys.executable, "-m", "patarm_lite.quantize.quantizer"]
    done = subprocess.run(command, input=json.dumps(job) + "\n", text=True, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert "quant size" not in done.stderr


def test_a_child_that_is_killed_is_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer, "_run_child", lambda job, progress: (-6, ["GGML_ASSERT(x) failed"]))
    with pytest.raises(UserError, match=r"was killed by signal 6\): GGML_ASSERT"):
        quantize(model, tmp_path / "q8.gguf", "q8_0", threads=1)


def test_a_file_of_the_current_folder_does_not_pass_for_a_module(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise SystemExit('run by mistake')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.fspath(Path(quantizer.__file__).parents[2]))
    assert quantize(model, Path("q8.gguf"), "q8_0", threads=1).path.is_file()


@pytest.mark.slow
def test_llama_cpp_refuses_without_a_matrix_just_the_types_that_say_so(model: Path, tmp_path: Path) -> None:
    for kind in TYPES.values():
        job = {"source": str(model), "out": str(tmp_path / kind.name), "ftype": kind.ftype, "threads": 1}
        code, said = quantizer._run_child(job, None)
        assert bool(code) == kind.needs_importance, (kind, said[-3:])
        if not code:
            types = set(types_of(read_gguf(tmp_path / kind.name)).values()) - {"F32"}
            assert types <= {kind.base, *kind.others}, kind


@pytest.mark.slow
@pytest.mark.parametrize("rows", [256, 320])
def test_llama_cpps_own_tool_writes_the_same_bytes(tmp_path: Path, rows: int) -> None:
    """With rows of 320 it falls back, too; the head goes to Q8_0 without a word where blocks are of 256."""
    program = tool("quantize")
    source = write_model(tmp_path / "f16.gguf", **{**SHAPE, "hidden": rows}, tied=rows == 256)
    ids = np.random.default_rng(1).integers(0, 256, 700).tolist()
    matrix = importance.compute(source, [ids], tmp_path / "importance.gguf", threads=1).path
    for kind in TYPES.values():
        if rows == 320 and kind.needs_importance and kind.name not in ("iq2_xs", "iq3_xs"):
            continue  # the same few fallbacks, and each takes seconds
        ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
        found = quantize(source, ours, kind.name, importance=matrix, threads=1)
        arguments = ["--imatrix", str(matrix), str(source), str(theirs), kind.name, "1"]
        done = subprocess.run([str(program), *arguments], check=True, capture_output=True, text=True)
        one, other = read_gguf(ours), read_gguf(theirs)
        assert types_of(one) == types_of(other) and tensor_bytes(one) == tensor_bytes(other), kind
        silent = int(rows == 320 and kind.block == 256)
        assert (done.stderr + done.stdout).count("falling back") == len(found.fallbacks) - silent, kind
        different = {key for key in other.metadata if one.metadata.get(key) != other.metadata[key]}
        assert different == {"quantize.imatrix.file"}, kind
