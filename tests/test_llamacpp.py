"""The runtime on llama.cpp: votes are what a plain loop over logits would draw, and no call ends the process."""

from __future__ import annotations

import hashlib
import shutil
import unicodedata
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from little_gguf import write_little_gguf

from patarm_lite.errors import UserError
from patarm_lite.gguf_file import read_gguf
from patarm_lite.judge.llamacpp import LEAST_SHARED, LlamaCpp, Work, _Run
from patarm_lite.judge.sampling import draw, softmax
from patarm_lite.metrics import expected_score
from patarm_lite.prompts import Encoder, Protocol
from patarm_lite.records import Criterion, Turn, Vote
from patarm_lite.verdicts import parse

pytest.importorskip("llama_cpp")

PROTOCOL = Protocol(instructions=False)
RUBRIC = (Criterion("so", "start with so", 3),)
LEAST = 200
"""Tokens that a constrained judgement surely fits in."""


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_little_gguf(tmp_path_factory.mktemp("little"), dtype="f32")


@pytest.fixture(scope="module")
def model(little: Path) -> Any:
    """Exact: 32-bit weights and cache, no flash attention, so that batches of any shape give the same votes."""
    with LlamaCpp.load(little, context=1500, sequences=8, threads=1, cache="f32", flash_attention=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def encoder(model: LlamaCpp) -> Encoder:
    return model.encoder(PROTOCOL)


def prompts(encoder: Encoder, count: int) -> list[list[int]]:
    texts = ["so red.", "The door is red!", "def f(): return 1", "garden", "old old door day = 7"]
    turn = (Turn("user", "start with so, name a color"),)
    return [
        encoder.prompt_ids(turn, texts[n % len(texts)] + " day" * (n // len(texts)), task="chat", rubric=RUBRIC)
        for n in range(count)
    ]


# tokens


HARD = [
    "",
    "plain words",
    "  spaces   and\ttabs\n\n\nlines\r\n",
    "12345 + 67 = 0",
    "日本語 한국어 العربية Ünïcödé",
    "🙂👩‍👩‍👧‍👦 ﷺ ✓",
    "<|im_start|>user\n</think><tool_call>",
    "a" * 300,
    "nul \0 inside",
    "def f(x):\n    return x  # comment",
]


def test_texts_become_the_ids_that_training_gave_them(model: LlamaCpp) -> None:
    from conftest import little_tokenizer

    for text in HARD:
        text = unicodedata.normalize("NFC", text)
        assert model.tokenize(text) == little_tokenizer().encode(text, add_special_tokens=False), text
        assert model.text(model.tokenize(text)) == text


def test_control_and_user_defined_tokens_are_known_by_their_spelling(model: LlamaCpp) -> None:
    from conftest import little_tokenizer

    assert model.added == {token.content: n for n, token in little_tokenizer().added_tokens_decoder.items()}
    assert model.piece(model.added["<|im_end|>"]) == b"<|im_end|>"
    assert model.vocab_size == len(little_tokenizer())


def test_bytes_that_are_no_text_are_shown_as_such(model: LlamaCpp) -> None:
    first = model.tokenize("日")[0]
    assert len(model.piece(first)) == 1 and model.text([first]) == "\ufffd"
    assert model.tokenize("lone \ud800") == model.tokenize("lone ?")


def test_a_megabyte_is_tokenized(model: LlamaCpp) -> None:
    text = "x7 " * 350_000
    assert model.text(model.tokenize(text)) == text


# logits


def test_logits_do_not_depend_on_how_the_text_is_cut_into_calls(model: LlamaCpp, encoder: Encoder) -> None:
    ids = (prompts(encoder, 1)[0] * 30)[:1400]  # three calls of at most 512 tokens, or eleven of 128 rows
    every = model.logits(ids)
    some = model.logits(ids, [1399, 0, 511, 512, 512])
    assert every.shape == (1400, model.vocab_size) and every.dtype == np.float32
    assert np.abs(some - every[[1399, 0, 511, 512, 512]]).max() < 1e-4
    assert np.abs(model.logits(ids[:600], [599]) - every[599]).max() < 1e-4


def test_logits_are_those_of_transformers(model: LlamaCpp, little: Path, encoder: Encoder) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    ids = prompts(encoder, 3)[2]
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(little.parent / "hf")(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(model.logits(ids) - reference).max() < 1e-3 * reference.std()


# votes


def chance(seed: int, prompt: list[int], vote: int, count: int) -> list[float]:
    """The documented draws: Philox keyed by (seed, vote, prompt), 53 bits each."""
    inner = hashlib.blake2b(np.asarray(prompt, np.int32).tobytes(), digest_size=16).digest()
    key = hashlib.blake2b(f"{seed}:{vote}:".encode() + inner, digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    return [int(number) // 2048 / 2**53 for number in raw]


def plainly(model: LlamaCpp, prompt: list[int], seed: int, vote: int, tokens: int, end: int) -> list[int]:
    """A free judgement by a loop that reads the whole text again for every token."""
    ids: list[int] = []
    for u in chance(seed, prompt, vote, tokens):
        p = softmax(model.logits([*prompt, *ids], [len(prompt) + len(ids) - 1])[0])
        ids.append(next(token for token, total in enumerate(accumulate(p.tolist())) if total > u))
        if ids[-1] == end:
            break
    return ids


def test_votes_are_what_a_plain_loop_draws(model: LlamaCpp, encoder: Encoder) -> None:
    asked = prompts(encoder, 3)
    found = model.votes(asked, 2, encoder=encoder, seed=5, max_tokens=12)
    for prompt, votes in zip(asked, found, strict=True):
        for number, vote in enumerate(votes):
            ids = plainly(model, prompt, 5, number, 12, encoder.end_id)
            ended = ids[-1] == encoder.end_id
            assert vote.text == model.text(ids[:-1] if ended else ids)
            assert vote.tokens == len(ids) and vote.verdict == parse(vote.text, ended)


def test_an_end_token_ends_a_vote(model: LlamaCpp, encoder: Encoder) -> None:
    votes = model.votes(prompts(encoder, 4), 8, encoder=encoder, seed=1, max_tokens=300)
    lengths = [vote.tokens for side in votes for vote in side]
    assert min(lengths) < 300 and all(
        (vote.verdict.problem == "truncated") == (vote.tokens == 300) for side in votes for vote in side
    )


def plain(votes: list[tuple[Vote, ...]]) -> list[list[tuple[str, int]]]:
    return [[(vote.text, vote.tokens) for vote in side] for side in votes]


@pytest.mark.parametrize("decoding", ["free", "constrained"])
def test_a_vote_depends_on_seed_prompt_and_its_number_alone(
    little: Path, model: LlamaCpp, encoder: Encoder, decoding: str
) -> None:
    asked = prompts(encoder, 6)
    options: dict[str, Any] = {"encoder": encoder, "seed": 2, "max_tokens": LEAST, "decoding": decoding}
    votes = plain(model.votes(asked, 5, **options))
    assert plain(model.votes(asked, 3, **options)) == [side[:3] for side in votes]
    assert plain(model.votes(asked[::-1], 5, **options)) == votes[::-1]
    assert plain(model.votes(asked[:1] * 2, 5, **options)) == [votes[0], votes[0]]
    assert plain(model.votes(asked, 5, **{**options, "seed": 3})) != votes
    kept = {"context": 1500, "threads": 1, "cache": "f32", "flash_attention": False}
    for sequences in (1, 3):
        with LlamaCpp.load(little, sequences=sequences, **kept) as narrow:  # type: ignore[arg-type]
            assert plain(narrow.votes(asked[:2], 5, **options)) == votes[:2]


def test_constrained_votes_of_a_judge_that_writes_nonsense_are_readable(model: LlamaCpp, encoder: Encoder) -> None:
    for temperature in (0.0, 1.0, 3.0):
        found = model.votes(
            prompts(encoder, 5),
            4,
            encoder=encoder,
            seed=1,
            temperature=temperature,
            decoding="constrained",
            max_tokens=LEAST,
        )
        votes = [vote for side in found for vote in side]
        assert all(vote.verdict.score is not None and not vote.verdict.faults for vote in votes)
        assert all(vote.tokens <= LEAST and vote.mass is not None for vote in votes)
        if temperature == 0:
            assert all(len({vote.text for vote in side}) == 1 for side in found)


def test_thinking_comes_first_where_the_protocol_says_so(model: LlamaCpp) -> None:
    encoder = model.encoder(Protocol(instructions=False, thinking=True))
    found = model.votes(
        prompts(encoder, 2), 3, encoder=encoder, seed=1, decoding="constrained", max_tokens=2 * LEAST, expected=False
    )
    for vote in (vote for side in found for vote in side):
        assert vote.text.startswith("<think>\n") and vote.verdict.score is not None and vote.mass is None


def test_expected_scores_are_read_behind_the_score_tag_whatever_was_drawn(
    model: LlamaCpp, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one plain pass over prompt, judgement up to `<score>`, and "1"."""
    written: dict[tuple[int, int], list[int]] = {}
    end = _Run._end
    monkeypatch.setattr(
        _Run, "_end", lambda run, live: written.update({(live.prompt, live.vote): live.ids}) or end(run, live)
    )
    asked = prompts(encoder, 4)
    found = model.votes(
        asked, 8, encoder=encoder, seed=4, decoding="constrained", max_tokens=LEAST, temperature=2.0, expected=True
    )
    digits = [model.tokenize(str(digit))[0] for digit in range(10)]
    close = model.tokenize("</score>")
    for (prompt, number), ids in written.items():
        vote = found[prompt][number]
        assert model.text(ids[:-1]) == vote.text and len(ids) == vote.tokens
        score_at = len(ids) - 1 - len(close) - len(str(vote.verdict.score))
        whole = [*asked[prompt], *ids[:score_at], digits[1]]
        first, second = map(softmax, model.logits(whole, [len(whole) - 2, len(whole) - 1]))
        score, mass = expected_score(first[digits[1:]].tolist(), float(second[digits[0]]), float(second[close[0]]))
        assert vote.mass is not None and abs(vote.mass - mass) < 1e-5
        assert (vote.expected is None) == (score is None)
        assert abs((vote.expected or 0) - (score or 0)) < 1e-3
    assert len(written) == 32 and {1, 10} <= {vote.verdict.score for side in found for vote in side}


def numbered(found: Any) -> dict[tuple[int, int], tuple[str, int]]:
    return {(place, index): (vote.text, vote.tokens) for place, index, vote in found}


@pytest.mark.parametrize("decoding", ["free", "constrained"])
def test_further_votes_are_those_that_more_votes_at_once_would_have_given(
    model: LlamaCpp, encoder: Encoder, decoding: str
) -> None:
    asked = prompts(encoder, 4)
    options: dict[str, Any] = {"encoder": encoder, "seed": 2, "max_tokens": LEAST, "decoding": decoding}
    votes = plain(model.votes(asked, 6, **options))
    assert plain(model.votes(asked, 2, first=4, **options)) == [side[4:] for side in votes]
    wanted = [(asked[0], [5]), (asked[1], []), (asked[2], [0, 3]), (asked[3], range(2, 4))]
    found = numbered(model.stream(wanted, **options))
    assert found == {(p, n): votes[p][n] for p, n in [(0, 5), (2, 0), (2, 3), (3, 2), (3, 3)]}


def test_what_prompts_have_in_common_is_read_once(model: LlamaCpp, encoder: Encoder) -> None:
    options: dict[str, Any] = {"encoder": encoder, "seed": 2, "max_tokens": 30}
    asked = prompts(encoder, 6)
    alone = [plain(model.votes([prompt], 3, **options))[0] for prompt in asked]
    model.work = Work()
    assert plain(model.votes(asked[:2], 3, **options)) == alone[:2]  # six votes, so a slot for each
    common = next(n for n, (a, b) in enumerate(zip(*asked[:2], strict=False)) if a != b)
    assert common > LEAST_SHARED
    assert (model.work.read, model.work.shared) == (len(asked[0]) + len(asked[1]) - common, common)
    model.work = Work()
    assert plain(model.votes([*asked, asked[5]], 3, **options)) == [*alone, alone[5]]
    total = sum(map(len, asked)) + len(asked[5])
    assert model.work.read + model.work.shared == total and model.work.read < total / 2


def test_what_the_last_call_read_may_be_kept(model: LlamaCpp, encoder: Encoder) -> None:
    options: dict[str, Any] = {"encoder": encoder, "seed": 2, "max_tokens": 30}
    asked = prompts(encoder, 3)
    votes = plain(model.votes(asked, 4, **options))
    list(model.stream([(prompt, [0, 1]) for prompt in asked], **options))
    model.work = Work()
    found = numbered(model.stream([(prompt, [2, 3]) for prompt in asked], keep=True, **options))
    assert model.work.read == 3  # the last token of each, for its logits
    assert found == {(p, n): votes[p][n] for p in range(3) for n in (2, 3)}
    found = numbered(model.stream([(prompt, [2]) for prompt in asked[::-1]], keep=True, **options))
    assert found == {(p, 2): votes[2 - p][2] for p in range(3)}


def test_deterministic_votes_are_the_same_bit_for_bit_whatever_else_is_asked_for(
    little: Path, encoder: Encoder
) -> None:
    """With the rounding cache and attention of every day, where batches of another shape give other bits."""
    with LlamaCpp.load(little, context=1500, sequences=8, threads=1) as everyday:
        asked = prompts(encoder, 6)
        options: dict[str, Any] = {
            "encoder": encoder,
            "seed": 2,
            "max_tokens": LEAST,
            "decoding": "constrained",
            "deterministic": True,
        }
        votes = everyday.votes(asked, 3, **options)
        assert everyday.votes(asked, 3, **options) == votes
        assert everyday.votes(asked[::-1], 3, **options) == votes[::-1]
        everyday.logits(asked[0] * 5)
        everyday.votes(asked, 5, **{**options, "deterministic": False})
        assert [everyday.votes([prompt], 3, **options)[0] for prompt in asked] == votes
    with LlamaCpp.load(little, context=1500, sequences=8, threads=1) as fresh:
        assert fresh.votes(asked[3:5], 3, **options) == votes[3:5]


def test_votes_end_where_the_model_is_used_for_something_else(model: LlamaCpp, encoder: Encoder) -> None:
    options: dict[str, Any] = {"encoder": encoder, "seed": 1, "max_tokens": 20}
    asked = [(prompt, range(4)) for prompt in prompts(encoder, 5)]
    found = model.stream(asked, **options)
    next(found)
    model.logits(asked[0][0])
    with pytest.raises(ValueError, match="used for something else"):
        list(found)
    assert len(list(model.stream(asked, **options))) == 20


def test_top_k_of_one_is_the_likeliest_token(model: LlamaCpp, encoder: Encoder) -> None:
    options: dict[str, Any] = {"encoder": encoder, "seed": 1, "max_tokens": 20}
    asked = [(prompt, [0]) for prompt in prompts(encoder, 3)]
    assert numbered(model.stream(asked, top_k=1, **options)) == numbered(
        model.stream(asked, temperature=0.0, **options)
    )


def test_a_cache_that_may_take_little_memory_holds_fewer_votes_at_once(little: Path, encoder: Encoder) -> None:
    """A token takes 2 layers x 1 head x (16 + 16) numbers of 16 bits: 128 bytes, and 256 tokens 32,768."""
    options: dict[str, Any] = {"encoder": encoder, "seed": 1, "max_tokens": 20}
    asked = prompts(encoder, 2)
    with LlamaCpp.load(little, threads=1, memory=3 * 32_768) as small:
        assert len(small.votes(asked, 8, **options)[1]) == 8
        assert (small._room, small._streams) == (256, 3)
        long = (asked[0] * 30)[:700]
        assert len(small.votes([long], 2, **options)[0]) == 2
        assert (small._room, small._streams) == (768, 1)
        assert len(small.votes(asked, 8, **options)[1]) == 8
        assert (small._room, small._streams) == (256, 3)


# scores with nothing written


def test_scores_at_once_are_read_from_the_digits_after_an_empty_judgement(model: LlamaCpp, encoder: Encoder) -> None:
    asked = prompts(encoder, 11)  # more than the eight sequences
    digits = [model.tokenize(str(digit))[0] for digit in range(10)]
    for opening in ("<score>", "<generated_rubrics>\n</generated_rubrics>\n<eval>\n</eval>\n<score>"):
        for prompt, (expected, mass) in zip(asked, model.scores(asked, encoder=encoder, opening=opening), strict=True):
            ids = [*prompt, *model.tokenize(opening)]
            first, second = map(softmax, model.logits([*ids, digits[1]], [len(ids) - 1, len(ids)]))
            close = model.tokenize("</score>")[0]
            score, there = expected_score(first[digits[1:]].tolist(), float(second[digits[0]]), float(second[close]))
            assert abs(mass - there) < 1e-5 and (expected is None) == (score is None)
            assert abs((expected or 0) - (score or 0)) < 1e-3
    assert model.scores(asked, encoder=encoder) == model.scores(asked, encoder=encoder, opening=opening)
    assert model.scores([], encoder=encoder) == []


def test_a_score_at_once_costs_one_prefill_and_one_token(model: LlamaCpp, encoder: Encoder) -> None:
    asked = prompts(encoder, 3)
    before = model.work.read + model.work.shared
    model.scores(asked, encoder=encoder, opening="<score>")
    opening = len(model.tokenize("<score>"))
    assert model.work.read + model.work.shared - before == sum(map(len, asked)) + 3 * opening


def test_drawing_inverts_the_cumulated_distribution() -> None:
    row = np.log(np.array([[0.1, 0.2, 0.0, 0.7]], np.float32) + 1e-30)
    rows = np.repeat(row, 7, axis=0)
    chances = np.array([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.9999, np.nextafter(1, 0)])
    assert draw(rows, rows.max(axis=1), chances, 1.0).tolist() == [0, 0, 1, 1, 3, 3, 3]
    assert draw(rows, rows.max(axis=1), chances, 0.0).tolist() == [3] * 7
    half = draw(rows[:2], rows[:2].max(axis=1), np.array([0.018, 0.019]), 0.5)  # .01 / (.01 + .04 + .49) = .0185
    assert half.tolist() == [0, 1]
    equal = np.array([[1, 5, 5, 2]], np.float32)
    assert draw(equal, equal.max(axis=1), np.array([0.9]), 0.0).tolist() == [1]


def test_progress_is_told_prompt_by_prompt(model: LlamaCpp, encoder: Encoder) -> None:
    told: list[tuple[int, int]] = []
    model.votes(
        prompts(encoder, 3),
        2,
        encoder=encoder,
        seed=1,
        max_tokens=3,
        progress=lambda done, all: told.append((done, all)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert model.votes([], 2, encoder=encoder, seed=1, max_tokens=3) == []


# a trained judge


@pytest.fixture(scope="module")
def trained(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a run folder, its judge as an exact GGUF file)."""
    from patarm_lite.quantize.convert import convert

    out = tmp_path_factory.mktemp("trained") / "judge.gguf"
    return trained_run, convert(trained_run / "judge", out, dtype="f32").path


@pytest.mark.slow
def test_expected_scores_are_those_of_the_evaluation(trained: tuple[Path, Path]) -> None:
    from patarm_lite.metrics import row_to_pair
    from patarm_lite.recipe import load_recipe
    from patarm_lite.training.evaluation import Sampler, open_judge
    from patarm_lite.training.run_folder import read_lines

    run, gguf = trained
    encoder, model, tokenizer, rubric = open_judge(run / "judge", load_recipe(str(run / "recipe.yaml")))
    pairs = [row_to_pair(row) for row in read_lines(run / "heldout.jsonl")][:16]
    asked = [ids for pair in pairs for ids in encoder.pair_ids(pair, rubric(pair.task))]
    with LlamaCpp.load(gguf, threads=1, cache="f32", flash_attention=False) as runtime:
        own = runtime.encoder(encoder.protocol)
        assert [ids for pair in pairs for ids in own.pair_ids(pair, rubric(pair.task))] == asked
        for decoding in ("free", "constrained"):
            found = runtime.votes(asked, 2, encoder=own, seed=1, max_tokens=150, decoding=decoding)
            votes = [(ids, vote) for ids, side in zip(asked, found, strict=True) for vote in side]
            written = [encoder.judgement_ids(vote.text)[: vote.tokens] for _, vote in votes]
            spelled = [runtime.text(ids).removesuffix("<|im_end|>") for ids in written]
            canonical = [n for n, (_, vote) in enumerate(votes) if spelled[n] == vote.text]
            reference = Sampler(model, tokenizer, encoder, 150, 40)._read(
                [votes[n][0] for n in canonical], [written[n] for n in canonical], expected=True
            )
            measured = 0
            for n, other in zip(canonical, reference, strict=True):
                vote = votes[n][1]
                if vote.verdict.problem == "truncated":
                    continue
                assert (vote.text, vote.verdict) == (other.text, other.verdict)
                assert (vote.mass is None) == (other.mass is None) == (vote.verdict.score is None)
                if vote.mass is not None and other.mass is not None:
                    measured += 1
                    assert abs(vote.mass - other.mass) < 1e-4
                    assert (vote.expected is None) == (other.expected is None)
                    assert abs((vote.expected or 0) - (other.expected or 0)) < 1e-3
            assert measured >= 50


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sound_free_judgement_is_what_constrained_decoding_writes_too(
    trained: tuple[Path, Path], temperature: float
) -> None:
    from patarm_lite import arena
    from patarm_lite.metrics import row_to_pair
    from patarm_lite.training.run_folder import read_lines

    run, gguf = trained
    pairs = [row_to_pair(row) for row in read_lines(run / "heldout.jsonl")][:16]
    with LlamaCpp.load(gguf, threads=1, cache="f32", flash_attention=False) as runtime:
        encoder = runtime.encoder(PROTOCOL)
        asked = [ids for pair in pairs for ids in encoder.pair_ids(pair, arena.RUBRICS[pair.task])]
        options: dict[str, Any] = {"encoder": encoder, "seed": 1, "max_tokens": 200, "temperature": temperature}
        free = runtime.votes(asked, 2, **options)
        constrained = runtime.votes(asked, 2, decoding="constrained", **options)
    both = [(f, c) for one, other in zip(free, constrained, strict=True) for f, c in zip(one, other, strict=True)]
    sound = [(f, c) for f, c in both if f.verdict.score is not None and not f.verdict.faults]
    assert len(sound) >= 50
    assert sum(f.text == c.text for f, c in sound) >= 0.9 * len(sound)
    assert all(c.verdict.score is not None and not c.verdict.faults for _, c in both)


# nothing may end the process: each of these would be an abort, a crash or silence in llama.cpp


def test_a_prompt_that_does_not_fit_the_context_is_refused(model: LlamaCpp, encoder: Encoder) -> None:
    ids = (prompts(encoder, 1)[0] * 30)[:1500]
    with pytest.raises(UserError, match="prompt 2 of 2 has 1500 tokens and up to 1 for the judgement"):
        model.votes([ids[:10], ids], 1, encoder=encoder, seed=1, max_tokens=1)
    with pytest.raises(UserError, match="the context holds 1500"):
        model.logits([*ids, 1])
    assert len(model.votes([ids[:1499]], 2, encoder=encoder, seed=1, max_tokens=1)[0]) == 2
    assert model.logits(ids, [1499]).shape == (1, model.vocab_size)


def test_a_context_beyond_the_model_s_own_is_not_used(little: Path) -> None:
    with LlamaCpp.load(little, context=1_000_000, threads=1) as model:
        assert model.context == 2048


def test_ids_that_the_vocabulary_does_not_have_are_refused(model: LlamaCpp, encoder: Encoder) -> None:
    for wrong in (-1, model.vocab_size, 2**31):
        with pytest.raises(ValueError, match="token id"):
            model.logits([1, wrong])
        with pytest.raises(ValueError, match="token id"):
            model.votes([[1, wrong]], 1, encoder=encoder, seed=1, max_tokens=3)
        with pytest.raises(ValueError, match="token id"):
            model.text([wrong])


@pytest.mark.parametrize("rows", [[-1], [2], [0, 7]])
def test_rows_that_are_not_there_are_refused(model: LlamaCpp, rows: list[int]) -> None:
    with pytest.raises(ValueError, match="rows"):
        model.logits([1, 2], rows)
    with pytest.raises(ValueError, match="rows"):
        model.logits([])


def test_more_votes_than_sequences_are_written_in_turns(little: Path, encoder: Encoder) -> None:
    with LlamaCpp.load(little, sequences=256, threads=1) as model:
        assert len(model.votes(prompts(encoder, 1), 300, encoder=encoder, seed=1, max_tokens=2)[0]) == 300


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sequences": 0}, "1 to 256"),
        ({"sequences": 257}, "1 to 256"),
        ({"context": 0}, "at least 1"),
        ({"threads": 0}, "at least 1"),
        ({"cache": "q8_0"}, "f16, f32"),
    ],
)
def test_settings_out_of_range_are_refused(little: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LlamaCpp.load(little, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 0}, "at least 1"),
        ({"max_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "at least 0"),
        ({"decoding": "greedy"}, "free, constrained"),
        ({"decoding": "constrained", "max_tokens": 20}, "needs max_tokens of at least"),
    ],
)
def test_votes_that_make_no_sense_are_refused(
    model: LlamaCpp, encoder: Encoder, options: dict[str, Any], said: str
) -> None:
    chosen: dict[str, Any] = {"k": 1, "max_tokens": 3, "encoder": encoder, "seed": 1, **options}
    with pytest.raises(UserError, match=said):
        model.votes(prompts(encoder, 1), **chosen)


def test_a_closed_model_says_so(little: Path) -> None:
    model = LlamaCpp.load(little, threads=1)
    encoder = model.encoder(PROTOCOL)
    model.close()
    model.close()
    for call in (
        lambda: model.tokenize("a"),
        lambda: model.piece(3),
        lambda: model.logits([1]),
        lambda: model.votes([[1]], 1, encoder=encoder, seed=1, max_tokens=1),
    ):
        with pytest.raises(ValueError, match="was closed"):
            call()


def test_damaged_weights_are_noticed_even_unchecked(little: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(little, tmp_path / "judge.gguf"))
    tensor = read_gguf(copy).tensor("blk.1.ffn_down.weight")
    assert tensor is not None
    with copy.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(np.float32(np.nan).tobytes() * 8)
    with pytest.raises(UserError, match="invalid data"):
        LlamaCpp.load(copy)
    with LlamaCpp.load(copy, check=False, threads=1) as model:
        encoder = model.encoder(PROTOCOL)
        with pytest.raises(UserError, match="not numbers"):
            model.logits([5, 6])
        with pytest.raises(UserError, match="not numbers"):
            model.votes([[5, 6]], 1, encoder=encoder, seed=1, max_tokens=2)


def test_a_file_that_is_cut_after_loading_changes_nothing(little: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(little, tmp_path / "judge.gguf"))
    with LlamaCpp.load(copy, threads=1) as model:
        before = model.logits([5, 6])
        copy.write_bytes(b"")
        assert (model.logits([5, 6]) == before).all()


def test_a_run_that_was_broken_off_leaves_nothing_behind(model: LlamaCpp, encoder: Encoder) -> None:
    asked = prompts(encoder, 3)
    options: dict[str, Any] = {"encoder": encoder, "seed": 1, "max_tokens": 30}
    votes = plain(model.votes(asked, 2, **options))

    def stop(done: int, everything: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.votes(asked, 2, progress=stop, **options)
    assert plain(model.votes(asked, 2, **options)) == votes
