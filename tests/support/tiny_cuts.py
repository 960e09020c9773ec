"""Models that show what a rule of homeinfer.model.architectures is for, where their architecture's first does not."""

from __future__ import annotations

from dataclasses import replace

from tests.support.tiny_dense import DENSE, GEMMA4, GRANITE, HALF_ROPE, MROPE, SOFTCAPS
from tests.support.tiny_experts import DEEPSEEK, EXPERTS, INDEXER
from tests.support.tiny_hybrid import HYBRID
from tests.support.tiny_recipe import (
    HEAD,
    LLAMA,
    LN,
    MOE,
    NO_BIAS,
    Q_LORA,
    RMS,
    SWA,
    TIED,
    VOCAB_SIZE,
    Recipe,
    Value,
    layers,
    lead,
    sliding,
)

GEMMA3: dict[str, Value] = {"rope.freq_base": 1000000.0, "rope.freq_base_swa": 10000.0}
DEEPSTACK: dict[str, Value] = {"deepstack_mapping": [0, -1, 1, -1, -1, -1]}

SHARED_INDEXERS: dict[str, Value] = {"attention.indexer.types": [1, 0, 1, 1, 0]}

FACTORS = (
    *("apertus", "arcee", "deci", "exaone", "exaone4", "exaone-moe", "falcon-h1", "granite_swa", "granitehybrid"),
    *("llama4", "mistral3", "pangu-embedded", "refact", "step35"),
)
"""Whose real models have factors of RoPE (Llama 3's way to long contexts), or may: one tensor for all layers."""


def _with_factors(recipe: Recipe) -> Recipe:
    omit = (*(pattern for pattern in recipe.omit if pattern != r"^rope_f"), r"^rope_factors")
    return replace(recipe, variant="factors", omit=omit)


# sqrt(96) is not a power of two, so the inverse of the embeddings' scale is not exact
CUTS: tuple[Recipe, ...] = (
    Recipe("gemma", layers(4, RMS, HEAD, embd=96), "wide", TIED),
    Recipe("gemma2", layers(46, RMS, HEAD, SWA, SOFTCAPS, ff=32, embd=96), "27b", TIED),
    Recipe("gemma3", layers(62, RMS, HEAD, SWA, GEMMA3, ff=32, embd=96), "27b", TIED),
    Recipe(
        "gemma4",
        layers(10, RMS, sliding(10, 5), GEMMA4, MOE),
        "moe",
        (*NO_BIAS[3:], r"^output\.", r"input_scale$", r"(attn_\w+|ffn_(gate|up|down)(_exps)?)\.scale$"),
    ),
    Recipe(
        "smallthinker",
        layers(16, RMS, HEAD, MOE, SWA, {"expert_gating_func": 2, "feed_forward_length": 48}),
        "long",
        TIED,
    ),
    Recipe("glm4", layers(4, RMS, HALF_ROPE, {"rope.dimension_sections": [2, 2, 0, 0]}), "vision"),
    Recipe("qwen3vl", layers(4, RMS, HEAD, MROPE, {"n_deepstack_layers": 2}), "deepstack"),
    Recipe("granite", layers(6, *LLAMA, GRANITE, DEEPSTACK), "deepstack", TIED),
    Recipe("minicpm", layers(6, *LLAMA), "old"),
    Recipe("glm-dsa", layers(5, *DEEPSEEK, Q_LORA, INDEXER, lead(1), SHARED_INDEXERS, kv=1), "shared"),
    Recipe("mpt", layers(4, LN, kv=4), "learned", (*TIED, r"norm\.bias", r"ffn_act", r"_(q|k)_norm"), joined_qkv=True),
    Recipe(
        "plm",
        layers(
            4,
            RMS,
            VOCAB_SIZE,
            {
                "attention.kv_lora_rank": 32,
                "attention.key_length": 24,
                "attention.value_length": 16,
                "rope.dimension_count": 8,
            },
            kv=4,
        ),
        omit=TIED,
    ),
    *(_with_factors(recipe) for recipe in (*DENSE, *EXPERTS, *HYBRID) if recipe.name in FACTORS),
)
