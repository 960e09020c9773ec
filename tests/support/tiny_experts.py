"""Decoders with a mixture of experts in some or all of their layers."""

from __future__ import annotations

from tests.support.tiny_dense import GRANITE, HALF_ROPE, MINICPM, MROPE
from tests.support.tiny_recipe import (
    HEAD,
    LLAMA,
    LN,
    MLA,
    MOE,
    NO_ROPE_SCALING,
    Q_LORA,
    RMS,
    ROPE,
    ROPE_ONLY,
    SHARED,
    SHARED_FF,
    SIGMOID,
    SWA,
    TIED,
    VOCAB_SIZE,
    YARN,
    Recipe,
    Value,
    layers,
    lead,
    sliding,
)

DEEPSEEK = (RMS, VOCAB_SIZE, MLA, MOE, SHARED, SIGMOID, {"expert_feed_forward_length": 32})
YARN_MLA = {**YARN, "rope.scaling.yarn_log_multiplier": 0.1}
INDEXER: dict[str, Value] = {
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 16,
}
GROUPS: dict[str, Value] = {"expert_count": 8, "expert_group_count": 4, "expert_group_used_count": 2}
GLM4: dict[str, Value] = {"rope.dimension_count": 8}

_DEEPSEEK: tuple[Recipe, ...] = (
    Recipe(
        "deepseek",
        layers(4, RMS, VOCAB_SIZE, ROPE, MOE, SHARED, NO_ROPE_SCALING, lead(1), {"expert_weights_scale": 1.0}, kv=4),
    ),
    Recipe("deepseek2", layers(5, *DEEPSEEK, Q_LORA, YARN_MLA, lead(2), kv=1)),
    Recipe(
        "deepseek2",
        layers(
            27,
            RMS,
            VOCAB_SIZE,
            MLA,
            MOE,
            SHARED,
            lead(1),
            YARN_MLA,
            {"expert_feed_forward_length": 32, "expert_weights_scale": 1.0},
            kv=1,
            ff=64,
            embd=32,
        ),
        "lite",
    ),
    Recipe("deepseek2", layers(5, *DEEPSEEK, Q_LORA, GROUPS, lead(1), kv=1), "groups"),
    Recipe("deepseek32", layers(5, *DEEPSEEK, Q_LORA, INDEXER, lead(1), kv=1)),
    Recipe("glm-dsa", layers(5, *DEEPSEEK, Q_LORA, INDEXER, lead(1), kv=1)),
    Recipe(
        "mistral4",
        layers(
            5,
            *DEEPSEEK,
            Q_LORA,
            YARN,
            lead(1),
            {"attention.temperature_scale": 0.1, "attention.temperature_length": 128},
            kv=1,
        ),
    ),
    Recipe(
        "bailingmoe",
        layers(
            4, RMS, VOCAB_SIZE, ROPE, MOE, SHARED, lead(0), {"expert_weights_scale": 1.0, "expert_weights_norm": True}
        ),
    ),
    Recipe("bailingmoe2", layers(5, RMS, VOCAB_SIZE, HALF_ROPE, MOE, SHARED, SHARED_FF, SIGMOID, lead(1))),
    Recipe("dots1", layers(5, RMS, ROPE, MOE, SHARED, SIGMOID, lead(1), kv=4)),
    Recipe("glm4moe", layers(5, RMS, HEAD, GLM4, MOE, SHARED, SIGMOID, lead(1))),
    Recipe("glm4moe", layers(6, RMS, HEAD, GLM4, MOE, SHARED, SIGMOID, lead(1), {"nextn_predict_layers": 1}), "nextn"),
    Recipe("deepseek2", layers(6, *DEEPSEEK, Q_LORA, lead(1), {"nextn_predict_layers": 1}, kv=1), "nextn"),
    Recipe("hy_v3", layers(4, RMS, HEAD, MOE, SHARED_FF, SIGMOID)),
    Recipe("exaone-moe", layers(8, RMS, HEAD, VOCAB_SIZE, MOE, SHARED, SHARED_FF, SIGMOID, sliding(8, 4), lead(1))),
    Recipe("afmoe", layers(8, *LLAMA, HEAD, MOE, SHARED, SIGMOID, SWA, lead(2))),
    Recipe(
        "laguna",
        {
            **layers(
                8,
                RMS,
                VOCAB_SIZE,
                HEAD,
                MOE,
                SHARED_FF,
                SIGMOID,
                SWA,
                lead(1),
                {"rope.dimension_count": 8, "rope.dimension_count_swa": 16},
            ),
            "attention.head_count": [8 if i % 4 else 4 for i in range(8)],
        },
    ),
)

_MOE: tuple[Recipe, ...] = (
    Recipe("llama", layers(4, *LLAMA, MOE), "mixtral"),
    Recipe("llama4", layers(8, *LLAMA, MOE, {"expert_used_count": 1, "interleave_moe_layer_step": 2})),
    Recipe("llama4", layers(8, *LLAMA, MOE, {"expert_used_count": 1, "interleave_moe_layer_step": 1}), "scout"),
    Recipe("mistral3", layers(4, *LLAMA, HEAD, MOE), "moe"),
    Recipe("qwen2moe", layers(4, RMS, MOE, SHARED_FF), omit=(*ROPE_ONLY, r"attn_output\.bias")),
    Recipe("qwen3moe", layers(6, RMS, HEAD, MOE)),
    Recipe("qwen3vlmoe", layers(4, RMS, HEAD, MROPE, MOE)),
    Recipe("phimoe", layers(4, RMS, ROPE, MOE, {"rope.scaling.original_context_length": 512}), omit=ROPE_ONLY),
    Recipe("gpt-oss", layers(6, RMS, HEAD, MOE, SWA, YARN), omit=ROPE_ONLY),
    Recipe("granitemoe", layers(4, *LLAMA, GRANITE, MOE, SHARED_FF), omit=TIED),
    Recipe("minicpm", layers(4, *LLAMA, MINICPM, MOE), "moe"),
    Recipe("olmoe", layers(4, RMS, MOE, kv=4)),
    Recipe("dbrx", layers(4, LN, MOE, {"attention.clamp_kqv": 8.0, "rope.freq_base": 500000.0}), joined_qkv=True),
    Recipe(
        "grok",
        layers(
            4,
            RMS,
            MOE,
            {
                "embedding_scale": 8.0,
                "logit_scale": 0.57735,
                "attention.output_scale": 0.25,
                "attn_logit_softcapping": 30.0,
                "router_logit_softcapping": 30.0,
            },
        ),
    ),
    Recipe("arctic", layers(4, RMS, VOCAB_SIZE, ROPE, MOE)),
    Recipe(
        "cohere2moe",
        layers(
            8,
            LN,
            VOCAB_SIZE,
            HEAD,
            ROPE,
            NO_ROPE_SCALING,
            MOE,
            SHARED,
            SHARED_FF,
            lead(1),
            sliding(8, 4),
            {"logit_scale": 0.25, "expert_weights_norm": True},
        ),
        omit=TIED,
    ),
    Recipe(
        "ernie4_5-moe",
        layers(6, RMS, ROPE, MOE, SHARED, SHARED_FF, lead(1), {"interleave_moe_layer_step": 1}),
        omit=TIED,
    ),
    Recipe(
        "ernie4_5-moe",
        layers(6, RMS, ROPE, MOE, SHARED, SHARED_FF, lead(1), {"interleave_moe_layer_step": 2}),
        "step2",
        TIED,
    ),
    Recipe("hunyuan-moe", layers(4, RMS, HEAD, MOE, SHARED, SHARED_FF, NO_ROPE_SCALING), omit=TIED),
    Recipe(
        "smallthinker", layers(8, RMS, HEAD, MOE, SWA, {"expert_gating_func": 2, "feed_forward_length": 48}), omit=TIED
    ),
    Recipe("smallthinker", layers(8, RMS, HEAD, MOE, {"expert_gating_func": 1}), "noswa", TIED),
    Recipe(
        "grovemoe",
        layers(
            4,
            RMS,
            HEAD,
            MOE,
            {"expert_chunk_feed_forward_length": 16, "experts_per_group": 2, "expert_group_scale": 0.05},
        ),
    ),
    Recipe("minimax-m2", layers(4, RMS, HEAD, MOE, HALF_ROPE, {"expert_gating_func": 2})),
    Recipe(
        "minimax-m3",
        layers(
            5,
            RMS,
            HEAD,
            MOE,
            HALF_ROPE,
            SHARED,
            SIGMOID,
            lead(1),
            INDEXER,
            {"attention.indexer.head_count": 2, "attention.indexer.block_size": 4, "attention.indexer.local_blocks": 1},
        ),
    ),
    Recipe(
        "mimo2",
        {
            **layers(8, RMS, HEAD, HALF_ROPE, MOE, {"expert_gating_func": 2}, sliding(8, 4, full_first=True)),
            "attention.head_count_kv": [2 if i % 4 else 1 for i in range(8)],
        },
    ),
    Recipe(
        "step35",
        {
            **layers(
                8,
                RMS,
                HEAD,
                MOE,
                SHARED_FF,
                SIGMOID,
                lead(2),
                sliding(8, 4, full_first=True),
                {"rope.dimension_count": 16, "rope.freq_base_swa": 10000.0},
            ),
            "attention.head_count": [8 if i % 4 else 4 for i in range(8)],
            "attention.head_count_kv": [4 if i % 4 else 2 for i in range(8)],
        },
    ),
    Recipe("mellum", layers(8, RMS, HEAD, MOE, sliding(8, 4))),
    Recipe("maple", layers(8, RMS, VOCAB_SIZE, HEAD, ROPE, MOE, sliding(8, 4), {"swiglu_clamp_exp": [7.0] * 8})),
    Recipe("granite_swa", layers(8, *LLAMA, GRANITE, MOE, SHARED_FF, sliding(8, 4, full_first=True)), "moe"),
)

HYPER: dict[str, Value] = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
}
FULL_INDEXERS: dict[str, Value] = {"attention.indexer.types": [1, 0, 1, 0, 1, 0]}

_LATEST: tuple[Recipe, ...] = (
    Recipe("deepseek2-ocr", layers(4, RMS, VOCAB_SIZE, ROPE, MOE, SHARED, lead(1), kv=4)),
    Recipe(
        "hy_v4",
        layers(
            6,
            *DEEPSEEK,
            Q_LORA,
            INDEXER,
            FULL_INDEXERS,
            HYPER,
            lead(1),
            {"hyper_connection.magnitude": 2.0, "swiglu_clamp_exp": 10.0},
            kv=1,
        ),
    ),
    Recipe(
        "dots3note",
        layers(
            6,
            *DEEPSEEK,
            Q_LORA,
            INDEXER,
            FULL_INDEXERS,
            SWA,
            lead(1),
            {
                "attention.sliding_window_pattern": [False, True] * 3,
                "attention.kv_lora_rank_swa": 32,
                "attention.key_length_swa": 40,
                "attention.value_length_swa": 32,
                "attention.key_length_mla_swa": 24,
                "attention.value_length_mla_swa": 16,
                "rope.freq_base_swa": 10000.0,
            },
            kv=1,
        ),
    ),
    Recipe(
        "deepseek4",
        layers(
            4,
            RMS,
            MOE,
            SHARED,
            SIGMOID,
            Q_LORA,
            INDEXER,
            HYPER,
            SWA,
            HEAD,
            {
                "expert_gating_func": 4,
                "rope.dimension_count": 8,
                "attention.output_group_count": 4,
                "attention.output_lora_rank": 16,
                "attention.compress_ratios": [0, 0, 4, 128],
                "attention.compress_rope_freq_base": 160000.0,
                "hash_layer_count": 0,
                "swiglu_clamp_exp": [10.0] * 4,
            },
            kv=1,
        ),
    ),
)

EXPERTS: tuple[Recipe, ...] = (*_DEEPSEEK, *_MOE, *_LATEST)
