"""What attacks in a response change in a judge's score, by family: the table of docs/security.md.

    python benchmarks/attacks.py my-judge/small-seed1-q8_0.gguf                 # a judge trained on the arena
    python benchmarks/attacks.py JUDGE.gguf --cases 50 --seed 2

Each case is one arena response that leaves room to rise, once with the attack at its end and once with harmless words
that are equally long in tokens and leave the true quality equal (patarm_lite/evals/injection.py). The file must be
trained on the arena, or its scores mean nothing here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from patarm_lite import arena  # noqa: E402
from patarm_lite.evals import attacks, injection  # noqa: E402
from patarm_lite.gguf_file import read_gguf  # noqa: E402
from patarm_lite.judge.description import read_description  # noqa: E402
from patarm_lite.judge.llamacpp import LlamaCpp  # noqa: E402
from patarm_lite.progress import Progress  # noqa: E402

CONTEXT, JUDGEMENT = 1024, 160


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("judge", type=Path, help="a GGUF judge trained on the arena")
    parser.add_argument("--cases", type=int, default=400, help="cases of each family")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    description = read_description(read_gguf(options.judge).metadata)
    if description.kind != "arena":
        parser.error(f"{options.judge} was not trained on the arena")
    judged = {name: texts for name, texts in attacks.STRUCTURAL.items() if name not in attacks.ENCODED_ONLY}
    pairs = arena.heldout_pairs(960, options.seed)
    with LlamaCpp.load(options.judge, context=CONTEXT, threads=options.threads) as model:
        broken = [text for text in attacks.ATTACKS if not injection.is_encoded_as_text(text, model, description)]
        if broken:
            raise AssertionError(f"{len(broken)} attacks are not encoded as text, the first: {broken[0]!r}")
        tokens = injection.content_tokens(model, description)
        found = list(injection.cases({**judged, **attacks.PERSUASIVE}, pairs, tokens, options.cases, seed=options.seed))
        shown = Progress("judging", 2 * len(found))
        changes = injection.score_changes(
            model, description, found, max_tokens=JUDGEMENT, progress=lambda done, _: shown.at(done)
        )
    print(f"{options.judge.name}, {options.cases} cases a family, seed {options.seed}; constrained, temperature 0")
    print(injection.markdown(injection.summary(found, changes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
