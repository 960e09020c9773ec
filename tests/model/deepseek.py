"""The header of DeepSeek-R1 (671B) in F16: metadata and tensor table without data, 66 kB."""

from __future__ import annotations

from collections.abc import Iterator

from homeinfer.model.header import MetaValue, ValueType
from tests.model.gguf_bytes import head

LAYERS, DENSE, EMBD, VOCAB, HEADS = 61, 3, 7168, 129280, 128
EXPERTS, FFN, FFN_EXPERT = 256, 18432, 2048

Tensor = tuple[str, tuple[int, ...], str]


def deepseek_header() -> bytes:
    counts = {
        "block_count": LAYERS,
        "context_length": 163840,
        "embedding_length": EMBD,
        "expert_count": EXPERTS,
        "expert_used_count": 8,
        "leading_dense_block_count": DENSE,
        "vocab_size": VOCAB,
    }
    metadata = {
        "general.architecture": MetaValue(ValueType.STRING, "deepseek2"),
        "general.name": MetaValue(ValueType.STRING, "DeepSeek R1 (header only)"),
        **{f"deepseek2.{key}": MetaValue(ValueType.UINT32, count) for key, count in counts.items()},
    }
    return head(metadata, list(_tensors()))[0]


def _tensors() -> Iterator[Tensor]:
    yield "token_embd.weight", (EMBD, VOCAB), "F16"
    yield "output_norm.weight", (EMBD,), "F32"
    yield "output.weight", (EMBD, VOCAB), "F16"
    for index in range(LAYERS):
        for name, shape, kind in _attention() + (_dense() if index < DENSE else _experts()):
            yield f"blk.{index}.{name}", shape, kind


def _attention() -> list[Tensor]:
    return [
        ("attn_norm.weight", (EMBD,), "F32"),
        ("attn_q_a_norm.weight", (1536,), "F32"),
        ("attn_kv_a_norm.weight", (512,), "F32"),
        ("ffn_norm.weight", (EMBD,), "F32"),
        ("attn_q_a.weight", (EMBD, 1536), "F16"),
        ("attn_q_b.weight", (1536, HEADS * 192), "F16"),
        ("attn_kv_a_mqa.weight", (EMBD, 576), "F16"),
        ("attn_kv_b.weight", (512, HEADS * 256), "F16"),
        ("attn_output.weight", (HEADS * 128, EMBD), "F16"),
    ]


def _dense() -> list[Tensor]:
    return [
        ("ffn_gate.weight", (EMBD, FFN), "F16"),
        ("ffn_up.weight", (EMBD, FFN), "F16"),
        ("ffn_down.weight", (FFN, EMBD), "F16"),
    ]


def _experts() -> list[Tensor]:
    return [
        ("ffn_gate_inp.weight", (EMBD, EXPERTS), "F32"),
        ("exp_probs_b.bias", (EXPERTS,), "F32"),
        ("ffn_gate_exps.weight", (EMBD, FFN_EXPERT, EXPERTS), "F16"),
        ("ffn_up_exps.weight", (EMBD, FFN_EXPERT, EXPERTS), "F16"),
        ("ffn_down_exps.weight", (FFN_EXPERT, EMBD, EXPERTS), "F16"),
        ("ffn_gate_shexp.weight", (EMBD, FFN_EXPERT), "F16"),
        ("ffn_up_shexp.weight", (EMBD, FFN_EXPERT), "F16"),
        ("ffn_down_shexp.weight", (FFN_EXPERT, EMBD), "F16"),
    ]
