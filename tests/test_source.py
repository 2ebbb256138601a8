"""What can be exported, what is known of it, and the one clear line for everything that can't be. No torch."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_folders import (
    base_shapes,
    change,
    write,
    write_adapter,
    write_base,
    write_protocol,
    write_run,
    write_tokenizer,
)

from patarm_lite.errors import UserError
from patarm_lite.prompts import Protocol
from patarm_lite.quantize.source import Source, base_record, open_source, weights_sha256
from patarm_lite.quantize.tensors import Entry, TensorFolder, write_tensors

SHAPES = base_shapes(2, 32, 64, 40, True)


def refusal(judge: Path | str, **options: Any) -> str:
    """The one line that says why a judge can't be exported."""
    with pytest.raises(UserError) as caught:
        open_source(str(judge), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def adapter_run(tmp_path: Path, record: dict[str, Any] | None = None, tuning: str = "lora") -> Path:
    """A run that trained an adapter on `tmp_path / "base"`."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, SHAPES)
    if record is None:
        record = base_record(str(base), "main", None, None, "bfloat16")
    model = {"base": str(base), "tuning": tuning}
    return write_run(tmp_path / "run", adapter, about={"base": record}, model=model, data={"pairs": ["mine.jsonl"]})


def test_a_run_folder_says_what_the_judge_is_and_nothing_of_this_machine(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", write_base(tmp_path / "new"))
    found = open_source(str(run))
    assert (found.folder, found.run, found.tokenizer) == (run / "judge", run, run / "judge")
    assert (found.adapter, found.base, found.quantized_base, found.weights) == (False, None, False, run / "judge")
    assert (found.protocol, found.rubric, found.trained) == (Protocol(instructions=False), "arena", True)
    assert found.shape.layers == 2 and found.shape.tied
    about = found.about
    assert (about["name"], about["seed"], about["method"], about["stage"]) == ("little", 1, "par", "judge")
    assert about["data"] == {"train": 13, "heldout": 10, "sha256_train": "aa", "sha256_heldout": "bb"}
    assert about["recipe_sha256"] == hashlib.sha256((run / "recipe.yaml").read_bytes()).hexdigest()
    assert about["sources"] == ["arena"] and about["versions"]["torch"] == "2.13.0"
    assert str(tmp_path) not in json.dumps(about) and "/home/" not in json.dumps(about)


def test_the_judge_folder_of_a_run_is_known_as_that_runs_judge(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", write_base(tmp_path / "new"))
    change(run / "run.json", status="running")  # the judge itself is whole: it appears by rename
    inside = open_source(str(run / "judge"))
    assert inside.run == run and inside.about["name"] == "little"


def test_a_foreign_folder_is_untrained_and_gets_the_standard_protocol(tmp_path: Path) -> None:
    found = open_source(str(write_base(tmp_path / "Some-Qwen3", tied=False, dtype="BF16")))
    assert (found.trained, found.protocol, found.rubric) == (False, Protocol(), "standard")
    assert found.run is None and found.about == {"name": "Some-Qwen3"} and not found.shape.tied


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    run = adapter_run(tmp_path)
    code = f"import sys; from patarm_lite.quantize.source import open_source as o; o({str(run)!r}); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" not in said and "transformers" not in said and "numpy" in said


@pytest.mark.parametrize("status", ["running", "interrupted", "stopped"])
def test_an_unfinished_run_is_told_how_to_be_finished(tmp_path: Path, status: str) -> None:
    run = write_run(tmp_path / "run", write_base(tmp_path / "new"), about={"status": status})
    assert f"finish it with: patarm-lite train --resume {run}" in refusal(run)


def test_a_run_without_a_judge_yet_is_unfinished(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", write_base(tmp_path / "new"))
    shutil.rmtree(run / "judge")
    assert "is not finished" in refusal(run)


def break_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def break_empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def break_gguf_folder(folder: Path) -> None:
    break_empty(folder)
    (folder / "judge-q8_0.gguf").write_bytes(b"GGUF\3\0\0\0")


def break_scalar(folder: Path) -> None:
    write(folder / "scalar.json", {"kind": "scalar"})


def break_classifier(folder: Path) -> None:
    change(folder / "config.json", architectures=["Qwen3ForSequenceClassification"])


def break_architecture(folder: Path) -> None:
    change(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_gptq(folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def break_eight_bits(folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def break_old_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "vocab.json")


def break_large_tokenizer(folder: Path) -> None:
    write_tokenizer(folder, 41)


def break_empty_tokenizer(folder: Path) -> None:
    write(folder / "tokenizer.json", {"model": {"vocab": {}}})


def break_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_tie(folder: Path) -> None:
    shutil.rmtree(folder)
    write_base(folder, tied=False)
    change(folder / "config.json", tie_word_embeddings=True)


def break_protocol(folder: Path) -> None:
    write(folder / "protocol.json", {"protocol": "patarm-lite/1"})


def break_unknown_protocol(folder: Path) -> None:
    write_protocol(folder)
    change(folder / "protocol.json", protocol="patarm-lite/9")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (break_nothing_there, "is neither a folder here nor a hub id"),
        (break_empty, "is no folder of a model"),
        (break_gguf_folder, "is a GGUF file already"),
        (break_scalar, "scalar head (method scalar)"),
        (break_classifier, "Qwen3ForSequenceClassification"),
        (break_architecture, "model_type 'llama'"),
        (break_config, "config.json"),
        (break_gptq, "gptq"),
        (break_eight_bits, "are quantized already (bitsandbytes, 8 bits)"),
        (break_tokenizer, "holds no tokenizer (no tokenizer.json)"),
        (break_old_tokenizer, "has vocab.json but no tokenizer.json"),
        (break_large_tokenizer, "has the id 40, and the model has 40 rows"),
        (break_empty_tokenizer, "holds no vocabulary"),
        (break_pickled, "pytorch_model.bin, a pickled file"),
        (break_cut, "it may be cut"),
        (break_tie, "has an lm_head.weight that differs from model.embed_tokens.weight"),
        (break_protocol, "lacks protocol, instructions, thinking or rubric"),
        (break_unknown_protocol, "protocol 'patarm-lite/9' is not known here"),
    ],
)
def test_a_folder_that_is_no_judge_is_one_clear_line(
    tmp_path: Path, broken: Callable[[Path], None], words: str
) -> None:
    folder = write_base(tmp_path / "judge")
    broken(folder)
    assert words in refusal(folder)


def test_a_file_is_told_apart_from_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "judge").write_bytes(b"GGUF\3\0\0\0")
    assert "is a GGUF file already" in refusal(tmp_path / "judge")
    (tmp_path / "notes.txt").write_text("a judge")
    assert "is a file; give a run folder" in refusal(tmp_path / "notes.txt")


def test_a_hub_id_offline_works_from_the_cache_and_is_refused_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "you are offline and it is not in the cache" in refusal("somebody/some-judge", offline=True)
    commit = "c" * 40
    cache = tmp_path / "models--somebody--some-judge"
    write_base(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    found = open_source("somebody/some-judge", offline=True)
    assert found.folder == cache / "snapshots" / commit
    assert found.about == {"name": "somebody/some-judge", "revision": "main", "commit": commit}
    (found.folder / "config.json").unlink()
    assert "has no config.json (GGUF files alone?)" in refusal("somebody/some-judge", offline=True)


def test_an_adapters_run_knows_its_base_by_its_weights(tmp_path: Path) -> None:
    found = open_source(str(adapter_run(tmp_path)))
    assert found.adapter and found.base == found.weights == tmp_path / "base"
    assert found.tokenizer == tmp_path / "base", "the adapter's folder has none of its own"
    assert (found.quantized_base, found.dtype) == (False, "bfloat16")
    assert found.about["base"]["verified"] == "weights" and found.about["base"]["name"] == "base"
    assert found.about["sources"] == ["mine.jsonl"] and found.about["tuning"] == "lora"
    assert str(tmp_path) not in json.dumps(found.about)


def test_a_run_by_qlora_says_that_its_base_was_in_four_bits(tmp_path: Path) -> None:
    assert open_source(str(adapter_run(tmp_path, tuning="qlora"))).quantized_base


def test_a_base_that_moved_is_found_with_base_even_in_other_shards(tmp_path: Path) -> None:
    run = adapter_run(tmp_path)
    shutil.rmtree(tmp_path / "base")
    assert "is not here; say where it is now: --base FOLDER" in refusal(run)
    moved = write_base(tmp_path / "moved", shard_bytes=5000)
    assert len(list(moved.glob("model-*.safetensors"))) > 2
    assert open_source(str(run), base=str(moved)).about["base"]["verified"] == "weights"


def test_a_base_of_the_same_shapes_but_other_weights_is_refused(tmp_path: Path) -> None:
    run = adapter_run(tmp_path)
    other = write_base(tmp_path / "other", seed=7)
    assert "is not the one that" in refusal(run, base=str(other))
    foreign = write_adapter(tmp_path / "foreign", other, SHAPES)
    assert open_source(str(foreign)).about["base"]["verified"] == "shapes", "nothing recorded: shapes are all there is"


def test_the_base_of_a_cold_start_taken_over_is_looked_up_there(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    record = base_record(str(base), "main", None, None, "float32")
    adapter = write_adapter(tmp_path / "a", base, SHAPES)
    first = write_run(tmp_path / "first", adapter, about={"base": record}, model={"base": str(base), "tuning": "lora"})
    again = write_adapter(tmp_path / "b", base, SHAPES)
    model = {"base": str(base), "tuning": "lora"}
    second = write_run(tmp_path / "second", again, model=model, sft={"init": str(first)})
    assert open_source(str(second)).about["base"]["verified"] == "weights"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"hidden": 48}, "mlp.down_proj.weight is [48, 64] there and [32, 64] in the adapter (rank 4)"),
        ({"mlp": 96}, "mlp.down_proj.weight is [32, 96] there and [32, 64] in the adapter"),
        ({"layers": 1}, "it has no model.layers.1.mlp.down_proj.weight, which the adapter changes"),
        ({"layers": 3}, "which the adapter would change and holds nothing for (a deeper model?)"),
    ],
)
def test_a_base_of_another_shape_is_refused_by_tensor(tmp_path: Path, sizes: dict[str, int], words: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", "nobody/knows", SHAPES)
    base = write_base(tmp_path / "base", **sizes)
    said = refusal(adapter, base=str(base))
    assert f"base {base} doesn't fit the adapter" in said and words in said


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "only LORA can be merged here"),
        ({"task_type": "SEQ_CLS"}, "it writes no judgements"),
        ({"use_dora": True}, "is a DoRA"),
        ({"use_something_new": True}, "use_something_new=True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base itself"),
        ({"r": 8}, "says rank 8; adapter_config.json and adapter_model.safetensors don't belong together"),
        ({"rank_pattern": {"q_proj": 2}}, "says rank 2"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "the base /nowhere/at/all of the adapter"),
        ({"lora_alpha": None}, "lacks r or lora_alpha"),
    ],
)
def test_an_adapter_that_a_plain_merge_would_spoil_is_refused(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"), SHAPES)
    change(adapter / "adapter_config.json", **config)
    assert words in refusal(adapter)


def test_an_adapter_with_tensors_that_no_plain_lora_has_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    for number, (name, words) in enumerate(
        (
            (f"{module}.lora_magnitude_vector", "which is no plain LoRA"),
            (f"{module}.lora_B.bias", "which is no plain LoRA"),
            ("q_proj.lora_A.weight", "is not PEFT's"),
            ("base_model.model.score.weight", "score.weight is absent there"),
        )
    ):
        adapter = write_adapter(tmp_path / str(number), base, SHAPES, extra={name: (4, 32)})
        assert words in refusal(adapter)


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    adapter = write_adapter(tmp_path / "adapter", base, {}, extra={name: (4, 32)})
    assert "has no lora_B for model.layers.0.self_attn.q_proj" in refusal(adapter)


def test_a_base_that_is_an_adapter_a_file_or_no_model_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, SHAPES)
    assert "is an adapter itself" in refusal(adapter, base=str(adapter))
    assert "is a file" in refusal(adapter, base=str(base / "config.json"))
    assert "is no folder of a model" in refusal(adapter, base=str(tmp_path))
    assert "it has no base; leave out --base" in refusal(base, base=str(base))


def test_the_hash_of_weights_sees_every_tensor_and_no_file_layout(tmp_path: Path) -> None:
    one = weights_sha256(write_base(tmp_path / "one"))
    assert weights_sha256(write_base(tmp_path / "shards", shard_bytes=3000)) == one
    assert weights_sha256(write_base(tmp_path / "seed", seed=5)) != one
    assert weights_sha256(write_base(tmp_path / "half", dtype="F16")) != one
    name = "model.layers.1.mlp.down_proj.weight"
    weights = TensorFolder(tmp_path / "one").f32(name).copy()
    weights[3, 5] = np.nextafter(weights[3, 5], np.float32(9))
    tuned = write_base(tmp_path / "tuned", values={name: weights})
    assert weights_sha256(tuned) != one, "the last bit of one weight"


def test_an_adapter_on_four_bit_weights_fits_them_and_their_original(tmp_path: Path) -> None:
    """Packed weights are columns of bytes: their shape before packing stands in the quant state beside them."""
    base = write_base(tmp_path / "base", dtype="F16")
    packed = tmp_path / "packed"
    shutil.copytree(base, packed)
    entries = []
    for name, shape in SHAPES.items():
        if "_proj" in name:
            state = json.dumps({"quant_type": "nf4", "shape": shape}).encode()
            codes = shape[0] * shape[1] // 2
            entries.append(Entry(name, "U8", (codes, 1), lambda codes=codes: bytes(codes)))
            entries.append(Entry(f"{name}.absmax", "U8", (codes // 32,), lambda codes=codes: bytes(codes // 32)))
            beside = f"{name}.quant_state.bitsandbytes__nf4"
            entries.append(Entry(beside, "U8", (len(state),), lambda state=state: state))
        else:
            entries.append(Entry(name, "F16", shape, lambda shape=shape: np.ones(shape, np.float16)))
    write_tensors(packed / "model.safetensors", entries)
    change(packed / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    adapter = write_adapter(tmp_path / "adapter", packed, SHAPES)
    record = base_record(str(packed), "main", None, None, "float16")
    assert record["four_bits"]
    run = write_run(tmp_path / "run", adapter, about={"base": record}, model={"base": str(packed), "tuning": "qlora"})
    found: Source = open_source(str(run))
    assert found.quantized_base and found.base == packed and found.about["base"]["verified"] == "weights"
    original = open_source(str(run), base=str(base))
    assert original.base == base and original.about["base"]["verified"] == "shapes"
