"""Single architectures' reasons against a window, and what they must be told in one.

Each function follows `load_arch_hparams` or the graph of the model in llama.cpp's `src/models/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from homeinfer.model.cut_rules import Rule, Sliding, f32, n_layers, off_step, per_layer, sliding_layers, u32
from homeinfer.model.header import Header, MetaValue, ValueType

_SOFTMAX, _SIGMOID = 1, 2
_LITE = (26, 27)
_LLAMA4_STEP = 4
_GEMMA2_27B, _GEMMA3_27B = 46, 62
_LONG_CONTEXT = 1 << 20


def _vocabulary(header: Header) -> int:
    embedding = header.tensor("token_embd.weight")
    return embedding.shape[-1] if embedding is not None else 0


def _has_q_lora(header: Header) -> bool:
    return header.tensor("blk.0.attn_q_a.weight") is not None


def deepseek2_forbid(header: Header, first: int, last: int) -> str | None:
    """llama.cpp's is_lite: models of 26 or 27 layers, or of 48 with a certain vocabulary, have no q_lora_rank."""
    vocabulary = _vocabulary(header) if last == n_layers(header) else 0
    if _has_q_lora(header) and (last - first in _LITE or (last - first, vocabulary) == (48, 128256)):
        return f"llama.cpp takes {last - first} layers of deepseek2 for a lite model: use one more or one less"
    return None


def deepseek2_says(header: Header, _first: int, _last: int) -> Mapping[str, MetaValue | None]:
    """A part of a lite model is asked for its q_lora_rank; the default of the gating function goes by the
    number of layers and the vocabulary (GLM 4.7 Flash)."""
    said: dict[str, MetaValue | None] = {}
    if not _has_q_lora(header):
        said["attention.q_lora_rank"] = u32(0)
    if not header.arch_get("expert_gating_func", 0):
        is_glm = n_layers(header) in (47, 48) and _vocabulary(header) == 154880
        said["expert_gating_func"] = u32(_SIGMOID if is_glm else _SOFTMAX)
    return said


def _gemma_attention_scale(header: Header, n: int, n_27b: int) -> float:
    heads = int(header.arch_get("attention.head_count", 1))
    head = int(header.arch_get("embedding_length", 1)) // heads
    return 1 / math.sqrt(head if n == n_27b else int(header.arch_get("attention.key_length", head)))


def _gemma_ratio(header: Header, first: int, last: int, n_27b: int) -> float:
    """What Q lacks in a window: llama.cpp knows a 27B by its number of layers and scales attention otherwise."""
    wanted = _gemma_attention_scale(header, n_layers(header), n_27b)
    return wanted / _gemma_attention_scale(header, last - first, n_27b)


def gemma2_factors(header: Header, first: int, last: int) -> Mapping[str, float]:
    """Gemma 2 has no norm of Q: the ratio goes into the scale that any matrix may have (NVFP4's)."""
    return {"attn_q.scale": _gemma_ratio(header, first, last, _GEMMA2_27B)}


def gemma2_forbid(header: Header, first: int, last: int) -> str | None:
    if header.tensor("blk.0.attn_q.weight") is None and _gemma_ratio(header, first, last, _GEMMA2_27B) != 1:
        return "llama.cpp scales attention by the number of layers, and joined Q, K, V can't make up for it"
    return None


def gemma3_factors(header: Header, first: int, last: int) -> Mapping[str, float]:
    """Gemma 3 norms Q just before the scale: the ratio goes into that norm's weights."""
    return {"attn_q_norm.weight": _gemma_ratio(header, first, last, _GEMMA3_27B)}


def gemma4_forbid(header: Header, first: int, last: int) -> str | None:
    if header.arch_get("embedding_length_per_layer_input", 0):
        return "every layer of this gemma4 model (E2B, E4B) takes in embeddings of the token, which windows don't get"
    if header.arch_get("attention.shared_kv_layers", 0):
        return "layers of this gemma4 model share the keys and values of others"
    return "a window of gemma4 has two layers at least" if last - first < 2 else None


def glm4_forbid(header: Header, _first: int, _last: int) -> str | None:
    sections = header.arch_get("rope.dimension_sections", [])
    if len(sections) < 2 or not all(sections[:2]):
        return "llama.cpp's glm4 takes hidden states with M-RoPE only, and this one has another layout of RoPE"
    return None


def glm4moe_says(header: Header, _first: int, _last: int) -> Mapping[str, MetaValue | None]:
    """llama.cpp's glm4moe takes hidden states with M-RoPE only. Its pairs lie as in this model's NEOX RoPE, so
    with one position for time, height and width, and no fourth section, the two are the same."""
    sections = header.arch_get("rope.dimension_sections", [])
    if len(sections) >= 2 and all(sections[:2]):
        return {}
    head = int(header.arch_get("embedding_length")) // int(header.arch_get("attention.head_count"))
    rotated = int(header.arch_get("rope.dimension_count", header.arch_get("attention.key_length", head)))
    return {"rope.dimension_sections": MetaValue(ValueType.ARRAY, [rotated // 2 - 1, 1, 0, 0], ValueType.INT32)}


def minicpm_says(header: Header, _first: int, _last: int) -> Mapping[str, MetaValue | None]:
    """Old files leave the scale of the residuals to llama.cpp, which takes it from the number of layers."""
    if header.arch_get("residual_scale", None) is not None:
        return {}
    return {"residual_scale": f32(float(np.float32(1.4) / np.sqrt(np.float32(n_layers(header)))))}


def llama4_forbid(header: Header, first: int, last: int) -> str | None:
    """Every fourth layer has no RoPE and the scale of its positions: llama.cpp aborts on a window without."""
    if header.arch_get("attention.sliding_window", None) == 0:
        return "without its sliding window, llama.cpp leaves out the RoPE of the last layer of any part"
    if last - first < _LLAMA4_STEP:
        return f"a window of llama4 has {_LLAMA4_STEP} layers at least"
    return None


def smallthinker_forbid(header: Header, first: int, last: int) -> str | None:
    """Every fourth layer of a model with a sliding window has no RoPE, but all have it where there are four."""
    if sliding_layers(header, Rule(sliding=Sliding(4, dense_first=True))) is None:
        return None
    if last - first == 4:
        return "llama.cpp takes 4 layers of smallthinker for a model with RoPE in every layer: use 8"
    return off_step(header, first, last, 4)


def granite_swa_forbid(header: Header, first: int, last: int) -> str | None:
    if not any(per_layer(header, "attention.rope_pattern", 1)[first:last]):
        return "each window of a granite_swa model needs a layer with RoPE"
    return None


def laguna_forbid(header: Header, first: int, last: int) -> str | None:
    """llama.cpp takes the rotated part of heads without a window from the first layer, whatever its kind."""
    slides = sliding_layers(header, Rule(sliding=Sliding(4, dense_first=True)))
    rotated = header.arch_get("rope.dimension_count", None)
    same = header.arch_get("rope.dimension_count_swa", rotated) == rotated
    if slides is None or same or not slides[first] or all(slides[first:last]):
        return None
    return "a window of laguna with full attention starts with it: cut before those layers"


def exaone4_forbid(header: Header, first: int, last: int) -> str | None:
    if 64 in (n_layers(header), last - first):
        return "llama.cpp gives exaone4 its sliding windows only where it has 64 layers"
    return None


def nanbeige_forbid(header: Header, _first: int, _last: int) -> str | None:
    if int(header.arch_get("num_loops", 1)) > 1:
        return "this nanbeige model goes through its layers more than once"
    return None


def deci_forbid(header: Header, first: int, last: int) -> str | None:
    """Layers may lack attention, which llama.cpp aborts on where all do, or a feed-forward network, whose output
    it does not name."""
    if not any(per_layer(header, "attention.head_count_kv", 1)[first:last]):
        return "each window of a deci model needs a layer with attention"
    if last != n_layers(header) and per_layer(header, "feed_forward_length", 1)[last - 1] == 0:
        return f"layer {last - 1} of this deci model has no feed-forward network, and a window can't end with it"
    return None


def glm_dsa_forbid(header: Header, first: int, _last: int) -> str | None:
    """Layers without an indexer of their own attend to what the last one with an indexer chose."""
    kinds = header.arch_get("attention.indexer.types", None)
    if kinds is None and int(header.arch_get("context_length", 0)) >= _LONG_CONTEXT:
        return "the file does not say which of its layers have an indexer"
    if kinds is not None and not per_layer(header, "attention.indexer.types", 1)[first]:
        return f"layer {first} of this glm-dsa model attends to what the indexer of the layer before chose"
    return None
