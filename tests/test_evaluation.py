"""Evaluating a run's judge: sampled votes, expected scores, pair files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, little_recipe, little_tokenizer

from patarm_lite import arena
from patarm_lite.errors import UserError
from patarm_lite.prompts import Encoder, Protocol
from patarm_lite.records import Pair, Turn
from patarm_lite.training.evaluation import Sampler, evaluate_run, judge_pairs, open_judge

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def sampler(little_run: Path) -> Sampler:
    """The little run's judge, eight judgements at a time."""
    torch.set_num_threads(1)
    encoder, model, tokenizer, _ = open_judge(little_run / "judge", little_recipe())
    return Sampler(model, tokenizer, encoder, max_tokens=99, batch_size=8)


def prompts_of(sampler: Sampler, pairs: int) -> list[list[int]]:
    drawn = arena.heldout_pairs(pairs, seed=3)
    return [ids for pair in drawn for ids in sampler.encoder.pair_ids(pair, arena.RUBRICS[pair.task])]


# --- expected scores ---


def brute_force(sampler: Sampler, context: list[int]) -> tuple[float | None, float]:
    """Expected score and mass behind `context`, which ends with `<score>`: two passes over one row, no padding."""
    token = sampler.tokenizer.convert_tokens_to_ids
    with torch.no_grad():
        first = torch.softmax(sampler.model(input_ids=torch.tensor([context])).logits[0, -1].double(), 0)
        after = torch.softmax(sampler.model(input_ids=torch.tensor([[*context, token("1")]])).logits[0, -1].double(), 0)
    close = sampler.tokenizer.encode("</score>", add_special_tokens=False)[0]
    p = {k: float(first[token(str(k))]) for k in range(2, 10)}
    p[10] = float(first[token("1")] * after[token("0")])
    p[1] = float(first[token("1")] * after[close])
    mass = sum(p.values())
    return (sum(k * share for k, share in p.items()) / mass if mass >= 0.5 else None), mass


def test_expected_scores_of_a_padded_batch_are_those_of_each_row_alone(sampler: Sampler) -> None:
    one = sampler.tokenizer.convert_tokens_to_ids("1")
    opening = sampler.tokenizer.encode("<score>", add_special_tokens=False)
    judgement = arena.judgement_text(["so (3): start with so"] * 3, ["so: yes (9)"] * 3, "5").partition("<score>")[0]
    head = sampler.encoder.judgement_ids(judgement)[:-1]
    contexts = [[*prompt, *head, *opening] for prompt in prompts_of(sampler, 4)]
    contexts += [prompt[:9] for prompt in contexts[:2]]  # and places where no score is due
    assert len({len(context) for context in contexts}) > 3
    found = sampler._expected([[*context, one] for context in contexts])
    expected = [brute_force(sampler, context) for context in contexts]
    assert [mass for _, mass in found] == pytest.approx([mass for _, mass in expected], abs=1e-5)
    assert [e is None for e, _ in found] == [e is None for e, _ in expected]
    assert [e or 0.0 for e, _ in found] == pytest.approx([e or 0.0 for e, _ in expected], abs=1e-4)
    assert any(e is not None for e, _ in found) and any(e is None for e, _ in found)


def test_the_expected_score_of_a_vote_is_read_behind_its_own_rubric_and_findings(sampler: Sampler) -> None:
    """Not behind the prompt alone: the judgement so far is part of the context."""
    prompt = prompts_of(sampler, 1)[0]
    texts = [
        arena.judgement_text(["so (3): start with so"] * 3, [f"so: {finding} ({score})"] * 3, "7")
        for finding, score in (("yes", 9), ("no", 2))
    ]
    completions = [sampler.encoder.judgement_ids(text) for text in texts]
    votes = sampler._read([prompt, prompt], completions, expected=True)
    opening = sampler.tokenizer.encode("<score>", add_special_tokens=False)
    for vote, text, completion in zip(votes, texts, completions, strict=True):
        head = sampler.encoder.judgement_ids(text.partition("<score>")[0])[:-1]
        assert completion[: len(head) + len(opening)] == [*head, *opening]
        expected, mass = brute_force(sampler, [*prompt, *head, *opening])
        assert vote.verdict.score == 7 and vote.tokens == len(completion)
        assert vote.mass == pytest.approx(mass, abs=1e-5)
        assert vote.expected == (None if expected is None else pytest.approx(expected, abs=1e-4))
    assert votes[0].mass != pytest.approx(votes[1].mass, abs=1e-5)


def test_an_unreadable_judgement_has_no_expected_score(sampler: Sampler) -> None:
    prompt = prompts_of(sampler, 1)[0]
    cut = sampler.encoder.judgement_ids("<score>7</score>")
    vote = sampler._read([prompt], [cut], expected=True)[0]
    assert (vote.verdict.score, vote.verdict.problem) == (None, "tags_missing")
    assert (vote.expected, vote.mass) == (None, None)


# --- votes ---


def test_votes_depend_on_the_seed_alone(sampler: Sampler) -> None:
    prompts = prompts_of(sampler, 3)
    first = sampler.votes(prompts, k=2, seed=1)
    torch.rand(5)
    assert sampler.votes(prompts, k=2, seed=1) == first
    other = sampler.votes(prompts, k=2, seed=2)
    assert [vote.text for votes in other for vote in votes] != [vote.text for votes in first for vote in votes]
    assert [len(votes) for votes in first] == [2] * 6
    assert len({vote.text for votes in first for vote in votes}) > 6, "votes of one prompt are drawn apart"


def test_votes_leave_a_judge_in_training_in_training(sampler: Sampler) -> None:
    for training in (True, False):
        sampler.model.train(training)
        sampler.votes(prompts_of(sampler, 1), k=1, seed=1)
        assert sampler.model.training == training


def test_a_judgement_is_cut_at_the_limit_and_then_truncated(sampler: Sampler) -> None:
    short = Sampler(sampler.model, sampler.tokenizer, sampler.encoder, max_tokens=5, batch_size=8)
    for votes in short.votes(prompts_of(sampler, 2), k=2, seed=1):
        assert [(vote.verdict.problem, vote.tokens) for vote in votes] == [("truncated", 5)] * 2


class Counting(Sampler):
    """Answers every prompt with its length and the number of the vote instead of judging."""

    def _generate(self, prompts: Sequence[list[int]], k: int, temperature: float) -> list[list[int]]:
        self.batches = [*getattr(self, "batches", []), len(prompts) * k]
        return [self.encoder.judgement_ids(f"{len(prompt)} {vote}") for prompt in prompts for vote in range(k)]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_votes_come_in_the_order_of_the_prompts_whatever_the_batches(batch_size: int) -> None:
    """Prompts are sorted by length for the batches; their votes must not be."""
    tokenizer = little_tokenizer()
    model = arena.build_judge(tokenizer, hidden=16, layers=1, heads=2, mlp=16, seed=1)
    encoder = Encoder.from_tokenizer(tokenizer, Protocol(instructions=False))
    counting = Counting(model, tokenizer, encoder, max_tokens=9, batch_size=batch_size)
    prompts = [[7] * length for length in random.Random(1).sample(range(1, 60), 13)]
    found = counting.votes(prompts, k=3, seed=1)
    assert [[vote.text for vote in votes] for votes in found] == [[f"{len(p)} {i}" for i in range(3)] for p in prompts]
    assert max(counting.batches) <= max(3, batch_size) and sum(counting.batches) == 39


def test_each_side_of_a_pair_is_judged_on_its_own_prompt() -> None:
    tokenizer = little_tokenizer()
    model = arena.build_judge(tokenizer, hidden=16, layers=1, heads=2, mlp=16, seed=1)
    encoder = Encoder.from_tokenizer(tokenizer, Protocol(instructions=False))
    counting = Counting(model, tokenizer, encoder, max_tokens=9, batch_size=4)
    pairs = [Pair((Turn("user", "hi"),), "red " * i, "blue " * (20 - i)) for i in range(1, 6)]
    rubric = arena.RUBRICS.__getitem__
    judged = judge_pairs(counting, pairs, rubric, k=2, seed=1, label="judging")
    for pair, item in zip(pairs, judged, strict=True):
        assert item.pair is pair
        chosen, rejected = (str(len(ids)) for ids in encoder.pair_ids(pair, rubric("chat")))
        assert [vote.text for vote in item.chosen] == [f"{chosen} 0", f"{chosen} 1"]
        assert [vote.text for vote in item.rejected] == [f"{rejected} 0", f"{rejected} 1"]


# --- a run's judge ---


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = [
    {"prompt": pair.prompt[0].content, "chosen": pair.chosen, "rejected": pair.rejected, "task": pair.task}
    for pair in arena.heldout_pairs(12, seed=8)
]


def test_a_finished_runs_judge_repeats_the_runs_own_evaluation(little_run: Path) -> None:
    """What is loaded from the folder is what was evaluated at the end of the run."""
    torch.set_num_threads(1)
    again = evaluate_run(little_run, [], None, seed=1)
    after = json.loads((little_run / "summary.json").read_text())["heldout"]["after"]
    assert {key: again[key] for key in after} == after
    assert (again["n"], again["dropped"], again["votes"], again["decoding"]) == (10, 0, 1, "free")


def test_a_saved_judge_carries_no_sampling_defaults(little_run: Path) -> None:
    for stage in ("sft", "judge"):
        own = json.loads((little_run / stage / "generation_config.json").read_text())
        assert not {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample"} & own.keys()


def test_eval_judges_a_pair_file_and_counts_what_it_leaves_out(
    command: Callable[..., Command], little_run: Path, tmp_path: Path
) -> None:
    long = {"prompt": "name a color", "chosen": "red " * 500, "rejected": "blue", "task": "chat"}
    same = {"prompt": "name a color", "chosen": "red", "rejected": "red", "task": "chat"}
    pairs = write_pairs(tmp_path / "pairs.jsonl", [*ROWS, long, same])
    arguments = ("eval", little_run, "--pairs", pairs, "--votes", 3, "--seed", 4, "--json")
    first, second = command(*arguments), command(*arguments)
    assert first.wait() == 0, first.said()
    assert second.wait() == 0
    found = json.loads(first.out.read_text())
    assert first.out.read_text() == second.out.read_text()
    assert (found["n"], found["dropped"], found["votes"], found["seed"]) == (12, 2, 3, 4)
    assert {"accuracy", "low", "high", "accuracy_mean3", "accuracy_expected", "unreadable", "ties"} <= found.keys()
    assert found["rows"]["task=chat"]["n"] == sum(row["task"] == "chat" for row in ROWS) == 4
    assert 0 <= found["low"] <= found["accuracy"] <= found["high"] <= 1


def test_eval_of_a_run_without_a_judge_says_how_to_finish_it(little_run: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text((little_run / "run.json").read_text())
    with pytest.raises(UserError, match="holds no judge yet; finish it with: patarm-lite train --resume"):
        evaluate_run(tmp_path, [], None, seed=1)


def test_eval_of_pairs_that_are_all_too_long_says_so(little_run: Path, tmp_path: Path) -> None:
    long = {"prompt": "name a color", "chosen": "red " * 500, "rejected": "blue", "task": "chat"}
    pairs = write_pairs(tmp_path / "pairs.jsonl", [long])
    with pytest.raises(UserError, match=r"no pair is left to judge: 1 rows dropped \(1 over 384 tokens\)"):
        evaluate_run(little_run, [str(pairs)], None, seed=1)
