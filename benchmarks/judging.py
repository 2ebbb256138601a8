"""Verdicts per second: our engine beside llama-cpp-python's own calls and llama.cpp's server, in one run, in turn.

    python benchmarks/judging.py                                # 12 prompts x 4 responses x 8 votes, 100M parameters
    python benchmarks/judging.py --model 0.6b --prompts 2       # Qwen3-0.6B's shape
    python benchmarks/judging.py --prompts 1 --responses 2 --votes 4 --tokens 30 --rounds 1 --peers ours,b --sweep

The models are random Qwen3s in q8_0 with Qwen's real vocabulary: only time is measured. All sides get the same file,
threads, waiting policy, prompts (as ids) and tokens a verdict, and draw at temperature 1 from the full distribution;
a second row of each has top_k 40. A judgement's tokens follow a script: spans that the protocol forces between spans
that are drawn. Our engine draws only the latter, the peers all of them, as they would have to.

    a       create_completion of llama-cpp-python, each verdict from an empty cache
    b       the same with its prefix cache
    server  llama-server, n = votes, prompt cache, four requests at once, a slot for every vote, no unified cache

Beside the clock the processor's time is taken, the server's included: on a busy machine that is the fairer measure.
Sides take turns, round by round; `a` and `b` get one prompt only, since they are slow. A ratio is the median of the
rounds' ratios, with their range; below 1.1 it is called equal. `--sweep` shows how our cost grows; `--judge FILE
--pairs FILE` adds the share of forced tokens, and what score-only is worth, on a trained judge.

The server is built by llama_server.py (20 minutes of a core, once), or given by --server PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from patarm_lite.judge.llamacpp import LlamaCpp, Work  # noqa: E402
from patarm_lite.prompts import Encoder, Protocol  # noqa: E402
from patarm_lite.records import Criterion, Turn  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 32},
    "100m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "head_dim": 64},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128},
}
VOCABULARY = 151_936
ASKING = 4
"""Requests that the server gets at once."""
SEQUENCES = 64
TOP_K = 40
EQUAL = 1.1
PEERS = ("ours", "a", "b", "server")
WORDS = "garden river seven letter window bright answer simple question because quiet reason number table small".split()
LAST_PLAIN = 1000
"""Forced tokens are taken from the ids below this."""


@dataclass(frozen=True)
class Job:
    """What one side judges. `shared`: words of a prompt; `own`: words of a response; `forced`: share of tokens."""

    prompts: int
    responses: int
    votes: int
    tokens: int
    shared: int
    own: int
    forced: float

    @property
    def verdicts(self) -> int:
        return self.prompts * self.responses * self.votes


class Script:
    """A form that forces some spans of 3 to 8 tokens and lets the others be drawn; every token is accepted there."""

    def __init__(self, tokens: int, forced: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.plan: list[bool] = []
        while len(self.plan) < tokens:
            free = int(rng.integers(3, 9))
            spans = round(free * forced / (1 - forced)) if forced < 1 else tokens
            self.plan += [True] * spans + [False] * free
        self.plan = self.plan[:tokens]
        if all(self.plan):
            self.plan[-1] = False
        self.words = rng.integers(0, LAST_PLAIN, tokens).tolist()
        self.at = 0

    @property
    def done(self) -> bool:
        return self.at == len(self.plan)

    def begin(self) -> list[int]:
        return self._forced()

    def few(self) -> None:
        return None

    def accepts(self, token: int) -> bool:
        return True

    def take(self, token: int) -> list[int]:
        self.at += 1
        return [token, *self._forced()]

    def _forced(self) -> list[int]:
        start = self.at
        while self.at < len(self.plan) and self.plan[self.at]:
            self.at += 1
        return self.words[start : self.at]


def make_model(folder: Path, name: str) -> Path:
    """A random Qwen3 of a shape as q8_0, kept from one call to the next."""
    from qwen_vocabulary import qwen3_tokenizer
    from random_qwen import write_model

    from patarm_lite.quantize.convert import convert
    from patarm_lite.quantize.quantizer import quantize

    out = folder / f"{name}-q8_0.gguf"
    if out.is_file():
        return out
    print(f"making {out}", file=sys.stderr, flush=True)
    work = folder / f"{name}-hf"
    changes = {**SHAPES[name], "vocab_size": VOCABULARY, "max_position_embeddings": 8192, "rope_theta": 1e6}
    changes |= {"eos_token_id": 151_645, "bos_token_id": 151_643, "max_window_layers": changes["num_hidden_layers"]}
    write_model(work, dtype="F16", changes=changes, with_tokenizer=False)
    qwen3_tokenizer().save_pretrained(work)
    f16 = convert(work, folder / f"{name}-f16.gguf").path
    quantize(f16, out, "q8_0")
    f16.unlink()
    return out


def make_prompts(encoder: Encoder, job: Job) -> list[list[int]]:
    """Judging prompts as ids: all responses of a prompt after one another."""
    rng = np.random.default_rng(5)
    rubric = tuple(Criterion(name, "the text does that well", 3) for name in ("Correctness", "Clarity", "Depth"))
    found = []
    for _ in range(job.prompts):
        prompt = (Turn("user", " ".join(rng.choice(WORDS, job.shared))),)
        for _ in range(job.responses):
            response = " ".join(rng.choice(WORDS, job.own))
            found.append(encoder.prompt_ids(prompt, response, task="chat", rubric=rubric))
    return found


CHILDREN: list[int] = []
"""Servers whose processor time counts too."""

Side = Callable[[Sequence[Sequence[int]], Job, int], None]
"""(prompts, job, top_k): judges them all."""


def ours(model: LlamaCpp, encoder: Encoder) -> Side:
    def judge(prompts: Sequence[Sequence[int]], job: Job, top_k: int) -> None:
        seeds = iter(range(1 << 60))
        found = model.stream(
            [(ids, range(job.votes)) for ids in prompts],
            encoder=encoder,
            seed=1,
            top_k=top_k,
            max_tokens=job.tokens,
            expected=False,
            form=lambda: Script(job.tokens, job.forced, next(seeds)),  # type: ignore[arg-type,return-value]
        )
        if sum(vote.tokens for _, _, vote in found) != len(prompts) * job.votes * job.tokens:
            raise AssertionError("a verdict has another length")

    return judge


def high_level(path: Path, threads: int, room: int, cached: bool) -> Side:
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=room, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False)
    never = {llama.token_eos(): -1e9}

    def judge(prompts: Sequence[Sequence[int]], job: Job, top_k: int) -> None:
        for ids in prompts:
            for vote in range(job.votes):
                if not cached:
                    llama.reset()
                done: Any = llama.create_completion(
                    list(ids),
                    max_tokens=job.tokens,
                    temperature=1.0,
                    top_k=top_k,
                    top_p=1.0,
                    min_p=0.0,
                    typical_p=1.0,
                    repeat_penalty=1.0,
                    seed=vote,
                    logit_bias=never,
                )
                if done["usage"]["completion_tokens"] != job.tokens:
                    raise AssertionError(f"a verdict has {done['usage']['completion_tokens']} tokens")

    return judge


@contextmanager
def server(program: Path, path: Path, threads: int, room: int, votes: int, log: Path) -> Iterator[Side]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slots = ASKING * votes
    command = [str(program), "-m", str(path), "--host", "127.0.0.1", "--port", str(port), "-t", str(threads)]
    command += ["-tb", str(threads), "-np", str(slots), "-c", str(slots * room), "-no-kvu", "-fa", "on", "-ngl", "0"]
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    CHILDREN.append(child.pid)
    url = f"http://127.0.0.1:{port}"

    def post(ids: Sequence[int], job: Job, top_k: int) -> None:
        body = {
            "prompt": list(ids),
            "n": job.votes,
            "max_tokens": job.tokens,
            "cache_prompt": True,
            "ignore_eos": True,
            "temperature": 1.0,
            "top_k": top_k,
            "samplers": ["top_k", "temperature"] if top_k else ["temperature"],
        }
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=3600) as answer:
            found = json.load(answer)
        if len(found["choices"]) != job.votes or {c["finish_reason"] for c in found["choices"]} != {"length"}:
            raise AssertionError(f"the server answered {str(found)[:300]}")

    def judge(prompts: Sequence[Sequence[int]], job: Job, top_k: int) -> None:
        with ThreadPoolExecutor(ASKING) as pool:
            list(pool.map(lambda ids: post(ids, job, top_k), prompts))

    try:
        _wait(url, child, log)
        yield judge
    finally:
        CHILDREN.remove(child.pid)
        child.terminate()
        child.wait(30)


def _wait(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if child.poll() is not None:
            raise SystemExit(f"llama-server ended: {log.read_text(errors='replace')[-2000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("llama-server did not become ready within five minutes")


def processor() -> float:
    """Seconds of the processor that this process and the servers have used."""
    seconds = time.process_time()
    for pid in CHILDREN:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def measure(sides: dict[str, Side], prompts: list[list[int]], job: Job, rounds: int, work: Work) -> dict[str, Any]:
    """Verdicts per second of each side, plain and with top_k, round by round; and the profile of our own rounds."""
    small = replace(job, prompts=1)
    speeds: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    profile = {"seconds": 0.0, **asdict(Work())}
    for number in range(rounds):
        for top_k in (0, TOP_K):
            names = list(sides) if number % 2 == 0 else list(sides)[::-1]
            for name in names:
                asked = small if name in ("a", "b") else job
                before = asdict(work)
                began, used = time.perf_counter(), processor()
                sides[name](prompts[: asked.prompts * asked.responses], asked, top_k)
                seconds, used = time.perf_counter() - began, processor() - used
                key = name + (f", top_k {top_k}" if top_k else "")
                speeds.setdefault(key, []).append(asked.verdicts / seconds)
                costs.setdefault(key, []).append(asked.verdicts / used)
                said = f"{asked.verdicts / seconds:.2f} a second, {asked.verdicts / used:.2f} a processor second"
                print(f"round {number + 1}: {key}: {said}", file=sys.stderr, flush=True)
                if name == "ours" and not top_k:
                    profile["seconds"] += seconds
                    for field, value in asdict(work).items():
                        profile[field] += value - before[field]
    found = {"speeds": speeds, "ratios": _ratios(speeds), "processor": costs, "processor_ratios": _ratios(costs)}
    return {**found, "profile": profile}


def _ratios(speeds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Ours to each peer, plain to plain and top_k to top_k: median and range over rounds."""
    found = {}
    for name, other in speeds.items():
        mine = "ours" + name.partition(",")[1] + name.partition(",")[2]
        if name.startswith("ours") or mine not in speeds:
            continue
        each = [a / b for a, b in zip(speeds[mine], other, strict=True)]
        found[name] = {"median": statistics.median(each), "least": min(each), "most": max(each)}
    return found


def score_only(model: LlamaCpp, encoder: Encoder, prompts: list[list[int]], rounds: int) -> dict[str, float]:
    """Seconds of a score with nothing written and of a bare prefill, each prompt alone; and with shared beginnings."""
    alone: list[float] = []
    bare: list[float] = []
    together: list[float] = []
    for _ in range(rounds):
        some = prompts[:8]
        began = time.perf_counter()
        for ids in some:
            model.scores([ids], encoder=encoder)
        alone.append((time.perf_counter() - began) / len(some))
        began = time.perf_counter()
        for ids in some:
            model.logits(ids, [len(ids) - 1])
        bare.append((time.perf_counter() - began) / len(some))
        began = time.perf_counter()
        model.scores(prompts, encoder=encoder)
        together.append((time.perf_counter() - began) / len(prompts))
    return {
        "seconds": min(alone),
        "prefill_seconds": min(bare),
        "prefills": statistics.median(a / b for a, b in zip(alone, bare, strict=True)),
        "prefills_shared": statistics.median(a / b for a, b in zip(together, bare, strict=True)),
    }


def sweep(path: Path, job: Job, threads: int) -> list[dict[str, Any]]:
    """How our cost grows: one number changed at a time, from a quarter of the job's prompts."""
    base = replace(job, prompts=max(1, job.prompts // 4))
    changes: list[tuple[str, Job, int]] = [("", base, threads)]
    changes += [(f"k {k}", replace(base, votes=k), threads) for k in (1, 2, 4, 16)]
    changes += [(f"responses {n}", replace(base, responses=n), threads) for n in (1, 8)]
    changes += [(f"prompt words x {n}", replace(base, shared=n * base.shared), threads) for n in (2, 4)]
    changes += [(f"threads {n}", base, n) for n in sorted({1, 2, 4, os.cpu_count() or 1}) if n != threads]
    changes = [change for change in changes if change[2] <= (os.cpu_count() or 1)]
    found = []
    for name, changed, count in changes:
        with LlamaCpp.load(path, threads=count, sequences=SEQUENCES, check=False) as model:
            encoder = model.encoder(Protocol())
            prompts = make_prompts(encoder, changed)
            judge = ours(model, encoder)
            judge(prompts[:1], replace(changed, tokens=2), 0)
            began = time.perf_counter()
            judge(prompts, changed, 0)
            seconds = time.perf_counter() - began
        row = {"change": name or "none", "verdicts": changed.verdicts, "per_second": changed.verdicts / seconds}
        row["milliseconds_per_response"] = 1000 * seconds / (changed.prompts * changed.responses)
        found.append(row)
        print(f"{row['change']:20} {row['per_second']:.2f} a second", file=sys.stderr, flush=True)
    return found


def trained(path: Path, pairs_file: Path, threads: int, count: int) -> dict[str, float]:
    """A trained judge's share of forced tokens, and what its score-only reading is worth, on pairs."""
    from patarm_lite.metrics import row_to_pair
    from patarm_lite.quantize.fidelity import opened

    lines = pairs_file.read_text(encoding="utf-8").splitlines()[:count]
    pairs = [row_to_pair(json.loads(line)) for line in lines]
    with LlamaCpp.load(path, threads=threads) as model:
        encoder, description = opened(model)
        prompts = [ids for pair in pairs for ids in encoder.pair_ids(pair, description.rubric(pair.task))]
        before = replace(model.work)
        votes = model.votes(prompts, 1, encoder=encoder, seed=1, decoding="constrained", max_tokens=512)
        work = model.work
        forced = (work.forced - before.forced) / sum(vote.tokens for (vote,) in votes)
        raced = (work.raced - before.raced) / max(1, work.drawn - before.drawn)
        short = [score for score, _ in model.scores(prompts, encoder=encoder)]
    whole = [vote.expected for (vote,) in votes]
    both = [(a, b) for a, b in zip(whole, short, strict=True) if a is not None and b is not None]
    right = {
        name: statistics.mean(
            0.0 if a is None or b is None else 0.5 if a == b else float(a > b)
            for a, b in zip(scores[::2], scores[1::2], strict=True)
        )
        for name, scores in (("whole", whole), ("short", short))
    }
    return {
        "pairs": len(pairs),
        "forced_share": forced,
        "drawn_again_share": raced,
        "accuracy": right["whole"],
        "accuracy_score_only": right["short"],
        "score_only_readable": len(both) / len(whole),
        "correlation": float(np.corrcoef(*zip(*both, strict=True))[0, 1]) if len(both) > 2 else float("nan"),
    }


def _rows(speeds: dict[str, list[float]], ratios: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"  {'side':20}{'median':>9}{'range':>16}{'ours / side':>13}{'range':>14}"]
    for name, each in speeds.items():
        row = f"  {name:20}{statistics.median(each):9.2f}{f'{min(each):.2f} - {max(each):.2f}':>16}"
        ratio = ratios.get(name)
        if ratio:
            said = "equal" if 1 / EQUAL < ratio["median"] < EQUAL else f"{ratio['median']:.2f}"
            row += f"{said:>13}" + f"{ratio['least']:.2f} - {ratio['most']:.2f}".rjust(14)
        lines.append(row)
    return lines


def table(found: dict[str, Any]) -> list[str]:
    lines = []
    for what, speeds, ratios in (
        ("second", found["speeds"], found["ratios"]),
        ("processor second", found["processor"], found["processor_ratios"]),
    ):
        lines += [f"verdicts a {what}", *_rows(speeds, ratios), ""]
    profile = found["profile"]
    if profile["seconds"]:
        rest = profile["seconds"] - profile["decoding"] - profile["sampling"]
        shares = [f"{part} {value / profile['seconds']:.1%}" for part, value in (("rest", rest),)]
        shares = [f"{part} {profile[part] / profile['seconds']:.1%}" for part in ("decoding", "sampling")] + shares
        lines.append("our time: " + ", ".join(shares))
        tokens = [f"{profile[part]:,} {part}" for part in ("read", "shared", "fed", "forced", "drawn", "steps")]
        lines.append("our tokens: " + ", ".join(tokens))
    if "score_only" in found:
        only = found["score_only"]
        lines.append(
            f"score-only: {only['prefills']:.2f} prefills, {only['prefills_shared']:.2f} with shared beginnings"
        )
    for row in found.get("sweep", []):
        lines.append(
            f"{row['change']:22}{row['per_second']:11.2f} verdicts/s"
            f"{row['milliseconds_per_response']:12.0f} ms a response"
        )
    for name, value in found.get("trained", {}).items():
        lines.append(f"trained judge, {name}: {value:.3g}")
    return lines


def main() -> int:
    """Print the table and write judging.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="100m")
    parser.add_argument("--gguf", type=Path, help="a GGUF file with Qwen's vocabulary instead of a random one")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--votes", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=90, help="of a verdict")
    parser.add_argument("--shared", type=int, default=100, help="words of a prompt")
    parser.add_argument("--own", type=int, default=150, help="words of a response")
    parser.add_argument("--forced", type=float, default=0.4, help="share of tokens that the protocol forces")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="by default the physical cores")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"some of {','.join(PEERS)}")
    parser.add_argument("--server", type=Path, help="a llama-server built elsewhere")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--judge", type=Path, help="a trained judge, with --pairs")
    parser.add_argument("--pairs", type=Path, help="JSONL as a run's heldout.jsonl")
    parser.add_argument("--pair-count", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/judging-benchmark"), help="models and results go here")
    options = parser.parse_args()
    peers = options.peers.split(",")
    if not set(peers) <= set(PEERS) or not 0 <= options.forced < 1:
        parser.error(f"--peers takes some of {','.join(PEERS)}, --forced a share below 1")
    options.out.mkdir(parents=True, exist_ok=True)
    job = Job(
        options.prompts, options.responses, options.votes, options.tokens, options.shared, options.own, options.forced
    )
    path = options.gguf or make_model(options.out, options.model)
    found = run(path, job, peers, options)
    (options.out / "judging.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(found)))
    return 0


def run(path: Path, job: Job, peers: list[str], options: argparse.Namespace) -> dict[str, Any]:
    from contextlib import ExitStack

    from patarm_lite.judge.loading import physical_cores

    threads = options.threads or physical_cores()
    with ExitStack() as stack:
        model = stack.enter_context(LlamaCpp.load(path, threads=threads, sequences=SEQUENCES, check=False))
        encoder = model.encoder(Protocol())
        prompts = make_prompts(encoder, job)
        room = -(-(max(map(len, prompts)) + job.tokens + 1) // 256) * 256
        made: dict[str, Callable[[], Side]] = {
            "ours": lambda: ours(model, encoder),
            "a": lambda: high_level(path, threads, room, cached=False),
            "b": lambda: high_level(path, threads, room, cached=True),
            "server": lambda: stack.enter_context(
                server(_program(options.server), path, threads, room, job.votes, options.out / "server.log")
            ),
        }
        sides = {name: made[name]() for name in PEERS if name in peers}
        for side in sides.values():
            side(prompts[:1], replace(job, votes=2, tokens=2), 0)
        lengths = {"prompt_tokens": statistics.mean(map(len, prompts)), "threads": threads, "file": path.name}
        found = {"job": asdict(job), **lengths, **measure(sides, prompts, job, options.rounds, model.work)}
        found["waiting"] = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        found["score_only"] = score_only(model, encoder, prompts, options.rounds)
    if options.sweep:
        found["sweep"] = sweep(path, job, threads)
    if options.judge and options.pairs:
        found["trained"] = trained(options.judge, options.pairs, threads, options.pair_count)
    return found


def _program(given: Path | None) -> Path:
    if given is not None:
        return given
    from llama_server import server as build

    return build()


if __name__ == "__main__":
    sys.exit(main())
