"""What planning needs of a model, from its header alone (ModelShape). Pure."""

from __future__ import annotations

from homeinfer.cluster.planning.attention import attention_macs, kv_widths, rule_of, state_bytes
from homeinfer.cluster.planning.kinds import layer_kinds, output_kind, output_tensors
from homeinfer.cluster.planning.plan import Workload
from homeinfer.cluster.planning.scratch import scratch_bytes, scratch_logits_bytes
from homeinfer.cluster.planning.shape import LayerShape, ModelShape
from homeinfer.errors import HomeinferError
from homeinfer.model.cut_rules import n_layers, per_layer
from homeinfer.model.header import TYPE_SIZES, Header, printable
from homeinfer.model.layers import LayerWeight, is_routed_expert, layer_weights
from homeinfer.model.output_blocks import block_bytes
from homeinfer.model.window_plan import why_not

_FLOAT_BYTES = 4


def model_shape(header: Header, workload: Workload) -> ModelShape:
    """The model's layers in numbers, for a workload's context, batch and KV type. A header without data is enough.

    kv_window is 0 for layers with a sliding window, too: engines make contexts with llama.cpp's default swa_full, which
    keeps, and attends to, every position (llama_kv_cache_iswa).

    Raises HomeinferError for a header that is no language model's, and for an unknown kv_type.
    """
    n = n_layers(header)
    weights = {layer.index: layer for layer in layer_weights(header)}
    embedding = header.tensor("token_embd.weight")
    n_vocab = embedding.shape[1] if embedding is not None and len(embedding.shape) > 1 else 0
    name = header.get("general.name", "")
    return ModelShape(
        name=printable(str(name)),
        layers=_layers(header, workload, n, weights),
        output_kind=output_kind(header),
        output_bytes=sum(tensor.nbytes for tensor in output_tensors(header)),
        embedding_bytes=0 if embedding is None else embedding.nbytes,
        hidden_bytes=_FLOAT_BYTES * int(header.arch_get("embedding_length", 0)),
        n_vocab=n_vocab,
        scratch_bytes=scratch_bytes(header, workload),
        scratch_logits_bytes=scratch_logits_bytes(header, workload, n_vocab),
        allowed=allowed_cuts(header),
        has_experts=any(weights[index].expert_nbytes for index in range(n) if index in weights),
        output_block_bytes=block_bytes(header),
        is_tied=header.tensor("output.weight") is None,
    )


def _layers(header: Header, workload: Workload, n: int, weights: dict[int, LayerWeight]) -> tuple[LayerShape, ...]:
    kinds, widths, states, macs = layer_kinds(header), kv_widths(header), state_bytes(header), attention_macs(header)
    used = per_layer(header, "expert_used_count")
    experts = per_layer(header, "expert_count")
    layers = []
    for index in range(n):
        weight = weights.get(index)
        expert_bytes = 0 if weight is None else weight.expert_nbytes
        share = used[index] / experts[index] if expert_bytes and 0 < used[index] <= experts[index] else 1.0
        key, value = widths[index]
        layers.append(
            LayerShape(
                kind=kinds[index],
                nbytes=0 if weight is None else weight.nbytes,
                expert_bytes=expert_bytes,
                expert_share=share,
                kv_bytes=type_bytes(workload.kv_type, key) + type_bytes(workload.kv_type, value),
                state_bytes=states[index],
                attention_macs=macs[index],
                largest_bytes=0 if weight is None else _largest(weight),
            )
        )
    return tuple(layers)


def _largest(weight: LayerWeight) -> int:
    return max((tensor.nbytes for tensor in weight.tensors if not is_routed_expert(tensor.name)), default=0)


def type_bytes(name: str, width: int) -> int:
    """Bytes of a row of so many numbers of ggml's type `name`, whole blocks. Raises HomeinferError for no type."""
    if name.upper() not in TYPE_SIZES:
        raise HomeinferError(f"{printable(name, 40)} is no type of KV cache: take f16, q8_0 or q4_0")
    weights, size = TYPE_SIZES[name.upper()]
    return -(-width // weights) * size


def allowed_cuts(header: Header) -> tuple[int, ...]:
    """For each first layer the set of `last` as bits, for which layers [first, last) can be a window; a model of an
    architecture that can't be cut is one."""
    n = n_layers(header)
    if rule_of(header) is None:
        return (1 << n, *(0,) * (n - 1))
    return tuple(
        sum(1 << last for last in range(first + 1, n + 1) if why_not(header, first, last) is None) for first in range(n)
    )
