"""What a Rule says of an architecture, and which of a model's layers are of which kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from homeinfer.model.header import Header, MetaValue, ValueType

OUTPUT_KEY = "homeinfer.layer_output"
"""Says in a window file what llama.cpp's graph calls the output of its last layer, unless that is `l_out-N`."""

EmbeddingScale = Literal["none", "tokens", "always"]

Forbid = Callable[[Header, int, int], str | None]
"""Why layers [first, last) can't be a window, or None."""

Say = Callable[[Header, int, int], Mapping[str, MetaValue | None]]
"""Keys (without the architecture) that a window of layers [first, last) must say, None for those it must not."""

Factors = Callable[[Header, int, int], Mapping[str, float]]
"""Tensors of each layer (names without `blk.N.`) of a window of [first, last) that must be multiplied."""


class Sliding(msgspec.Struct, frozen=True):
    """Which layers attend to a sliding window when the file gives no array of it.

    `period` and `dense_first` are the defaults of llama.cpp's `load_swa_pattern` for the architecture (period 1:
    the file must give the array). With `optional`, a model without `attention.sliding_window` has no such layers,
    and neither has a window without the key; otherwise llama.cpp aborts on a window without any.
    """

    period: int
    dense_first: bool = False
    optional: bool = True


class Rule(msgspec.Struct, frozen=True):
    """How one architecture is cut.

    cut_every: cuts only at multiples of this many layers (a pattern computed from the layer's number).
    cut_every_key: the same, with the number in this key.
    sliding: its sliding-window layers, or None.
    full_only: tensors of the whole model that only layers without a sliding window load.
    recurrent_period: default of `full_attention_interval`, for those that read `attention.recurrent_layers`.
    hybrid: attention and recurrent layers have caches of their own, and each window needs both.
    feed_forward_alone: layers of a hybrid with a `feed_forward_length` have neither attention nor recurrence.
    embedding_scale: whether the graph multiplies by sqrt(n_embd) nothing, tokens' rows only, or any input.
    scale_key: its metadata holds a scale of the embeddings, which later windows set to 1.
    zero_tensors: tensors that are added to every input, zero in later windows.
    output: what its graph calls the output of layer `{}`.
    forbid, says, factors: whatever else llama.cpp computes from a layer's number or from their number.
    """

    cut_every: int = 1
    cut_every_key: str = ""
    sliding: Sliding | None = None
    full_only: frozenset[str] = frozenset()
    recurrent_period: int | None = None
    hybrid: bool = False
    feed_forward_alone: bool = False
    embedding_scale: EmbeddingScale = "none"
    scale_key: bool = False
    zero_tensors: frozenset[str] = frozenset()
    output: str = "l_out-{}"
    forbid: Forbid | None = None
    says: Say | None = None
    factors: Factors | None = None


def n_layers(header: Header) -> int:
    """Layers that take part in decoding (those for multi-token prediction at the end do not)."""
    return header.n_layer - int(header.arch_get("nextn_predict_layers", 0))


def per_layer(header: Header, key: str, default: int = 0) -> tuple[int, ...]:
    """A key that holds one number for all layers or one for each (llama.cpp's get_key_or_arr)."""
    n = n_layers(header)
    value = header.arch_get(key, default)
    return tuple(int(x) for x in value[:n]) if isinstance(value, list) else (int(value),) * n


def sliding_layers(header: Header, rule: Rule) -> tuple[bool, ...] | None:
    """Which layers have a sliding window, or None for a model without (llama.cpp's load_swa_pattern)."""
    n = n_layers(header)
    if rule.sliding is None:
        return None
    window = header.arch_get("attention.sliding_window", 0 if rule.sliding.optional else 1)
    if not window:
        return None
    given = header.arch_get("attention.sliding_window_pattern", None)
    if isinstance(given, list):
        return tuple(bool(x) for x in given[:n])
    period = rule.sliding.period if given is None else int(given)
    if period == 0:
        return (True,) * n
    if rule.sliding.dense_first:
        return tuple(i % period != 0 for i in range(n))
    return tuple(i % period < period - 1 for i in range(n))


def recurrent_layers(header: Header, rule: Rule) -> tuple[bool | None, ...] | None:
    """Which layers of a hybrid model are recurrent and which have attention (None: neither), or None for other
    models (hparams.is_recr and the layer filters of llama_model::create_memory)."""
    n = n_layers(header)
    if not rule.hybrid:
        return None
    given = header.arch_get("attention.recurrent_layers", None)
    if isinstance(given, list):
        return tuple(bool(x) for x in given[:n])
    if rule.recurrent_period is not None:
        period = int(header.arch_get("full_attention_interval", rule.recurrent_period))
        return tuple((i + 1) % period != 0 for i in range(n))
    heads = per_layer(header, "attention.head_count_kv", 1)
    widths = per_layer(header, "feed_forward_length") if rule.feed_forward_alone else (0,) * n
    return tuple(None if width else count == 0 for count, width in zip(heads, widths, strict=True))


def off_step(header: Header, first: int, last: int, step: int) -> str | None:
    """Why [first, last) is not a window of a model that is cut at multiples of `step` layers, or None."""
    if first % step or (last % step and last != n_layers(header)):
        return f"this {header.architecture} model can be cut only at multiples of {step} layers"
    return None


def u32(value: int) -> MetaValue:
    """A number as metadata."""
    return MetaValue(ValueType.UINT32, value)


def f32(value: float) -> MetaValue:
    """A fraction as metadata."""
    return MetaValue(ValueType.FLOAT32, value)


def bools(values: tuple[bool, ...]) -> MetaValue:
    """One flag for each layer as metadata."""
    return MetaValue(ValueType.ARRAY, list(values), ValueType.BOOL)
