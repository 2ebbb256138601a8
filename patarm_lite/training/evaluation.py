"""Evaluating a judge on pairs: k freely sampled judgements of every response, with expected scores beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from patarm_lite import arena
from patarm_lite.errors import UserError
from patarm_lite.metrics import expected_score, row_to_pair, summarise
from patarm_lite.progress import Progress
from patarm_lite.prompts import Encoder, decode_judgement
from patarm_lite.recipe import Recipe, load_recipe
from patarm_lite.records import JudgedPair, Pair, Rubric, Verdict, Vote
from patarm_lite.rubrics import primary_rubric
from patarm_lite.training.asking import EVALUATION, JUDGEMENT, Read, ask, write_rubrics
from patarm_lite.training.engine import answering, choose_engine, load_protocol, prepare_libraries
from patarm_lite.training.run_folder import RunFolder, read_lines
from patarm_lite.verdicts import parse


def rubric_for(kind: str) -> Callable[[str], Rubric]:
    """Task -> primary rubric, of the arena's short ones or the standard ones."""
    return arena.RUBRICS.__getitem__ if kind == "arena" else primary_rubric


class Sampler:
    """Draws judgements from a loaded model. Sampling is temperature 1, top_p 1, top_k off unless told otherwise."""

    def __init__(self, model: Any, tokenizer: Any, encoder: Encoder, max_tokens: int, batch_size: int) -> None:
        self.model, self.tokenizer, self.encoder = model, tokenizer, encoder
        self.max_tokens, self.batch_size = max_tokens, batch_size
        self._digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
        self._open = tokenizer.encode("<score>", add_special_tokens=False)
        self._close = tokenizer.encode("</score>", add_special_tokens=False)[0]

    def votes(
        self,
        prompts: Sequence[list[int]],
        k: int,
        seed: int,
        expected: bool = True,
        temperature: float = 1.0,
        progress: Progress | None = None,
        reads: Sequence[Read] | None = None,
    ) -> list[tuple[Vote, ...]]:
        """k votes for each prompt (token ids), in the order given.

        Deterministic for one seed, batch size, thread count and machine.

        Args:
            reads: how answers to each prompt are read; none: as whole judgements.
        """
        found: list[tuple[Vote, ...]] = [()] * len(prompts)
        for done, (at, completions) in self._batches(prompts, k, seed, temperature):
            repeated = [prompts[i] for i in at for _ in range(k)]
            readers = None if reads is None else [reads[i] for i in at for _ in range(k)]
            drawn = self._read(repeated, completions, expected, readers)
            for place, i in enumerate(at):
                found[i] = tuple(drawn[place * k : (place + 1) * k])
            if progress is not None:
                progress.at(done)
        return found

    def answers(self, prompts: Sequence[list[int]], k: int, seed: int) -> list[list[list[int]]]:
        """Ids of k answers to each prompt, end token included; drawn as votes are, and not read."""
        found: list[list[list[int]]] = [[] for _ in prompts]
        for _, (at, completions) in self._batches(prompts, k, seed, 1.0):
            for place, i in enumerate(at):
                found[i] = completions[place * k : (place + 1) * k]
        return found

    def _batches(
        self, prompts: Sequence[list[int]], k: int, seed: int, temperature: float
    ) -> Iterator[tuple[int, tuple[list[int], list[list[int]]]]]:
        """Prompts asked so far, then the places of a batch's prompts and k answers to each of them, the shortest
        prompts first."""
        import torch

        torch.manual_seed(seed)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        rows = max(1, self.batch_size // k)
        with answering(self.model):
            for start in range(0, len(order), rows):
                at = order[start : start + rows]
                completions = self._generate([prompts[i] for i in at], k, temperature)
                yield min(start + rows, len(order)), (at, completions)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        import torch

        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        return ids.to(self.model.device), mask.to(self.model.device)

    def _generate(self, prompts: Sequence[list[int]], k: int, temperature: float) -> list[list[int]]:
        import torch

        ids, mask = self._padded(prompts)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                num_return_sequences=k,
                max_new_tokens=self.max_tokens,
                eos_token_id=self.encoder.end_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return [_until(row, self.encoder.end_id) for row in out[:, ids.shape[1] :].tolist()]

    def _read(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        expected: bool,
        reads: Sequence[Read] | None = None,
    ) -> list[Vote]:
        texts = [decode_judgement(self.tokenizer, ids, self.encoder.end_id) for ids in completions]
        if reads is None:
            verdicts = [parse(text, ended, self.encoder.protocol.thinking) for text, ended in texts]
        else:
            verdicts = [read(text, ended) for read, (text, ended) in zip(reads, texts, strict=True)]
        measured = self._measured(prompts, completions, verdicts) if expected else {}
        votes = []
        for i, (verdict, (text, _)) in enumerate(zip(verdicts, texts, strict=True)):
            score, mass = measured.get(i, (None, None))
            votes.append(Vote(verdict, text, score, mass, len(completions[i])))
        return votes

    def expected_scores(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], verdicts: Sequence[Verdict]
    ) -> list[float | None]:
        """The expected score of each answer that has a score, where there is one."""
        with answering(self.model):
            measured = self._measured(prompts, completions, verdicts)
        return [measured.get(i, (None, 0.0))[0] for i in range(len(prompts))]

    def _measured(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], verdicts: Sequence[Verdict]
    ) -> dict[int, tuple[float | None, float]]:
        """Place -> expected score and digit mass, of readable answers. The prompt may end with `<score>` itself."""
        ends = {
            i: end - len(self._open)
            for i, ids in enumerate(completions)
            if verdicts[i].score is not None
            and (end := _after([*prompts[i][-len(self._open) :], *ids], self._open)) is not None
        }
        rows = [[*prompts[i], *completions[i][:end], self._digits[1]] for i, end in ends.items()]
        return dict(zip(ends, self._expected(rows), strict=True)) if rows else {}

    def _expected(self, rows: Sequence[list[int]]) -> list[tuple[float | None, float]]:
        """Expected score and digit mass for rows that end with `<score>` and a "1": one forward pass for both."""
        import torch

        ids, mask = self._padded(rows)
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=2, use_cache=False).logits
        p = torch.softmax(logits.float(), dim=-1).double()
        return [
            expected_score(
                p[i, 0, self._digits[1:]].tolist(), float(p[i, 1, self._digits[0]]), float(p[i, 1, self._close])
            )
            for i in range(len(rows))
        ]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def _after(ids: Sequence[int], part: Sequence[int]) -> int | None:
    """Index behind the last occurrence of `part` in `ids`."""
    for start in range(len(ids) - len(part), -1, -1):
        if list(ids[start : start + len(part)]) == list(part):
            return start + len(part)
    return None


def judge_pairs(
    sampler: Sampler,
    pairs: Sequence[Pair],
    rubric: Callable[[str], Rubric],
    k: int,
    seed: int,
    label: str,
    writes: str = JUDGEMENT,
) -> list[JudgedPair]:
    """k votes of both sides of every pair.

    Args:
        writes: what is asked for, as `grpo.writes`. With `evaluation` the rubric of a prompt is written first, once.
    """
    parts = write_rubrics(sampler, pairs, rubric, seed) if writes == EVALUATION else [None] * len(pairs)
    asked = [
        ask(sampler.encoder, pair, rubric(pair.task), writes, part) for pair, part in zip(pairs, parts, strict=True)
    ]
    prompts = [ids for one in asked for ids in (one.chosen, one.rejected)]
    reads = [one.read for one in asked for _ in range(2)]
    votes = sampler.votes(prompts, k, seed, progress=Progress(label, len(prompts)), reads=reads)
    return [JudgedPair(pair, votes[2 * i], votes[2 * i + 1]) for i, pair in enumerate(pairs)]


def summary_of(judged: Sequence[JudgedPair], seed: int = 0) -> dict[str, Any]:
    """`metrics.summarise`, and for arena pairs how true the findings are."""
    found = summarise(judged, seed)
    if all("criteria" in item.pair.meta for item in judged):
        found.update(arena.truth_of_findings(judged))
    return found


def evaluate_run(run: Path, pairs: Sequence[str], votes: int | None, seed: int) -> dict[str, Any]:
    """Judge pair files (or, with none, the run's own held-out pairs) with a run's judge.

    Returns what `summary_of` returns, and `n`, `votes`, `decoding`.
    """
    from patarm_lite.pairs import drop_long, load_pairs

    folder = RunFolder.open(run)
    if not (folder / "judge").is_dir():
        raise UserError(f"{run} holds no judge yet; finish it with: patarm-lite train --resume {run}")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    encoder, model, tokenizer, rubric = open_judge(folder / "judge", recipe)
    if pairs:
        loaded = load_pairs(list(pairs))
        limit = recipe.data.max_prompt_tokens
        kept, long = drop_long(
            loaded.pairs, lambda pair: max(map(len, encoder.pair_ids(pair, rubric(pair.task)))), limit
        )
        dropped = len(loaded.dropped) + len(long)
        if not kept:
            raise UserError(f"no pair is left to judge: {dropped} rows dropped ({len(long)} over {limit} tokens)")
    else:
        kept = [row_to_pair(row) for row in read_lines(folder / "heldout.jsonl")]
        dropped = 0
    k = votes or recipe.eval.votes
    sampler = Sampler(model, tokenizer, encoder, recipe.grpo.max_completion_tokens, recipe.eval.batch_size)
    judged = judge_pairs(sampler, kept, rubric, k, seed, "judging", recipe.grpo.writes)
    return {"n": len(kept), "dropped": dropped, "votes": k, "decoding": "free", "seed": seed, **summary_of(judged)}


def open_judge(folder: Path, recipe: Recipe) -> tuple[Encoder, Any, Any, Callable[[str], Rubric]]:
    """(encoder, model, tokenizer, task -> primary rubric) of a judge's folder."""
    protocol, kind = load_protocol(folder)
    engine = choose_engine(recipe)
    prepare_libraries(recipe.threads)
    model, tokenizer = engine.load(str(folder), recipe.model)
    return Encoder.from_tokenizer(tokenizer, protocol), model, tokenizer, rubric_for(kind)
