"""What each layer remembers of a sequence: KV cache, sliding windows, recurrent state. Pure functions of a header."""

from __future__ import annotations

import msgspec

from homeinfer.errors import HomeinferError
from homeinfer.model.architectures import rule_for
from homeinfer.model.cut_rules import Rule, n_layers, per_layer, recurrent_layers, sliding_layers
from homeinfer.model.header import Header

_RECURRENT = ("blk.0.ssm_", "blk.0.time_mix_")


def rule_of(header: Header) -> Rule | None:
    """How the architecture is cut, or None for one that can't be: such a model runs in one piece."""
    try:
        return rule_for(header)
    except HomeinferError:
        return None


def sliding_flags(header: Header) -> tuple[bool, ...]:
    """Which layers attend to a sliding window only."""
    rule = rule_of(header)
    found = None if rule is None else sliding_layers(header, rule)
    return found or (False,) * n_layers(header)


def state_flags(header: Header) -> tuple[bool | None, ...]:
    """Which layers are recurrent (True), which have attention (False), and which neither (None)."""
    n = n_layers(header)
    rule = rule_of(header)
    found = None if rule is None else recurrent_layers(header, rule)
    if found is not None:
        return found
    return (any(tensor.name.startswith(_RECURRENT) for tensor in header.tensors) and not _is_parallel(header),) * n


def kv_widths(header: Header) -> tuple[tuple[int, int], ...]:
    """Numbers of each layer's keys and values per position; keys count those of an indexer (llama_kv_cache)."""
    n = n_layers(header)
    heads_kv = per_layer(header, "attention.head_count_kv", 0)
    if header.arch_get("attention.head_count_kv", None) is None:
        heads_kv = per_layer(header, "attention.head_count")
    sliding, recurrent = sliding_flags(header), state_flags(header)
    rank = _number(header, "attention.kv_lora_rank")
    absorbed = rank > 0 and any(tensor.name.endswith("attn_k_b.weight") for tensor in header.tensors)
    widths = []
    for index in range(n):
        if recurrent[index] is not False and not _is_parallel(header):
            widths.append((0, 0))
        elif absorbed:
            widths.append((rank + _number(header, "rope.dimension_count") + _indexer(header, index), 0))
        else:
            key, value = head_widths(header, is_sliding=sliding[index])
            widths.append((heads_kv[index] * key + _indexer(header, index), heads_kv[index] * value))
    values = {value for key, value in widths if key}
    # without flash attention values lie transposed, rows of all layers as long as the longest (n_embd_v_gqa_max)
    return tuple(
        (key, max(values)) if len(values) > 1 and keeps is False else (key, value)
        for (key, value), keeps in zip(widths, recurrent, strict=True)
    )


def attention_macs(header: Header) -> tuple[int, ...]:
    """Multiplications per token and position of each layer's attention: query by key, score by value."""
    heads = per_layer(header, "attention.head_count")
    rank = _number(header, "attention.kv_lora_rank")
    sliding, widths = sliding_flags(header), kv_widths(header)
    macs = []
    for index, (key, value) in enumerate(widths):
        one = (key + rank) if rank and key and not value else sum(head_widths(header, is_sliding=sliding[index]))
        macs.append(heads[index] * one if key else 0)
    return tuple(macs)


def head_widths(header: Header, *, is_sliding: bool) -> tuple[int, int]:
    """Numbers of one head's key and value (n_embd_head_k, n_embd_head_v)."""
    heads = next((count for count in per_layer(header, "attention.head_count") if count), 1)
    plain = _number(header, "embedding_length") // heads
    key = _number(header, "attention.key_length") or plain
    value = _number(header, "attention.value_length") or plain
    if is_sliding:
        key = _number(header, "attention.key_length_swa") or key
        value = _number(header, "attention.value_length_swa") or value
    return key, value


def _indexer(header: Header, index: int) -> int:
    """Layers with sparse attention keep keys to choose positions by, too."""
    width = _number(header, "attention.indexer.key_length")
    own = width > 0 and any(tensor.name.startswith(f"blk.{index}.indexer") for tensor in header.tensors)
    return width if own else 0


def _number(header: Header, key: str) -> int:
    value = header.arch_get(key, 0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _is_parallel(header: Header) -> bool:
    """Each layer has attention and a recurrent part beside it."""
    return header.architecture == "falcon-h1"


def state_bytes(header: Header) -> tuple[int, ...]:
    """Bytes of each layer's recurrent state per sequence, float32 (n_embd_r and n_embd_s)."""
    recurrent = 4 * _state_width(header)
    flags = state_flags(header)
    return tuple(recurrent if flag or _is_parallel(header) else 0 for flag in flags)


def _state_width(header: Header) -> int:
    n_embd, conv = _number(header, "embedding_length"), _number(header, "ssm.conv_kernel")
    heads = next((count for count in per_layer(header, "attention.head_count") if count), 1)
    wkv, kda = _number(header, "wkv.head_size"), _number(header, "kda.head_dim")
    if wkv:
        return n_embd * (_number(header, "token_shift_count") or 2) + n_embd * wkv
    if _number(header, "shortconv.l_cache"):
        return n_embd * (_number(header, "shortconv.l_cache") - 1)
    if kda:
        return 3 * (conv - 1 if conv else 3) * heads * kda + heads * kda * kda
    inner, state = _number(header, "ssm.inner_size"), _number(header, "ssm.state_size")
    return inner * state + max(conv - 1, 0) * (inner + 2 * _number(header, "ssm.group_count") * state)


class Widths(msgspec.Struct, frozen=True):
    """Numbers per token that the widest layer holds at once beside its input: in attention (without scores), in a
    dense feed-forward network, in routed experts, in a recurrent layer."""

    attention: int
    feed_forward: int
    experts: int
    recurrent: int


def layer_widths(header: Header) -> Widths:
    """The widest moments of the model's layers."""
    n = n_layers(header)
    n_embd = int(header.arch_get("embedding_length", 0))
    heads = per_layer(header, "attention.head_count")
    key = max(head_widths(header, is_sliding=flag)[0] for flag in (False, True))
    widths = kv_widths(header)
    attention = max((2 * heads[index] * key + sum(widths[index]) for index in range(n)), default=0)
    rank = int(header.arch_get("attention.kv_lora_rank", 0))
    if rank and any(tensor.name.endswith("attn_k_b.weight") for tensor in header.tensors):
        attention = max(heads, default=0) * (3 * rank + 2 * int(header.arch_get("rope.dimension_count", 0)))
    used, experts = max(per_layer(header, "expert_used_count")), max(per_layer(header, "expert_count"))
    wide = max((t.shape[1] for t in header.tensors if _is_up(t.name) and len(t.shape) == 2), default=0)
    routed = max((t.shape[1] for t in header.tensors if _is_up(t.name) and len(t.shape) == 3), default=0)
    inner = int(header.arch_get("ssm.inner_size", 0))
    recurrent = 6 * inner if any(state_flags(header)) else 0
    return Widths(
        attention=attention,
        feed_forward=3 * wide,
        experts=used * max(3 * routed, routed + 2 * n_embd) + 4 * experts + 3 * wide if routed else 0,
        recurrent=recurrent,
    )


def _is_up(name: str) -> bool:
    return ".ffn_up" in name or ".ffn_gate_up" in name
