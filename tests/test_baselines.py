"""The methods PAR is compared with, and the filter of dead pairs: their rules by hand, and each of them for real.

The judge of these tests is taught by heart to write one sound judgement whose score is 3 or 8 by chance, so that some
of what it says agrees with any preference.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from patarm_lite import arena
from patarm_lite.errors import UserError
from patarm_lite.metrics import pair_to_row
from patarm_lite.recipe import Recipe, check_recipe
from patarm_lite.records import Pair, Turn, Verdict
from patarm_lite.training.data import RunPairs
from patarm_lite.training.dead_pairs import dead

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "baselines.py"
JUDGEMENT = """<generated_rubrics>
color (3): name a color
so (3): start with so
bang (3): end with a bang
</generated_rubrics>
<eval>
color: yes (8)
so: yes (8)
bang: no (2)
</eval>
<score>{score}</score>"""


def recipe(**changes: Any) -> Recipe:
    """A recipe of seconds; `changes` by dotted key with __ for the dot."""
    data: dict[str, Any] = {
        "name": "second",
        "seed": 1,
        "threads": 1,
        "model": {"hidden": 64, "layers": 1, "heads": 2, "mlp": 128, "vocab": 500},
        "protocol": {"instructions": False, "rubric": "arena"},
        "data": {"heldout": 10, "max_prompt_tokens": 200},
        "arena": {"train_pairs": 24},
        "sft": {"steps": 100, "batch_size": 8, "lr": 1e-2, "warmup": 5},
        "grpo": {"steps": 3, "pairs_per_step": 2, "n": 2, "save_every": 2, "max_completion_tokens": 110},
        "eval": {"votes": 2},
    }
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            data.setdefault(section, {})[leaf] = value
        else:
            data[key] = value
    return check_recipe(data, "this test")


def run(out: Path, **changes: Any) -> Path:
    from patarm_lite.training.run import train

    return train(recipe(**changes), out)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def steps(folder: Path, stage: str) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in lines(folder / "metrics.jsonl") if row["stage"] == stage]


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of judgements to learn by heart."""
    path = tmp_path_factory.mktemp("taught") / "judgements.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for pair in arena.training_pairs(64, seed=9):
            row = {"prompt": pair.prompt[0].content, "response": pair.chosen, "task": pair.task}
            for score in (3, 8):  # both for the same response: nothing but chance can decide
                file.write(json.dumps({**row, "judgement": JUDGEMENT.format(score=score)}) + "\n")
    return path


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory, taught: Path) -> Path:
    """A run of `method: sft`, whose cold-started judge the other runs begin with."""
    out = tmp_path_factory.mktemp("runs") / "sft"
    return run(out, method="sft", sft__source="file", sft__file=str(taught))


def judge_of(start: Path, plan: Recipe, folder: Any, train: list[Pair]) -> Any:
    """A run's context with the cold-started judge of `start`, as a method finds it."""
    from patarm_lite.training.engine import TransformersEngine
    from patarm_lite.training.run import Context
    from patarm_lite.training.watch import StopSignal

    engine = TransformersEngine()
    model, tokenizer = engine.load(str(start / "sft"), plan.model)
    pairs = RunPairs(train, [], {})
    rubric = arena.RUBRICS.__getitem__
    return Context(folder, plan, engine, StopSignal(), rubric, pairs, train=train, model=model, tokenizer=tokenizer)


def score(*values: int | None) -> list[Verdict]:
    return [Verdict(value) if value else Verdict(None, "truncated") for value in values]


# --- rules ---


def test_a_judgement_agrees_when_it_lies_on_the_right_side_of_the_other_sides_mean() -> None:
    from patarm_lite.training.rejection import agreeing

    # means: chosen (9 + 5 + 7) / 3 = 7, rejected (6 + 7 + 2) / 3 = 5
    assert agreeing(score(9, 5, 7), score(6, 7, 2)) == ([0, 2], [0, 2])


def test_a_judgement_that_cannot_be_read_is_in_no_mean_and_never_kept() -> None:
    from patarm_lite.training.rejection import agreeing

    # were the None a 0, the rejected mean would be 3 and the 5 be kept
    assert agreeing(score(5, None), score(6, None)) == ([], [])
    assert agreeing(score(7, None), score(6, None)) == ([0], [0])


def test_nothing_agrees_with_a_side_that_is_wholly_unreadable() -> None:
    from patarm_lite.training.rejection import agreeing

    assert agreeing(score(9, 9), score(None, None)) == ([], [])


def test_a_faulty_judgement_is_not_kept_but_its_score_counts_in_the_mean() -> None:
    from patarm_lite.training.rejection import agreeing

    faulty = Verdict(9, None, faults=("criteria_count",))
    # chosen mean (9 + 5) / 2 = 7 > 6; rejected mean 6 > 5
    assert agreeing([faulty, Verdict(5)], score(6, 6)) == ([], [0, 1])


@pytest.mark.parametrize(
    ("chosen", "rejected", "cause"),
    [
        ([7, 8], [6, 5], "right"),
        ([7, 8], [7, 5], None),  # 7 against 7 is a tie, which is not right
        ([3, 4], [6, 5], "wrong"),
        ([5, 5], [5, 5], "wrong"),  # ties alone
        ([9, None], [1, 1], None),  # an unreadable judgement is not right
        ([3, None], [5, 5], "wrong"),
        ([None, None], [5, 5], "unreadable"),
        ([None, None], [None, None], "unreadable"),
    ],
)
def test_a_pair_is_dead_when_all_comparisons_are_right_or_none_is_or_none_can_be_made(
    chosen: list[int | None], rejected: list[int | None], cause: str | None
) -> None:
    assert dead(chosen, rejected) == cause


def test_an_endless_order_visits_every_item_once_an_epoch_in_ever_new_orders() -> None:
    from patarm_lite.training.baselines import endless_order

    at = endless_order(20, "seed 1")
    first, second = [at(i) for i in range(20)], [at(20 + i) for i in range(20)]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert [endless_order(20, "seed 1")(i) for i in range(20)] == first


def test_real_scores_earn_accuracy_ties_and_correlations_by_their_order() -> None:
    from patarm_lite.training.scalar import summary_of_scores

    def pair(i: int) -> Pair:
        meta = {"chosen_quality": 1.0, "rejected_quality": 0.0}
        return Pair((Turn("user", str(i)),), "one", "one two", id=str(i), meta=meta)

    found = summary_of_scores([pair(i) for i in range(4)], [0.1, -3.0, 8.5, 2.0], [0.2, -4.0, -9.0, 2.0], votes=4)
    assert found["accuracy"] == found["accuracy_mean4"] == 2.5 / 4  # wrong, right, right, tie
    assert found["ties"] == 0.25
    assert found["unreadable"] == 0.0
    assert found["low"] <= 0.625 <= found["high"]
    assert found["spearman_quality"] == pytest.approx(-found["spearman_length"])  # the longer one is the worse here
    assert "faulty" not in found
    assert found["rows"]["task=chat"]["accuracy_mean4"] == 0.625


def test_bradley_terry_learns_to_tell_two_tokens_apart(tmp_path: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, TrainingArguments

    from patarm_lite.training.scalar import padded, scalar_head, scores_of, trainer_class

    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "judge")
    rng = random.Random(1)

    def prompt(mark: int) -> list[int]:
        """4 to 9 tokens from 3 to 29 with one 1 (to be chosen) or one 2 (to be rejected) among them."""
        ids = [rng.randrange(3, 30) for _ in range(rng.randrange(3, 9))]
        ids.insert(rng.randrange(len(ids) + 1), mark)
        return ids

    pairs = [(prompt(1), prompt(2)) for _ in range(64)]
    model = scalar_head(tmp_path / "judge", seed=1, dtype=torch.float32, pad=0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        remove_unused_columns=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer_class()(
        model=model,
        args=arguments,
        train_dataset=pairs,
        data_collator=lambda batch: padded([ids for pair in batch for ids in pair], 0),
    ).train()
    scores = scores_of(model, [ids for pair in pairs for ids in pair], 0, batch_size=10)
    assert all(chosen > rejected for chosen, rejected in zip(scores[0::2], scores[1::2], strict=True))


# --- runs ---


def test_more_sft_goes_on_with_the_judgements_of_the_file(start: Path) -> None:
    assert [step for step, _ in steps(start, "more_sft")] == [1, 2, 3]
    assert len(steps(start, "sft")) == 100  # the cold start's own metrics are still there
    assert steps(start, "more_sft")[0][1] < 0.5 * steps(start, "sft")[0][1]
    assert summary(start)["method"] == "sft"
    assert summary(start)["heldout"]["after"]["unreadable"] < 0.5
    assert (start / "judge" / "protocol.json").is_file()


def test_more_sft_on_the_arena_learns_from_judgements_that_the_cold_start_did_not_see(start: Path) -> None:
    from patarm_lite.training.baselines import _fresh
    from patarm_lite.training.data import arena_examples
    from patarm_lite.training.run_folder import RunFolder

    context = judge_of(start, recipe(sft__steps=32), RunFolder(start), [])
    seen = {tuple(example.input_ids) for example in arena_examples(context.recipe, context.encoder)}
    row = _fresh(context)
    fresh = [tuple(row(i).input_ids) for i in range(300)]
    assert len(seen) == 256
    assert not seen & set(fresh)
    assert len(set(fresh)) == 300
    assert tuple(_fresh(context)(299).input_ids) == fresh[299]  # a resumed run reads the same row


def test_more_sft_without_a_source_to_go_on_with_says_so(tmp_path: Path, start: Path) -> None:
    with pytest.raises(UserError, match=r"sft\.source=none has none to go on with; use method=rejection"):
        run(tmp_path / "run", method="sft", sft__init=str(start), sft__source="none")


def test_rejection_trains_on_rounds_of_its_own_judgements(tmp_path: Path, start: Path) -> None:
    folder = run(tmp_path / "run", method="rejection", sft__init=str(start))
    rows = [row for row in lines(folder / "metrics.jsonl") if row["stage"] == "rejection"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["kept"] < 1 for row in rows)
    assert summary(folder)["heldout"]["n"] == 10
    assert (folder / "report.html").is_file()


def test_the_clock_ends_a_method_and_what_it_prepares_counts(tmp_path: Path, start: Path) -> None:
    # 0.06 seconds: the first step is over them
    folder = run(tmp_path / "run", method="rejection", minutes=0.001, sft__init=str(start))
    assert [step for step, _ in steps(folder, "rejection")] == [1]


@pytest.mark.parametrize(("method", "stage"), [("rejection", "rejection"), ("scalar", "scalar")])
def test_a_method_stopped_by_ctrl_c_and_resumed_ends_as_if_it_had_not_been(
    tmp_path: Path, start: Path, method: str, stage: str
) -> None:
    from patarm_lite.training.run import resume

    changes: dict[str, Any] = {"method": method, "sft__init": str(start), "grpo__steps": 6}
    whole = run(tmp_path / "whole", **changes)
    metrics = tmp_path / "cut" / "metrics.jsonl"

    def press() -> None:
        while not metrics.is_file() or stage not in metrics.read_text():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", **changes)
    done = len(steps(tmp_path / "cut", stage))
    assert 1 <= done < 6
    cut = resume(tmp_path / "cut")
    assert steps(cut, stage) == steps(whole, stage)


def test_a_scalar_head_reports_accuracy_and_writes_no_judgements(
    tmp_path: Path, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from patarm_lite.cli import main

    folder = run(tmp_path / "run", method="scalar", sft__init=str(start))
    after = summary(folder)["heldout"]["after"]
    scores = [row["score"] for row in lines(folder / "heldout_scores.jsonl")]
    won = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(scores[0::2], scores[1::2], strict=True)]
    assert after["accuracy"] == pytest.approx(sum(won) / 10)
    assert after["accuracy_mean2"] == after["accuracy"]
    assert not (folder / "heldout_after.jsonl").exists()
    assert {path.name for path in (folder / "judge").iterdir()} >= {"scalar.json", "model.safetensors"}
    assert "<h2>Before and after</h2>" in (folder / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["eval", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "is a scalar head" in said and "writes no judgements" in said and said.count("\n") == 1


def test_a_saved_scalar_head_gives_the_scores_it_was_evaluated_with(tmp_path: Path, start: Path) -> None:
    from transformers import AutoTokenizer

    from patarm_lite.metrics import row_to_pair
    from patarm_lite.prompts import Encoder, Protocol
    from patarm_lite.training.scalar import load_scalar, scores_of

    folder = run(tmp_path / "run", method="scalar", sft__init=str(start))
    encoder = Encoder.from_tokenizer(AutoTokenizer.from_pretrained(folder / "judge"), Protocol(instructions=False))
    pair = row_to_pair(lines(folder / "heldout.jsonl")[0])
    # one at a time: no padding
    found = scores_of(load_scalar(folder / "judge"), encoder.pair_ids(pair, arena.RUBRICS[pair.task]), 0, 1)
    stated = [row["score"] for row in lines(folder / "heldout_scores.jsonl")[:2]]
    assert found == pytest.approx(stated, abs=1e-4)


def test_a_scalar_head_refuses_an_adapter() -> None:
    with pytest.raises(UserError, match=r"model\.tuning is lora"):
        recipe(method="scalar", model__tuning="lora")


def test_a_cold_start_by_rejection_learns_from_the_bases_own_agreeing_judgements(tmp_path: Path, start: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [pair_to_row(pair) for pair in arena.training_pairs(40, seed=5)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = run(
        tmp_path / "run",
        method="scalar",
        model={"base": str(start / "judge")},
        data__pairs=[str(pairs)],
        sft__source="rejection",
        sft__steps=3,
        sft__lr=1e-3,
    )
    counts = about(folder)["rejection"]
    kept = lines(folder / "cold_start.jsonl")
    assert counts["drawn"] == about(folder)["data"]["train"] * 2 * 4
    assert counts["kept"] == len(kept) > 0
    # two scores are all this judge knows: what agrees is 8 on the chosen and 3 on the rejected side
    assert {(row["side"], row["score"]) for row in kept} <= {("chosen", 8), ("rejected", 3)}
    assert all(row["judgement"].endswith(f"<score>{row['score']}</score>") for row in kept)
    assert len(steps(folder, "sft")) == 3


def test_dead_pairs_are_left_out_and_counted_and_a_resumed_run_takes_them_from_its_file(
    tmp_path: Path, start: Path
) -> None:
    from patarm_lite.training.dead_pairs import filter_dead_pairs
    from patarm_lite.training.run_folder import RunFolder

    folder = RunFolder.create(tmp_path / "run", force=False)
    folder.note(status="running")
    pairs = arena.training_pairs(24, seed=1)
    context = judge_of(start, recipe(data__filter_votes=3), folder, pairs)
    filter_dead_pairs(context)
    rows = lines(folder / "dead_pairs.jsonl")
    assert [row["pair"] for row in rows] == [pair.id for pair in pairs]
    assert all(len(row["chosen"]) == len(row["rejected"]) == 3 for row in rows)
    assert [row["dead"] for row in rows] == [dead(row["chosen"], row["rejected"]) for row in rows]
    assert context.train == [pair for pair, row in zip(pairs, rows, strict=True) if row["dead"] is None]
    found = about(folder.path)["filter"]
    assert 0 < found["kept"] == len(context.train) < found["pairs"] == 24
    assert found["kept"] + sum(found["dead"].values()) == 24

    for row in rows:  # a file that keeps one pair alone shows that it is read and not made again
        row["dead"] = None if row is rows[3] else "wrong"
    (folder / "dead_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    resumed = judge_of(start, recipe(data__filter_votes=3), folder, pairs)
    filter_dead_pairs(resumed)
    assert resumed.train == [pairs[3]]


def test_a_run_filters_its_pairs_before_its_method_begins(tmp_path: Path, start: Path) -> None:
    folder = run(tmp_path / "run", method="scalar", sft__init=str(start), data__filter_votes=2)
    assert about(folder)["filter"]["pairs"] == about(folder)["data"]["train"] == 24
    stages = list(about(folder)["stages"])
    assert stages.index("filter") < stages.index("scalar")


def test_one_vote_a_side_can_only_call_every_pair_dead_and_is_refused(tmp_path: Path, start: Path) -> None:
    with pytest.raises(UserError, match=r"data\.filter_votes=1 .* give at least 2"):
        run(tmp_path / "run", method="scalar", sft__init=str(start), data__filter_votes=1)


# --- the benchmark's table ---


def test_the_benchmark_averages_over_seeds_and_takes_the_cold_start_from_the_par_runs() -> None:
    spec = importlib.util.spec_from_file_location("baselines_benchmark", BENCHMARK)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    def of(seed: int, method: str, before: float, after: float) -> dict[str, Any]:
        def figures(accuracy: float) -> dict[str, Any]:
            numbers = {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "accuracy_mean": accuracy}
            return numbers | {"unreadable": 0.0, "ties": 0.0, "spearman_quality": None, "spearman_length": 0.5}

        both = {"before": figures(before), "after": figures(after)}
        return {"seed": seed, "method": method, "n": 400, "votes": 4, "minutes": 5.0, **both}

    found = benchmark.collect([of(2, "par", 0.5, 0.75), of(1, "par", 0.25, 0.875), of(1, "sft", 0.3, 0.5)])
    assert found["over_seeds"]["before"]["accuracy"]["mean"] == 0.375  # of 0.5 and 0.25; 0.3 is another run's
    par = found["over_seeds"]["par"]["accuracy"]
    assert (par["mean"], par["lowest"], par["highest"]) == (0.8125, 0.75, 0.875)
    assert found["over_seeds"]["sft"]["accuracy"]["deviation"] is None
    table = benchmark.markdown(found, "tiny", jobs=1)
    par_row = next(line for line in table.splitlines() if line.startswith("| GRPO with PAR"))
    assert [cell.strip() for cell in par_row.split("|")[2:5]] == [
        "0.875 [0.775, 0.975]",
        "0.750 [0.650, 0.850]",
        "**0.812** (0.750 to 0.875)",
    ]
