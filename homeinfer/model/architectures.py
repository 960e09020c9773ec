"""What each architecture needs so that layers [first, last) of it run as a model of their own.

A window is a renumbered model, so whatever llama.cpp derives from a layer's number, from the number of
layers, or does between the embedding and layer 0, must be said or undone. The rules below come from
llama.cpp's `src/models/`; tests/engine/test_architectures.py compares windows at every allowed cut with
the whole model, and an architecture without such a test is not in ALLOWED.
"""

from __future__ import annotations

import math

from homeinfer.errors import HomeinferError
from homeinfer.model import cut_quirks
from homeinfer.model.architectures_refused import NOT_GENERATING, REFUSED
from homeinfer.model.cut_rules import Rule, Sliding, sliding_layers
from homeinfer.model.header import Header

_PLAIN = (
    "arcee",
    "arctic",
    "bailingmoe",
    "bailingmoe2",
    "bitnet",
    "chatglm",
    "codeshell",
    "command-r",
    "dbrx",
    "deepseek",
    "deepseek2-ocr",
    "deepseek32",
    "dots1",
    "ernie4_5",
    "exaone",
    "falcon",
    "falcon-h1",
    "gptneox",
    "grovemoe",
    "hunyuan-dense",
    "hunyuan-moe",
    "hunyuan_vl",
    "hy_v3",
    "internlm2",
    "jais",
    "jais2",
    "llama",
    "maincoder",
    "mamba",
    "mamba2",
    "minimax-m2",
    "minimax-m3",
    "mistral3",
    "mistral4",
    "nemotron",
    "olmo",
    "olmoe",
    "openelm",
    "orion",
    "paddleocr",
    "pangu-embedded",
    "phi2",
    "phi3",
    "phimoe",
    "plamo",
    "plm",
    "qwen",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen3moe",
    "qwen3vl",
    "qwen3vlmoe",
    "refact",
    "rwkv6qwen2",
    "seed_oss",
    "stablelm",
    "starcoder2",
    "xverse",
    "apertus",
)
_LISTED = Sliding(1, optional=False)
_HYBRID = Rule(hybrid=True)
_DELTA_NET = Rule(hybrid=True, recurrent_period=4)
_NEMOTRON_H = Rule(hybrid=True, feed_forward_alone=True, output="nemotron_h_block_out-{}")
_SCALED = Rule(scale_key=True)
_POSITIONS = Rule(zero_tensors=frozenset(("position_embd.weight",)))

ALLOWED: dict[str, Rule] = {
    **dict.fromkeys(_PLAIN, Rule()),
    "afmoe": Rule(cut_every=4, sliding=Sliding(4), embedding_scale="always"),
    "bailingmoe3": _HYBRID,
    "cohere2": Rule(sliding=Sliding(4, optional=False)),
    "cohere2moe": Rule(sliding=Sliding(4, dense_first=True, optional=False)),
    "deci": Rule(forbid=cut_quirks.deci_forbid),
    "deepseek2": Rule(forbid=cut_quirks.deepseek2_forbid, says=cut_quirks.deepseek2_says),
    "ernie4_5-moe": Rule(cut_every_key="interleave_moe_layer_step"),
    "exaone-moe": Rule(sliding=Sliding(4, optional=False)),
    "exaone4": Rule(forbid=cut_quirks.exaone4_forbid),
    "gemma": Rule(embedding_scale="always"),
    "gemma2": Rule(
        sliding=Sliding(2, optional=False),
        embedding_scale="always",
        forbid=cut_quirks.gemma2_forbid,
        factors=cut_quirks.gemma2_factors,
    ),
    "gemma3": Rule(sliding=Sliding(6), embedding_scale="tokens", factors=cut_quirks.gemma3_factors),
    "gemma4": Rule(
        sliding=_LISTED,
        full_only=frozenset(("rope_freqs.weight",)),
        embedding_scale="tokens",
        forbid=cut_quirks.gemma4_forbid,
    ),
    "glm-dsa": Rule(forbid=cut_quirks.glm_dsa_forbid),
    "glm4": Rule(forbid=cut_quirks.glm4_forbid),
    "glm4moe": Rule(says=cut_quirks.glm4moe_says),
    "gpt-oss": Rule(sliding=Sliding(2, optional=False)),
    "gpt2": _POSITIONS,
    "granite": _SCALED,
    "granite_swa": Rule(sliding=_LISTED, scale_key=True, forbid=cut_quirks.granite_swa_forbid),
    "granitehybrid": Rule(hybrid=True, scale_key=True),
    "granitemoe": _SCALED,
    "grok": _SCALED,
    "jamba": _HYBRID,
    "kimi-linear": _HYBRID,
    "laguna": Rule(sliding=Sliding(4, dense_first=True), forbid=cut_quirks.laguna_forbid),
    "lfm2": _HYBRID,
    "lfm2moe": _HYBRID,
    "llama4": Rule(
        cut_every=4,
        cut_every_key="interleave_moe_layer_step",
        sliding=Sliding(4, optional=False),
        forbid=cut_quirks.llama4_forbid,
    ),
    "maple": Rule(sliding=_LISTED),
    "mellum": Rule(sliding=Sliding(4)),
    "mimo2": Rule(sliding=_LISTED),
    "minicpm": Rule(scale_key=True, says=cut_quirks.minicpm_says),
    "mpt": _POSITIONS,
    "nanbeige": Rule(forbid=cut_quirks.nanbeige_forbid),
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": _NEMOTRON_H,
    "olmo2": Rule(sliding=Sliding(4)),
    "plamo2": Rule(hybrid=True, output="ffn_residual-{}"),
    "plamo3": Rule(sliding=Sliding(8)),
    "qwen35": _DELTA_NET,
    "qwen35moe": _DELTA_NET,
    "qwen3next": _DELTA_NET,
    "smallthinker": Rule(sliding=Sliding(4, dense_first=True), forbid=cut_quirks.smallthinker_forbid),
    "smollm3": Rule(cut_every=4),
    "spark2_5": Rule(sliding=_LISTED),
    "starcoder": _POSITIONS,
    "step35": Rule(sliding=_LISTED, output="h_nextn"),
}


def rule_for(header: Header) -> Rule:
    """The rule of a model's architecture. Raises HomeinferError by name, with what is known of why."""
    name = header.architecture
    if name in ALLOWED:
        return ALLOWED[name]
    why = REFUSED.get(name, "no test has compared its windows with the whole model")
    raise HomeinferError(f"{name} models can't be cut into windows: {why}")


def input_scale(header: Header, first: int) -> float:
    """What hidden states entering layer `first` are multiplied by, so that a scale which the graph
    applies to any input (gemma, gemma2) is undone. Exact to one unit in the last place."""
    rule = rule_for(header)
    if first == 0 or rule.embedding_scale != "always":
        return 1.0
    return 1.0 / math.sqrt(int(header.arch_get("embedding_length", 1)))


def is_exact(header: Header, first: int, last: int) -> bool:
    """Whether a window of layers [first, last) repeats the whole model's operations bit by bit; where a scale
    is undone (`input_scale`) or moved into a tensor, it does so to one unit in the last place."""
    rule = rule_for(header)
    moved = {} if rule.factors is None else rule.factors(header, first, last)
    return input_scale(header, first) == 1.0 and all(factor == 1.0 for factor in moved.values())


def context_length(header: Header, wanted: int) -> int:
    """Positions of a sequence: what was asked for, or the model's own up to 4,096."""
    trained = int(header.arch_get("context_length", 0))
    return wanted or min(trained or 4096, 4096)


def can_shift(header: Header, first: int, last: int) -> bool:
    """Whether positions in the memory of layers [first, last) can be moved: where all of them slide, the cache for the
    others is empty, and llama.cpp aborts (llama_kv_cache::set_input_k_shift)."""
    rule = ALLOWED.get(header.architecture)
    sliding = None if rule is None else sliding_layers(header, rule)
    return sliding is None or not all(sliding[first:last])


def check_generates(header: Header) -> None:
    """Raises HomeinferError for a file whose model writes no text (embedding models, vision projectors, …)."""
    what = NOT_GENERATING.get(header.architecture)
    if what is not None:
        raise HomeinferError(
            f"{header.files[0].path} is {what} ({header.architecture}): it can't write text token by token"
        )
    if header.get("general.type", "model") != "model":
        raise HomeinferError(f"{header.files[0].path} is a {header.get('general.type')}, not a model")
    if header.n_layer < 1:
        raise HomeinferError(f"{header.files[0].path} has no layers: it can't write text")
