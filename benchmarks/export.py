"""Converting and quantizing a random Qwen3, beside llama.cpp's own converter and quantizer: time and peak memory.

    python benchmarks/export.py                                 # about 50 million parameters, q4_k_m, 2 rounds
    python benchmarks/export.py --parameters 1.7e9 --type q8_0 --rounds 1 --out /big/disk

Each step runs in a process of its own, ours and theirs in turn, so that a busy machine troubles both alike; the ratio
is between the fastest rounds. Peak memory is the largest resident set of the process and its children, mapped pages
of files included. Their converter imports torch, which counts. At the end the files of both must hold the same bytes.

llama.cpp's source comes from llama-cpp-python's source distribution ($PATARM_LLAMA_CPP_SDIST, else downloaded).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CONVERT = """
import sys
from pathlib import Path
from patarm_lite.quantize.convert import convert
convert(Path(sys.argv[1]), Path(sys.argv[2]))
"""
QUANTIZE = """
import sys
from pathlib import Path
from patarm_lite.quantize.quantizer import quantize
quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], threads=int(sys.argv[4]))
"""
LAYERS, VOCAB = 8, 32_768


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock, seconds of the processor, and the largest resident set in bytes."""

    seconds: float
    processor: float
    memory: int


def shape(parameters: float) -> dict[str, Any]:
    """A config of about so many parameters: 8 layers, 32,768 tokens, an MLP of three times the hidden size.

    A layer of hidden size h has h^2 (q) + h^2 / 2 (k and v) + h^2 (o) + 9 h^2 (MLP) weights.
    """
    a, b = 11.5 * LAYERS, VOCAB
    hidden = max(256, round((-b + math.sqrt(b * b + 4 * a * parameters)) / (2 * a) / 256) * 256)
    heads = hidden // 128
    return {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 128,
        "vocab_size": VOCAB,
        "max_window_layers": LAYERS,
    }


def run(command: Sequence[str], log: Path) -> Cost:
    """Run a command to its end; its talk goes to `log`."""
    start = time.perf_counter()
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        pipes = [(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)]
        child = os.posix_spawn(command[0], command, environment, file_actions=pipes)
        _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:3])} ... failed: {log.read_text(errors='replace')[-2000:]}")
    return Cost(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two GGUF files hold tensors of the same names, types and bytes."""
    from patarm_lite.gguf_file import read_gguf

    files = [read_gguf(path) for path in (one, other)]
    found = [{t.name: (t.type, t.shape, t.offset, t.bytes) for t in file.tensors} for file in files]
    if {name: value[:2] for name, value in found[0].items()} != {name: value[:2] for name, value in found[1].items()}:
        return False
    with one.open("rb") as left, other.open("rb") as right:
        for name, (_, _, offset, size) in found[0].items():
            left.seek(offset)
            right.seek(found[1][name][2])
            if left.read(size) != right.read(size):
                return False
    return True


def prepare(work: Path, parameters: float) -> dict[str, str]:
    """The random model, and llama.cpp's programs. In a process of its own: a child's peak counts its parent's size."""
    from llama_cpp_source import source
    from llama_cpp_tools import tool
    from random_qwen import write_model
    from test_convert_oracle import OFFICIAL

    folder = write_model(work / "model", dtype="BF16", changes=shape(parameters))
    return {"folder": str(folder), "source": str(source()), "program": str(tool("quantize")), "official": OFFICIAL}


def measure(work: Path, parameters: float, kind: str, threads: int, rounds: int) -> dict[str, Any]:
    """All steps, `rounds` times in turn; the fastest of each and the largest memory."""
    command = [sys.executable, __file__, "--prepare", str(work), "--parameters", str(parameters)]
    made = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    f16, q = ([str(work / f"{who}-{name}.gguf") for who in ("ours", "theirs")] for name in ("f16", kind))
    python = sys.executable
    official = [python, "-c", made["official"], made["source"], "convert_hf_to_gguf.py", "0"]
    commands = {
        "convert, ours": [python, "-c", CONVERT, made["folder"], f16[0]],
        "convert, llama.cpp": [*official, made["folder"], "--outfile", f16[1], "--outtype", "f16"],
        "quantize, ours": [python, "-c", QUANTIZE, f16[0], q[0], kind, str(threads)],
        "quantize, llama.cpp": [made["program"], f16[0], q[1], kind, str(threads)],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            print(name, file=sys.stderr, flush=True)
            costs[name].append(run(command, work / "log"))
    steps = {
        name: {
            "seconds": min(cost.seconds for cost in found),
            "processor_seconds": min(cost.processor for cost in found),
            "peak_bytes": max(cost.memory for cost in found),
        }
        for name, found in costs.items()
    }
    return {
        "f16_bytes": Path(f16[0]).stat().st_size,
        "type": kind,
        "threads": threads,
        "rounds": rounds,
        "steps": steps,
        "ratios": {
            step: _ratios(steps[f"{step}, ours"], steps[f"{step}, llama.cpp"]) for step in ("convert", "quantize")
        },
        "same_tensors": {"convert": same_tensors(Path(f16[0]), Path(f16[1])), "quantize": same_tensors(*map(Path, q))},
    }


def _ratios(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    return {key: ours[key] / theirs[key] for key in ours}


def table(found: dict[str, Any]) -> list[str]:
    lines = [f"{'step':22}{'seconds':>9}{'processor':>11}{'peak MB':>9}"]
    for name, cost in found["steps"].items():
        lines.append(f"{name:22}{cost['seconds']:9.2f}{cost['processor_seconds']:11.2f}{cost['peak_bytes'] / 1e6:9.0f}")
    for step, ratio in found["ratios"].items():
        same = "same tensors" if found["same_tensors"][step] else "TENSORS DIFFER"
        lines.append(
            f"{step + ', ours / theirs':22}{ratio['seconds']:9.2f}{ratio['processor_seconds']:11.2f}"
            f"{ratio['peak_bytes']:9.2f}  {same}"
        )
    return lines


def main() -> int:
    """Print the table and write export.json; 1 if the files of both differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=50e6)
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/export-benchmark"), help="the models go here and away")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        print(json.dumps(prepare(options.prepare, options.parameters)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=options.out))
    try:
        found = measure(work, options.parameters, options.type, options.threads, options.rounds)
    finally:
        shutil.rmtree(work)
    print(f"f16 file of {found['f16_bytes'] / 1e6:.0f} MB, {options.type}, {options.threads} thread(s)")
    print("\n".join(table(found)))
    (options.out / "export.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(not all(found["same_tensors"].values()))


if __name__ == "__main__":
    sys.exit(main())
