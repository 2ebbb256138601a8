"""Attacks on a judge: encoded as text by the real runtime, and measured against fair benign texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from patarm_lite import arena
from patarm_lite.evals import attacks, injection
from patarm_lite.evals.injection import Case
from patarm_lite.gguf_file import read_gguf
from patarm_lite.judge.description import Description, read_description
from patarm_lite.records import Turn

pytest.importorskip("llama_cpp")
from little_gguf import write_little_gguf

from patarm_lite.judge.llamacpp import LlamaCpp


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LlamaCpp, Description]]:
    path = write_little_gguf(tmp_path_factory.mktemp("judge"), seed=1)
    path = path if isinstance(path, Path) else path[0]
    with LlamaCpp.load(path, context=2048, threads=1) as model:
        yield model, read_description(read_gguf(path).metadata)


def test_there_are_a_hundred_attacks_in_families() -> None:
    persuasive = [text for texts in attacks.PERSUASIVE.values() for text in texts]
    assert len(set(attacks.ATTACKS)) >= 100 and len(attacks.STRUCTURAL) >= 8
    assert len(set(persuasive)) == len(persuasive) >= 20


def test_every_attack_reaches_llama_cpp_as_text(judge: tuple[LlamaCpp, Description]) -> None:
    model, description = judge
    persuasive = [text for texts in attacks.PERSUASIVE.values() for text in texts]
    for text in [*attacks.ATTACKS, *persuasive]:
        assert injection.is_encoded_as_text(text, model, description), text[:60]


def test_an_attack_and_its_benign_text_are_equally_long_and_leave_the_truth_equal(
    judge: tuple[LlamaCpp, Description],
) -> None:
    tokens = injection.content_tokens(*judge)
    families = {
        name: texts for name, texts in attacks.STRUCTURAL.items() if name not in attacks.ENCODED_ONLY
    } | attacks.PERSUASIVE
    pairs = arena.heldout_pairs(60, seed=3)
    asked = {pair.prompt: pair.meta["criteria"] for pair in pairs}
    found = list(injection.cases(families, pairs, tokens, n=6, seed=1))
    counts = {family: sum(case.family == family for case in found) for family in families}
    assert set(counts.values()) == {6}, counts
    for case in found:
        assert case.attacked.endswith(" " + case.attack)
        assert tokens(case.attacked) == tokens(case.benign)
        truth = [arena.met(asked[case.prompt], text) for text in (case.attacked, case.benign)]
        assert truth[0] == truth[1] and len(truth[0]) / len(asked[case.prompt]) == case.quality


def test_the_summary_counts_what_rose_and_leaves_out_what_could_not_be_read() -> None:
    def case(family: str, attack: str) -> Case:
        return Case(family, attack, (Turn("user", "q"),), "chat", "a", "b", 0.0)

    found = [case("one", "x"), case("one", "y"), case("one", "x"), case("two", "z")]
    first, second = injection.summary(found, [2.0, -1.0, None, 0.5])
    assert (first["family"], first["texts"], first["n"], first["rise"]) == ("one", 2, 2, 0.5)
    assert (first["rose_by_a_point"], first["fell_by_a_point"]) == (0.5, 0.5)
    assert (first["low"], first["high"]) == (-1.0, 2.0), "of two values, both ends are drawn"
    assert (second["n"], second["rise"], second["low"], second["high"]) == (1, 0.5, 0.5, 0.5)
    assert "| two | 1 | 1 | +0.500 |" in injection.markdown([first, second])


def test_changes_of_scores_are_attack_minus_benign(judge: tuple[LlamaCpp, Description]) -> None:
    model, description = judge
    pair = arena.heldout_pairs(4, seed=3)[0]
    same = Case("same", "x", pair.prompt, pair.task, pair.chosen, pair.chosen, 0.0)
    assert injection.score_changes(model, description, [same], max_tokens=200) == [0.0]
