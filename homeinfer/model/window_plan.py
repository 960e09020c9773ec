"""What a window file of layers [first, last) must say: pure arithmetic on headers.

A window is a GGUF of its own: layers renumbered from 0, per-layer metadata sliced, patterns that
llama.cpp would compute from a layer's number written out, and placeholders (zeros, holes in the file)
for what the architecture's loader wants and the window never uses. Every window but a whole model is fed
hidden states, the first one embedding rows (homeinfer.engine.embedding), so only the last holds a vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec

from homeinfer.errors import HomeinferError
from homeinfer.model.architectures import rule_for
from homeinfer.model.cut_rules import (
    OUTPUT_KEY,
    Rule,
    bools,
    f32,
    n_layers,
    off_step,
    per_layer,
    recurrent_layers,
    sliding_layers,
    u32,
)
from homeinfer.model.header import TYPE_SIZES, Header, MetaValue, TensorInfo, ValueType

__all__ = [
    "PLACEHOLDER_VOCAB",
    "PlannedTensor",
    "WindowPlan",
    "layer_bytes",
    "n_layers",
    "plan_window",
    "split_layers",
    "why_not",
]

PLACEHOLDER_VOCAB = 32
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_PER_LAYER = frozenset(
    (
        "attention.head_count",
        "attention.head_count_kv",
        "attention.sliding_window_pattern",
        "attention.recurrent_layers",
        "attention.rope_pattern",
        "attention.indexer.types",
        "attention.compress_ratios",
        "feed_forward_length",
        "expert_feed_forward_length",
        "expert_used_count",
        "swiglu_clamp_exp",
        "swiglu_clamp_shexp",
        "xielu.alpha_n",
        "xielu.alpha_p",
        "xielu.beta",
        "xielu.eps",
    )
)
_NOT_PER_LAYER = frozenset(("rope.dimension_sections", "deepstack_mapping"))
_XIELU = "xielu."
_GENERAL = frozenset(("general.architecture", "general.name", "general.file_type", "general.quantization_version"))


class PlannedTensor(msgspec.Struct, frozen=True):
    """One tensor of a window file: a copy of `source` times `factor`, or `fill` everywhere where source is None.

    Only F32 tensors have a factor or a fill.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    source: TensorInfo | None
    factor: float = 1.0
    fill: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        weights, size = TYPE_SIZES[self.type]
        return math.prod(self.shape) // weights * size


class WindowPlan(msgspec.Struct, frozen=True):
    """A window file before it is written."""

    first: int
    last: int
    metadata: dict[str, MetaValue]
    tensors: tuple[PlannedTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are copied; placeholders are holes."""
        return sum(t.nbytes for t in self.tensors if t.source is not None)


def why_not(header: Header, first: int, last: int) -> str | None:
    """Why layers [first, last) can't be a window of this model, or None where they can."""
    n = n_layers(header)
    if not 0 <= first < last <= n:
        return f"the model has layers 0 to {n - 1}"
    if (first, last) == (0, n):
        return None
    rule = rule_for(header)
    step = math.lcm(rule.cut_every, int(header.arch_get(rule.cut_every_key, 0)) or 1)
    reasons = (
        off_step(header, first, last, step),
        None if rule.forbid is None else rule.forbid(header, first, last),
        _missing_kind(header, rule, first, last),
    )
    return next((reason for reason in reasons if reason is not None), None)


def _missing_kind(header: Header, rule: Rule, first: int, last: int) -> str | None:
    """llama.cpp aborts on caches and inputs that no layer uses, and takes sizes from the first layer."""
    kinds = recurrent_layers(header, rule)
    if kinds is not None and not {kind for kind in kinds if kind is not None} <= set(kinds[first:last]):
        return "each window of a hybrid model needs a layer with attention and a recurrent one"
    sliding = sliding_layers(header, rule)
    if sliding is not None and rule.sliding is not None and not rule.sliding.optional and not any(sliding[first:last]):
        return f"each window of a {header.architecture} model needs a layer with a sliding window"
    heads = per_layer(header, "attention.head_count")
    if bool(heads[first]) != bool(heads[0]):
        return f"layer {first} has {'' if heads[first] else 'no '}attention heads: a window starts as the model does"
    return None


def split_layers(header: Header, parts: int) -> tuple[tuple[int, int], ...]:
    """Cut the model into `parts` windows of nearly equal bytes, at cuts its architecture allows.

    Raises HomeinferError when there are fewer places to cut than that.
    """
    n = n_layers(header)
    if parts == 1 and n > 0:
        return ((0, n),)  # nothing is cut: any architecture
    weights = layer_bytes(header, n)
    total = [0]
    for w in weights:
        total.append(total[-1] + w)
    target = total[-1] / max(parts, 1)

    def allowed(a: int, b: int) -> bool:
        return why_not(header, a, b) is None

    best = _best_split(n, parts, allowed, lambda a, b: (total[b] - total[a] - target) ** 2)
    if best is None:
        raise HomeinferError(_too_many(header, parts, allowed))
    return best


def _too_many(header: Header, parts: int, allowed: Callable[[int, int], bool]) -> str:
    n = n_layers(header)
    if parts < 1:
        return f"a model is cut into one window at least, not {parts}"
    most = max((p for p in range(2, min(parts, n + 1)) if _best_split(n, p, allowed, lambda _a, _b: 0.0)), default=1)
    if most == 1 and n > 1:
        middle = n // 2
        return f"this model can't be cut into windows: {why_not(header, 0, middle) or why_not(header, middle, n)}"
    return f"this model of {n} layers can be cut into at most {most} windows, not {parts}: use fewer devices"


def _best_split(
    n: int, parts: int, allowed: Callable[[int, int], bool], cost: Callable[[int, int], float]
) -> tuple[tuple[int, int], ...] | None:
    """Least summed cost over all ways to cut n layers into `parts` allowed windows (dynamic programme)."""

    @cache
    def ok(a: int, b: int) -> bool:
        return allowed(a, b)

    @cache
    def best(end: int, left: int) -> tuple[float, tuple[tuple[int, int], ...]] | None:
        if left == 0:
            return (0.0, ()) if end == 0 else None
        found = None
        for start in range(left - 1, end):
            before = best(start, left - 1) if ok(start, end) else None
            if before is not None:
                value = before[0] + cost(start, end)
                if found is None or value < found[0]:
                    found = (value, (*before[1], (start, end)))
        return found

    if not 1 <= parts <= n:
        return None
    result = best(n, parts)
    return None if result is None else result[1]


def layer_bytes(header: Header, n: int) -> list[int]:
    """Bytes of each of the first n layers; the output matrix counts to the last, which computes it."""
    sizes = [0] * n
    for tensor in header.tensors:
        match = _LAYER.fullmatch(tensor.name)
        if match and int(match[1]) < n:
            sizes[int(match[1])] += tensor.nbytes
    output = header.tensor("output.weight") or header.tensor("token_embd.weight")
    if output is not None:
        sizes[-1] += output.nbytes
    return sizes


def plan_window(header: Header, first: int, last: int) -> WindowPlan:
    """The window file of layers [first, last). Raises HomeinferError where that can't be one."""
    problem = why_not(header, first, last)
    if problem is not None:
        raise HomeinferError(f"layers {first} to {last - 1} can't be a window: {problem}")
    rule = rule_for(header)
    is_last = last == n_layers(header)
    embedding = header.tensor("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise HomeinferError("the model has no token_embd.weight matrix: it can't be cut into windows")
    vocab = embedding.shape[1] if is_last else PLACEHOLDER_VOCAB
    return WindowPlan(
        first=first,
        last=last,
        metadata=_metadata(header, rule, first, last, vocab),
        tensors=tuple(_globals(header, rule, first, last, vocab) + _layers(header, rule, first, last)),
    )


def _metadata(header: Header, rule: Rule, first: int, last: int, vocab: int) -> dict[str, MetaValue]:
    prefix = f"{header.architecture}."
    n = n_layers(header)
    kept = {k: v for k, v in header.metadata.items() if k in _GENERAL}
    for key, value in header.metadata.items():
        if key.startswith((prefix, _XIELU)):
            kept[key] = _sliced(key.removeprefix(prefix), value, first, last, n, header.n_layer)
    for key, item in _said(header, rule, first, last, vocab).items():
        if item is None:
            kept.pop(prefix + key, None)
        else:
            kept[prefix + key] = item
    name = rule.output.format(last - first - 1)
    if last != n and not name.startswith("l_out"):
        kept[OUTPUT_KEY] = MetaValue(ValueType.STRING, name)
    kept["tokenizer.ggml.model"] = MetaValue(ValueType.STRING, "none")
    return kept


def _said(header: Header, rule: Rule, first: int, last: int, vocab: int) -> dict[str, MetaValue | None]:
    """What a window says otherwise than the model; None for what it does not say."""
    said: dict[str, MetaValue | None] = {
        "block_count": u32(last - first),
        "vocab_size": u32(vocab),
        # images enter beside the text in layers 0, 1, …: text alone adds zeros there
        "deepstack_mapping": None,
        "n_deepstack_layers": None,
        "nextn_predict_layers": None,
    }
    dense = header.arch_get("leading_dense_block_count", None)
    if dense is not None:
        said["leading_dense_block_count"] = u32(max(0, int(dense) - first))
    if rule.scale_key and first > 0:
        said["embedding_scale"] = f32(1.0)
    if rule.recurrent_period is not None:
        said["attention.recurrent_layers"] = bools(tuple(map(bool, (recurrent_layers(header, rule) or ())[first:last])))
    heads = header.arch_get("attention.head_count", None)
    if isinstance(heads, list) and heads[0]:
        for key in ("attention.key_length", "attention.value_length"):
            said[key] = u32(int(header.arch_get(key, int(header.arch_get("embedding_length")) // int(heads[0]))))
    special = {} if rule.says is None else rule.says(header, first, last)
    return said | _said_of_sliding(header, rule, first, last) | dict(special)


def _said_of_sliding(header: Header, rule: Rule, first: int, last: int) -> dict[str, MetaValue | None]:
    layers = sliding_layers(header, rule)
    if layers is None:
        return {}
    if not any(layers[first:last]):
        return {"attention.sliding_window": None, "attention.sliding_window_pattern": None}
    return {"attention.sliding_window_pattern": bools(layers[first:last])}


def _sliced(key: str, value: MetaValue, first: int, last: int, n: int, n_all: int) -> MetaValue:
    if value.type != ValueType.ARRAY or key in _NOT_PER_LAYER:
        return value
    items: list[Any] = value.value  # type: ignore[assignment]
    if key in _PER_LAYER:
        if len(items) < n:
            raise HomeinferError(f"{key} has {len(items)} entries for {n} layers: the file is broken")
        return MetaValue(value.type, items[first:last], value.item)
    if len(items) in (n, n_all) and n > 1:
        raise HomeinferError(f"{key} may hold one entry per layer: homeinfer does not know it and can't cut this model")
    return value


def _smallest_type(width: int) -> str:
    """The type with the fewest bytes for a row of zeros of this width (all zero bytes mean zeros in it)."""
    usable = [t for t in ("TQ1_0", "Q2_K", "Q4_0", "F16") if width % TYPE_SIZES[t][0] == 0]
    return usable[0]


def _globals(header: Header, rule: Rule, first: int, last: int, vocab: int) -> list[PlannedTensor]:
    is_last = last == n_layers(header)
    tied = is_last and header.tensor("output.weight") is None
    all_slide = all((sliding_layers(header, rule) or (False,) * last)[first:last])
    planned = []
    for tensor in header.tensors:
        if _LAYER.fullmatch(tensor.name) or (all_slide and tensor.name in rule.full_only):
            continue
        if tensor.name == "token_embd.weight":
            planned.append(_copy(tensor) if tied else _zeros(tensor.name, (tensor.shape[0], vocab)))
        elif tensor.name in ("output.weight", "output.bias") and not is_last:
            planned.append(_zeros(tensor.name, (*tensor.shape[:-1], vocab), tensor.type))
        elif tensor.name in rule.zero_tensors and first > 0:
            planned.append(_zeros(tensor.name, tensor.shape, tensor.type))
        else:
            planned.append(_copy(tensor))
    return planned


def _zeros(name: str, shape: tuple[int, ...], wanted: str | None = None) -> PlannedTensor:
    plain = wanted in ("F32", "F16", "BF16") or len(shape) == 1
    kind = wanted if plain and wanted is not None else _smallest_type(shape[0])
    return PlannedTensor(name, shape, kind, None)


def _copy(tensor: TensorInfo, name: str | None = None, factor: float = 1.0) -> PlannedTensor:
    if factor != 1.0 and tensor.type != "F32":
        raise HomeinferError(f"{tensor.name} is {tensor.type}, and only F32 can be scaled for a window")
    return PlannedTensor(name or tensor.name, tensor.shape, tensor.type, tensor, factor)


def _layers(header: Header, rule: Rule, first: int, last: int) -> list[PlannedTensor]:
    factors = dict(rule.factors(header, first, last)) if rule.factors is not None else {}
    by_layer: dict[int, dict[str, PlannedTensor]] = {i: {} for i in range(first, last)}
    for tensor in header.tensors:
        match = _LAYER.fullmatch(tensor.name)
        if match and first <= int(match[1]) < last:
            layer, name = int(match[1]), match[2]
            by_layer[layer][name] = _copy(tensor, f"blk.{layer - first}.{name}", factors.get(name, 1.0))
    for layer, tensors in by_layer.items():
        for name, factor in factors.items():
            if name not in tensors and name.endswith(".scale") and factor != 1.0:
                tensors[name] = PlannedTensor(f"blk.{layer - first}.{name}", (1,), "F32", None, fill=factor)
    return [tensor for layer in by_layer.values() for tensor in layer.values()]
