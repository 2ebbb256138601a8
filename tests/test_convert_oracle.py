"""Our converter beside llama.cpp's own, from the source distribution of llama-cpp-python (see llama_cpp_source.py)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen_vocabulary
from llama_cpp_source import source
from random_qwen import logits, write_json, write_model
from test_convert import IDS, computed, difference, write_adapter

from patarm_lite.gguf_file import GgufFile, GgufTensor, read_gguf
from patarm_lite.quantize.convert import convert, convert_adapter

pytestmark = pytest.mark.slow

ALLOWED = {
    "general.name": "theirs is a folder's or hub id's name with capitals; ours is what we are told, else the folder's",
    "general.basename": "a guess from the folder's name",
    "general.finetune": "a guess from the folder's name",
    "general.version": "a guess from the folder's name",
    "general.organization": "a guess from the folder's name",
    "tokenizer.ggml.add_bos_token": "theirs is left out where no tokenizer file says so; ours is always there",
    "tokenizer.ggml.add_eos_token": "theirs is left out where no tokenizer file says so; ours is always there",
}
"""Metadata that may differ, and why."""

OFFICIAL = """
import runpy, sys
root, script, known, *rest = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
from conversion.base import TextModel
def no_sentencepiece(self):  # asked for first, and the library for it need not be installed
    raise FileNotFoundError
TextModel._create_vocab_sentencepiece = no_sentencepiece
if not int(known):
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = [script, *rest]
runpy.run_path(root + "/" + script, run_name="__main__")
"""
"""llama.cpp recognises a tokenizer by a hash of token ids, so it can't know one that is not published: `known` 0."""


def official(script: str, *arguments: str, known: bool = False) -> None:
    """Run a converter of llama.cpp in a process of its own."""
    pytest.importorskip("transformers")
    command = [sys.executable, "-c", OFFICIAL, str(source()), script, str(int(known)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_file(ours: GgufFile, theirs: GgufFile) -> None:
    def described(file: GgufFile) -> dict[str, tuple[Any, ...]]:
        return {tensor.name: (tensor.shape, tensor.type, tensor.bytes) for tensor in file.tensors}

    def compared(file: GgufFile) -> dict[str, tuple[str, Any]]:
        return {key: (file.kinds[key], value) for key, value in file.metadata.items() if key not in ALLOWED}

    assert described(ours) == described(theirs)
    for tensor in ours.tensors:
        assert same_bytes(ours.path, tensor, theirs.path, theirs.tensor(tensor.name)), tensor.name
    mine, other = compared(ours), compared(theirs)
    assert sorted(mine) == sorted(other)
    assert [key for key in mine if mine[key] != other[key]] == []
    for key in ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"):
        assert not ours.metadata.get(key) and not theirs.metadata.get(key)


def same_bytes(ours: Path, first: GgufTensor, theirs: Path, second: GgufTensor) -> bool:
    with ours.open("rb") as one, theirs.open("rb") as other:
        one.seek(first.offset)
        other.seek(second.offset)
        for start in range(0, first.bytes, 1 << 24):
            size = min(1 << 24, first.bytes - start)
            if one.read(size) != other.read(size):
                return False
    return True


@pytest.mark.parametrize(
    ("tied", "stored", "dtype"), [(True, "F32", "f16"), (False, "BF16", "f16"), (False, "F32", "bf16")]
)
def test_our_file_is_llama_cpps_file(tmp_path: Path, tied: bool, stored: str, dtype: str) -> None:
    folder = write_model(tmp_path / "model", tied=tied, dtype=stored, shard_bytes=60_000)
    write_json(folder / "generation_config.json", {"temperature": 0.6, "top_k": 20, "top_p": 0.95})
    official("convert_hf_to_gguf.py", str(folder), "--outfile", str(tmp_path / "theirs.gguf"), "--outtype", dtype)
    convert(folder, tmp_path / "ours.gguf", dtype=dtype)
    assert_same_file(read_gguf(tmp_path / "ours.gguf"), read_gguf(tmp_path / "theirs.gguf"))


def test_a_tiny_judge_becomes_llama_cpps_file(tmp_path: Path) -> None:
    from patarm_lite import arena

    tokenizer = arena.tiny_tokenizer(vocab=500)
    model = arena.build_judge(tokenizer, hidden=32, layers=2, heads=2, mlp=64, seed=1)
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    convert(tmp_path / "judge", tmp_path / "ours.gguf")
    official("convert_hf_to_gguf.py", str(tmp_path / "judge"), "--outfile", str(tmp_path / "theirs.gguf"))
    assert_same_file(read_gguf(tmp_path / "ours.gguf"), read_gguf(tmp_path / "theirs.gguf"))


@pytest.mark.skipif(bool(qwen_vocabulary.MISSING), reason=qwen_vocabulary.MISSING)
def test_a_model_of_qwen3_06b_s_shape_with_its_vocabulary_is_llama_cpps_file(tmp_path: Path) -> None:
    """596 million random parameters: writes 4 GB. llama.cpp recognises this vocabulary by itself."""
    folder = tmp_path / "model"
    shape = {
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rope_theta": 1000000,
        "vocab_size": 151936,
    }
    write_model(folder, dtype="BF16", changes=shape, with_tokenizer=False)
    qwen_vocabulary.qwen3_tokenizer().save_pretrained(folder)
    made = convert(folder, tmp_path / "ours.gguf")
    # the count on Qwen3-0.6B's model card
    assert made.parameters == 596_049_920
    theirs = tmp_path / "theirs.gguf"
    official("convert_hf_to_gguf.py", str(folder), "--outfile", str(theirs), "--outtype", "f16", known=True)
    assert_same_file(read_gguf(tmp_path / "ours.gguf"), read_gguf(theirs))
    shutil.rmtree(tmp_path)  # pytest would keep its gigabytes


def test_our_adapter_is_llama_cpps_adapter(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    base = json.loads((folder / "config.json").read_text())
    modules = {f"model.layers.{layer}.{part}": 4 for layer in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")}
    adapter = write_adapter(tmp_path / "adapter", modules, {}, base)
    convert_adapter(adapter, folder, tmp_path / "ours.gguf")
    outfile = ["--outfile", str(tmp_path / "theirs.gguf")]
    official("convert_lora_to_gguf.py", str(adapter), "--base", str(folder), *outfile)
    assert_same_file(read_gguf(tmp_path / "ours.gguf"), read_gguf(tmp_path / "theirs.gguf"))


def test_yarn_turns_positions_as_transformers_does(tmp_path: Path) -> None:
    """llama.cpp, transformers, and (without scaling) our own arithmetic in numpy."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    ids = [(7 * place) % 256 for place in range(100)]
    found = {}
    for name, changes in {"plain": {}, "yarn": {"rope_scaling": scaling, "max_position_embeddings": 128}}.items():
        folder = write_model(tmp_path / name, changes=changes)
        convert(folder, tmp_path / f"{name}.gguf", dtype="f32")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0].numpy().astype(np.float64)
        assert difference(computed(tmp_path / f"{name}.gguf", ids), wanted) < 1e-3
        found[name] = wanted
    assert difference(found["yarn"], found["plain"]) > 0.1
    assert difference(logits(tmp_path / "plain", IDS), computed(tmp_path / "plain.gguf", IDS)) < 1e-4
