"""Shadow windows: windows of a model's own shapes, types and metadata that can be timed without its weights.

A layer's speed depends on shapes and types, not on values, so the header alone says all (PLAN.md). Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from homeinfer.cluster.planning.kinds import layer_kinds, output_tensors
from homeinfer.errors import HomeinferError
from homeinfer.model.architectures import rule_for
from homeinfer.model.cut_rules import OUTPUT_KEY, n_layers, u32
from homeinfer.model.header import TYPE_SIZES, Header, MetaValue, TensorInfo, ValueType
from homeinfer.model.layers import is_routed_expert, layer_of
from homeinfer.model.window_plan import PLACEHOLDER_VOCAB, PlannedTensor, WindowPlan, plan_window, why_not

MOST_LAYERS = 16

_VOCABULARY = ("token_embd.weight", "output.weight", "output.bias")
_SECTIONS = "rope.dimension_sections"
_POSITIONS, _MOST_POSITIONS = "position_embd.weight", 1024
_ROUTERS = ("ffn_gate_inp.", "exp_probs_b")
_THIN = 64
_HEADS, _HEAD_WIDTH = 16, 128
ATTENTION_MACS = _HEADS * 2 * _HEAD_WIDTH
"""Multiplications of one layer of `attention_shadow` for each position that a token attends to."""


class Experts(msgspec.Struct, frozen=True):
    """Routed experts of a model (`count`, of which a token uses `used`), and how many its shadow has."""

    count: int
    used: int
    kept: int


class Sizes(msgspec.Struct, frozen=True):
    """How large shadows are made.

    enough: layers are repeated until a window is so large: a few small ones would stay in the processor's cache and
    drown in the noise. experts: routed experts of a layer beyond that are left out, since a token reads those it is
    sent to, not those that are there. most: what a window may have at all. All in bytes.
    """

    enough: int = 128_000_000
    experts: int = 400_000_000
    most: int = 4_000_000_000


class Shadow(msgspec.Struct, frozen=True):
    """A window to be timed. kinds: of its layers, in order; none for the windows that are not of the model."""

    kinds: tuple[str, ...]
    plan: WindowPlan
    n_embd: int
    is_last: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its weights and placeholders."""
        return sum(tensor.nbytes for tensor in self.plan.tensors)


def shadows(header: Header, sizes: Sizes) -> tuple[Shadow, ...]:
    """Windows that together time every kind of layer (`solve_kinds`), each of as few layers of the model as its
    architecture allows, repeated.

    Raises HomeinferError for a model that homeinfer can't cut, and for layers that are larger than `sizes.most`.
    """
    kinds = layer_kinds(header)
    experts = experts_of(header, sizes.experts)
    nbytes = layer_sizes(header)
    windows = chosen_windows(header, kinds, nbytes)
    made = []
    for first, last in windows:
        plan = shadow_plan(header, first, last, experts)
        times = min(MOST_LAYERS // (last - first), sizes.enough // max(plan_bytes(plan), 1))
        repeated = repeat(header, plan, times)
        made.append(Shadow(kinds[first:last] * max(times, 1), repeated, embedding_length(header)))
        if made[-1].nbytes > sizes.most:
            raise HomeinferError(
                f"{_named(first, last)} {made[-1].nbytes / 1e6:,.0f} MB to be timed, and for that "
                f"{sizes.most / 1e6:,.0f} MB of memory and disk are free: close other programs or make room"
            )
    return tuple(made)


def _named(first: int, last: int) -> str:
    return f"layer {first} takes" if last == first + 1 else f"layers {first} to {last - 1} take"


def plan_bytes(plan: WindowPlan) -> int:
    """Bytes of everything in a window."""
    return sum(tensor.nbytes for tensor in plan.tensors)


def chosen_windows(header: Header, kinds: Sequence[str], nbytes: Sequence[int]) -> list[tuple[int, int]]:
    """The smallest allowed windows in which each kind is alone, and where it may not be, those from which its time
    follows. Raises HomeinferError where there are none."""
    names = list(dict.fromkeys(kinds))
    alone = {
        kind: next(
            (i for i in reversed(range(len(kinds))) if kinds[i] == kind and why_not(header, i, i + 1) is None), None
        )
        for kind in names
    }
    windows = [(i, i + 1) for i in alone.values() if i is not None]
    return windows + _mixed_windows(header, kinds, nbytes, {kind for kind, i in alone.items() if i is None}, windows)


def embedding_length(header: Header) -> int:
    """Numbers in a hidden state. Raises HomeinferError where the header does not say it."""
    length = header.arch_get("embedding_length", 0)
    if not isinstance(length, int) or length <= 0:
        raise HomeinferError(f"the model does not say its embedding_length: {header.files[0].path} can't be profiled")
    return length


def layer_sizes(header: Header) -> list[int]:
    """Bytes of each layer's weights."""
    sizes = [0] * n_layers(header)
    for tensor in header.tensors:
        index = layer_of(tensor.name)
        if index is not None and index < len(sizes):
            sizes[index] += tensor.nbytes
    return sizes


def _mixed_windows(
    header: Header,
    kinds: Sequence[str],
    sizes: Sequence[int],
    lacking: set[str],
    windows: Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:
    """The smallest allowed windows from which the times of kinds that can't stand alone follow, as far as they do."""
    if not lacking:
        return []
    names = list(dict.fromkeys(kinds))
    n = len(kinds)
    allowed = [(a, b) for a in range(n) for b in range(a + 1, n + 1) if lacking & set(kinds[a:b])]
    if all((a, b) == (0, n) or why_not(header, a, b) is not None for a, b in allowed):
        allowed = []  # it runs whole only, where tokens go in
    found: list[tuple[int, int]] = []
    rank = len(windows)
    for a, b in sorted(allowed, key=lambda w: (sum(sizes[w[0] : w[1]]), w)):
        if rank == len(names) or why_not(header, a, b) is not None:
            continue
        rows = [counts(names, kinds[x:y]) for x, y in (*windows, *found, (a, b))]
        if np.linalg.matrix_rank(np.array(rows)) > rank:
            found.append((a, b))
            rank += 1
    if lacking - {kind for a, b in found for kind in kinds[a:b]}:
        raise HomeinferError(f"this {header.architecture} model can't be cut: {why_not(header, 0, 1) or 'no window'}")
    return found


def counts(names: Sequence[str], kinds: Sequence[str]) -> list[float]:
    """How many layers of each kind there are."""
    return [float(kinds.count(name)) for name in names]


def solve_kinds(windows: Sequence[Sequence[str]], times: Sequence[float], nbytes: dict[str, float]) -> dict[str, float]:
    """Time of one layer of each kind, from the times of windows without what a window costs by itself.

    nbytes: what each kind reads. Kinds that only come together share a window's time as they share its bytes.
    """
    names = list(dict.fromkeys(kind for window in windows for kind in window))
    share = np.array([counts(names, list(window)) for window in windows]) * [nbytes[name] for name in names]
    rate = sum(times) / float(share.sum())
    # the deviation from the common rate that is smallest among all that explain the times
    deviation = np.linalg.pinv(share) @ (np.asarray(times) - rate * share.sum(axis=1))
    return {name: max(nbytes[name] * (rate + float(extra)), 1e-4) for name, extra in zip(names, deviation, strict=True)}


def shadow_plan(header: Header, first: int, last: int, experts: Experts | None = None) -> WindowPlan:
    """The window of layers [first, last) as one in the middle of a model, with `experts.kept` routed experts."""
    plan = plan_window(header, first, last)
    metadata = dict(plan.metadata)
    metadata[f"{header.architecture}.vocab_size"] = u32(PLACEHOLDER_VOCAB)
    name = rule_for(header).output.format(last - first - 1)
    if not name.startswith("l_out"):
        metadata[OUTPUT_KEY] = MetaValue(ValueType.STRING, name)
    if experts is not None and experts.kept < experts.count:
        metadata[f"{header.architecture}.expert_count"] = u32(experts.kept)
    if any(tensor.name == _POSITIONS for tensor in plan.tensors):
        metadata[f"{header.architecture}.context_length"] = u32(_MOST_POSITIONS)
    tensors = tuple(_shadowed(tensor, experts) for tensor in plan.tensors)
    return WindowPlan(first, last, metadata, tensors)


def repeat(header: Header, plan: WindowPlan, times: int) -> WindowPlan:
    """The window's layers so many times one after another; unchanged where the number of layers would change them."""
    architecture, n = header.architecture, plan.last - plan.first
    arrays = [
        key for key, value in plan.metadata.items() if value.type == ValueType.ARRAY and not key.endswith(_SECTIONS)
    ]
    dense = plan.metadata.get(f"{architecture}.leading_dense_block_count")
    n_dense = 0 if dense is None else min(int(dense.value), n)  # type: ignore[arg-type]
    if times <= 1 or 0 < n_dense < n or (arrays and n == n_layers(header)):
        return plan
    metadata = dict(plan.metadata)
    metadata[f"{architecture}.block_count"] = u32(n * times)
    if dense is not None:
        metadata[f"{architecture}.leading_dense_block_count"] = u32(n_dense * times)
    for key in arrays:
        items, source = metadata[key].value, header.get(key)
        assert isinstance(items, list)
        if source is None or not isinstance(source, list) or len(source) != len(items):  # one for each layer
            metadata[key] = msgspec.structs.replace(metadata[key], value=items * times)
    if OUTPUT_KEY in metadata:
        name = str(metadata[OUTPUT_KEY].value)
        metadata[OUTPUT_KEY] = MetaValue(ValueType.STRING, name.replace(str(n - 1), str(n * times - 1)))
    layers = [tensor for tensor in plan.tensors if layer_of(tensor.name) is not None]
    others = [tensor for tensor in plan.tensors if layer_of(tensor.name) is None]
    copies = [_moved(tensor, n * i) for i in range(times) for tensor in layers]
    return WindowPlan(plan.first, plan.first + n * times, metadata, (*others, *copies))


def _moved(tensor: PlannedTensor, by: int) -> PlannedTensor:
    _, number, name = tensor.name.split(".", 2)
    return msgspec.structs.replace(tensor, name=f"blk.{int(number) + by}.{name}")


def _shadowed(tensor: PlannedTensor, experts: Experts | None) -> PlannedTensor:
    shape = tensor.shape
    if tensor.name in _VOCABULARY:
        shape = (*shape[:-1], PLACEHOLDER_VOCAB)
    elif tensor.name == _POSITIONS:
        shape = (*shape[:-1], _MOST_POSITIONS)
    elif experts is not None and shape[-1] == experts.count and has_experts(tensor.name):
        shape = (*shape[:-1], experts.kept)
    return PlannedTensor(tensor.name, shape, tensor.type, None)


def has_experts(name: str) -> bool:
    """Whether a tensor's last dimension is the routed experts."""
    return is_routed_expert(name) or any(router in name for router in _ROUTERS)


def experts_of(header: Header, most_bytes: int) -> Experts | None:
    """The model's routed experts, None for one without. What is kept has at most so many bytes in a layer, but is no
    less than a token uses."""
    count, used = header.arch_get("expert_count", 0), header.arch_get("expert_used_count", 0)
    if isinstance(used, list):
        used = max(used, default=0)
    if not isinstance(count, int) or not isinstance(used, int) or not 0 < used <= count:
        return None
    layers = [0] * n_layers(header)
    for tensor in header.tensors:
        index = layer_of(tensor.name)
        if index is not None and index < len(layers) and is_routed_expert(tensor.name):
            layers[index] += tensor.nbytes
    each = max(layers, default=0) / count
    if each == 0:
        return None
    groups = header.arch_get("expert_group_count", 1)
    step = groups if isinstance(groups, int) and 0 < groups <= count and count % groups == 0 else 1
    wanted = max(used, min(count, int(most_bytes / each)))
    return Experts(count, used, min(count, math.ceil(wanted / step) * step))


def output_shadow(header: Header, most_bytes: int) -> tuple[Shadow, float]:
    """A thin layer with the model's final norm and output matrix, or as many of its rows as have so many bytes, and
    what part of all that is. `thin_shadow` is the same without. Raises HomeinferError where there is no such matrix."""
    n_embd = embedding_length(header)
    tensors = [tensor for tensor in output_tensors(header) if tensor.name == "output.weight"]
    if not tensors or len(tensors[0].shape) != 2 or not tensors[0].shape[1]:
        raise HomeinferError(f"{header.files[0].path} has no output matrix: it can't be profiled")
    output = tensors[0]
    rows = max(min(output.shape[1], output.shape[1] * most_bytes // max(output.nbytes, 1)), PLACEHOLDER_VOCAB)
    return _thin(n_embd, 1, msgspec.structs.replace(output, shape=(n_embd, rows))), rows / output.shape[1]


def thin_shadow(n_embd: int, layers: int = 1) -> Shadow:
    """Layers in which next to nothing is computed: what remains is what a window costs by itself."""
    return _thin(n_embd, layers, None)


def attention_shadow(layers: int = 2) -> Shadow:
    """Layers in which attention takes longer than the rest, as soon as there is something to attend to."""
    return _thin(256, layers, None, heads=_HEADS, kv_heads=_HEADS // 4, width=_HEAD_WIDTH)


def _thin(
    n_embd: int, layers: int, output: TensorInfo | None, *, heads: int = 1, kv_heads: int = 1, width: int = _THIN
) -> Shadow:
    n_vocab = PLACEHOLDER_VOCAB if output is None else output.shape[1]
    kind = "F16" if output is None else output.type
    placeholder = next(name for name in ("TQ1_0", "Q4_0", "F16") if n_embd % TYPE_SIZES[name][0] == 0)
    shapes = {
        "attn_norm.weight": (n_embd,),
        "attn_q.weight": (n_embd, heads * width),
        "attn_k.weight": (n_embd, kv_heads * width),
        "attn_v.weight": (n_embd, kv_heads * width),
        "attn_output.weight": (heads * width, n_embd),
        "ffn_norm.weight": (n_embd,),
        "ffn_gate.weight": (n_embd, _THIN),
        "ffn_up.weight": (n_embd, _THIN),
        "ffn_down.weight": (_THIN, n_embd),
    }
    tensors = [
        PlannedTensor("token_embd.weight", (n_embd, n_vocab), placeholder, None),
        PlannedTensor("output_norm.weight", (n_embd,), "F32", None),
        PlannedTensor("output.weight", (n_embd, n_vocab), kind, None),
    ]
    for layer in range(layers):
        for name, shape in shapes.items():
            tensors.append(PlannedTensor(f"blk.{layer}.{name}", shape, "F32" if len(shape) == 1 else "F16", None))
    numbers = {
        "block_count": layers,
        "vocab_size": n_vocab,
        "context_length": 4096,
        "embedding_length": n_embd,
        "feed_forward_length": _THIN,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
    }
    plan = WindowPlan(1, 1 + layers, _llama_metadata(numbers), tuple(tensors))
    return Shadow((), plan, n_embd, output is not None)


def _llama_metadata(numbers: dict[str, int]) -> dict[str, MetaValue]:
    said = {f"llama.{key}": u32(value) for key, value in numbers.items()}
    said["general.architecture"] = MetaValue(ValueType.STRING, "llama")
    said["llama.attention.layer_norm_rms_epsilon"] = MetaValue(ValueType.FLOAT32, 1e-5)
    said["tokenizer.ggml.model"] = MetaValue(ValueType.STRING, "none")
    return said
