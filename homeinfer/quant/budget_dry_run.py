"""What a budget would give, from the header alone: the allocation with typical errors instead of measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from homeinfer.model.header import Header
from homeinfer.quant.allocate import allocate
from homeinfer.quant.candidates import candidate_types, free_tensors, item_of
from homeinfer.quant.dry_run import DryRun
from homeinfer.quant.error_tables import TypeError_
from homeinfer.quant.output_header import header_bytes, padded
from homeinfer.quant.recipes import Recipe, plan
from homeinfer.quant.sensitivity import assumed
from homeinfer.quant.tensor_rules import TensorRule, with_tensor_rules

TYPICAL_ERRORS: Mapping[str, float] = MappingProxyType(
    {
        "IQ1_S": 0.100, "IQ1_M": 0.085, "IQ2_XXS": 0.055, "IQ2_XS": 0.045, "IQ2_S": 0.0315, "IQ3_XXS": 0.0146,
        "IQ3_S": 0.0094, "IQ4_XS": 0.0033, "IQ4_NL": 0.0031, "Q4_K": 0.0027, "Q4_1": 0.0026, "Q5_0": 0.0011,
        "Q5_K": 0.00075, "Q5_1": 0.0006, "Q6_K": 0.0002, "Q8_0": 0.00001,
    }
)  # fmt: skip
"""Relative output errors with Hessian-aware rounding, as on SmolLM2's embedding (the one of its matrices whose source
is finer than 4 bits), times ten for a layer's matrix; only their ratios count."""
_FTYPE_Q8_0 = 7
_ADDED_BYTES = 512
"""What the metadata of a real run takes beside the shares per tensor, generously."""


def budget_dry_run(header: Header, limit_bytes: int, tensor_rules: Sequence[TensorRule] = ()) -> DryRun:
    """Types and bytes of a file of at most limit_bytes. Needs no weights. Raises HomeinferError for a budget that no
    types fit, and for rules that match nothing."""
    rules = with_tensor_rules(Recipe("dynamic", _FTYPE_Q8_0, (), ()), header, tensor_rules)
    fixed = dict(rules.overrides)
    free = free_tensors(header, fixed)
    names = {tensor.name for tensor in free}
    overhead = header_bytes(header, {}) + _ADDED_BYTES + 4 * len(header.tensors)
    overhead += sum(padded(tensor.bytes) for tensor in plan(header, fixed.items()) if tensor.name not in names)
    bpw = 8 * (limit_bytes - overhead) / max(sum(tensor.n_weights for tensor in free), 1)
    sensitivity = assumed(header, [tensor.name for tensor in free]).per_tensor
    items = [
        item_of(tensor, candidate_types(tensor.shape[0], bpw, True), _typical, sensitivity[tensor.name])
        for tensor in free
    ]
    found = allocate(items, limit_bytes - overhead)
    tensors = plan(header, ({name: option.type for name, option in found.choices.items()} | fixed).items())
    return DryRun(
        recipe="dynamic",
        size_bytes=overhead + found.bytes,
        bpw=round(8 * sum(tensor.bytes for tensor in tensors) / header.n_weights, 4),
        tensors=tensors,
        notes=(
            *rules.notes,
            "an estimate with typical errors: without --dry-run the model is measured, and other tensors may get more",
        ),
    )


def _typical(_name: str, type_name: str) -> TypeError_:
    error = TYPICAL_ERRORS[type_name]
    return TypeError_(type_name, error, error, 0.0)
