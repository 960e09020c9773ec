"""What planning takes from a header, against what llama.cpp makes of the same model."""

from __future__ import annotations

import re
import time
from collections import deque
from pathlib import Path

import pytest

from homeinfer.cluster.planning.model_shape import model_shape
from homeinfer.cluster.planning.plan import Workload
from homeinfer.cluster.planning.scratch import cells
from homeinfer.engine import runtime
from homeinfer.engine.window import LayerWindow
from homeinfer.engine.window_spec import WindowSpec
from homeinfer.errors import HomeinferError
from homeinfer.model.cut_rules import n_layers
from homeinfer.model.header import read_header
from homeinfer.model.window_file import cut_windows
from homeinfer.model.window_plan import why_not
from tests.support.headers import header_of
from tests.support.tiny_models import make_tiny_model

_SIZE = re.compile(r"(KV|RS|compute) buffer size = +([\d.]+) MiB")


@pytest.fixture(autouse=True)
def _whole_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of llama.cpp's log instead of its end: what it says of buffers comes before much else."""
    monkeypatch.setattr(runtime, "_log", deque(maxlen=10_000))


def _buffers(path: Path, first: int, last: int, workload: Workload, folder: Path) -> tuple[float, float]:
    """MiB of llama.cpp's memory and of its compute buffer, as it says itself."""
    header = read_header(path)
    n = n_layers(header)
    whole = (first, last) == (0, n)
    file = path if whole else cut_windows(header, ((first, last),), folder)[0]
    spec = WindowSpec(
        path=str(file),
        first=first,
        last=last,
        n_layer=n,
        n_ctx=workload.n_ctx,
        embedding_length=int(header.arch_get("embedding_length")),
        resident=False,
        n_batch=workload.n_batch,
        n_seq=workload.sequences,
        n_threads=1,
    )
    LayerWindow(spec).close()
    found = _SIZE.findall(runtime.recent_log())
    kept = sum(float(size) for what, size in found if what != "compute")
    return kept, sum(float(size) for what, size in found if what == "compute")


def _compare(path: Path, first: int, last: int, workload: Workload, folder: Path) -> None:
    shape = model_shape(read_header(path), workload)
    kept, scratch = _buffers(path, first, last, workload, folder)
    layers = shape.layers[first:last]
    ours = sum(layer.kv_bytes * cells(workload) + layer.state_bytes * workload.sequences for layer in layers)
    assert ours / 2**20 == pytest.approx(kept, abs=0.02)
    ours = shape.scratch_bytes + (shape.scratch_logits_bytes if last == len(shape.layers) else 0)
    assert 0.99 <= ours / 2**20 / scratch <= 1.15


@pytest.mark.parametrize(
    ("first", "last", "workload"),
    [
        (10, 20, Workload(n_ctx=1024)),
        (20, 30, Workload(n_ctx=1024)),
        (10, 20, Workload(n_ctx=4096)),
        (10, 20, Workload(n_ctx=500, n_batch=128, sequences=2)),
        (20, 30, Workload(n_ctx=512, n_batch=64)),
    ],
)
def test_smollm2_takes_the_memory_that_llama_cpp_says(
    smollm2_path: Path, tmp_path: Path, first: int, last: int, workload: Workload
) -> None:
    _compare(smollm2_path, first, last, workload, tmp_path)


@pytest.mark.parametrize(("first", "last"), [(2, 9), (9, 18)])
def test_gemma_takes_the_memory_that_llama_cpp_says(gemma_path: Path, tmp_path: Path, first: int, last: int) -> None:
    _compare(gemma_path, first, last, Workload(n_ctx=2048), tmp_path)


@pytest.mark.parametrize("arch", ["qwen3moe", "deepseek2", "qwen3next", "gpt-oss", "gemma4", "falcon-h1", "lfm2moe"])
def test_mixtures_hybrids_and_latent_attention_take_it_too(arch: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    make_tiny_model(arch, path)
    _compare(path, 0, n_layers(read_header(path)), Workload(n_ctx=1024, n_batch=256), tmp_path)


def test_latent_attention_keeps_one_row_for_all_heads(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    make_tiny_model("deepseek2", path)
    header = read_header(path)
    layer = model_shape(header, Workload()).layers[-1]
    rank, rope = int(header.arch_get("attention.kv_lora_rank")), int(header.arch_get("rope.dimension_count"))
    assert layer.kv_bytes == 2 * (rank + rope)
    assert 0 < layer.expert_share < 1
    assert 0 < layer.expert_bytes < layer.nbytes


def test_the_cache_type_counts(smollm2_path: Path) -> None:
    header = read_header(smollm2_path)
    half = model_shape(header, Workload(kv_type="q8_0")).layers[0].kv_bytes
    assert half / model_shape(header, Workload(kv_type="f16")).layers[0].kv_bytes == pytest.approx(34 / 64)
    with pytest.raises(HomeinferError, match="no type of KV cache"):
        model_shape(header, Workload(kv_type="f17"))


def test_allowed_cuts_are_those_of_the_architecture(gemma_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    make_tiny_model("llama4", path)
    for header in (read_header(gemma_path), read_header(path)):
        shape, n = model_shape(header, Workload()), n_layers(header)
        for first in range(n):
            for last in range(first + 1, n + 1):
                assert shape.may_cut(first, last) == (why_not(header, first, last) is None)


def test_a_model_that_cannot_be_cut_is_one_window(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    make_tiny_model("baichuan", path)
    shape = model_shape(read_header(path), Workload())
    n = len(shape.layers)
    assert shape.may_cut(0, n)
    assert not any(
        shape.may_cut(first, last) for first in range(n) for last in range(first + 1, n + 1) if last - first < n
    )


def test_a_large_models_shape_takes_a_moment() -> None:
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down", "attn_norm", "ffn_norm")
    tensors: dict[str, tuple[int, ...]] = {f"blk.{i}.{name}.weight": (8192, 1024) for i in range(128) for name in names}
    header = header_of("llama", layers=128, tensors={"token_embd.weight": (8192, 1000), **tensors})
    began = time.process_time()
    assert len(model_shape(header, Workload()).layers) == 128
    assert time.process_time() - began < 1.0
