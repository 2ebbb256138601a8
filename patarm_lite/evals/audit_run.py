"""Audit a judge: draw its votes on pairs and on attacks, measure, and say what is wrong.

from patarm_lite.evals.audit_run import audit_judge
from patarm_lite.evals.named_judge import Asking, named_judge
from patarm_lite.store import Store

with Store.open(None) as store:
    found = audit_judge(named_judge("judge.gguf", Asking(votes=4)), pairs, store, votes=4)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from patarm_lite import __version__
from patarm_lite.errors import UserError
from patarm_lite.evals.audit import cost, measures
from patarm_lite.evals.audit_attacks import CASES, attack_measures, attack_part, attacks_on, content_tokens
from patarm_lite.evals.audit_findings import findings
from patarm_lite.evals.drawn import draw, judged_pairs, pair_part
from patarm_lite.evals.named_judge import NamedJudge
from patarm_lite.evals.pair_choice import check_count, check_enough
from patarm_lite.metrics import pair_to_row
from patarm_lite.records import Pair
from patarm_lite.store import Store

SCHEMA = 2
ARENA_PAIRS = 200


def audit_judge(
    named: NamedJudge,
    pairs: Sequence[Pair] | None,
    store: Store,
    *,
    votes: int,
    attacks: int = CASES,
    seed: int = 1,
    count: int | None = None,
    source: str = "",
) -> dict[str, Any]:
    """An audit as plain JSON values: settings, every measure of `audit.measures`, `cost`, `attacks`, `findings`.

    Args:
        pairs: None: the arena's held-out pairs, `count` of them, for a judge that was trained on the arena.
        votes: of a response. attacks: cases of each family; 0 leaves attacks out.
        source: where the pairs are from, in words.

    Raises:
        UserError: a judge that can't be loaded or can't go on, too few pairs that fit its context, no pairs for a judge
            of something else than the arena. What was drawn is kept.
    """
    with named.load() as judge:
        chosen = _arena(named, judge.description.kind, count, seed) if pairs is None else list(pairs)
        parts = [pair_part(judge, chosen, votes, source=source or ("the arena" if pairs is None else ""))]
        tried = None
        if attacks:
            tried = attacks_on(chosen, content_tokens(judge, chosen[0]), attacks, seed)
            parts.append(attack_part(judge, tried))
        drawn = draw(judge, parts, store, name="audit", source=_sha256(chosen), place=named.place, check=named.check)
        judged = [one for one in judged_pairs(chosen, drawn.of(0)) if one is not None]
        check_enough(len(judged), len(chosen))
        rate = drawn.rates.get(judge.plan)
        fits = [tokens for tokens, key in zip(drawn.prompt_tokens[0], drawn.keys[0], strict=True) if key is not None]
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "version": __version__,
            "place": named.place,
            "fingerprint": judge.backend.fingerprint,
            "trained": getattr(judge.backend, "trained", None),
            "backend": judge.backend.name,
            "tokens": judge.backend.tokens,
            "decoding": judge.plan.decoding,
            "temperature": judge.plan.temperature,
            "seed": seed,
            "source": parts[0].source,
            "left_out": len(chosen) - len(judged),
            "notes": [],
            **measures(judged, judge.description.calibration, seed),
            "cost": cost(judged, fits, rate.drawn if rate else 0, rate.seconds if rate else 0.0),
            "attacks": attack_measures(tried, drawn.of(1), seed) if tried is not None else None,
        }
    if found["left_out"]:
        found["notes"].append(f"{found['left_out']} pairs are too long for the judge and were left out.")
    if not found["truth"]:
        found["notes"].append("The pairs don't state true quality: length and quality can't be told apart entirely.")
    return found | {"findings": findings(found)}


def sentences(found: dict[str, Any]) -> str:
    """An audit's notes and findings as text, a line each."""
    lines = [
        f"{one['severity']:8} {one['about']}: {one['sentence']}{' -> ' if one['todo'] else ''}{one['todo']}"
        for one in found["findings"]
    ]
    return "\n".join([*found["notes"], *lines])


def _arena(named: NamedJudge, kind: str | None, count: int | None, seed: int) -> list[Pair]:
    from patarm_lite import arena

    if kind != "arena":
        raise UserError(f"{named.place} is no judge of the arena, so it needs pairs of yours; give --pairs FILE")
    count = ARENA_PAIRS if count is None else count
    check_count(count)
    return arena.heldout_pairs(count, seed)


def _sha256(pairs: Sequence[Pair]) -> str:
    """Tells the same pairs again."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair_to_row(pair), ensure_ascii=True, sort_keys=True, default=str).encode())
    return digest.hexdigest()
