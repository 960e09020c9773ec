"""DQ3_K_M (arXiv 2505.02390): Q3_K_M with its bits where they matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from homeinfer.model.header import Header
from homeinfer.quant.tensor_types import fitting_type, keeps_type, misfit_note, role_of, stack_and_layer

_EVERY_MODEL = {
    **dict.fromkeys(("output", "attn_v", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b"), "Q6_K"),
    **dict.fromkeys(("token_embd", "per_layer_token_embd", "attn_output"), "Q4_K"),
    **dict.fromkeys(("attn_q", "attn_q_a", "attn_q_b", "attn_k"), "Q4_K"),
    "attn_qkv": "Q5_K",
}
_MIXTURE = {
    **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"), "Q3_K"),
    **dict.fromkeys(("ffn_gate_chexps", "ffn_up_chexps"), "Q3_K"),
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_gate_shexp", "ffn_up_shexp"), "Q4_K"),
    **dict.fromkeys(("ffn_down", "ffn_down_shexp", "ffn_down_chexps"), "Q6_K"),
}
_DENSE = dict.fromkeys(("ffn_gate", "ffn_up"), "Q3_K")
_SMALL_SHARE = 0.01


def dq3_k_m_types(header: Header) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """The type of every tensor that llama.cpp would quantize, in the file's order, and notes on the reading.

    The down projections that carry the super weights (the experts' in a mixture, the layers' own in
    a dense model) get Q6_K in the first two such layers, Q4_K in one of five of the rest, Q3_K in the
    others; gate and up beside them Q3_K; everything else 4 to 6 bits.
    """
    roles = {
        tensor.name: role_of(tensor.name) for tensor in header.tensors if not keeps_type(tensor, header.architecture)
    }
    mixture = "ffn_down_exps" in roles.values()
    types = _EVERY_MODEL | (_MIXTURE if mixture else _DENSE)
    if header.tensor("output.weight") is None:
        types["token_embd"] = types["output"]
    down = _down_types(header, roles, "ffn_down_exps" if mixture else "ffn_down")
    small = _small_roles(header, roles)
    chosen, misfits = [], []
    for tensor in header.tensors:
        role = roles.get(tensor.name)
        if role is None:
            continue
        wanted = down.get(tensor.name) or types.get(role) or ("Q6_K" if role in small else "Q4_K")
        got = fitting_type(wanted, tensor.shape[0])
        chosen.append((tensor.name, got))
        if got != wanted:
            misfits.append((wanted, got))
    notes = [] if mixture and "attn_kv_a_mqa" in roles.values() else [_reading_note(header, mixture)]
    notes += [misfit_note(misfits)] if misfits else []
    return tuple(chosen), tuple(notes)


def _down_types(header: Header, roles: Mapping[str, str], role: str) -> dict[str, str]:
    """Types of the down projections in layer order. Layers that predict further tokens (nextn) stand
    behind the model's own and take the lowest."""
    n_own = header.n_layer - int(header.arch_get("nextn_predict_layers", 0))
    layers = []
    for name in (name for name, its_role in roles.items() if its_role == role):
        place = stack_and_layer(name)
        if place:
            layers.append((*place, name))
    return {
        name: "Q3_K" if layer >= n_own else _down_type(index) for index, (_, layer, name) in enumerate(sorted(layers))
    }


def _down_type(index: int) -> str:
    if index < 2:
        return "Q6_K"
    return "Q4_K" if (index - 2) % 5 == 0 else "Q3_K"


def _small_roles(header: Header, roles: Mapping[str, str]) -> set[str]:
    """Roles whose tensors together hold less than a hundredth of the model's weights."""
    weights: Counter[str] = Counter()
    for tensor in header.tensors:
        if tensor.name in roles:
            weights[roles[tensor.name]] += tensor.n_weights
    return {role for role, count in weights.items() if count < _SMALL_SHARE * header.n_weights}


def _reading_note(header: Header, mixture: bool) -> str:
    kind = "mixture-of-experts" if mixture else "dense"
    return (
        f"DQ3_K_M was published for DeepSeek's models; for this {kind} {header.architecture} model it is "
        "homeinfer's reading of it"
    )
