"""llama.cpp's own `llama-server`, built from the source distribution of llama-cpp-python: a peer for benchmarks.

    python benchmarks/llama_server.py                           # prints the program's path; about 20 minutes of a core

Its own sources and those of llama.cpp's `common` are compiled with g++ at -O2; the rest is the shared library that
llama-cpp-python installed, so that server and subject compute with the same kernels and draw with the same samplers.
Images, speech and the web page are left out (their calls stay unresolved). Objects are kept, so a build that was
interrupted goes on. Linux only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

COMMON = (
    "arg chat-auto-parser-generator chat-auto-parser-helpers chat-diff-analyzer chat-peg-parser chat common console"
    " debug download fit hf-cache json-schema-to-grammar json-schema json llguidance log ngram-cache ngram-map"
    " ngram-mod peg-parser preset reasoning-budget sampling speculative subproc trie unicode jinja/lexer jinja/parser"
    " jinja/runtime jinja/value jinja/string jinja/caps"
).split()
SERVER = (
    "main server server-chat server-common server-context server-http server-mcp server-models server-queue"
    " server-schema server-stream server-task server-tools"
).split()
INCLUDE = "include ggml/include common src vendor tools/server tools/mtmd".split()
DEFINED = (
    "CPPHTTPLIB_FORM_URL_ENCODED_PAYLOAD_MAX_LENGTH=1048576 CPPHTTPLIB_LISTEN_BACKLOG=512"
    " CPPHTTPLIB_REQUEST_URI_MAX_LENGTH=32768 CPPHTTPLIB_TCP_NODELAY=1 LLAMA_SUBPROCESS"
).split()
UI_HEADER = """
#pragma once
#include <array>
#include <string>
struct llama_ui_asset { std::string name; const unsigned char * data; std::size_t size; std::string etag, type; };
const llama_ui_asset * llama_ui_find_asset(const std::string & name);
bool llama_ui_use_gzip();
const std::array<llama_ui_asset, 0> & llama_ui_get_assets();
"""
OURS = """
#include "build-info.h"
#include "mtmd.h"
#include "mtmd-helper.h"
#include "ui.h"
const llama_ui_asset * llama_ui_find_asset(const std::string &) { return nullptr; }
bool llama_ui_use_gzip() { return false; }
static const std::array<llama_ui_asset, 0> none{};
const std::array<llama_ui_asset, 0> & llama_ui_get_assets() { return none; }
int llama_build_number(void) { return 0; }
const char * llama_commit(void) { return "source"; }
const char * llama_compiler(void) { return "g++"; }
const char * llama_build_target(void) { return "linux"; }
const char * llama_build_info(void) { return "b0-source"; }
void llama_print_build_info(const char *, FILE *) {}
extern "C" mtmd_context_params mtmd_context_params_default(void) { return {}; }
extern "C" mtmd_helper_init_opt mtmd_helper_init_opt_default(void) { return {}; }
extern "C" mtmd_caps mtmd_get_cap_from_file(const char *) { return {}; }
extern "C" bool mtmd_support_vision(const mtmd_context *) { return false; }
extern "C" bool mtmd_support_audio(const mtmd_context *) { return false; }
extern "C" bool mtmd_helper_support_video(const mtmd_context *) { return false; }
extern "C" const char * mtmd_default_marker(void) { return "<__media__>"; }
extern "C" void mtmd_free(mtmd_context *) {}
extern "C" void mtmd_helper_log_set(ggml_log_callback, void *) {}
extern "C" void mtmd_log_set(ggml_log_callback, void *) {}
"""


def server() -> Path:
    """The program, built where it is not there yet.

    Raises:
        SystemExit: no compiler, no source distribution, another system than Linux.
    """
    import llama_cpp
    from llama_cpp_source import source

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or not sys.platform.startswith("linux"):
        raise SystemExit("llama-server is built with g++ on Linux only; give a program of your own: --server PATH")
    libraries = Path(llama_cpp.__file__).parent / "lib"
    linked = hashlib.sha256(str(libraries).encode() + (libraries / "libllama.so").read_bytes()).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = root / "patarm-lite-benchmarks" / f"llama-server-{llama_cpp.__version__}-{linked[:12]}"
    program = cache / f"llama-server-{hashlib.sha256(OURS.encode()).hexdigest()[:8]}"
    if not program.is_file():
        _build(compiler, source(), libraries, cache, program)
    return program


def _build(compiler: str, source: Path, libraries: Path, cache: Path, program: Path) -> None:
    (cache / "ui").mkdir(parents=True, exist_ok=True)
    (cache / "ui" / "ui.h").write_text(UI_HEADER)
    (cache / "ours.cpp").write_text(OURS)
    parsers = sorted((source / "common" / "parsers").glob("*.cpp"))
    files = [cache / "ours.cpp", *(source / "tools" / "server" / f"{name}.cpp" for name in SERVER)]
    files += [source / "vendor" / "cpp-httplib" / "httplib.cpp", source / "common" / "imatrix-loader.cpp"]
    files += [*(source / "common" / f"{name}.cpp" for name in COMMON), *parsers, source / "vendor/hash/hash.cpp"]
    include = [f"-I{source / folder}" for folder in [*INCLUDE, "vendor/hash"]]
    options = ["-std=c++20", "-O2", "-w", "-ffunction-sections", f"-I{cache / 'ui'}", *include]
    options += [f"-D{name}" for name in DEFINED]
    objects = []
    for number, file in enumerate(files):
        name = f"{file.parent.name}-{file.stem}.o"
        objects.append(str(cache / name))
        if not (cache / name).is_file() or file.name == "ours.cpp":
            print(f"{number + 1} of {len(files)}: {file.name}", file=sys.stderr, flush=True)
            subprocess.run([compiler, *options, "-c", str(file), "-o", objects[-1] + ".part"], check=True)
            os.replace(objects[-1] + ".part", objects[-1])
    link = ["-Wl,--gc-sections", "-Wl,--unresolved-symbols=ignore-all", "-Wl,-z,now"]
    link += [f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    link += ["-lllama", "-lggml", "-lggml-base", "-lggml-cpu", "-pthread", "-ldl"]
    subprocess.run([compiler, "-o", f"{program}.part", *objects, *link], check=True)
    os.replace(f"{program}.part", program)


if __name__ == "__main__":
    print(server())
