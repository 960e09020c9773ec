"""What reaches a model's weights, read once more in Python: through ctypes, without homeinfer's native code."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llama_cpp import _ggml
from llama_cpp import llama_cpp as api

from homeinfer.engine.graph_nodes import GgmlTensor

Ints = npt.NDArray[np.int32]


class Product(NamedTuple):
    """A weight's inputs, float32 [ne3, ne2, ne1, n_in], and the experts they go to, int32 [tokens, used], if any."""

    inputs: npt.NDArray[np.float32]
    experts: Ints | None


def _array(tensor: GgmlTensor, kind: type[np.generic]) -> npt.NDArray[np.generic]:
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.ne, tensor.nb, strict=True))
    raw = (ctypes.c_char * (span + 3)).from_address(tensor.data)
    view = np.ndarray(tuple(reversed(tensor.ne)), kind, raw, strides=tuple(reversed(tensor.nb)))
    return view.copy()


def recorded_inputs(path: Path, chunks: Iterable[Sequence[int]], names: Iterable[str]) -> dict[str, list[Product]]:
    """Every product of these weights while the model reads each chunk by itself."""
    wanted = {name.encode() for name in names}
    found: dict[str, list[Product]] = {name: [] for name in names}
    _ggml.libggml.ggml_op_name.restype = ctypes.c_char_p

    @api.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
    def record(address: int, ask: bool, _user: object) -> bool:
        node = GgmlTensor.from_address(address)
        if not _ggml.libggml.ggml_op_name(node.op).startswith(b"MUL_MAT") or node.src[0].contents.name not in wanted:
            return not ask
        if not ask:
            inputs = _array(node.src[1].contents, np.float32)
            experts = _array(node.src[2].contents, np.int32)[0, 0] if node.src[2] else None
            found[node.src[0].contents.name.decode()].append(Product(inputs, experts))  # type: ignore[arg-type]
        return True

    params = api.llama_model_default_params()
    params.use_extra_bufts = False
    model = api.llama_model_load_from_file(str(path).encode(), params)
    context_params = api.llama_context_default_params()
    context_params.n_ctx = context_params.n_batch = context_params.n_ubatch = 256
    context_params.n_threads = context_params.n_threads_batch = 1
    context_params.cb_eval = record
    context = api.llama_init_from_model(model, context_params)
    for chunk in chunks:
        batch = api.llama_batch_init(len(chunk), 0, 1)
        batch.n_tokens = len(chunk)
        for i, token in enumerate(chunk):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        api.llama_memory_clear(api.llama_get_memory(context), True)
        assert api.llama_decode(context, batch) == 0
        api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
    return found
