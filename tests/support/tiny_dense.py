"""Decoders whose every layer is attention and a dense feed-forward network."""

from __future__ import annotations

from tests.support.tiny_recipe import (
    HEAD,
    LLAMA,
    LN,
    NO_BIAS,
    NO_ROPE_SCALING,
    Q_LORA,
    RMS,
    ROPE,
    ROPE_ONLY,
    SWA,
    TIED,
    VOCAB_SIZE,
    YARN,
    Recipe,
    Value,
    layers,
    sliding,
)

SOFTCAPS: dict[str, Value] = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GRANITE: dict[str, Value] = {
    "attention.scale": 0.25,
    "embedding_scale": 4.0,
    "residual_scale": 0.5,
    "logit_scale": 2.0,
}
MINICPM: dict[str, Value] = {"embedding_scale": 12.0, "residual_scale": 0.57, "logit_scale": 0.25}
HALF_ROPE: dict[str, Value] = {"rope.dimension_count": 8}
MROPE: dict[str, Value] = {"rope.dimension_sections": [3, 3, 2, 0]}
ALIBI: dict[str, Value] = {"attention.max_alibi_bias": 8.0}

GEMMA4: dict[str, Value] = {
    "rope.freq_base": 1000000.0,
    "rope.freq_base_swa": 10000.0,
    "rope.dimension_count": 32,
    "rope.dimension_count_swa": 16,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "attention.shared_kv_layers": 0,
    "embedding_length_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}
GEMMA4_OMIT = (*NO_BIAS[1:], r"^output\.", r"_exps|_inp\.|_norm_[12]\.|post_norm_[12]")

_EARLY: tuple[Recipe, ...] = (
    Recipe("gpt2", layers(4, LN, kv=4), omit=(*TIED[:2], r"^output\."), joined_qkv=True),
    Recipe("gptneox", layers(4, LN, HALF_ROPE, {"use_parallel_residual": True}, kv=4), omit=ROPE_ONLY, joined_qkv=True),
    Recipe("gptneox", layers(4, LN, HALF_ROPE, {"use_parallel_residual": False}, kv=4), "serial", ROPE_ONLY, True),
    Recipe("bloom", layers(4, LN, kv=4), omit=(*ROPE_ONLY, r"^output\.weight"), joined_qkv=True),
    Recipe(
        "mpt",
        layers(4, LN, ALIBI, kv=4),
        omit=(*TIED, r"norm\.bias", r"ffn_act", r"_(q|k)_norm", r"position"),
        joined_qkv=True,
    ),
    Recipe("falcon", layers(4, LN, kv=1), omit=(*NO_BIAS, r"attn_norm_2"), joined_qkv=True),
    Recipe("falcon", layers(4, LN, kv=2), "norms", NO_BIAS, True),
    Recipe("starcoder", layers(4, LN, kv=1), omit=(*ROPE_ONLY, r"^output\.weight"), joined_qkv=True),
    Recipe("starcoder2", layers(4, LN), omit=(*ROPE_ONLY, r"^output\.")),
    Recipe("refact", layers(4, RMS, kv=1)),
    Recipe("codeshell", layers(4, LN, ROPE), omit=ROPE_ONLY),
    Recipe("baichuan", layers(4, RMS, ROPE, kv=4)),
    Recipe("qwen", layers(4, RMS, ROPE, kv=4), omit=ROPE_ONLY),
    Recipe("jais", layers(4, LN, ALIBI, kv=4), omit=ROPE_ONLY, joined_qkv=True),
    Recipe("jais2", layers(4, LN, ROPE, kv=4), omit=ROPE_ONLY),
    Recipe("plamo", layers(4, RMS, ROPE, kv=2)),
    Recipe("orion", layers(4, LN)),
    Recipe("xverse", layers(4, *LLAMA)),
    Recipe("internlm2", layers(4, RMS, ROPE)),
    Recipe("stablelm", layers(4, LN, HALF_ROPE), omit=(*NO_BIAS, r"_(q|k)_norm")),
    Recipe("phi2", layers(4, LN, HALF_ROPE, kv=4), omit=ROPE_ONLY),
    Recipe("command-r", layers(4, LN, {"logit_scale": 0.0625}, NO_ROPE_SCALING), omit=(*TIED, r"_(q|k)_norm")),
    Recipe("olmo", layers(4, LN, {"attention.clamp_kqv": 8.0})),
    Recipe("nemotron", layers(4, LN, VOCAB_SIZE, HALF_ROPE, NO_ROPE_SCALING)),
    Recipe("bitnet", layers(4, RMS, ROPE), omit=TIED),
    Recipe(
        "openelm",
        {
            **layers(4, RMS, ROPE, HEAD),
            "feed_forward_length": [32, 64, 96, 128],
            "attention.head_count": [4, 4, 8, 8],
            "attention.head_count_kv": [1, 1, 2, 2],
        },
        omit=TIED,
        joined_qkv=True,
    ),
)

_LLAMA_LIKE: tuple[Recipe, ...] = (
    Recipe("llama", layers(6, *LLAMA)),
    Recipe(
        "llama",
        layers(4, *LLAMA, {"rope.freq_base": 500000.0}),
        "tied",
        (*NO_BIAS[1:], r"rope_factors", r"^output\.weight"),
    ),
    Recipe("llama", layers(4, *LLAMA, ff=128), "q8_0", weight_type="Q8_0"),
    Recipe("llama", layers(4, *LLAMA), "bf16", weight_type="BF16"),
    Recipe(
        "deci",
        {
            **layers(6, *LLAMA),
            "feed_forward_length": [96, 64, 96, 0, 96, 96],
            "attention.head_count": [4, 4, 0, 0, 4, 4],
            "attention.head_count_kv": [2, 1, 0, 0, 2, 2],
        },
    ),
    Recipe("arcee", layers(4, *LLAMA)),
    Recipe("mistral3", layers(6, *LLAMA, HEAD, YARN, {"attention.temperature_scale": 0.1})),
    Recipe("qwen2", layers(6, RMS), omit=(*ROPE_ONLY, r"attn_output\.bias")),
    Recipe("qwen2", layers(4, RMS), "tied", (*ROPE_ONLY, r"^output\.", r"attn_output\.bias")),
    Recipe("qwen2vl", layers(4, RMS, MROPE), omit=(*ROPE_ONLY, r"attn_output\.bias")),
    Recipe("qwen3", layers(6, RMS, HEAD)),
    Recipe("qwen3", layers(4, RMS, HEAD), "tied", TIED),
    Recipe("qwen3vl", layers(4, RMS, HEAD, MROPE)),
    Recipe("exaone", layers(4, RMS, ROPE)),
    Recipe("exaone4", layers(6, RMS, ROPE, HEAD, VOCAB_SIZE)),
    Recipe("smollm3", layers(8, *LLAMA), omit=TIED),
    Recipe("olmo2", layers(6, RMS)),
    Recipe("olmo2", layers(8, RMS, sliding(8, 4), YARN), "olmo3"),
    Recipe("seed_oss", layers(4, RMS, HEAD), omit=(*ROPE_ONLY, r"attn_output\.bias")),
    Recipe("granite", layers(6, *LLAMA, GRANITE), omit=TIED),
    Recipe(
        "granite_swa",
        layers(
            8,
            *LLAMA,
            GRANITE,
            sliding(8, 4, full_first=True),
            {"attention.rope_pattern": [i % 4 != 0 for i in range(8)]},
        ),
    ),
    Recipe("minicpm", layers(6, *LLAMA, MINICPM)),
    Recipe(
        "minicpm3",
        layers(
            4,
            RMS,
            VOCAB_SIZE,
            Q_LORA,
            {"attention.kv_lora_rank": 32, "attention.key_length": 24, "rope.dimension_count": 8},
            kv=4,
        ),
    ),
    Recipe("chatglm", layers(4, RMS, HALF_ROPE), omit=ROPE_ONLY, joined_qkv=True),
    Recipe("glm4", layers(4, RMS, HALF_ROPE), omit=NO_BIAS),
    Recipe("ernie4_5", layers(4, RMS, ROPE), omit=TIED),
    Recipe("paddleocr", layers(4, RMS, ROPE, HEAD, MROPE)),
    Recipe("hunyuan-dense", layers(4, RMS, HEAD, NO_ROPE_SCALING), omit=TIED),
    Recipe(
        "hunyuan_vl",
        layers(4, RMS, HEAD, NO_ROPE_SCALING, {"rope.dimension_sections": [2, 2, 2, 2], "rope.scaling.alpha": 1.0}),
        omit=TIED,
    ),
    Recipe("pangu-embedded", layers(4, RMS, VOCAB_SIZE, ROPE, HEAD), omit=ROPE_ONLY),
    Recipe(
        "apertus",
        layers(4, *LLAMA),
        other={
            f"xielu.{key}": [value + 0.1 * i for i in range(4)]
            for key, value in (("alpha_n", 0.5), ("alpha_p", 0.6), ("beta", 0.4), ("eps", 0.01))
        },
    ),
    Recipe("cogvlm", layers(4, *LLAMA, kv=4)),
    Recipe("maincoder", layers(4, RMS, HEAD), omit=TIED),
    Recipe("talkie", layers(4, RMS, HEAD, {"logit_scale": 2.0}, kv=4)),
    Recipe("nanbeige", layers(4, *LLAMA)),
    Recipe("nanbeige", layers(4, *LLAMA, {"num_loops": 2}), "loops"),
    Recipe("spark2_5", layers(8, RMS, ROPE, sliding(8, 4))),
    Recipe("muse-glimmer", layers(8, RMS, HEAD, sliding(8, 4), {"logit_scale": 0.5})),
    Recipe("hrm_text", layers(6, RMS, {"hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2}, kv=4)),
)

_GEMMA_PHI: tuple[Recipe, ...] = (
    Recipe("gemma", layers(6, RMS, HEAD), omit=TIED),
    Recipe("gemma2", layers(6, RMS, HEAD, SWA, SOFTCAPS), omit=TIED),
    Recipe(
        "gemma3", layers(13, RMS, HEAD, SWA, {"rope.freq_base": 1000000.0, "rope.freq_base_swa": 10000.0}), omit=TIED
    ),
    Recipe("gemma3", layers(8, RMS, HEAD, {"rope.freq_base": 1000000.0}), "noswa", TIED),
    Recipe(
        "gemma3n",
        layers(
            22,
            RMS,
            HEAD,
            sliding(22, 5),
            {
                "rope.freq_base": 1000000.0,
                "altup.active_idx": 0,
                "altup.num_inputs": 4,
                "embedding_length_per_layer_input": 256,
                "attention.shared_kv_layers": 2,
                "activation_sparsity_scale": [1.6448] * 10 + [0.0] * 12,
            },
            ff=64,
        ),
        omit=TIED,
        weight_type="Q8_0",
    ),
    Recipe("gemma4", layers(10, RMS, sliding(10, 5), GEMMA4), omit=GEMMA4_OMIT),
    Recipe(
        "gemma4",
        layers(
            10, RMS, sliding(10, 5), GEMMA4, {"embedding_length_per_layer_input": 16, "attention.shared_kv_layers": 5}
        ),
        "shared",
        GEMMA4_OMIT,
    ),
    Recipe(
        "phi3",
        layers(6, RMS, ROPE, SWA, {"rope.scaling.original_context_length": 256, "rope.scaling.attn_factor": 1.19}),
        omit=NO_BIAS[1:],
        joined_qkv=True,
    ),
    Recipe("phi3", layers(4, RMS, ROPE, {"rope.scaling.original_context_length": 512}), "short", joined_qkv=True),
    Recipe("cohere2", layers(8, LN, VOCAB_SIZE, SWA, ROPE, NO_ROPE_SCALING, {"logit_scale": 0.25}), omit=TIED),
    Recipe("plamo3", layers(16, RMS, VOCAB_SIZE, HEAD, SWA, {"attention.sliding_window_pattern": 8}), omit=TIED),
)

DENSE: tuple[Recipe, ...] = (*_EARLY, *_LLAMA_LIKE, *_GEMMA_PHI)
