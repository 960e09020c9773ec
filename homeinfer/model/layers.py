"""What the layers of a model weigh: pure functions from a Header to bytes, weights and types."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Final

import msgspec

from homeinfer.model.header import Header, TensorInfo, printable

_LAYER: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.")
_ROUTED: Final = re.compile(r"\.ffn_(?:gate|up|down|gate_up)(?:_(?:ch)?exps|\.[0-9]+)\.")
_EMBEDDING: Final = ("token_embd", "position_embd", "token_types", "per_layer_")
_OUTPUT: Final = ("output.", "output_", "cls.")


class Weight(msgspec.Struct, frozen=True, kw_only=True):
    """What some tensors weigh together.

    bpw is bits per weight, 0 where there are no weights. types maps each tensor type to its bytes,
    the heaviest first. expert_nbytes counts the routed experts, of which a token reads only some;
    the other bytes are read for every token.
    """

    nbytes: int
    n_weights: int
    bpw: float
    types: dict[str, int]
    expert_nbytes: int
    tensors: tuple[TensorInfo, ...]


class LayerWeight(Weight, frozen=True, kw_only=True):
    index: int


class ModelFile(msgspec.Struct, frozen=True):
    """One file of the model; bytes it has and bytes it needs to be whole."""

    path: str
    size: int
    whole_size: int


class ModelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A model as `homeinfer model --json` prints it; None is what the header does not say.

    active_weights are those that one token uses: all but the routed experts it is not sent to.
    tied says that the embedding is the output matrix as well.
    """

    name: str | None
    architecture: str
    n_layer: int
    n_embd: int | None
    n_ctx_train: int | None
    n_vocab: int | None
    n_expert: int | None
    n_expert_used: int | None
    n_weights: int
    active_weights: int
    nbytes: int
    bpw: float
    types: dict[str, int]
    expert_nbytes: int
    tied: bool
    truncated: bool
    files: tuple[ModelFile, ...]
    layers: tuple[LayerWeight, ...]
    embedding: Weight
    output: Weight
    other: Weight


class LayerRun(msgspec.Struct, frozen=True):
    """Consecutive layers [first, last) that weigh the same, tensor by tensor."""

    first: int
    last: int
    layer: LayerWeight


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to: `blk.N.`; None for those outside the layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def is_routed_expert(name: str) -> bool:
    """Whether a tensor holds routed experts (`ffn_*_exps`); shared experts and routers do not."""
    return _ROUTED.search(name) is not None


def layer_weights(header: Header) -> tuple[LayerWeight, ...]:
    """The layers that have tensors, by index."""
    layers: defaultdict[int, list[TensorInfo]] = defaultdict(list)
    for tensor in header.tensors:
        index = layer_of(tensor.name)
        if index is not None:
            layers[index].append(tensor)
    return tuple(
        LayerWeight(index=index, **msgspec.structs.asdict(weigh(tensors))) for index, tensors in sorted(layers.items())
    )


def weigh(tensors: Iterable[TensorInfo]) -> Weight:
    tensors = tuple(tensors)
    types: defaultdict[str, int] = defaultdict(int)
    for tensor in tensors:
        types[tensor.type] += tensor.nbytes
    nbytes = sum(types.values())
    n_weights = sum(tensor.n_weights for tensor in tensors)
    return Weight(
        nbytes=nbytes,
        n_weights=n_weights,
        bpw=bits_per_weight(nbytes, n_weights),
        types=dict(sorted(types.items(), key=lambda item: (-item[1], item[0]))),
        expert_nbytes=sum(tensor.nbytes for tensor in tensors if is_routed_expert(tensor.name)),
        tensors=tensors,
    )


def bits_per_weight(nbytes: int, n_weights: int) -> float:
    return 8 * nbytes / n_weights if n_weights else 0.0


def fold_layers(layers: Iterable[LayerWeight]) -> tuple[LayerRun, ...]:
    """Runs of consecutive layers whose tensors have the same names, shapes and types."""
    runs: list[LayerRun] = []
    for layer in layers:
        last = runs[-1] if runs else None
        if last is not None and last.last == layer.index and _likeness(last.layer) == _likeness(layer):
            runs[-1] = LayerRun(last.first, layer.index + 1, last.layer)
        else:
            runs.append(LayerRun(layer.index, layer.index + 1, layer))
    return tuple(runs)


def _likeness(layer: LayerWeight) -> frozenset[tuple[str, tuple[int, ...], str]]:
    prefix = len(f"blk.{layer.index}.")
    return frozenset((tensor.name[prefix:], tensor.shape, tensor.type) for tensor in layer.tensors)


def summarize(header: Header) -> ModelSummary:
    """The whole model's weight and what its metadata says of its size."""
    layers = layer_weights(header)
    outside = [tensor for tensor in header.tensors if layer_of(tensor.name) is None]
    embedding = [tensor for tensor in outside if tensor.name.startswith(_EMBEDDING)]
    output = [tensor for tensor in outside if tensor.name.startswith(_OUTPUT)]
    whole = weigh(header.tensors)
    name = header.get("general.name")
    n_expert = _count(header, "expert_count")
    n_expert_used = _count(header, "expert_used_count")
    return ModelSummary(
        name=printable(name) if isinstance(name, str) else None,
        architecture=header.architecture,
        n_layer=_count(header, "block_count") or len(layers),
        n_embd=_count(header, "embedding_length"),
        n_ctx_train=_count(header, "context_length"),
        n_vocab=_vocabulary(header),
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        n_weights=whole.n_weights,
        active_weights=whole.n_weights - _idle_weights(header, n_expert, n_expert_used),
        nbytes=whole.nbytes,
        bpw=whole.bpw,
        types=whole.types,
        expert_nbytes=whole.expert_nbytes,
        tied=header.tensor("output.weight") is None and header.tensor("token_embd.weight") is not None,
        truncated=header.truncated,
        files=tuple(
            ModelFile(printable(file.path, 1000), file.size, file.data_offset + file.data_bytes)
            for file in header.files
        ),
        layers=layers,
        embedding=weigh(embedding),
        output=weigh(output),
        other=weigh(tensor for tensor in outside if not tensor.name.startswith(_EMBEDDING + _OUTPUT)),
    )


def _idle_weights(header: Header, n_expert: int | None, n_expert_used: int | None) -> int:
    if not n_expert or not n_expert_used or n_expert_used > n_expert:
        return 0
    routed = sum(tensor.n_weights for tensor in header.tensors if is_routed_expert(tensor.name))
    return routed * (n_expert - n_expert_used) // n_expert


def _vocabulary(header: Header) -> int | None:
    tokens = header.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        return len(tokens)
    embedding = header.tensor("token_embd.weight")
    rows = embedding.shape[1] if embedding is not None and len(embedding.shape) > 1 else None
    return _count(header, "vocab_size") or rows


def _count(header: Header, key: str) -> int | None:
    value = header.arch_get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
