"""Merging tensor by tensor, against PEFT's merge of the whole model and the 4-bit model's own answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import little_recipe
from judge_folders import base_shapes, change, write_adapter, write_base, write_run

from patarm_lite.errors import UserError
from patarm_lite.quantize.four_bits import read_packed
from patarm_lite.quantize.merge import cast, merge
from patarm_lite.quantize.source import open_source
from patarm_lite.quantize.tensors import Entry, TensorFolder, write_tensors

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

SHAPES = base_shapes(2, 32, 64, 40, True)
IDS = torch.arange(40)[None]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def answers(model: Any) -> Any:
    """Logits of one fixed row of ids."""
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def peft_adapter(base: Path, folder: Path, seed: int = 3, **config: Any) -> Any:
    """An adapter that PEFT made on a base, with random weights in every part of it; the model in memory."""
    targets = config.pop("target_modules", ["q_proj", "v_proj", "gate_proj", "down_proj"])
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(load(base), peft.LoraConfig(**settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) / 4)
    model.save_pretrained(folder)
    return model


def all_equal(merged: Path, expected: dict[str, Any], tolerance: float) -> None:
    found = TensorFolder(merged)
    for name in found.names():
        np.testing.assert_allclose(
            found.f32(name), expected[name].float().numpy(), rtol=0, atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["input_layernorm"], "target_modules": r".*layers\.0\..*(up|down)_proj"},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"layers_to_transform": [1], "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_in_float32_a_merge_is_pefts(tmp_path: Path, config: dict[str, Any]) -> None:
    base = write_base(tmp_path / "base", tied=False)
    model = peft_adapter(base, tmp_path / "adapter", **config)
    before = answers(model)
    merged = merge(open_source(str(tmp_path / "adapter")), tmp_path / "merged", dtype="float32")
    expected = model.merge_and_unload().state_dict()
    assert merged.tensors == len(expected) and merged.dtype == "float32"
    all_equal(tmp_path / "merged", expected, 1e-6)
    assert (answers(load(tmp_path / "merged")) - before).abs().max() < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_a_tied_base_whose_head_or_embedding_was_trained_is_untied(tmp_path: Path, config: dict[str, Any]) -> None:
    model = peft_adapter(write_base(tmp_path / "base", tied=True), tmp_path / "adapter", **config)
    merge(open_source(str(tmp_path / "adapter")), tmp_path / "merged", dtype="float32")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert (answers(load(tmp_path / "merged")) - answers(model)).abs().max() < 1e-4


def test_a_tied_base_stays_tied_and_a_head_it_carries_along_is_left_out(tmp_path: Path) -> None:
    embedding = np.random.default_rng(0).standard_normal((40, 32)) / 4
    both = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    base = write_base(tmp_path / "base", tied=False, values=both)
    change(base / "config.json", tie_word_embeddings=True)
    model = peft_adapter(base, tmp_path / "adapter")
    merge(open_source(str(tmp_path / "adapter")), tmp_path / "merged", dtype="float32")
    assert "lm_head.weight" not in TensorFolder(tmp_path / "merged").names()
    assert (answers(load(tmp_path / "merged")) - answers(model)).abs().max() < 1e-4


def test_a_merged_folder_has_everything_a_judge_needs_in_16_bits(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", _name_or_path="/home/somebody/base", quantization_config=None)
    adapter = write_adapter(tmp_path / "adapter", base, SHAPES)
    (adapter / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes() + b"\n")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    run = write_run(tmp_path / "run", adapter, model={"base": str(base), "tuning": "lora"})
    seen: list[tuple[int, int]] = []
    found = merge(open_source(str(run)), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert (found.folder, found.onto, found.dtype) == (tmp_path / "out", "original", "float16")
    assert (found.tensors, found.largest_bytes) == (len(SHAPES), 4 * 64 * 32)
    assert {info.dtype for info in TensorFolder(found.folder).names().values()} == {"F16"}
    for name in ("tokenizer.json", "chat_template.jinja", "protocol.json"):
        assert (found.folder / name).read_bytes() == (run / "judge" / name).read_bytes(), name
    config = json.loads((found.folder / "config.json").read_text())
    assert config["dtype"] == "float16" and not {"quantization_config", "_name_or_path"} & set(config)
    generation = json.loads((found.folder / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 1}, "the base's temperature is not the judge's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "run"]
    assert seen == [(number, len(SHAPES)) for number in range(1, len(SHAPES) + 1)]
    assert open_source(str(found.folder)).rubric == "arena"


def test_what_an_adapter_leaves_alone_stays_byte_for_byte(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype="BF16", shard_bytes=6000)
    adapter = write_adapter(tmp_path / "adapter", base, SHAPES, targets=["q_proj"])
    found = merge(open_source(str(adapter)), tmp_path / "out")
    assert found.dtype == "bfloat16"
    old, new = TensorFolder(base), TensorFolder(found.folder)
    for name in SHAPES:
        assert (bytes(old.raw(name)) == bytes(new.raw(name))) == ("q_proj" not in name), name


def test_a_bfloat16_merge_is_rounded_once_from_the_sum_in_float32(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype="BF16")
    adapter = write_adapter(tmp_path / "adapter", base, SHAPES, rank=1)
    out = merge(open_source(str(adapter)), tmp_path / "out").folder
    name, prefix = "model.layers.0.mlp.up_proj.weight", "base_model.model.model.layers.0.mlp.up_proj.lora_"
    factors = TensorFolder(adapter, "adapter_model")
    a, b = factors.f32(f"{prefix}A.weight"), factors.f32(f"{prefix}B.weight")
    exact = TensorFolder(base).f32(name).astype(np.float64) + 8.0 * b.astype(np.float64) @ a  # alpha 8, rank 1
    # bfloat16 keeps 8 bits: at most half of the last one is lost
    assert (np.abs(TensorFolder(out).f32(name) - exact) <= np.abs(exact) * 2.0**-8 * 1.0001).all()


def test_the_finest_16_bits_keep_more_of_a_small_change_than_the_bases_bfloat16(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype="BF16")
    adapter = write_adapter(tmp_path / "adapter", base, SHAPES, rank=1, lora_alpha=0.002)
    name, prefix = "model.layers.0.mlp.up_proj.weight", "base_model.model.model.layers.0.mlp.up_proj.lora_"
    factors = TensorFolder(adapter, "adapter_model")
    change = 0.002 * factors.f32(f"{prefix}B.weight") @ factors.f32(f"{prefix}A.weight")
    lost = {}
    for dtype in ("base", "finest"):
        out = merge(open_source(str(adapter)), tmp_path / f"{dtype}-out", dtype=dtype).folder
        error = TensorFolder(out).f32(name) - TensorFolder(base).f32(name) - change
        lost[dtype] = float(np.linalg.norm(error) / np.linalg.norm(change))
    # three bits more: an eighth of the rounding error
    assert lost["base"] / lost["finest"] == pytest.approx(8, rel=0.3)
    assert json.loads((tmp_path / "finest-out" / "config.json").read_text())["dtype"] == "float16"


def test_a_value_too_large_for_float16_makes_the_folder_bfloat16(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights = np.ones((64, 32), np.float32)
    weights[5, 7] = 70000.0
    source = open_source(str(write_base(tmp_path / "base", values={name: weights})))
    found = cast(source, tmp_path / "out")
    assert found.dtype == "bfloat16"
    assert TensorFolder(found.folder).f32(name)[5, 7] == 70144.0  # 70000 to 8 bits: 137 * 512
    with pytest.raises(UserError, match=rf"tensor '{name}' holds 7e\+04, and float16 ends at 65504; use --type bf16"):
        cast(source, tmp_path / "no", dtype="float16")
    assert not list(tmp_path.glob("no*"))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(tmp_path: Path, dtype: str, bad: float) -> None:
    weights = np.ones((32, 64), np.float32)
    weights[31, 63] = bad
    name = "model.layers.1.mlp.down_proj.weight"
    base = write_base(tmp_path / "base", dtype=dtype, values={name: weights})
    adapter = write_adapter(tmp_path / "adapter", base, SHAPES, targets=["q_proj"])
    for write in (
        lambda: cast(open_source(str(base)), tmp_path / "out"),
        lambda: merge(open_source(str(adapter)), tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=f"tensor '{name}' holds a value that is not finite"):
            write()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_output_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    source = open_source(str(write_base(tmp_path / "base")))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UserError, match="is there already"):
        cast(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_full_disk_is_one_clear_line_and_nothing_is_left(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    source = open_source(str(write_base(tmp_path / "base")))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"writing .*out failed: File too large; make room"):
            cast(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def four_bit(base: Path, compute: Any) -> Any:
    """A base as training by QLoRA loads it."""
    from patarm_lite.training.engine import TransformersEngine

    name = str(compute).removeprefix("torch.")
    section = little_recipe(model={"base": str(base), "tuning": "qlora", "dtype": name}).model
    return TransformersEngine().load(str(base), section)[0].eval()


def plain_weights(model: Any) -> dict[str, Any]:
    """Every weight of a 4-bit model, dequantized by bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit

    return {
        name: dequantize_4bit(weight.data, weight.quant_state) if hasattr(weight, "quant_state") else weight.detach()
        for name, weight in model.named_parameters()
    }


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_the_dequantized_base_is_the_one_that_training_held(
    tmp_path: Path, compute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("patarm_lite.quantize.four_bits.PIECE", 512)  # several pieces even of these little weights
    base = write_base(tmp_path / "base", hidden=128, mlp=192)
    adapter = write_adapter(tmp_path / "adapter", base, base_shapes(2, 128, 192, 40, True), lora_alpha=0)
    model = {"base": str(base), "tuning": "qlora", "dtype": str(compute).removeprefix("torch.")}
    run = write_run(tmp_path / "run", adapter, model=model)
    merge(open_source(str(run)), tmp_path / "out", onto="dequantized", dtype="float32")
    held = plain_weights(four_bit(base, compute))
    found = TensorFolder(tmp_path / "out")
    assert set(found.names()) == set(held)
    for name, weight in held.items():
        assert np.array_equal(found.f32(name), weight.float().numpy()), name
        changed = not np.array_equal(found.f32(name), TensorFolder(base).f32(name))
        assert changed == ("_proj" in name or compute == torch.bfloat16), name


def test_blocks_of_a_scale_run_over_rows_of_any_length() -> None:
    """On a CPU bitsandbytes itself is wrong for rows that are no multiple of 64, so the right answer is worked out."""
    from patarm_lite.quantize.four_bits import round_nf4

    pytest.importorskip("bitsandbytes")
    weight = torch.zeros(5, 80)
    weight.view(-1)[::64] = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0, 6.0, -7.0])  # one value in each block
    before = weight.clone()
    rounded = round_nf4(weight, torch.float32)
    assert rounded is weight and torch.equal(rounded == 0, before == 0)
    # NF4 holds a block's largest value exactly but for its scale, which keeps 8 bits of the spread of scales (6)
    assert (rounded - before).abs().max() < 6 / 128


def test_a_packed_folder_is_unpacked_as_bitsandbytes_reads_it_and_has_no_original(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = write_base(tmp_path / "base", hidden=128, mlp=192)
    held = four_bit(base, torch.bfloat16)
    held.save_pretrained(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "packed" / name).write_bytes((base / name).read_bytes())
    whole = open_source(str(tmp_path / "packed"))
    assert whole.quantized_base and not whole.adapter
    assert cast(whole, tmp_path / "whole").dtype == "bfloat16"
    all_equal(tmp_path / "whole", plain_weights(held), 0)
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "packed", base_shapes(2, 128, 192, 40, True), lora_alpha=0)
    merge(open_source(str(adapter)), tmp_path / "merged", onto="dequantized")
    all_equal(tmp_path / "merged", plain_weights(held), 0)
    with pytest.raises(UserError, match="holds 4-bit weights, and there is no 16-bit original to merge into"):
        merge(open_source(str(adapter)), tmp_path / "original")


def test_damaged_four_bit_weights_are_named(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    four_bit(write_base(tmp_path / "base", layers=1, hidden=128, mlp=192), torch.bfloat16).save_pretrained(
        tmp_path / "p"
    )
    name = "model.layers.0.mlp.up_proj.weight"
    found = TensorFolder(tmp_path / "p")
    for part in ("absmax", "quant_map", "nested_absmax", "quant_state.bitsandbytes__nf4"):
        kept = [
            Entry(other, info.dtype, info.shape, lambda other=other: found.raw(other))
            for other, info in found.names().items()
            if other != f"{name}.{part}"
        ]
        folder = tmp_path / part
        folder.mkdir()
        write_tensors(folder / "model.safetensors", kept)
        cut = TensorFolder(folder)
        with pytest.raises(UserError, match=r"the 4-bit weight 'model.layers.0.mlp.up_proj.weight' is damaged"):
            read_packed(cut, name, [other for other in cut.names() if other.startswith(f"{name}.")])


def test_a_real_qlora_run_is_verified_and_merges_to_what_training_held(
    little_run: Path, little_qlora_run: Path, tmp_path: Path
) -> None:
    """The whole way: trained in 4 bits, base found by its recorded weights, merged both ways, against the trained
    judge's own logits."""
    from patarm_lite.training.engine import TransformersEngine, settle

    source = open_source(str(little_qlora_run))
    assert source.adapter and source.quantized_base and source.trained and source.dtype == "float32"
    assert source.about["base"]["verified"] == "weights"
    section = little_recipe(model={"base": str(little_run / "judge"), "tuning": "qlora"}).model
    trained, _ = TransformersEngine().load(str(little_qlora_run / "judge"), section)
    settle(trained)
    expected, ids = {}, torch.arange(20, 60)[None]
    with torch.no_grad():
        expected["dequantized"] = trained.eval()(input_ids=ids).logits
        for onto in ("dequantized", "original"):
            merge(source, tmp_path / onto, onto=onto, dtype="float32")
            found = load(tmp_path / onto)(input_ids=ids).logits
            difference = float((found - expected["dequantized"]).abs().max() / expected["dequantized"].std())
            assert (difference < 1e-3) == (onto == "dequantized"), (onto, difference)


MEASURE = """
import sys
import numpy, torch, bitsandbytes.functional
from pathlib import Path
from patarm_lite.quantize.merge import merge
from patarm_lite.quantize.source import open_source
def memory(key):  # not getrusage: its peak is inherited from the process that started this one
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(key + ":")[2].split()[0])
torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
before = memory("VmRSS")
found = merge(open_source(sys.argv[1]), Path(sys.argv[2]), onto=sys.argv[3])
print(memory("VmHWM") - before, found.largest_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "onto"), [("BF16", "original"), ("F32", "dequantized")])
def test_memory_at_its_peak_is_three_times_the_largest_tensor_and_not_the_model(
    tmp_path: Path, dtype: str, onto: str
) -> None:
    """The model is nine times its largest tensor, the embedding of 32 MiB in float32."""
    pytest.importorskip("bitsandbytes")
    if not Path("/proc/self/status").is_file():
        pytest.skip("the peak is read from /proc")
    sizes = {"layers": 20, "hidden": 512, "mlp": 2048, "vocab": 16384}
    shapes = base_shapes(*sizes.values(), True)
    base = write_base(tmp_path / "base", dtype=dtype, shard_bytes=50_000_000, **sizes)
    factors = {"A": (16, 16384), "B": (512, 16)}
    extra = {f"base_model.model.model.embed_tokens.lora_embedding_{side}": shape for side, shape in factors.items()}
    adapter = write_adapter(tmp_path / "adapter", base, shapes, rank=16, extra=extra)
    command = [sys.executable, "-c", MEASURE, str(adapter), str(tmp_path / "out"), onto]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, largest = map(int, said.split())
    assert largest == 4 * 512 * 16384
    assert largest < peak < 3.25 * largest, peak / largest
