"""The one door to llama.cpp: the library itself, its version, its log, its OpenMP threads.

Nothing here may import llama_cpp before `prepare_environment` has run: OpenMP reads its settings
once, when the library is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from homeinfer import _native
from homeinfer.errors import HomeinferError

OLDEST = "0.3.36"
TOO_NEW = "0.3.37"
SPIN_MICROSECONDS = 50.0
"""How long an idle OpenMP thread waits busily: longer than the pauses inside a step (some
microseconds), shorter than the pause between two steps of a ring (milliseconds). On the 2-core test
machine 50 µs is a spin count of about 2,000; the default of 200,000 made a ring of three twice as slow."""

_log: deque[str] = deque(maxlen=200)
_keep: list[object] = []
_importing = threading.Lock()


def prepare_environment(environment: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Set how long idle OpenMP threads spin (GOMP_SPINCOUNT, KMP_BLOCKTIME), unless the user did.

    libgomp counts steps of a busy wait, whose length differs 20-fold between processors, so it is
    timed here; libomp (macOS, Windows) counts milliseconds, for which 0 is nearest.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(_spin_count()))
        environment.setdefault("KMP_BLOCKTIME", "0")


def engine_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of an engine process: OpenMP as above. llama.cpp's own backtraces are off: they start a debugger,
    and what failed is in its last line."""
    made = dict(environment)
    prepare_environment(made)
    made.setdefault("GGML_NO_BACKTRACE", "1")
    return made


def _spin_count(steps: int = 20_000) -> int:
    """Steps of a busy wait in SPIN_MICROSECONDS here: the best of three, since others use the machine."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        _native.spin(steps)
        best = min(best, time.perf_counter() - start)
    return max(100, round(SPIN_MICROSECONDS * 1e-6 * steps / best))


def check_version(installed: str) -> None:
    """Raise HomeinferError unless this llama-cpp-python's C structures are the ones known here."""
    if not _parts(OLDEST) <= _parts(installed) < _parts(TOO_NEW):
        raise HomeinferError(
            f"llama-cpp-python {installed} is installed, homeinfer works with {OLDEST} up to, not including, "
            f"{TOO_NEW}: pip install 'llama-cpp-python=={OLDEST}'"
        )


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:3])


@functools.cache
def llama() -> ModuleType:
    """llama_cpp.llama_cpp, checked, initialized and quiet (its log goes to `recent_log`)."""
    prepare_environment()
    try:
        check_version(importlib.metadata.version("llama-cpp-python"))
        llama_cpp = _bindings("llama_cpp")
    except (importlib.metadata.PackageNotFoundError, ImportError, OSError, RuntimeError) as problem:
        raise HomeinferError(
            f"llama.cpp can't be loaded ({problem}): pip install 'llama-cpp-python=={OLDEST}'"
        ) from problem

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep_line(_level: int, text: bytes, _user: object) -> None:
        _log.append(text.decode("utf-8", "replace"))

    _keep.append(keep_line)
    llama_cpp.llama_log_set(keep_line, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _bindings(name: str) -> ModuleType:
    """A module of llama-cpp-python, without its package's own imports: templates, caches and a database are nothing
    that an idle engine would use. Whoever imports the package itself later gets it whole."""
    with _importing:
        if "llama_cpp" in sys.modules:
            return importlib.import_module(f"llama_cpp.{name}")
        found = importlib.util.find_spec("llama_cpp")
        if found is None:
            raise ImportError("there is no llama_cpp")
        bare = ModuleType("llama_cpp")
        bare.__path__ = list(found.submodule_search_locations or ())
        sys.modules["llama_cpp"] = bare
        try:
            return importlib.import_module(f"llama_cpp.{name}")
        finally:
            sys.modules.pop("llama_cpp", None)


def recent_log() -> str:
    """llama.cpp's last log lines, for the reason of a failure."""
    return "".join(_log)


def reason(fallback: str) -> str:
    """llama.cpp's own last word on what went wrong, on one line, or `fallback`."""
    lines = [line.strip() for line in recent_log().splitlines() if "error" in line.lower() or "fail" in line.lower()]
    return lines[0].removeprefix("llama_model_load: ").removeprefix("error loading model: ") if lines else fallback


def forget_log() -> None:
    """Start `recent_log` anew."""
    _log.clear()


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop what C code writes to standard error meanwhile."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@functools.cache
def ggml() -> ctypes.CDLL:
    """The ggml library beside llama.cpp's, for the tensor functions that llama_cpp does not bind."""
    llama()
    library: Any = _bindings("_ggml").libggml
    for name in ("ggml_get_name", "ggml_nbytes", "ggml_backend_tensor_get", "ggml_get_type_traits"):
        if not hasattr(library, name):
            raise HomeinferError(f"this llama.cpp has no {name}: pip install 'llama-cpp-python=={OLDEST}'")
    assert isinstance(library, ctypes.CDLL)
    return library


def address(name: str) -> int:
    """The address of a ggml function in the loaded library."""
    return ctypes.cast(getattr(ggml(), name), ctypes.c_void_p).value or 0


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


def llama_address(name: str) -> int:
    """The address of a llama.cpp function in the loaded library."""
    return ctypes.cast(getattr(llama()._lib, name), ctypes.c_void_p).value or 0


def to_float_address(type_number: int) -> int:
    """The address of ggml's own dequantizer of a type, f(const void *x, float *y, int64 n_weights), or 0 for F32."""
    get = ggml().ggml_get_type_traits
    get.restype = ctypes.POINTER(_TypeTraits)
    get.argtypes = (ctypes.c_int,)
    return get(type_number).contents.to_float or 0
