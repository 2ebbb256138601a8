"""`patarm-lite export`: from a trained judge to checked GGUF files. The order of the stages, and nothing else.

    source -> merge -> f16 GGUF -> parity gate -> importance matrix -> quantize -> fidelity -> metadata -> OUT

Every stage writes under `OUT/.work` by rename and is skipped when its result is there, so the same command after a
kill goes on where it stopped. OUT itself only ever holds finished files; `.work` goes at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from patarm_lite import __version__, calibration, metrics
from patarm_lite.errors import UserError
from patarm_lite.gguf_file import read_gguf
from patarm_lite.judge import description
from patarm_lite.judge.llamacpp import LlamaCpp
from patarm_lite.metrics import pair_to_row, row_to_pair
from patarm_lite.pairs import drop_long
from patarm_lite.progress import Progress
from patarm_lite.quantize import budget, fidelity, importance, quantizer
from patarm_lite.quantize.calibrate import calibration_of
from patarm_lite.quantize.card import CardFile, MergeFigure, card
from patarm_lite.quantize.convert import convert, convert_adapter
from patarm_lite.quantize.finished import digests_of, place_finished, served, size_of, what_it_is
from patarm_lite.quantize.merge import cast, merge
from patarm_lite.quantize.metadata import rewrite
from patarm_lite.quantize.modelfile import modelfile
from patarm_lite.quantize.parity import JudgingText, check
from patarm_lite.quantize.request import (
    DEFAULT_TYPES,
    LADDER,
    Request,
    limits_of,
    name_of,
    open_work,
    pairs_of,
    ways_of,
)
from patarm_lite.quantize.source import Source, open_source
from patarm_lite.recipe import load_recipe
from patarm_lite.records import TASKS, Pair
from patarm_lite.training.evaluation import rubric_for
from patarm_lite.training.run_folder import write_json, write_text

HELD_IN_TOKENS = 60_000
"""Tokens the importance matrix is made of at most."""
PARITY_PROMPTS = 40
"""Pairs whose judging prompts pass the gate, both sides each."""
DIVERGENCE_PAIRS = 100
"""Pairs on whose judgements KL is measured, both sides each."""


def export(request: Request, force: bool = False) -> dict[str, Any]:
    """Run an export to its end and return what `export.json` holds.

    Raises:
        UserError: bad input (before any work), a gate that failed, a disk that is full.
        KeyboardInterrupt: Ctrl-C; the same command goes on.
    """
    types = request.types or (LADDER if request.auto else DEFAULT_TYPES)
    quantizer.check_types(types, importance=request.imatrix != "none")
    if request.auto and not request.fidelity:
        raise UserError("--auto chooses by fidelity; leave out --without-fidelity")
    if request.imatrix not in ("judging", "none"):
        importance.read(Path(request.imatrix))
    source = open_source(request.judge, base=request.base, revision=request.revision, offline=request.offline)
    if "lora" in types and not source.adapter:
        raise UserError(f"{request.judge} is a whole model and no adapter; leave out type lora")
    recipe = load_recipe(str(source.run / "recipe.yaml")) if source.run is not None else None
    heldin, heldout = pairs_of(request, source, recipe)
    limits = limits_of(recipe)
    shape = source.shape
    found = budget.budget(
        shape,
        {name: quantizer.TYPES[name].bits for name in types if name in quantizer.TYPES},
        adapter=source.adapter,
        ways=len(ways_of(source)),
        hf="hf" in types,
        fidelity=request.fidelity,
        context=sum(limits),
    )
    for line in (f"export of {request.judge}: {', '.join(types)}", *found.lines(), f"output: {request.out}"):
        sys.stderr.write(line + "\n")
    if not (request.out / ".work").is_dir():  # what a stopped export wrote is room already taken
        budget.check_room(found, request.out, types)
    work = open_work(request, types, source, force)
    try:
        return _Export(request, types, source, heldin, heldout, limits, work).run()
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from here\n")
        raise


class _Export:
    """One export: what its stages share. Each stage returns at once what it finds done under `work`."""

    def __init__(
        self,
        request: Request,
        types: Sequence[str],
        source: Source,
        heldin: list[Pair],
        heldout: list[Pair],
        limits: tuple[int, int],
        work: Path,
    ) -> None:
        self.request, self.types, self.source, self.work = request, types, source, work
        self.heldin, self.heldout = heldin, heldout
        self.prompt_tokens, self.judgement_tokens = limits
        self.name = name_of(source)
        self.rubric = rubric_for(source.rubric)
        self._pairs: list[Pair] | None = None
        self.precise = "bf16" if "bf16" in types and "f16" not in types else "f16"
        self.seconds: dict[str, float] = self._load("seconds.json") or {}

    def run(self) -> dict[str, Any]:
        """All stages in order; what export.json holds."""
        if tuple(self.types) == ("lora",):
            return self._finish({"lora": self._adapter()}, None, None, None, None, None)
        merged, reference, merging = self._merge()
        parity = self._parity(merged, reference)
        matrix = self._importance(reference)
        files = {name: self._file(name, merged, reference, matrix) for name in self.types if name != "hf"}
        if "hf" in self.types:
            files["hf"] = self._safetensors(merging)
        found, calibrations = self._fidelity(reference, files) if self.request.fidelity else (None, {})
        kept = files
        if found is not None and found["choice"] is not None:
            kept = {found["choice"]["type"]: files.get(found["choice"]["type"], reference)}
        return self._finish(kept, parity, matrix, merging, found, calibrations)

    # merging and converting

    def _merge(self) -> tuple[Path, Path, dict[str, Any] | None]:
        """(folder of 16-bit or 32-bit weights, its precise GGUF file, how the adapter was merged)."""
        ways = ways_of(self.source)
        if not ways:
            folder = self.source.folder
            if self.source.quantized_base:
                folder = self.work / "merged-dequantized"
                self._once(
                    "merge", folder, lambda: cast(self.source, folder, dtype="finest", progress=_shown("dequantizing"))
                )
            return folder, self._precise(folder, None), None
        built = {}
        for way in ways:
            folder = self.work / f"merged-{way}"
            self._once("merge", folder, functools.partial(self._merge_into, folder, way))
            built[way] = folder, self._precise(folder, way)
        if len(ways) == 1:
            return *built[ways[0]], {"onto": ways[0]}
        merging = self._load("merging.json") or self._better_way({way: gguf for way, (_, gguf) in built.items()})
        write_json(self.work / "merging.json", merging)
        for way in ways:
            if way != merging["onto"]:
                shutil.rmtree(built[way][0], ignore_errors=True)
        return *built[merging["onto"]], merging

    def _merge_into(self, folder: Path, way: str) -> None:
        merge(self.source, folder, onto=way, dtype="finest", progress=_shown(f"merging into the {way} base"))

    def _better_way(self, files: Mapping[str, Path]) -> dict[str, Any]:
        """Which way of merging judges better: chosen on one half of the held-out pairs, both reported on the other."""
        if not self.request.fidelity:
            return {"onto": "dequantized", "reason": "the base it was trained over; not compared, without fidelity"}
        judged = {way: self._judged(f"merged-{way}", path, files["original"]) for way, path in files.items()}
        choosing, reporting = fidelity.halves(self._fitting(files["original"]))
        decoding = fidelity.DECODINGS[0]

        def accuracy(way: str, pairs: Sequence[Pair]) -> dict[str, Any]:
            found = metrics.accuracy(judged[way].only(pairs).pairs[decoding])
            return {"accuracy": found.value, "low": found.low, "high": found.high, "n": found.n}

        if not choosing or not reporting:
            raise UserError(f"{len(self.heldout)} held-out pairs are too few to compare two ways of merging; give more")
        chosen = {way: accuracy(way, choosing) for way in files}
        onto = max(files, key=lambda way: (chosen[way]["accuracy"], way == "dequantized"))
        return {"onto": onto, "choosing": chosen, "reporting": {way: accuracy(way, reporting) for way in files}}

    def _precise(self, folder: Path, way: str | None) -> Path:
        path = self.work / (f"{self.precise}.gguf" if way is None else f"{self.precise}-{way}.gguf")
        onto = None if way is None else f"merged into the {way} base"
        self._once("convert", path, lambda: self._convert(folder, path, self.precise, onto))
        return path

    def _convert(self, folder: Path, path: Path, dtype: str, merged: str | None) -> None:
        described = description.describe(
            protocol=self.source.protocol,
            rubrics={task: self.rubric(task) for task in TASKS},
            kind=self.source.rubric,
            trained=self.source.trained,
            about=self.source.about,
            merge=merged,
        )
        shown = _shown(f"converting to {dtype}, MB", unit=1_000_000)
        convert(folder, path, dtype=dtype, metadata=described, name=self.name, progress=shown)

    def _safetensors(self, merging: Mapping[str, Any] | None) -> Path:
        """A folder of 16-bit safetensors for servers that read them, in the base's own 16 bits where it has some."""
        folder = self.work / "hf"

        def write() -> None:
            if merging is not None:
                merge(self.source, folder, onto=merging["onto"], progress=_shown("merging for safetensors"))
            else:
                cast(self.source, folder, progress=_shown("casting to 16 bits"))

        self._once("merge", folder, write)
        return folder

    def _adapter(self) -> Path:
        path, base = self.work / "lora.gguf", self.source.weights
        self._once("convert", path, lambda: convert_adapter(self.source.folder, base, path))
        return path

    # the gate

    def _parity(self, merged: Path, reference: Path) -> dict[str, Any]:
        known = self._load("parity.json")
        if known is not None:
            return known
        sys.stderr.write("checking parity: tokens, template, logits\n")
        texts = [
            JudgingText(pair.prompt, response, pair.task, self.rubric(pair.task), reference=pair.reference)
            for pair in (*self.heldout, *self.heldin)[:PARITY_PROMPTS]
            for response in (pair.chosen, pair.rejected)
        ]
        with self._timed("parity"):
            found = check(
                self.source.tokenizer,
                merged,
                reference,
                self.work / "parity",
                protocol=self.source.protocol,
                judging_prompts=texts,
                threads=self.request.threads or 1,
            )
        result = dataclasses.asdict(found)
        write_json(self.work / "parity.json", result)
        sys.stderr.write(
            f"parity holds: {found.strings} strings and {found.prompts} prompts have equal tokens; the largest "
            f"difference of a logit is {found.max_logit_diff:.1e}, their standard deviation {found.logit_std:.2f} "
            f"({found.logits} model, {found.positions} positions)\n"
        )
        return result

    # judging traffic

    def _fitting(self, reference: Path) -> list[Pair]:
        """The held-out pairs that fit the limits. What doesn't is dropped and counted, never cut."""
        if self._pairs is None:
            self._pairs = [row_to_pair(row) for row in self._traffic(reference)["heldout"]]
        return self._pairs

    def _traffic(self, reference: Path) -> dict[str, Any]:
        """Pairs that fit, and token ids of held-in prompts with the judge's own judgements."""
        known = self._load("traffic.json")
        if known is not None:
            return known
        limit = self.prompt_tokens
        with (
            self._timed("judging traffic"),
            LlamaCpp.load(reference, context=limit + self.judgement_tokens + 2, threads=self.request.threads) as judge,
        ):
            encoder = judge.encoder(self.source.protocol)

            def length(pair: Pair) -> int:
                return max(map(len, encoder.pair_ids(pair, self.rubric(pair.task))))

            heldout, long = drop_long(self.heldout, length, limit)
            if self.request.fidelity and not heldout:
                raise UserError(f"no held-out pair fits {limit} tokens ({len(long)} were longer); give shorter ones")
            heldin, _ = drop_long(self.heldin, length, limit)
            prompts = [ids for pair in heldin for ids in encoder.pair_ids(pair, self.rubric(pair.task))]
            sequences: list[list[int]] = []
            if self.request.imatrix == "judging":
                fitting: list[list[int]] = []
                tokens = 0
                for ids in prompts:
                    tokens += len(ids) + self.judgement_tokens
                    if fitting and tokens > HELD_IN_TOKENS:
                        break
                    fitting.append(ids)
                votes = judge.votes(
                    fitting,
                    1,
                    encoder=encoder,
                    seed=self.request.seed,
                    max_tokens=self.judgement_tokens,
                    expected=False,
                    progress=_shown("judging held-in pairs"),
                )
                sequences = [
                    [*ids, *encoder.judgement_ids(vote.text)] for ids, (vote,) in zip(fitting, votes, strict=True)
                ]
        found = {"heldout": [pair_to_row(pair) for pair in heldout], "dropped": len(long), "sequences": sequences}
        write_json(self.work / "traffic.json", found)
        return found

    def _importance(self, reference: Path) -> Path | None:
        """The importance matrix: made of judging traffic, or a given file that fits this model."""
        if self.request.imatrix == "none" or not set(self.types) & set(quantizer.TYPES):
            return None
        path = self.work / "imatrix.gguf"
        if self.request.imatrix != "judging":
            given = Path(self.request.imatrix)
            importance.check_fits(given, read_gguf(reference))
            return given
        if not path.is_file():
            sequences = self._traffic(reference)["sequences"]
            with self._timed("importance matrix"):
                importance.compute(
                    reference,
                    sequences,
                    path,
                    threads=self.request.threads,
                    progress=_shown("importance matrix, tokens"),
                )
        return path

    # files and how they judge

    def _file(self, kind: str, merged: Path, reference: Path, matrix: Path | None) -> Path:
        if kind == "lora":
            return self._adapter()
        if kind == self.precise:
            return reference
        path = self.work / f"{kind}.gguf"
        if kind not in quantizer.TYPES:
            self._once("convert", path, lambda: self._convert(merged, path, kind, None))
            return path
        if not (self.work / f"{kind}.json").is_file():
            with self._timed(f"quantize {kind}"):
                written = quantizer.quantize(
                    reference,
                    path,
                    kind,
                    importance=matrix,
                    threads=self.request.threads,
                    progress=_shown(f"quantizing to {kind}"),
                )
            fallen = [dataclasses.asdict(fallback) for fallback in written.fallbacks]
            if fallen:
                got = ", ".join(sorted({f"{row['wanted']} -> {row['got']}" for row in fallen}))
                sys.stderr.write(
                    f"{kind}: rows of {len(fallen)} weights don't divide into its blocks, llama.cpp fell back: {got}\n"
                )
            write_json(self.work / f"{kind}.json", {"tensors_by_type": written.tensors_by_type, "fallbacks": fallen})
        return path

    def _judged(self, name: str, path: Path, reference: Path) -> fidelity.Judged:
        """A file's judgements of the held-out pairs."""
        pairs = self._fitting(reference)
        known = self._load(f"judged-{name}.json")
        if known is not None:
            return fidelity.Judged.from_json(path, known, pairs)
        with self._timed(f"judge {name}"):
            judged = fidelity.judge_file(
                path,
                pairs,
                seed=self.request.seed,
                votes=self.request.votes,
                threads=self.request.threads,
                context=self.prompt_tokens + self.judgement_tokens + 2,
                max_tokens=self.judgement_tokens,
                progress=_shown(f"judging with {name}"),
            )
        write_json(self.work / f"judged-{name}.json", judged.to_json())
        return judged

    def _fidelity(
        self, reference: Path, files: Mapping[str, Path]
    ) -> tuple[dict[str, Any], dict[str, calibration.Calibration]]:
        """fidelity.json, and the calibration of every file that has enough readable pairs for one."""
        original = self._judged(self.precise, reference, reference)
        others = {
            name: self._judged(name, path, reference)
            for name, path in files.items()
            if name not in (self.precise, "hf", "lora")
        }
        pairs = self._fitting(reference)
        context = self.prompt_tokens + self.judgement_tokens + 2
        known = self._load("divergence.json") or {}
        missing = [name for name in others if name not in known]
        if missing:
            with self._timed("divergence"):
                sample = original.pairs[fidelity.DECODINGS[0]][:DIVERGENCE_PAIRS]
                tokens = fidelity.verdict_tokens(reference, sample, threads=self.request.threads, context=context)
                for name in missing:
                    near = fidelity.divergence(tokens, files[name], threads=self.request.threads, context=context)
                    known[name] = dataclasses.asdict(near)
                    write_json(self.work / "divergence.json", known)
        divergences = {name: fidelity.Divergence(**known[name]) for name in others}
        choice, bounds, reporting = None, None, None
        if self.request.auto:
            choosing, reporting = fidelity.halves(pairs)
            quantized = {name: file for name, file in others.items() if name in quantizer.TYPES}
            offered, count = fidelity.candidates(original, quantized, choosing)
            choice = fidelity.choose(offered, self.request.max_loss, count, self.precise)
            bounds = {candidate.type: candidate.bound for candidate in offered}
            sys.stderr.write(choice.reason + "\n")
        found = fidelity.report(
            original,
            others,
            divergences,
            headline=self._headline(),
            pairs=reporting,
            original=self.precise,
            choice=choice,
            bounds=bounds,
            versions={name: metadata.version(name) for name in ("llama-cpp-python", "gguf", "torch", "transformers")},
            seed=self.request.seed,
        )
        found["dropped_too_long"] = self._traffic(reference)["dropped"]
        calibrations = {}
        for name, judged in {self.precise: original, **others}.items():
            with contextlib.suppress(UserError):  # too few readable pairs: the file then carries no calibration
                calibrations[name] = calibration_of(judged)
        return found, calibrations

    def _headline(self) -> str:
        count = budget.parameters_of(self.source.shape)
        if self.source.rubric == "arena":
            return f"a judge of {count:,} parameters of ours: shows the method, says nothing of Qwen3-8B"
        return f"{self.name}, {count:,} parameters"

    # what comes out

    def _finish(
        self,
        kept: Mapping[str, Path],
        parity: Mapping[str, Any] | None,
        matrix: Path | None,
        merging: Mapping[str, Any] | None,
        found: Mapping[str, Any] | None,
        calibrations: Mapping[str, calibration.Calibration] | None,
    ) -> dict[str, Any]:
        """Describe the files, move them into OUT, write what stands beside them, export.json last."""
        out = self.request.out
        files = []
        for kind, path in sorted(kept.items(), key=lambda item: item[0] == "hf"):
            target = out / ("hf" if kind == "hf" else f"{self.name}-{kind}.gguf")
            if not target.exists():
                if kind not in ("hf", "lora"):
                    self._describe(kind, path, parity, found, (calibrations or {}).get(kind))
                place_finished(path, target)
            files.append(self._row(kind, target, found))
        if matrix is not None:
            shutil.copyfile(matrix, self.work / "imatrix.copy")
            os.replace(self.work / "imatrix.copy", out / "imatrix.gguf")
        if found is not None:
            fidelity.write_report(out, found)
        result = {
            "schema": 1,
            "name": self.name,
            "judge": self.request.judge,
            "version": __version__,
            "files": files,
            "parity": parity,
            "merging": merging,
            "importance": None if matrix is None else {"path": "imatrix.gguf", "from": self.request.imatrix},
            "choice": None if found is None else found["choice"],
            "pairs": len(self.heldout),
            "seconds": self.seconds,
        }
        judge = served(files)
        if judge is not None:
            context = self.prompt_tokens + self.judgement_tokens
            text = modelfile(judge, self.source.protocol, context, max_tokens=self.judgement_tokens)
            write_text(out / "Modelfile", text)
        write_text(out / "README.md", self._card(result, found))
        names = [path.name for path in sorted(out.iterdir()) if path.name not in (".work", "SHA256SUMS", "export.json")]
        write_text(out / "SHA256SUMS", "".join(f"{digest}  {name}\n" for digest, name in digests_of(out, names)))
        write_json(out / "export.json", result | {"written": [*names, "SHA256SUMS"]})
        shutil.rmtree(self.work, ignore_errors=True)
        return result

    def _describe(
        self,
        kind: str,
        path: Path,
        parity: Mapping[str, Any] | None,
        found: Mapping[str, Any] | None,
        calibrated: calibration.Calibration | None,
    ) -> None:
        """What the file says of itself now that it has been measured."""
        changes: dict[str, Any] = {
            description.PREFIX + "fingerprint": description.fingerprint(path),
            description.PREFIX + "parity": json.dumps(parity),
        }
        if calibrated is not None:
            changes[description.PREFIX + "calibration"] = calibrated.to_json()
        if found is not None and kind != self.precise:
            changes[description.PREFIX + "fidelity"] = json.dumps(fidelity.stated(found, kind))
        rewrite(path, changes)

    def _row(self, kind: str, path: Path, found: Mapping[str, Any] | None) -> dict[str, Any]:
        row: dict[str, Any] = {"type": kind, "path": path.name, "bytes": size_of(path)}
        measured = next((file for file in (found or {}).get("files", ()) if file["type"] == kind), None)
        if kind == self.precise and found is not None:
            row |= {"flips": 0.0, "accuracy_loss": 0.0, "reference": True}
        elif found is not None and measured is not None:
            constrained = measured["decodings"][found["decoding"]]
            keys = ("accuracy", "accuracy_loss_low", "accuracy_loss_high", "unreadable", "tokens_per_second")
            row |= {key: measured[key] for key in ("flips", "accuracy_loss", "loss_bound")}
            row |= {key: constrained[key] for key in keys}
        else:
            row |= {"flips": None, "accuracy_loss": None}
        return row | (self._load(f"{kind}.json") or {})

    def _card(self, result: Mapping[str, Any], found: Mapping[str, Any] | None) -> str:
        names = [row["path"] for row in result["files"]]
        digests = {name: digest for digest, name in digests_of(self.request.out, names)}
        merging = result["merging"] or {}
        matrix = None
        if result["importance"] is not None:
            given = self.request.imatrix != "judging"
            matrix = (
                f"the file {Path(self.request.imatrix).name}"
                if given
                else ("judging prompts of training pairs, with the judge's own judgements of them")
            )
        return card(
            name=self.name,
            version=__version__,
            protocol=self.source.protocol,
            context=self.prompt_tokens + self.judgement_tokens,
            files=[
                CardFile(row["path"], row["bytes"], digests.get(row["path"], ""), what_it_is(row))
                for row in result["files"]
            ],
            about=self.source.about,
            trained=self.source.trained,
            fidelity=None if found is None else fidelity.table(found),
            parity=result["parity"],
            importance=matrix,
            merges=[
                MergeFigure(way, row["accuracy"], row["low"], row["high"], row["n"], way == merging["onto"])
                for way, row in merging.get("reporting", {}).items()
            ],
        )

    # small things

    def _load(self, name: str) -> Any:
        path = self.work / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _once(self, stage: str, result: Path, make: Callable[[], object]) -> None:
        if not result.exists():
            with self._timed(f"{stage} {result.stem}"):
                make()

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - began, 2)
        write_json(self.work / "seconds.json", self.seconds)


def _shown(label: str, unit: int = 1) -> Callable[[int, int], None]:
    """Progress on stderr for a stage that calls back with (done, all), shown in so many at a time."""
    shown: list[Progress] = []

    def at(done: int, total: int) -> None:
        if not shown:
            shown.append(Progress(label, -(-total // unit), even=False))
        shown[0].at(-(-done // unit))

    return at
