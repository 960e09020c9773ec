"""Kinds of layers: two layers are of one kind exactly when they take the same time. Pure functions of a header."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import msgspec

from homeinfer.cluster.planning.attention import sliding_flags, state_flags
from homeinfer.errors import HomeinferError
from homeinfer.model.cut_rules import n_layers
from homeinfer.model.header import Header, TensorInfo, printable
from homeinfer.model.layers import layer_of, weigh

_SAID_OF_LAYERS = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.kv_lora_rank",
    "attention.recurrent_layers",
    "attention.indexer.types",
    "attention.indexer.top_k",
    "attention.compress_ratios",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_count",
    "expert_used_count",
    "ssm.conv_kernel",
    "ssm.inner_size",
    "ssm.state_size",
    "ssm.time_step_rank",
    "ssm.group_count",
    "wkv.head_size",
)
"""Metadata that decides a layer's time beside its tensors: one number for all, or a list with one for each."""
_KEY_LENGTH = 12


def layer_kinds(header: Header) -> tuple[str, ...]:
    """One key for each layer that takes part in decoding; layers with the same key take the same time.

    A key is 12 hexadecimal digits of a hash of the architecture, the tensors' names (without `blk.N.`), shapes and
    types, and of what else decides the time: heads, experts used, sliding window, recurrence. A header without data is
    enough. Raises HomeinferError for headers that are no language model's.
    """
    n = n_layers(header)
    tensors: defaultdict[int, list[TensorInfo]] = defaultdict(list)
    for tensor in header.tensors:
        index = layer_of(tensor.name)
        if index is not None and index < n:
            tensors[index].append(tensor)
    sliding, recurrent = sliding_flags(header), state_flags(header)
    keys = []
    for index in range(n):
        said = [_said(header, key, index) for key in _SAID_OF_LAYERS]
        window = header.arch_get("attention.sliding_window", 0) if sliding[index] else 0
        keys.append(_hash([header.architecture, _likeness(tensors[index]), said, window, recurrent[index]]))
    return tuple(keys)


def output_kind(header: Header) -> str:
    """The key of the final norm and the output matrix; a tied embedding counts as an output matrix like itself."""
    return _hash(["output", header.architecture, _likeness(output_tensors(header), keep_names=True)])


def output_tensors(header: Header) -> tuple[TensorInfo, ...]:
    """What the last window holds beside its layers: final norm and output matrix, which may be the embedding."""
    found = [tensor for tensor in header.tensors if tensor.name.startswith("output")]
    if header.tensor("output.weight") is None:
        tied = header.tensor("token_embd.weight")
        if tied is not None:
            found.append(msgspec.structs.replace(tied, name="output.weight"))
    return tuple(found)


def kind_label(header: Header, kind: str) -> str:
    """What to call a kind to people: "layers 0 to 2 (Q4_K, 38 MB each)" or "the output matrix (Q6_K, 215 MB)".

    Raises HomeinferError for a key that is not this model's.
    """
    layers = [index for index, key in enumerate(layer_kinds(header)) if key == kind]
    if layers:
        weight = weigh(tensor for tensor in header.tensors if layer_of(tensor.name) == layers[0])
        each = " each" if len(layers) > 1 else ""
        return f"{_named(layers)} ({next(iter(weight.types), 'no weights')}, {weight.nbytes / 1e6:,.0f} MB{each})"
    if kind == output_kind(header):
        weight = weigh(output_tensors(header))
        return f"the output matrix ({next(iter(weight.types), 'no weights')}, {weight.nbytes / 1e6:,.0f} MB)"
    raise HomeinferError(f"{printable(kind)} is no kind of layer of this model: make the profile anew with it")


def _said(header: Header, key: str, index: int) -> Any:
    value = header.arch_get(key, None)
    if isinstance(value, list):
        return value[index] if index < len(value) else None
    return value


def _likeness(tensors: Iterable[TensorInfo], *, keep_names: bool = False) -> list[tuple[str, tuple[int, ...], str]]:
    return sorted(
        (tensor.name if keep_names else tensor.name.split(".", 2)[2], tensor.shape, tensor.type) for tensor in tensors
    )


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:_KEY_LENGTH]


def _named(layers: list[int]) -> str:
    """ "layer 3", "layers 0 to 2", "layers 0 to 2, 5 and 7 to 9"."""
    runs: list[list[int]] = []
    for index in layers:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    texts = [f"{first} to {last}" if last > first else str(first) for first, last in runs]
    joined = ", ".join(texts[:-1]) + (" and " if len(texts) > 1 else "") + texts[-1]
    return f"layer{'s' if len(layers) > 1 else ''} {joined}"
