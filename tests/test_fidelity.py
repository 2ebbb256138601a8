"""Fidelity of quantized judges: comparison, bounds, choice, report; judging and divergence on real GGUF files."""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from random_qwen import write_model

from patarm_lite import arena
from patarm_lite.errors import UserError
from patarm_lite.gguf_file import read_gguf
from patarm_lite.judge.description import describe, fingerprint, read_description
from patarm_lite.metrics import pair_to_row
from patarm_lite.prompts import Protocol
from patarm_lite.quantize import fidelity
from patarm_lite.quantize.choice import Candidate, bound_of, choose, halves, loss_bound, pairs_needed
from patarm_lite.quantize.fidelity import Divergence, Judged, compare
from patarm_lite.records import JudgedPair, Pair, Turn, Verdict, Vote

Row = tuple[int | None, int | None]


def vote(score: int | None, expected: float | None = None) -> Vote:
    return Vote(Verdict(score, None if score else "truncated"), "", expected)


def pair(number: int) -> Pair:
    return Pair((Turn("user", f"question {number}"),), f"good {number}", f"bad {number}", id=str(number))


def judged(rows: Sequence[Row], move: float = 0.0) -> list[JudgedPair]:
    """Pairs with one vote a side: (chosen's score, rejected's); expected scores are the scores plus `move`."""

    def side(score: int | None) -> tuple[Vote, ...]:
        return (vote(score, None if score is None else score + move),)

    return [JudgedPair(pair(i), side(chosen), side(rejected)) for i, (chosen, rejected) in enumerate(rows)]


def file(rows: Sequence[Row], size: int = 1000, name: str = "f16", move: float = 0.0) -> Judged:
    found = judged(rows, move)
    by = {"constrained": found, "free": found}
    return Judged(Path(f"{name}.gguf"), size, 1, 1, by, dict.fromkeys(by, 2.0), dict.fromkeys(by, 50.0))


BEFORE: list[Row] = [(9, 3), (5, 5), (2, 7), (None, 4)]
AFTER: list[Row] = [(9, 3), (6, 5), (None, 7), (None, 4)]


# --- comparing ---


def test_flips_are_the_pairs_whose_outcome_changed() -> None:
    row = compare(file(BEFORE), file(AFTER))["free"]
    assert row["flips"] == 0.5
    assert row["flip_counts"] == {"tied -> right": 1, "wrong -> unreadable": 1}
    assert (row["unreadable_reference"], row["unreadable"]) == (1 / 8, 2 / 8)
    assert (row["accuracy_reference"], row["accuracy"]) == (1.5 / 4, 2 / 4)
    assert row["accuracy_loss"] == -0.125 and row["n"] == 4
    assert row["accuracy_loss_low"] <= -0.125 <= row["accuracy_loss_high"]


def test_a_file_that_judges_alike_loses_nothing() -> None:
    row = compare(file(BEFORE), file(BEFORE))["constrained"]
    assert (row["flips"], row["accuracy_loss"], row["accuracy_loss_low"], row["accuracy_loss_high"]) == (0, 0, 0, 0)
    assert row["scores"]["sampled"]["pearson"] == pytest.approx(1) and row["scores"]["sampled"]["same"] == 1
    assert row["scores"]["expected"]["shift"] == 0


def test_scores_are_compared_where_both_files_could_read() -> None:
    scores = compare(file(BEFORE), file(AFTER, move=0.5))["free"]["scores"]
    # readable in both: 9 3 5 5 7 4 -> 9 3 6 5 7 4
    assert scores["sampled"]["n"] == 6
    assert scores["sampled"]["shift"] == pytest.approx(1 / 6) and scores["sampled"]["same"] == pytest.approx(5 / 6)
    assert scores["sampled"]["pearson"] == pytest.approx(np.corrcoef([9, 3, 5, 5, 7, 4], [9, 3, 6, 5, 7, 4])[0, 1])
    assert scores["expected"]["shift"] == pytest.approx(1 / 6 + 0.5)
    assert scores["expected"]["shift_low"] <= scores["expected"]["shift"] <= scores["expected"]["shift_high"]


def test_files_judged_in_different_ways_are_not_compared() -> None:
    with pytest.raises(UserError, match="different votes"):
        compare(file(BEFORE), Judged(Path("o"), 1, 2, 1, file(BEFORE).pairs, {}, {}))
    with pytest.raises(UserError, match="same pairs"):
        loss_bound(judged(BEFORE), judged(BEFORE)[::-1])


def test_without_expected_scores_there_is_no_figure_of_them() -> None:
    bare = [JudgedPair(pair(i), (vote(8),), (vote(3),)) for i in range(3)]
    plain = Judged(Path("p"), 1, 1, 1, {"free": bare}, {"free": 1.0}, {"free": 1.0})
    row = compare(plain, plain)["free"]
    assert row["expected"] is None and row["scores"]["expected"] is None


# --- bounds ---


def test_no_flip_at_all_still_leaves_three_in_n() -> None:
    assert bound_of([0.0] * 100) == pytest.approx(1 - 0.05**0.01)
    assert bound_of([]) == 1.0 and bound_of([1.0]) == 1.0


def test_one_loss_is_bounded_as_clopper_and_pearson_do() -> None:
    beta = pytest.importorskip("scipy.stats").beta
    for lost, n in ((1, 100), (1, 480), (4, 300)):
        exact = float(beta.ppf(0.95, lost + 1, n - lost))
        assert bound_of([1.0] * lost + [0.0] * (n - lost)) == pytest.approx(exact, abs=1e-9)


def test_many_losses_and_wins_are_bounded_as_by_the_normal_distribution() -> None:
    losses = np.array([1.0] * 300 + [-1.0] * 200 + [0.0] * 4500)
    normal = losses.mean() + 1.6449 * losses.std() / math.sqrt(len(losses))
    assert normal <= bound_of(losses.tolist()) < 1.02 * normal


@pytest.mark.parametrize(
    ("n", "lost", "won"), [(n, lost, won) for n in (60, 200) for lost in (0.01, 0.03, 0.08) for won in (0, 0.01, 0.05)]
)
def test_the_bound_holds_in_95_of_100_cases(n: int, lost: float, won: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    covered = 0.0  # over all outcomes (losses, wins) of n pairs
    for losses in range(n + 1):
        p = stats.binom.pmf(losses, n, lost)
        if p < 1e-7:
            continue
        wins = np.arange(n - losses + 1)
        for win, q in zip(wins, stats.binom.pmf(wins, n - losses, won / (1 - lost)), strict=True):
            if p * q > 1e-7 and bound(n, losses, int(win)) >= lost - won:
                covered += p * q
    assert covered >= 0.95 - 1e-4


@functools.cache
def bound(n: int, losses: int, wins: int) -> float:
    return bound_of([1.0] * losses + [-1.0] * wins + [0.0] * (n - losses - wins))


def test_just_above_the_bound_of_one_loss_it_holds_too() -> None:
    lost = bound(100, 0, 0) + 1e-6  # the hardest place: no loss happens with just under 5 %
    assert (1 - lost) ** 100 < 0.05 and bound(100, 1, 0) > lost


def test_losses_that_go_together_by_prompt_count_for_less() -> None:
    losses = [1.0] * 5 + [0.0] * 195
    apart, together = range(200), [i // 5 for i in range(200)]
    assert bound_of(losses, together) > bound_of(losses, apart) == bound_of(losses)


def test_half_a_loss_counts_half() -> None:
    assert bound_of([0.5, 0.5] + [0.0] * 98) < bound_of([1.0, 1.0] + [0.0] * 98)
    assert loss_bound(judged([(9, 3)] * 50), judged([(9, 3)] * 49 + [(5, 5)])) >= bound(50, 0, 0)


# --- choosing ---


def test_halves_are_by_prompt_and_do_not_depend_on_order_or_company() -> None:
    pairs = [pair(i) for i in range(200)] + [Pair(pair(i).prompt, "x", "y") for i in range(200)]
    choosing, reporting = halves(pairs)
    assert len(choosing) + len(reporting) == 400 and 140 < len(choosing) < 260
    assert not {p.prompt for p in choosing} & {p.prompt for p in reporting}
    again, _ = halves(pairs[::-1][:250])
    assert {p.prompt for p in again} <= {p.prompt for p in choosing}


def test_the_smallest_file_that_is_shown_good_enough_is_kept() -> None:
    files = [Candidate("q8_0", 80, 0.004), Candidate("q5_k_m", 50, 0.009), Candidate("q4_k_m", 40, 0.02)]
    kept = choose(files, 0.01, pairs=500)
    assert (kept.type, kept.enough) == ("q5_k_m", True)
    assert choose(files, 0.03, pairs=500).type == "q4_k_m"


def test_with_too_few_pairs_q8_0_is_kept_and_the_number_needed_is_said() -> None:
    files = [Candidate("q8_0", 80, 0.02), Candidate("q4_k_m", 40, 0.02)]
    kept = choose(files, 0.01, pairs=298)
    assert (kept.type, kept.enough, kept.needed) == ("q8_0", False, 299)  # 0.99 ** 299 < 0.05 < 0.99 ** 298
    assert "299" in kept.reason and "598" in kept.reason
    assert choose(files[1:], 0.01, pairs=0).type == "q4_k_m"


def test_where_every_file_loses_too_much_the_original_is_kept() -> None:
    kept = choose([Candidate("q2_k", 20, 0.3), Candidate("q8_0", 80, 0.02)], 0.01, pairs=1000)
    assert (kept.type, kept.enough) == ("f16", True) and "q8_0" in kept.reason


def test_candidates_are_bounded_by_their_worse_way_of_decoding() -> None:
    original, worse = file([(9, 3)] * 40), judged([(9, 3)] * 30 + [(3, 9)] * 10)
    other = Judged(Path("q"), 7, 1, 1, {"constrained": original.pairs["free"], "free": worse}, {}, {})
    [found], pairs = fidelity.candidates(original, {"q4_0": other}, [pair(i) for i in range(40)])
    assert pairs == 40 and found == Candidate("q4_0", 7, loss_bound(original.pairs["free"], worse))
    assert fidelity.candidates(original, {"q4_0": other}, []) == ([Candidate("q4_0", 7, 1.0)], 0)


def test_a_loss_that_is_no_share_is_refused() -> None:
    for value in (0, 1, -0.1, 5):
        with pytest.raises(UserError, match="between 0 and 1"):
            pairs_needed(value)


# --- report ---


def finished_report() -> dict[str, object]:
    files = {"q8_0": file(BEFORE, 500, "q8_0"), "q4_0": file(AFTER, 300, "q4_0", move=0.5)}
    near = {"q8_0": Divergence(1e-5, 1e-6, 1e-3, 0.999, 70, 7, 8)}
    choice = choose([Candidate(name, f.bytes, 0.9) for name, f in files.items()], 0.01, 4)
    return fidelity.report(file(BEFORE), files, near, headline="a judge of 7 parameters", choice=choice)


def test_the_report_is_json_a_table_and_two_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = finished_report()
    written = fidelity.write_report(tmp_path, report)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    data = json.loads((tmp_path / "fidelity.json").read_text(encoding="utf-8"))
    assert data == json.loads(json.dumps(report)) and data["schema"] == 1
    assert [(row["type"], row["path"], row["bytes"], row["flips"], row["accuracy_loss"]) for row in data["files"]] == [
        ("q8_0", "q8_0.gguf", 500, 0, 0),
        ("q4_0", "q4_0.gguf", 300, 0.5, -0.125),
    ]
    text = (tmp_path / "fidelity.md").read_text(encoding="utf-8")
    assert text.startswith("**a judge of 7 parameters**") and "too few pairs" in text
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 2 * 5 and set(tables) == {13}
    assert (tmp_path / "fidelity.png").read_bytes()[:4] == b"\x89PNG"
    assert "a judge of 7 parameters" in (tmp_path / "fidelity.svg").read_text(encoding="utf-8")


def test_figures_come_from_the_pairs_asked_for() -> None:
    found = fidelity.report(file(BEFORE), {"q": file(AFTER)}, {}, headline="h", pairs=[pair(0), pair(1)])
    row = found["files"][0]
    assert (found["n"], found["half"], row["flips"], row["accuracy_loss"]) == (2, "reporting", 0.5, -0.25)
    with pytest.raises(UserError, match="did not judge"):
        file(BEFORE).only([pair(9)])


def test_a_file_states_its_own_row() -> None:
    report = finished_report()
    own = fidelity.stated(report, "q4_0")
    assert own["type"] == "q4_0" and own["decodings"]["free"]["flips"] == 0.5 and own["kl"] is None
    with pytest.raises(UserError, match="no file of type"):
        fidelity.stated(report, "q2_k")


def test_judgements_come_back_from_json() -> None:
    found = file(BEFORE)
    data = json.loads(json.dumps(found.to_json()))
    assert Judged.from_json(found.path, data, [pair(i) for i in range(4)]) == found


# --- on real files ---

TOKENS = 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random judge and another one of the same vocabulary whose last norm is stretched."""
    pytest.importorskip("llama_cpp")
    from patarm_lite.quantize.convert import convert

    found = tmp_path_factory.mktemp("files")
    metadata = describe(
        protocol=Protocol(instructions=False), rubrics=arena.RUBRICS, kind="arena", trained=False, about={}
    )
    for name, stretch in (("one", 3.0), ("other", 3.3)):
        model = write_model(
            found / name,
            changes={"max_position_embeddings": 2048},
            replaced={"model.norm.weight": np.full(32, stretch, np.float32)},
        )
        convert(model, found / f"{name}.gguf", dtype="f32", metadata=metadata)
    return found


@pytest.fixture(scope="module")
def few_pairs() -> list[Pair]:
    return arena.training_pairs(3, seed=1)


@pytest.fixture(scope="module")
def first(folder: Path, few_pairs: list[Pair]) -> Judged:
    return fidelity.judge_file(folder / "one.gguf", few_pairs, threads=1, max_tokens=TOKENS)


def test_a_file_judges_freely_and_constrained(first: Judged, folder: Path, few_pairs: list[Pair]) -> None:
    assert set(first.pairs) == {"constrained", "free"} and first.bytes == (folder / "one.gguf").stat().st_size
    assert [j.pair for j in first.pairs["free"]] == few_pairs
    votes = [v for j in first.pairs["constrained"] for v in (*j.chosen, *j.rejected)]
    assert all(v.verdict.score is not None and not v.verdict.faults for v in votes) and len(votes) == 6
    assert all(rate > 0 for rate in first.tokens_per_second.values())
    row = compare(first, first)["constrained"]
    assert row["unreadable"] == 0 and row["flips"] == 0


def test_the_divergence_is_that_of_the_full_distributions(first: Judged, folder: Path) -> None:
    """Against all logits of both files, in float64, with scipy. Batches of other sizes differ in the last digits."""
    from patarm_lite.judge.llamacpp import LlamaCpp

    entropy = pytest.importorskip("scipy.stats").entropy
    kept = fidelity.verdict_tokens(folder / "one.gguf", first.pairs["constrained"], threads=1)
    assert len(kept.sequences) == kept.judgements == 6
    found = fidelity.divergence(kept, folder / "other.gguf", threads=1)
    rows: list[list[np.ndarray]] = []
    for name in ("one", "other"):
        model = LlamaCpp.load(folder / f"{name}.gguf", threads=1)
        rows.append([row for ids, start in kept.sequences for row in model.logits(ids)[start - 1 : -1]])
        model.close()
    p, q = (np.exp(np.array(part, dtype=float)) for part in rows)
    wanted = entropy(p, q, axis=1)
    assert found.tokens == len(wanted) == sum(len(ids) - start for ids, start in kept.sequences)
    assert found.mean == pytest.approx(wanted.mean(), rel=2e-3) and wanted.mean() > 1e-4
    assert found.p99 == pytest.approx(np.percentile(wanted, 99), rel=2e-3)
    assert found.top1 == pytest.approx(np.mean(p.argmax(1) == q.argmax(1)))
    same = fidelity.divergence(kept, folder / "one.gguf", threads=1)
    assert same.mean < 1e-7 and same.top1 == 1


def test_a_small_memory_takes_fewer_judgements_and_says_so(first: Judged, folder: Path) -> None:
    kept = fidelity.verdict_tokens(folder / "one.gguf", first.pairs["constrained"], threads=1, memory=600_000)
    assert 1 <= len(kept.sequences) < kept.judgements == 6
    found = fidelity.divergence(kept, folder / "one.gguf", threads=1)
    assert (found.judgements, found.judgements_possible) == (len(kept.sequences), 6)


def test_a_distribution_with_a_long_tail_keeps_its_divergence() -> None:
    rng = np.random.default_rng(0)
    p, q = (np.exp(6 * rng.normal(size=50_000)) for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    kept, log_p, rest = fidelity._likely(p)
    assert len(kept) < 25_000
    assert fidelity._kl(kept, log_p, rest, q) == pytest.approx(float(p @ np.log(p / q)), rel=1e-3)


def test_calibrating_a_file_leaves_its_fingerprint(folder: Path, tmp_path: Path) -> None:
    from patarm_lite.quantize.calibrate import calibrate_file, calibration_table

    judge, pairs = tmp_path / "judge.gguf", tmp_path / "pairs.jsonl"
    judge.write_bytes((folder / "one.gguf").read_bytes())
    before = fingerprint(judge)
    rows = [pair_to_row(p) for p in arena.training_pairs(32, seed=2)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = calibrate_file(judge, [str(pairs)], threads=1, max_tokens=TOKENS)
    assert fingerprint(judge) == before == found["fingerprint"] and found["judged"] == 32
    stated = read_description(read_gguf(judge).metadata)
    assert stated.calibration is not None and stated.fingerprint == before
    assert json.loads(stated.calibration.to_json())["slope"] == found["slope"]
    assert stated.calibration.pairs + found["how"]["check"]["pairs"] == 32
    assert "32 pairs judged" in calibration_table(found)


def test_too_few_pairs_leave_the_file_as_it_was(folder: Path, tmp_path: Path) -> None:
    from patarm_lite.quantize.calibrate import calibrate_file

    judge, pairs = tmp_path / "judge.gguf", tmp_path / "pairs.jsonl"
    judge.write_bytes((folder / "one.gguf").read_bytes())
    pairs.write_text("".join(json.dumps(pair_to_row(p)) + "\n" for p in arena.training_pairs(4, seed=2)))
    with pytest.raises(UserError, match="at least 10"):
        calibrate_file(judge, [str(pairs)], threads=1, max_tokens=TOKENS)
    assert judge.read_bytes() == (folder / "one.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge.gguf", "pairs.jsonl"]


def test_a_damaged_weight_is_one_line(folder: Path, few_pairs: list[Pair], tmp_path: Path) -> None:
    data = bytearray((folder / "one.gguf").read_bytes())
    place = read_gguf(folder / "one.gguf").tensor("blk.0.attn_q.weight").offset
    struct.pack_into("<f", data, place, math.nan)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(bytes(data))
    with pytest.raises(UserError) as caught:
        fidelity.judge_file(bad, few_pairs, threads=1, max_tokens=TOKENS)
    assert "\n" not in str(caught.value)
