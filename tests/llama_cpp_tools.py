"""llama.cpp's own `imatrix` and `quantize`, built from the source distribution of llama-cpp-python: the oracles.

Only the two tools and what they use of llama.cpp's `common` are compiled (half a minute on one core, once); the rest
is the shared library that llama-cpp-python installed, so that oracle and subject compute with the same kernels.
Options are parsed by a few lines of ours: llama.cpp's own parser would bring in its chat and download code.

`write_model` writes a random Qwen3 with a vocabulary of bytes, by the gguf package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OURS = """
#include "arg.h"
#include "build-info.h"
#include "common.h"
#include "sampling.h"
#include <fstream>
#include <sstream>

// MODEL TEXT OUT CONTEXT BATCH; OUT in the old form if it ends in .dat
bool common_params_parse(int argc, char ** argv, common_params & params, llama_example, void (*)(int, char **)) {
    if (argc != 6) return false;
    params.model.path = argv[1];
    params.prompt_file = argv[2];
    std::stringstream text;
    text << std::ifstream(argv[2], std::ios::binary).rdbuf();
    params.prompt = text.str();
    params.out_file = argv[3];
    params.imat_dat = params.out_file.ends_with(".dat") ? 1 : -1;
    params.n_ctx = std::atoi(argv[4]);
    params.n_batch = std::atoi(argv[5]);
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1;
    params.parse_special = true;
    params.compute_ppl = false;
    params.fit_params = false;
    return true;
}
common_sampler * common_sampler_init(const llama_model *, common_params_sampling &) { return nullptr; }
llama_sampler * common_sampler_get(const common_sampler *) { return nullptr; }
void common_sampler_free(common_sampler *) {}
void llama_print_build_info(const char *, FILE *) {}
"""
SOURCES = {
    "imatrix": ["tools/imatrix/imatrix.cpp"],
    "quantize": ["tools/quantize/quantize.cpp", "tools/quantize/main.cpp"],
}
COMMON = ["common/common.cpp", "common/log.cpp", "common/imatrix-loader.cpp"]
INCLUDE = ["include", "ggml/include", "common", "src", "vendor", "tools/quantize"]


def tool(name: str) -> Path:
    """The program `imatrix` (its arguments stand in `OURS`) or `quantize` (as llama.cpp documents it).

    Skips the test where there is no compiler or no source distribution.
    """
    from llama_cpp_source import source

    llama_cpp = pytest.importorskip("llama_cpp")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("llama.cpp's tools are built with g++ on Linux only")
    libraries = Path(llama_cpp.__file__).parent / "lib"
    linked = hashlib.sha256((OURS + str(libraries)).encode() + (libraries / "libllama.so").read_bytes()).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = root / "patarm-lite-tests" / f"llama-tools-{llama_cpp.__version__}-{linked[:12]}"
    program = cache / name
    if not program.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        _build(compiler, source(), libraries, cache, name)
    return program


def _build(compiler: str, source: Path, libraries: Path, cache: Path, name: str) -> None:
    (cache / "ours.cpp").write_text(OURS)
    sources = [cache / "ours.cpp", *(source / file for file in [*COMMON, *SOURCES[name]])]
    options = ["-std=c++20", "-O1", "-w", "-ffunction-sections", *(f"-I{source / folder}" for folder in INCLUDE)]
    objects = []
    for file in sources:
        objects.append(str(cache / (file.stem + ".o")))
        if not Path(objects[-1]).is_file() or file.stem == "main":
            subprocess.run([compiler, *options, "-c", str(file), "-o", objects[-1] + ".part"], check=True)
            os.replace(objects[-1] + ".part", objects[-1])
    # Parts of `common` that neither tool calls are left unresolved; lazy binding would stumble over them.
    link = ["-Wl,--gc-sections", "-Wl,--unresolved-symbols=ignore-all", "-Wl,-z,now"]
    link += [f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    link += ["-lllama", "-lggml", "-lggml-base", "-lggml-cpu", "-pthread"]
    subprocess.run([compiler, "-o", str(cache / f"{name}.part"), *objects, *link], check=True)
    os.replace(cache / f"{name}.part", cache / name)


def byte_letters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (the rule of GPT-2's tokenizer)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def write_model(
    path: Path,
    *,
    hidden: int = 256,
    mlp: int = 512,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    vocab: int = 320,
    tied: bool = True,
    seed: int = 0,
    dtype: str = "f16",
    spoil: dict[str, float] | None = None,
) -> Path:
    """A random Qwen3 as GGUF. Ids 0 to 255 are the bytes; then `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, unused.

    `spoil`: tensor name -> a value that its first weight gets.
    """
    import gguf
    import numpy as np

    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_name("random")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type({"f32": 0, "f16": 1}[dtype])
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    unused = [f"[PAD{index}]" for index in range(256 + len(control), vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*byte_letters(), *control, *unused])
    writer.add_token_types([1] * 256 + [3] * len(control) + [5] * len(unused))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(256)
    writer.add_add_bos_token(False)

    def add(name: str, *shape: int) -> None:
        scale = 1.0 if name.endswith("norm.weight") else shape[-1] ** -0.5
        weights: Any = random.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        if spoil and name in spoil:
            weights.flat[0] = spoil[name]
        writer.add_tensor(name, weights if len(shape) == 1 or dtype == "f32" else weights.astype(np.float16))

    add("token_embd.weight", vocab, hidden)
    add("output_norm.weight", hidden)
    if not tied:
        add("output.weight", vocab, hidden)
    for layer in range(layers):
        block = f"blk.{layer}."
        add(block + "attn_norm.weight", hidden)
        add(block + "attn_q.weight", heads * head_dim, hidden)
        add(block + "attn_k.weight", kv_heads * head_dim, hidden)
        add(block + "attn_v.weight", kv_heads * head_dim, hidden)
        add(block + "attn_q_norm.weight", head_dim)
        add(block + "attn_k_norm.weight", head_dim)
        add(block + "attn_output.weight", hidden, heads * head_dim)
        add(block + "ffn_norm.weight", hidden)
        add(block + "ffn_gate.weight", mlp, hidden)
        add(block + "ffn_up.weight", mlp, hidden)
        add(block + "ffn_down.weight", hidden, mlp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
