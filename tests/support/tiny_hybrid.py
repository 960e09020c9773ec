"""Recurrent decoders, and those that mix recurrent layers with attention."""

from __future__ import annotations

from tests.support.tiny_dense import GRANITE
from tests.support.tiny_recipe import (
    HEAD,
    LLAMA,
    LN,
    MLA,
    MOE,
    NO_BIAS,
    RMS,
    ROPE_ONLY,
    SHARED,
    SHARED_FF,
    SIGMOID,
    TIED,
    VOCAB_SIZE,
    Recipe,
    Value,
    layers,
    lead,
)

MAMBA: dict[str, Value] = {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.time_step_rank": 4}
MAMBA2: dict[str, Value] = {**MAMBA, "ssm.time_step_rank": 8, "ssm.group_count": 2}
DELTA_NET: dict[str, Value] = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 64,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
    "full_attention_interval": 4,
    "rope.dimension_count": 4,
}
RECURRENT: dict[str, Value] = {"attention.recurrent_layers": [i % 4 != 3 for i in range(8)]}
MROPE4: dict[str, Value] = {"rope.dimension_sections": [1, 1, 0, 0]}
KDA: dict[str, Value] = {"ssm.conv_kernel": 4, "kda.head_dim": 16, "kda.gate_lower_bound": -5.0}
SHORT_CONV: dict[str, Value] = {"shortconv.l_cache": 3}
RWKV: dict[str, Value] = {
    "block_count": 4,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 0,
    "wkv.head_size": 16,
}
RWKV6: dict[str, Value] = {**RWKV, "time_mix_extra_dim": 8, "time_decay_extra_dim": 16}
RWKV7: dict[str, Value] = {
    **RWKV,
    "attention.decay_lora_rank": 16,
    "attention.iclr_lora_rank": 16,
    "attention.value_residual_mix_lora_rank": 8,
    "attention.gate_lora_rank": 16,
}


def attention_at(indices: set[int], n: int, kv: int = 2) -> list[int]:
    """KV heads per layer: `kv` in the attention layers, 0 in the recurrent ones."""
    return [kv if i in indices else 0 for i in range(n)]


HYBRID: tuple[Recipe, ...] = (
    Recipe("mamba", {**layers(4, RMS, MAMBA, {"ssm.dt_b_c_rms": False}, heads=0, ff=0)}, omit=TIED),
    Recipe("mamba2", {**layers(4, RMS, MAMBA2, heads=0, ff=0)}, omit=TIED),
    Recipe("rwkv6", {**RWKV6, **LN, "rescale_every_n_layers": 2}, omit=ROPE_ONLY),
    Recipe(
        "rwkv6qwen2",
        {**RWKV6, **RMS, "attention.head_count_kv": 2, "token_shift_count": 1},
        omit=(*ROPE_ONLY, r"time_mix_first"),
    ),
    Recipe("rwkv7", {**RWKV7, **LN}, omit=ROPE_ONLY),
    Recipe("arwkv7", {**RWKV7, **RMS, "token_shift_count": 1}, omit=ROPE_ONLY),
    Recipe("lfm2", layers(8, RMS, VOCAB_SIZE, SHORT_CONV, kv=attention_at({2, 5, 7}, 8)), omit=TIED),
    Recipe(
        "lfm2moe",
        layers(8, RMS, VOCAB_SIZE, SHORT_CONV, MOE, SIGMOID, lead(2), kv=attention_at({2, 5, 7}, 8)),
        omit=TIED,
    ),
    Recipe("jamba", layers(8, RMS, MAMBA, kv=attention_at({2, 6}, 8)), omit=(*NO_BIAS, r"_exps|_inp\.")),
    Recipe("falcon-h1", layers(6, RMS, VOCAB_SIZE, HEAD, MAMBA2), omit=NO_BIAS),
    Recipe(
        "granitehybrid",
        layers(8, *LLAMA, GRANITE, MAMBA2, {"rope.scaling.finetuned": False}, kv=attention_at({3, 6}, 8)),
        omit=TIED,
    ),
    Recipe(
        "granitehybrid",
        layers(
            8, *LLAMA, GRANITE, MAMBA2, MOE, SHARED_FF, {"rope.scaling.finetuned": False}, kv=attention_at({3, 6}, 8)
        ),
        "moe",
        TIED,
    ),
    Recipe(
        "nemotron_h",
        {
            **layers(8, RMS, LN, HEAD, MAMBA2, kv=attention_at({3, 6}, 8)),
            "feed_forward_length": [96 if i in (1, 4, 7) else 0 for i in range(8)],
        },
    ),
    Recipe(
        "nemotron_h_moe",
        {
            **layers(8, RMS, LN, HEAD, MAMBA2, MOE, SHARED, SHARED_FF, SIGMOID, kv=attention_at({3, 6}, 8)),
            "feed_forward_length": [48 if i in (1, 4, 7) else 0 for i in range(8)],
        },
    ),
    Recipe(
        "plamo2",
        {
            **layers(
                8,
                RMS,
                VOCAB_SIZE,
                HEAD,
                MAMBA2,
                {"ssm.group_count": 0, "ssm.state_size": 64},
                kv=attention_at({0, 3, 5, 7}, 8),
            ),
            "attention.head_count": attention_at({0, 3, 5, 7}, 8, 4),
        },
    ),
    Recipe("qwen3next", layers(8, RMS, HEAD, MOE, SHARED_FF, DELTA_NET, RECURRENT)),
    Recipe("qwen3next", layers(8, RMS, HEAD, MOE, SHARED_FF, DELTA_NET), "interval"),
    Recipe("qwen35", layers(8, RMS, HEAD, DELTA_NET, RECURRENT, MROPE4)),
    Recipe("qwen35moe", layers(8, RMS, HEAD, MOE, SHARED_FF, DELTA_NET, RECURRENT, MROPE4)),
    Recipe(
        "kimi-linear",
        layers(
            8,
            RMS,
            VOCAB_SIZE,
            MLA,
            MOE,
            SHARED,
            SIGMOID,
            lead(1),
            {"ssm.conv_kernel": 4, "kda.head_dim": 16},
            kv=attention_at({3, 7}, 8, 1),
        ),
    ),
    Recipe("qwen3next", layers(9, RMS, HEAD, MOE, SHARED_FF, DELTA_NET, {"nextn_predict_layers": 1}), "nextn"),
    Recipe("bailingmoe3", layers(8, RMS, MLA, MOE, SHARED, SIGMOID, lead(1), KDA, kv=attention_at({3, 7}, 8, 1))),
    Recipe(
        "kimi-k3",
        layers(
            8,
            RMS,
            VOCAB_SIZE,
            MLA,
            MOE,
            SHARED,
            SIGMOID,
            lead(1),
            KDA,
            {
                "attn_res.block_size": 3,
                "activation.situ_beta": 4.0,
                "activation.situ_linear_beta": 25.0,
                "attention.q_lora_rank": 24,
            },
            kv=attention_at({3, 7}, 8, 1),
        ),
    ),
    Recipe(
        "minimax-01",
        layers(8, RMS, HEAD, MOE, {"residual_scale": 3.5, "rope.dimension_count": 8, "full_attention_interval": 4}),
    ),
)
