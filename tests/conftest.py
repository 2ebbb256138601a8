"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, vectors and models: $PATARM_SHARED, or `../shared` beside the checkout."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared"
    folder = Path(os.environ.get("PATARM_SHARED") or beside)
    if not folder.is_dir():
        pytest.skip("the folder of real data is not here (set PATARM_SHARED)")
    return folder
