"""Every real file of pairs loads, and the counts are those its description states."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from patarm_lite.pairs import contamination, load_pairs, render_survey, split_by_prompt, survey
from patarm_lite.pairs.survey import kind_of
from patarm_lite.records import Pair, Turn

PLAIN = {
    "train/autoj_pairs.jsonl.gz": (979, "prompt, chosen, rejected"),
    "train/debugbench_pairs.jsonl.gz": (2000, "prompt, chosen, rejected"),
    "train/gsm8k_pairs.jsonl.gz": (544, "prompt, chosen, rejected"),
    "train/hh_harmless_pairs.jsonl.gz": (2302, "prompt, chosen, rejected"),
    "train/pandalm_pairs.jsonl.gz": (772, "prompt, chosen, rejected"),
    "llmbar/Natural.json": (100, "two responses and a winner"),
    "llmbar/Adversarial_Neighbor.json": (134, "two responses and a winner"),
    "llmbar/Adversarial_GPTInst.json": (92, "two responses and a winner"),
    "llmbar/Adversarial_GPTOut.json": (47, "two responses and a winner"),
    "llmbar/Adversarial_Manual.json": (46, "two responses and a winner"),
    "judgebench/gpt4o.jsonl.gz": (350, "two responses and a winner"),
    "rewardbench_partial/llmbar_as_rewardbench.jsonl": (419, "RewardBench"),
    "prior_sets/anthropic_hhh.jsonl": (221, "RewardBench"),
}
SETS = {
    "rewardbench2_like/gsm8k_best_of_4.jsonl.gz": (188, 3, "RewardBench 2"),
    "rmbench/chat.jsonl.gz": (129, 9, "RM-Bench"),
    "rmbench/code.jsonl.gz": (228, 9, "RM-Bench"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_each_row_of_a_real_file_becomes_a_pair_or_a_counted_duplicate(shared: Path, name: str) -> None:
    source = str(shared / "data" / name)
    rows, layout = PLAIN[name]
    loaded = load_pairs([source])
    assert loaded.rows == {source: rows} and loaded.layouts[source].startswith(layout + ":")
    assert {kind_of(one.reason) for one in loaded.dropped} <= {"duplicate"}
    assert len(loaded.pairs) + len(loaded.dropped) == rows


@pytest.mark.parametrize("name", SETS)
def test_benchmark_records_become_the_stated_number_of_pairs(shared: Path, name: str) -> None:
    source = str(shared / "data" / name)
    rows, each, layout = SETS[name]
    loaded = load_pairs([source])
    assert loaded.rows == {source: rows} and loaded.layouts[source].startswith(layout + ":")
    assert {kind_of(one.reason) for one in loaded.dropped} <= {"duplicate"}
    assert len(loaded.pairs) + len(loaded.dropped) == rows * each


def test_raw_hh_rlhf_gives_the_pairs_its_derived_file_has_and_the_one_removed_from_it(shared: Path) -> None:
    raw = load_pairs([str(shared / "data/hh_rlhf/harmless-base_test.jsonl.gz")])
    derived = load_pairs([str(shared / "data/train/hh_harmless_pairs.jsonl.gz")])
    assert (len(raw.pairs), len(raw.dropped), len(derived.pairs)) == (2303, 9, 2302)

    def keys(pairs: list[Pair]) -> set[object]:
        return {(p.prompt, p.chosen.strip(), p.rejected.strip()) for p in pairs}

    assert len(keys(raw.pairs) & keys(derived.pairs)) == 2302
    assert {pair.task for pair in raw.pairs} == {"safety"}


def test_raw_pandalm_gives_the_836_pairs_its_derivation_states(shared: Path) -> None:
    loaded = load_pairs([str(shared / "data/pandalm/testset-v1.json.gz")])
    kinds = Counter(kind_of(one.reason) for one in loaded.dropped)
    assert len(loaded.pairs) + kinds["duplicate"] == 772 + 64
    assert kinds["the chosen reply is not text"] + kinds["the rejected reply is not text"] == 6
    derived = load_pairs([str(shared / "data/train/pandalm_pairs.jsonl.gz")])
    raw = {(pair.prompt[0].content, pair.chosen, pair.rejected) for pair in loaded.pairs}
    assert {(pair.prompt[0].content, pair.chosen, pair.rejected) for pair in derived.pairs} <= raw


def test_llmbar_as_it_came_and_as_rewardbench_are_the_same_pairs(shared: Path) -> None:
    own = load_pairs([str(path) for path in sorted((shared / "data/llmbar").glob("*.json"))])
    other = load_pairs([str(shared / "data/rewardbench_partial/llmbar_as_rewardbench.jsonl")])
    assert len(own.pairs) == len(other.pairs) == 419
    assert {(p.prompt, p.chosen, p.rejected) for p in own.pairs} == {
        (p.prompt, p.chosen, p.rejected) for p in other.pairs
    }


def test_the_training_files_have_the_described_tasks_length_bias_and_no_prompt_of_the_benchmarks(shared: Path) -> None:
    loaded = load_pairs([str(path) for path in sorted((shared / "data/train").glob("*.gz"))])
    against = [
        str(path)
        for folder in ("llmbar", "judgebench", "rmbench", "ifeval", "prior_sets", "rewardbench2_like")
        for path in sorted((shared / "data" / folder).iterdir())
    ]
    data = survey(loaded, against=against)
    assert sum(loaded.rows.values()) == 6597 and data["pairs"] + data["duplicates"] == 6597
    assert data["sources"]["autoj"] == 979 and data["sources"]["gsm8k"] == 544
    by_task = data["length_bias"]["by_task"]
    assert round(by_task["safety"]["chosen_longer"], 2) == 0.44 and round(by_task["code"]["chosen_longer"], 2) == 0.51
    assert all(one["exact"] == [] for one in data["contamination"])
    render_survey(data)


def test_a_benchmark_is_contaminated_by_itself(shared: Path) -> None:
    source = str(shared / "data/judgebench/gpt4o.jsonl.gz")
    (found,) = contamination(load_pairs([source]).pairs, [source]).files
    assert len(found.exact) == 350 and found.unread == 0


def test_a_split_of_the_training_files_shares_no_prompt_and_no_slug(shared: Path) -> None:
    pairs = load_pairs([str(path) for path in sorted((shared / "data/train").glob("*.gz"))]).pairs
    train, held = split_by_prompt(pairs, 400, seed=1)
    assert (len(train), len(held)) == (len(pairs) - 400, 400)

    def marks(some: list[Pair]) -> set[tuple[Turn, ...] | str]:
        return {pair.prompt for pair in some} | {pair.meta["slug"] for pair in some if "slug" in pair.meta}

    assert not marks(train) & marks(held)
    assert len({pair.task for pair in held}) == 4
