"""patarm-lite: train, quantize and run your own LLM judge on one GPU or none.

The public names are loaded at first use, so that `import patarm_lite` stays cheap.

>>> import patarm_lite
>>> patarm_lite.par_rewards.__module__
'patarm_lite.par'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patarm_lite.judge.judge import Judge
    from patarm_lite.judge.scored import Scored
    from patarm_lite.pairs import load_pairs
    from patarm_lite.par import par_rewards
    from patarm_lite.records import Criterion, Pair, Verdict

__version__ = "0.1.0"

__all__ = ["Criterion", "Judge", "Pair", "Scored", "Verdict", "load_pairs", "par_rewards"]

_HOME = {
    "Criterion": "patarm_lite.records",
    "Judge": "patarm_lite.judge.judge",
    "Pair": "patarm_lite.records",
    "Scored": "patarm_lite.judge.scored",
    "Verdict": "patarm_lite.records",
    "load_pairs": "patarm_lite.pairs",
    "par_rewards": "patarm_lite.par",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'patarm_lite' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
