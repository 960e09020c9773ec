"""Tiny random GGUF models of every architecture that llama.cpp can run, made from metadata alone.

`llama_model_init_from_user` creates the tensors that an architecture wants from a metadata-only GGUF; their names
and shapes are collected in its callback, and a file is written with our own metadata (as convert_hf_to_gguf.py writes
it for real models, not as llama.cpp's model saver would canonicalise it).

`python -m tests.support.tiny_models OUTDIR [NAME…]` makes many, each batch in a process of its own: llama.cpp aborts
the process where an assertion of it fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as api

from tests.support.tiny_metadata import RECIPES, Recipe, Value

ARCHITECTURES: tuple[str, ...] = tuple(dict.fromkeys(recipe.arch for recipe in RECIPES))
MODELS: tuple[str, ...] = tuple(recipe.name for recipe in RECIPES)

_BY_NAME = {recipe.name: recipe for recipe in RECIPES}
_SCALARS = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
_FLOATS = npt.NDArray[np.float32]


class _GgufInit(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


class _Tensor(ctypes.Structure):
    """The first fields of struct ggml_tensor, as far as its shape."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4))


def _ggml_base() -> ctypes.CDLL:
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = [path for path in folder.iterdir() if re.fullmatch(r"(lib)?ggml-base\.(so|dylib|dll)", path.name)]
    library = ctypes.CDLL(str(found[0]))
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _GgufInit]
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_free.argtypes = [ctypes.c_void_p]
    library.ggml_get_name.argtypes = [ctypes.c_void_p]
    library.ggml_get_name.restype = ctypes.c_char_p
    return library


def find_recipe(arch: str, variant: str = "") -> Recipe:
    """The recipe of `arch` (general.architecture) and `variant`; KeyError when there is none."""
    return _BY_NAME[f"{arch}:{variant}" if variant else arch]


def make_tiny_model(arch: str, path: Path, *, seed: int = 0, variant: str = "") -> None:
    """Writes a random model of `arch` as a GGUF file at `path`; the same seed gives the same bytes.

    Runs llama.cpp in this process (llama_model_init_from_user), which may abort it for metadata that llama.cpp does
    not accept. Raises KeyError for an unknown architecture or variant, RuntimeError when llama.cpp refuses.
    """
    recipe = find_recipe(arch, variant)
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder) / "header.gguf"
        _write(header, recipe, {})
        shapes = _wanted_tensors(header, nextn="nextn_predict_layers" in recipe.metadata)
    tensors = {
        name: _values(name, shape, seed)
        for name, shape in _as_converted(recipe, shapes).items()
        if not any(re.search(pattern, name) for pattern in recipe.omit)
    }
    _write(path, recipe, tensors)


def _wanted_tensors(header: Path, *, nextn: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes (ggml order) of the tensors that llama.cpp creates for the metadata in `header`."""
    ggml = _ggml_base()
    shapes: dict[str, tuple[int, ...]] = {}

    def collect(tensor: int, _user: int | None) -> None:
        ne = list(_Tensor.from_address(tensor).ne)
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        shapes.setdefault(ggml.ggml_get_name(tensor).decode(), tuple(ne))

    api.llama_backend_init()
    metadata = ggml.gguf_init_from_file(os.fsencode(header), _GgufInit(True, None))
    if not metadata:
        raise RuntimeError(f"{header}: not readable as GGUF")
    params = api.llama_model_default_params()
    params.load_mtp = nextn
    callback = api.llama_model_set_tensor_data_t(collect)
    model = api.llama_model_init_from_user(metadata, callback, ctypes.c_void_p(), params)
    if not model:
        raise RuntimeError("llama.cpp refuses this metadata (see its log)")
    api.llama_model_free(model)
    ggml.gguf_free(metadata)
    return shapes


def _as_converted(recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Joins Q, K, V where the architecture's converter does, and parts the experts' gate and up, as files have them."""
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name.endswith("ffn_gate_up_exps.weight"):
            half = (shape[0], shape[1] // 2, *shape[2:])
            out[name.replace("gate_up", "gate")] = half
            out[name.replace("gate_up", "up")] = half
        elif recipe.joined_qkv and (match := re.search(r"\.attn_([qkv])\.(weight|bias)$", name)):
            if match[1] == "q":
                parts = [shapes[name.replace("attn_q.", f"attn_{part}.")] for part in "qkv"]
                out[name.replace("attn_q.", "attn_qkv.")] = (*shape[:-1], sum(part[-1] for part in parts))
        else:
            out[name] = shape
    return out


def _values(name: str, shape: tuple[int, ...], seed: int) -> _FLOATS:
    """Random float32 of numpy shape reversed(shape), of a size that keeps hidden states near one."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    x = rng.standard_normal(tuple(reversed(shape)), dtype=np.float32)
    for pattern, shift, scale, fold in _RULES:
        if re.search(pattern, name):
            x = np.abs(x) if fold else x
            return np.asarray(shift + scale * x, dtype=np.float32)
    return np.asarray(x / np.sqrt(shape[0]) if len(shape) > 1 else 0.1 * x, dtype=np.float32)


# name pattern, value at x = 0, factor of the standard normal x, whether x is made positive
_RULES: tuple[tuple[str, float, float, bool], ...] = (
    (r"\.ssm_a\b", -0.2, -0.8, True),
    (r"\.ssm_dt\.bias", -1.0, 0.5, False),
    (r"\.ssm_d\b", 1.0, 0.1, False),
    (r"\.ssm_conv1d(_\w)?\.weight|shortconv\.conv\.weight", 0.0, 0.5, False),
    (r"rope_freqs|rope_factors", 1.0, 0.5, True),
    (r"norm.*\.weight$", 1.0, 0.1, False),
    (r"scale", 1.0, 0.1, False),
    (r"time_mix_lerp|channel_mix_lerp", 0.5, 0.1, False),
    (r"token_embd", 0.0, 0.25, False),
    (r"sinks", 0.0, 1.0, False),
)


def _write(path: Path, recipe: Recipe, tensors: dict[str, _FLOATS]) -> None:
    writer = gguf.GGUFWriter(path, recipe.arch)
    for key, value in recipe.keys().items():
        _add(writer, key, value)
    for name, data in tensors.items():
        kind = gguf.GGMLQuantizationType[recipe.weight_type]
        is_matrix = data.ndim > 1 and data.shape[-1] % 32 == 0 and not re.search(r"norm|ssm|conv|_inp", name)
        if is_matrix and recipe.weight_type != "F32":
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        getattr(writer, _SCALARS[type(value)])(key, value)


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Sends this process's stderr, where llama.cpp logs and ggml says why it aborts, to `log`."""
    saved = os.dup(2)
    with log.open("wb") as target:
        os.dup2(target.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def file_name(name: str) -> str:
    """ "deepseek2:lite" -> "deepseek2-lite.gguf"."""
    return name.replace(":", "-") + ".gguf"


def make_batch(folder: Path, names: list[str]) -> None:
    """Makes the named models in this process; what llama.cpp says goes to <model>.log, removed on success."""
    for name in names:
        path = folder / file_name(name)
        log = path.with_suffix(".log")
        arch, _, variant = name.partition(":")
        with _quiet(log):
            try:
                make_tiny_model(arch, path.with_suffix(".part"), variant=variant)
            except RuntimeError:
                continue
        path.with_suffix(".part").rename(path)
        log.unlink()


def make_tiny_models(folder: Path, names: tuple[str, ...] = MODELS) -> dict[str, str]:
    """Makes the named models that are not yet in `folder`, in processes of their own.

    Returns what failed: name -> the last lines of llama.cpp's log. A crash costs only the model that caused it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    while todo := [name for name in names if name not in failed and not (folder / file_name(name)).exists()]:
        for name in todo:
            (folder / file_name(name)).with_suffix(".log").unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.support.tiny_models", "--batch", str(folder), *todo]
        subprocess.run(command, check=False, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
        logs = {name: (folder / file_name(name)).with_suffix(".log") for name in todo}
        broken = {name: log for name, log in logs.items() if log.exists()}
        failed |= {name: log.read_text(errors="replace").strip()[-600:] for name, log in broken.items()}
        if not broken and any(not (folder / file_name(name)).exists() for name in todo):
            raise RuntimeError("the maker process could not start")
    return failed


def main(arguments: list[str]) -> int:
    if arguments[0] == "--batch":
        make_batch(Path(arguments[1]), arguments[2:])
        return 0
    failed = make_tiny_models(Path(arguments[0]), tuple(arguments[1:]) or MODELS)
    for name, why in failed.items():
        print(f"{name}: {why.splitlines()[-1] if why else 'no log'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
