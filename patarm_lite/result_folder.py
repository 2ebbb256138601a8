"""A folder of results that appears whole or not at all, and replaces only what the same verb wrote."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from patarm_lite.errors import UserError


def check_result_folder(out: Path, mark: str, force: bool) -> None:
    """Refuse a place that results can't go to, before any work is done.

    Args:
        mark: the file by which the verb knows a folder of its own, e.g. `bench.json`.

    Raises:
        UserError: `out` is a file, exists (without `force`), is somebody's own folder, or its parent is missing.
    """
    if out.is_file():
        raise UserError(f"{out} is a file; give a folder")
    if out.exists() and not force:
        raise UserError(f"{out} exists already; give another place, or --force to replace it")
    if out.exists() and not (out / mark).is_file() and any(out.iterdir()):
        raise UserError(f"{out} is not a folder of this verb (no {mark} in it); give another place")
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} does not exist; type: mkdir -p {shlex.quote(str(out.parent))}")


def write_result_folder(out: Path, files: Mapping[str, str], mark: str, force: bool) -> None:
    """Write files (name -> text) under another name first, then rename; what stood at `out` goes last.

    Raises:
        UserError: see `check_result_folder`. OSError: a disk that takes no more; nothing is left of it then.
    """
    check_result_folder(out, mark, force)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        part.chmod(0o755)
        for name, text in files.items():
            (part / name).write_text(text, encoding="utf-8", errors="replace")
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            out.rename(old / "old")
            part.rename(out)
            shutil.rmtree(old)
        else:
            part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
