"""llama.cpp's own source as an oracle for tests: from the source distribution of llama-cpp-python. Never shipped.

`PATARM_LLAMA_CPP_SDIST` names the distribution (.tar.gz) or the folder it was unpacked into; without it pip downloads
it once into the user's cache (77 MB, 217 MB unpacked).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

VERSION = "0.3.36"
VARIABLE = "PATARM_LLAMA_CPP_SDIST"
VENDORED = Path("vendor/llama.cpp")


@functools.cache
def source() -> Path:
    """The folder of llama.cpp's source. Skips the test where it can't be had."""
    given = os.environ.get(VARIABLE)
    if given:
        place = Path(given)
        return _unpacked(place) if place.is_file() else _inside(place)
    folder = _cache()
    if (folder / "complete").is_file():
        return _inside(folder)
    archive = folder / f"llama_cpp_python-{VERSION}.tar.gz"
    if not archive.is_file():
        _download(folder)
    return _unpacked(archive)


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "patarm-lite-tests" / f"llama-cpp-python-{VERSION}"


def _inside(folder: Path) -> Path:
    for place in (folder, folder / VENDORED, *sorted(folder.glob(f"*/{VENDORED}"))):
        if (place / "convert_hf_to_gguf.py").is_file():
            return place
    raise FileNotFoundError(f"{folder} holds no {VENDORED}: unpack llama_cpp_python-{VERSION}.tar.gz there")


def _download(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    what = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", f"llama-cpp-python=={VERSION}"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), *what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"llama-cpp-python's source can't be downloaded ({last}); set {VARIABLE}")


def _unpacked(archive: Path) -> Path:
    folder = _cache()
    if not (folder / "complete").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (folder / "complete").touch()  # last: an interrupted unpacking is done again
    return _inside(folder)
