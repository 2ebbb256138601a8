"""Before a GGUF file is loaded here, it is checked: its header by our own reader, then a first load in a child process.

llama.cpp can die on a damaged file, and a file with damaged weights loads and answers NaN. Whatever happens to the
child, the user's process gets one clear line. `python -m patarm_lite.judge.loading FILE` is that child.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from patarm_lite.errors import UserError, missing_extra

ARCHITECTURE = "qwen3"
SLOWEST_DISK = 30_000_000
"""Bytes per second. A child that reads slower than that, after a minute of grace, is given up."""

_ERROR_LEVEL, _CONTINUED = 4, 5
_checked: set[tuple[str, int, int]] = set()


class Log:
    """What llama.cpp says: nothing of it is shown unless `verbose`, the error lines are kept."""

    def __init__(self) -> None:
        self.verbose = False
        self.errors: list[str] = []
        self._level = 0

    def __call__(self, level: int, text: bytes, _: object) -> None:
        self._level = self._level if level == _CONTINUED else level
        line = text.decode("utf-8", "replace")
        if self._level == _ERROR_LEVEL and line.strip():
            self.errors = [*self.errors[-20:], line.strip()]
        if self.verbose:
            sys.stderr.write(line)

    def reason(self) -> str:
        """The first error since the last `forget`: the later ones say only that something failed."""
        return self.errors[0] if self.errors else "llama.cpp gave no reason"

    def forget(self) -> None:
        self.errors = []


LOG = Log()
_library: Any = None
_callback: Any = None


def library() -> Any:
    """llama-cpp-python's low-level module, its log silenced.

    OpenMP's threads wait by spinning; on a busy machine that costs a factor of ten. So they are told to spin for a
    short while, or to sleep where the machine is busy, before the library is first loaded. A setting of the user's own
    stands.
    """
    global _library, _callback
    if _library is None:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "0" if busy() else "1000")
        try:
            import llama_cpp
        except ImportError as error:
            raise missing_extra("judge", "llama-cpp-python") from error
        _callback = llama_cpp.llama_log_callback(LOG)
        llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _library = llama_cpp
    return _library


def physical_cores() -> int:
    """The physical cores that this process may use; a core that runs two threads counts once."""
    logical = os.cpu_count() or 1
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(logical)
    try:
        lists = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in usable]
    except OSError:
        return len(usable)
    return len(set(lists))


def busy() -> bool:
    """Whether other processes keep more than half of the cores at work, by the load of the last minute."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > physical_cores() / 2


def check_file(path: Path) -> None:
    """Refuse a file that is not a sound Qwen3 GGUF model. A file that passed is not checked again in this process.

    Raises:
        UserError: no such file, a damaged header, another architecture, NaN or infinite weights or logits, or a child
            process that died or hung while loading it.
    """
    path = Path(path)
    check_header(path)
    status = path.stat()
    mark = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if mark not in _checked:
        _try_in_child(path, 60 + status.st_size / SLOWEST_DISK)
        _checked.add(mark)


def check_header(path: Path) -> None:
    """Refuse what is no readable GGUF file of a Qwen3 model, without loading it."""
    from patarm_lite.gguf_file import read_gguf

    architecture = read_gguf(path).metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(
            f"{path} holds a model of architecture {architecture!r}, and only {ARCHITECTURE!r} is run here;"
            " convert a judge with: patarm-lite export JUDGE"
        )


def _try_in_child(path: Path, seconds: float) -> None:
    command = [sys.executable, "-m", "patarm_lite.judge.loading", str(path)]
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, env=environment, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{path} was not loaded within {seconds:.0f} s by a child process; check the disk, or the file's checksum"
        ) from None
    if done.returncode == 0:
        return
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if done.returncode == 3 and said:
        raise UserError(
            f"{path} can't be used: {said[-1]}; the file is damaged or not meant for llama.cpp: make it anew"
        )
    if done.returncode < 0:
        how = f"died of {signal.Signals(-done.returncode).name}"
    else:
        how = f"ended with exit status {done.returncode}" + (f" ({said[-1]})" if said else "")
    raise UserError(f"{path} can't be used: a child process that loaded it {how}; make the file anew")


def try_file(path: str) -> str | None:
    """Load a file wholly, every weight checked, and decode a few tokens: what is wrong with it, or None."""
    llama = library()
    options = llama.llama_model_default_params()
    options.load_mode = llama.LLAMA_LOAD_MODE_NONE
    options.n_gpu_layers = 0
    options.check_tensors = True
    model = llama.llama_model_load_from_file(os.fsencode(path), options)
    if not model:
        return LOG.reason()
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 64
    context = llama.llama_init_from_model(model, settings)
    if not context:
        return LOG.reason()
    tokens = (llama.llama_token * 8)(*(number * (size - 1) // 7 for number in range(8)))
    if llama.llama_decode(context, llama.llama_batch_get_one(tokens, 8)) != 0:
        return LOG.reason()
    logits = llama.llama_get_logits_ith(context, -1)
    if not logits:
        return "it gives no logits"
    if any(value - value != 0.0 for value in logits[:size]):
        return "it gives logits that are not numbers (NaN or infinite)"
    return None


if __name__ == "__main__":
    problem = try_file(sys.argv[1])
    if problem:
        print(problem, file=sys.stderr)
    sys.stderr.flush()
    os._exit(3 if problem else 0)
