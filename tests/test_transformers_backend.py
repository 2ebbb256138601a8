"""The backend for folders of safetensors: its votes, its place in the interface, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from patarm_lite import arena
from patarm_lite.errors import UserError
from patarm_lite.judge.backend import Item, Plan
from patarm_lite.judge.transformers_backend import (
    TransformersBackend,
    describe_folder,
    fingerprint,
    judge_folder,
    vote_chances,
)
from patarm_lite.prompts import Protocol
from patarm_lite.records import Criterion, Turn, Vote

pytest.importorskip("trl")

FREE = Plan(decoding="free", max_tokens=99)


@pytest.fixture(scope="module")
def backend(little_run: Path) -> TransformersBackend:
    return TransformersBackend.load(little_run, threads=1, context=512, batch_size=8)


def arena_items(count: int) -> list[Item]:
    pairs = arena.heldout_pairs(count, seed=3)
    return [Item(pair.prompt, pair.chosen, pair.task, arena.RUBRICS[pair.task]) for pair in pairs]


def drawn(backend: TransformersBackend, asked: list[tuple[Item, range]], plan: Plan) -> dict[tuple[int, int], Vote]:
    rows = list(backend.votes(asked, plan))
    found = {(place, index): vote for place, index, vote in rows}
    assert len(found) == len(rows), "no vote twice"
    return found


def alike(one: dict[tuple[int, int], Vote], other: dict[tuple[int, int], Vote]) -> int:
    return sum(one[key].text == other[key].text for key in one)


def test_a_vote_is_the_same_whatever_else_is_asked_for_up_to_rounding(backend: TransformersBackend) -> None:
    items = arena_items(5)
    whole = drawn(backend, [(item, range(4)) for item in items], FREE)
    assert set(whole) == {(place, index) for place in range(5) for index in range(4)}
    part = drawn(backend, [(item, range(2, 4)) for item in items], FREE)
    assert set(part) == {(place, index) for place in range(5) for index in (2, 3)}
    assert alike(part, whole) >= 9
    others = drawn(backend, [(item, range(4)) for item in items], Plan(decoding="free", max_tokens=99, seed=2))
    assert alike(others, whole) < 10


def test_equal_weights_draw_the_votes_that_llama_cpp_draws(
    backend: TransformersBackend, little_run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    from patarm_lite.judge.description import describe
    from patarm_lite.judge.llama_backend import LlamaBackend
    from patarm_lite.quantize.convert import convert

    described = describe(protocol=backend.protocol, rubrics=arena.RUBRICS, kind="arena", trained=True, about={})
    file = convert(little_run / "judge", tmp_path / "little.gguf", dtype="f32", metadata=described).path
    for temperature in (0.0, 1.0):
        plan = Plan(decoding="free", max_tokens=99, temperature=temperature)
        asked = [(item, range(3)) for item in arena_items(8)]
        own = drawn(backend, asked, plan)
        with LlamaBackend.load(file, threads=1, context=512) as embedded:
            other = {(place, index): vote for place, index, vote in embedded.votes(asked, plan)}
        assert alike(own, other) >= 22, "of 24; a place where two tokens are almost equally likely may differ"
        same = [key for key in own if own[key].text == other[key].text]
        assert all(own[key].tokens == other[key].tokens for key in same)
        assert all(own[key].mass == pytest.approx(other[key].mass, abs=0.01) for key in same if own[key].mass)
        assert any(vote.verdict.score is not None for vote in own.values())


def test_at_temperature_0_all_votes_of_a_response_are_the_likeliest_judgement(backend: TransformersBackend) -> None:
    plan = Plan(decoding="free", max_tokens=99, temperature=0, expected=False)
    found = drawn(backend, [(item, range(3)) for item in arena_items(2)], plan)
    assert all(found[place, index].text == found[place, 0].text for place in range(2) for index in range(3))
    assert all(vote.expected is None and vote.mass is None for vote in found.values())


def test_a_judgement_that_does_not_end_in_time_is_truncated(backend: TransformersBackend) -> None:
    found = drawn(backend, [(arena_items(1)[0], range(2))], Plan(decoding="free", max_tokens=5))
    assert [vote.verdict.problem for vote in found.values()] == ["truncated"] * 2
    assert all(vote.tokens == 5 for vote in found.values())


def test_chances_are_even_and_the_first_ones_do_not_depend_on_their_number() -> None:
    many = vote_chances(1, [5, 6, 7], 0, 100_000)
    assert many.min() >= 0 and many.max() < 1
    counts = np.histogram(many, bins=10, range=(0, 1))[0]
    assert abs(counts - 10_000).max() < 5 * np.sqrt(100_000 * 0.1 * 0.9)
    np.testing.assert_array_equal(vote_chances(1, [5, 6, 7], 0, 10), many[:10])
    others = [vote_chances(2, [5, 6, 7], 0, 10), vote_chances(1, [5, 6], 0, 10), vote_chances(1, [5, 6, 7], 1, 10)]
    assert all(not np.isin(other, many[:10]).any() for other in others)


def test_what_it_cant_do_is_refused_with_a_way_out(backend: TransformersBackend) -> None:
    item = arena_items(1)[0]
    forced = Item(item.prompt, "r", "chat", item.rubric, criteria=(Criterion("a", "b"),) * 3)
    for asked, plan, why in [
        (item, Plan(), "constrained decoding needs the llamacpp backend"),
        (forced, FREE, "a rubric can't be forced"),
        (Item(item.prompt, "word " * 900, "chat", item.rubric), FREE, r"prompt 1 of 1 has \d+ tokens.*holds 512"),
        (item, Plan(decoding="free", temperature=-1), "temperature -1"),
    ]:
        with pytest.raises(UserError, match=why):
            list(backend.votes([(asked, range(1))], plan))


def test_a_folder_says_its_protocol_and_rubrics(backend: TransformersBackend, little_run: Path, tmp_path: Path) -> None:
    assert backend.tokens == "exact" and backend.trained and backend.context == 512
    assert backend.protocol == Protocol(instructions=False)
    assert backend.description.rubric("math") == arena.RUBRICS["math"]
    item = arena_items(1)[0]
    ids = backend.encoder.prompt_ids(item.prompt, item.response, task=item.task, rubric=item.rubric)
    assert backend.prompt_tokens(item) == len(ids)
    copy = shutil.copytree(little_run / "judge", tmp_path / "copy")
    assert fingerprint(copy) == backend.fingerprint
    (copy / "protocol.json").unlink()
    assert not describe_folder(copy).trained and describe_folder(copy).protocol == Protocol()
    assert fingerprint(copy) != backend.fingerprint


def test_somebody_elses_folder_is_judged_with_protocol_1_and_called_untrained(little_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(little_run / "judge", tmp_path / "copy")
    (copy / "protocol.json").unlink()
    with TransformersBackend.load(copy, threads=1, context=1024) as foreign:
        assert not foreign.trained and foreign.protocol == Protocol()
        item = Item((Turn("user", "2+2?"),), "4", "math", foreign.description.rubric("math"))
        ((place, index, vote),) = foreign.votes([(item, range(1))], Plan(decoding="free", max_tokens=8))
    assert (place, index, vote.verdict.score) == (0, 0, None)


def test_folders_without_a_judge_are_refused_with_the_reason(little_run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(little_run / "run.json", unfinished)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "protocol.json").write_text(json.dumps({"protocol": "patarm-lite/1"}), encoding="utf-8")
    with pytest.raises(UserError, match="is no folder"):
        TransformersBackend.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no model \(no config\.json\)"):
        TransformersBackend.load(empty)
    with pytest.raises(UserError, match="holds no judge yet; finish it with: patarm-lite train --resume"):
        judge_folder(unfinished)
    with pytest.raises(UserError, match="is damaged"):
        describe_folder(damaged)
