"""How much KLD at the model's output one unit of a tensor's relative error costs.

The relative error of weights W rounded to W + D is E = tr(D·H·Dᵀ) / tr(W·H·Wᵀ), H the mean outer product of the
inputs. KLD grows in proportion to E while errors are small, and errors of several tensors add up, so one measurement
is enough for tensors of one role in neighbouring layers; in between it is interpolated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from homeinfer.model.header import Header
from homeinfer.quant.kld_meter import Kld, KldMeter
from homeinfer.quant.sensitivity_kept import KeptGroups, MeasuredGroup
from homeinfer.quant.tensor_encoding import decode, encode, is_exact_type
from homeinfer.quant.tensor_types import role_of, stack_and_layer
from homeinfer.quant.work_copy import WorkCopy

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Perturbed = Callable[[str], tuple[Floats, float]]
"""A tensor's weights with an error, float32 [m, n] (experts one below the other), and that error's E."""

OWN_BINS_FROM = 8
"""From so many layers on the first and the last are measured by themselves: activations of a size that no other
layer sees are made and unmade there, and what holds for these layers holds for no neighbour."""
_MOST_APART = 8.0
"""How far a bin may lie from the median of its role: more is an accident of the text."""
_MOST_APART_OWN = 200.0
"""More than for other bins: ffn_down of SmolLM2's last layer measured 45 times its role's median."""

_OUTPUT = 17.0
_OTHER = 0.15
ASSUMED: Mapping[str, float] = {
    **dict.fromkeys(("output", "token_embd"), _OUTPUT),
    **dict.fromkeys(("attn_q", "attn_q_a", "attn_q_b", "attn_qkv"), 0.15),
    **dict.fromkeys(("attn_k", "attn_k_b", "attn_kv_a_mqa"), 0.27),
    **dict.fromkeys(("attn_v", "attn_v_b"), 0.065),
    "attn_kv_b": 0.15,
    "attn_output": 0.12,
    **dict.fromkeys(("ffn_gate", "ffn_gate_up"), 0.21),
    "ffn_up": 0.16,
    "ffn_down": 0.28,
}
"""Measured on SmolLM2-135M (30 layers, embedding and output tied) but for what it does not have: MLA's roles are
given those of the projections that they stand for."""


class Group(msgspec.Struct, frozen=True):
    """Tensors that are measured together: of one role (with its stack, "dec.attn_q"), in neighbouring layers."""

    role: str
    layers: tuple[int, ...]
    tensors: tuple[str, ...]


class Sensitivity(msgspec.Struct, frozen=True):
    """per_tensor: KLD (nats) per unit of relative error. groups: what it was derived from. measured: whether by
    measurement at all, or assumed."""

    per_tensor: dict[str, float]
    groups: tuple[MeasuredGroup, ...]
    measured: bool


def groups_of(header: Header, names: Iterable[str], bins: int) -> tuple[Group, ...]:
    """Each tensor in one group: by role, and within a role by depth in at most `bins` bins.

    Tensors outside the layers (embedding, output) are groups of their own. From OWN_BINS_FROM layers of a role on,
    the first and the last of them have a bin each, if there are three bins. Groups are in the order of the file.
    """
    wanted = set(names)
    groups = []
    roles: dict[str, dict[int, list[str]]] = {}
    for name in (tensor.name for tensor in header.tensors if tensor.name in wanted):
        place = stack_and_layer(name)
        if place is None:
            groups.append(Group(role_of(name), (), (name,)))
        else:
            roles.setdefault(_staged_role(name), {}).setdefault(place[1], []).append(name)
    for role, by_layer in roles.items():
        for layers in _binned(sorted(by_layer), max(bins, 1)):
            tensors = tuple(name for layer in layers for name in by_layer[layer])
            groups.append(Group(role, layers, tensors))
    return tuple(groups)


def _staged_role(name: str) -> str:
    place = stack_and_layer(name)
    return (place[0] if place else "") + role_of(name)


def _binned(layers: list[int], bins: int) -> list[tuple[int, ...]]:
    if len(layers) < OWN_BINS_FROM or bins < 3:
        parts = np.array_split(layers, min(bins, len(layers)))
    else:
        inner = np.array_split(layers[1:-1], min(bins - 2, len(layers) - 2))
        parts = [np.array(layers[:1]), *inner, np.array(layers[-1:])]
    return [tuple(part.tolist()) for part in parts]


def per_tensor(groups: Sequence[MeasuredGroup]) -> Sensitivity:
    """Sensitivities from groups with their KLD and errors.

    A group's is KLD / error; a layer's is interpolated between bin centres, linearly in its logarithm, and constant
    beyond. A group without a usable measurement (nothing, zero, less) takes part in none of that; a role without any
    is assumed to stand to the others as ASSUMED has it. No bin is further from its role's median than a factor of 8.
    """
    by_role: dict[str, list[MeasuredGroup]] = {}
    for group in groups:
        by_role.setdefault(group.role, []).append(group)
    usable = [(group.role, value) for group in groups if (value := group.sensitivity) is not None]
    if not usable:
        tensors = [(group.role, name) for group in groups for name in group.tensors]
        return Sensitivity({name: _assumed_for(role) for role, name in tensors}, tuple(groups), not groups)
    scale = statistics.median(value / _assumed_for(role) for role, value in usable)
    found: dict[str, float] = {}
    for role, members in by_role.items():
        fallback = scale * _assumed_for(role)
        found.update(_layered(members, fallback) if members[0].layers else _alone(members, fallback))
    return Sensitivity({name: found[name] for group in groups for name in group.tensors}, tuple(groups), True)


def _alone(groups: list[MeasuredGroup], fallback: float) -> dict[str, float]:
    return {name: group.sensitivity or fallback for group in groups for name in group.tensors}


def _layered(groups: list[MeasuredGroup], fallback: float) -> dict[str, float]:
    """Sensitivities of one role's tensors."""
    ends = _own_bins(groups)
    inner = [group for group in groups if group not in ends and group.sensitivity is not None]
    valid = inner or [group for group in groups if group.sensitivity is not None]
    if not valid:
        return {name: fallback for group in groups for name in group.tensors}
    points = sorted((statistics.fmean(group.layers), math.log(group.sensitivity or fallback)) for group in valid)
    middle = statistics.median(value for _, value in points)
    values = [_within(value, middle, _MOST_APART if len(points) > 2 else math.inf) for _, value in points]
    found = {}
    for group in groups:
        for name in group.tensors:
            if group in ends and group.sensitivity is not None:
                value = _within(math.log(group.sensitivity), middle, _MOST_APART_OWN)
            else:
                place = stack_and_layer(name)
                value = float(np.interp(place[1] if place else 0, [centre for centre, _ in points], values))
            found[name] = math.exp(value)
    return found


def _own_bins(groups: list[MeasuredGroup]) -> list[MeasuredGroup]:
    """The first and the last layer's groups, where `groups_of` set them apart."""
    layers = sorted(layer for group in groups for layer in group.layers)
    if len(layers) < OWN_BINS_FROM or len(groups) < 3:
        return []
    return [group for group in groups if group.layers in ((layers[0],), (layers[-1],))]


def _within(value: float, middle: float, factor: float) -> float:
    return min(max(value, middle - math.log(factor)), middle + math.log(factor))


def assumed(header: Header, names: Iterable[str]) -> Sensitivity:
    """Sensitivities without a measurement: what SmolLM2 showed for each role (ASSUMED), the same in every layer.

    Routed and shared experts divide their role's by the tokens that pass each: relative errors of a part of a sum
    count by that part.
    """
    routed = _routed_share(header)
    return Sensitivity({name: _assumed_for(_staged_role(name), routed) for name in names}, (), False)


def _routed_share(header: Header) -> float:
    """What part of the experts that a token passes is chosen by the router."""
    used, shared = header.arch_get("expert_used_count"), header.arch_get("expert_shared_count")
    n_used = used if isinstance(used, int) and used > 0 else 1
    n_shared = shared if isinstance(shared, int) and shared > 0 else 0
    return n_used / (n_used + n_shared)


def _assumed_for(staged_role: str, routed: float = 1.0) -> float:
    role = staged_role.removeprefix("enc.").removeprefix("dec.")
    for ending, share in (("_exps", routed), ("_chexps", routed), ("_shexp", 1 - routed)):
        if role.endswith(ending):
            return ASSUMED.get(role.removesuffix(ending), _OTHER) * (share or 1.0)
    return ASSUMED.get(role, _OTHER)


def measure_sensitivity(
    header: Header,
    names: Iterable[str],
    chunks: Sequence[Ints],
    perturbed: Perturbed,
    *,
    bins: int = 5,
    threads: int,
    folder: Path,
    on_progress: Callable[[float], None] | None = None,
) -> Sensitivity:
    """Put an error into each group of tensors in turn, in a working copy of the model, and read off its KLD.

    chunks: tokens, int32 [n], to measure on. In `folder` every group's KLD is kept as soon as it is measured, and not
    measured again; the working copy, as large as the model, is there meanwhile. The model should fit into memory.
    Raises HomeinferError, and whatever perturbed and on_progress raise.
    """
    groups = groups_of(header, names, bins)
    kept = KeptGroups(folder, header, chunks)
    missing = [group for group in groups if kept.find(group.tensors) is None]
    report = on_progress or (lambda _: None)
    known, steps = len(groups) - len(missing), len(groups) + 1
    if missing:
        with (
            WorkCopy(header, folder, lambda part: report((known + part / 2) / steps)) as copy,
            KldMeter(copy.path, copy.folder, chunks, threads) as meter,
        ):
            for index, group in enumerate(missing):
                report((known + 1 + index) / steps)
                kept.add(_measured(group, copy, meter, perturbed))
    report(1.0)
    return per_tensor([found for group in groups if (found := kept.find(group.tensors)) is not None])


def _measured(group: Group, copy: WorkCopy, meter: KldMeter, perturbed: Perturbed) -> MeasuredGroup:
    error = 0.0
    try:
        for name in group.tensors:
            error += _write_perturbed(name, copy, perturbed)
        kld: Kld = meter.measure()
    finally:
        for name in group.tensors:
            copy.restore(name)
    known = math.isfinite(kld.mean) and math.isfinite(kld.stderr)
    return MeasuredGroup(
        role=group.role,
        layers=group.layers,
        tensors=group.tensors,
        error=error,
        kld=kld.mean if known else None,
        stderr=kld.stderr if known else None,
    )


def _write_perturbed(name: str, copy: WorkCopy, perturbed: Perturbed) -> float:
    """Returns the relative error that is in the copy now: where the source's type is coarse, encoding changed it."""
    tensor = copy.header.by_name[name]
    weights, error = perturbed(name)
    weights = np.ascontiguousarray(weights, np.float32).reshape(-1, tensor.shape[0])
    data = encode(tensor.type, weights)
    copy.write(name, data)
    if is_exact_type(tensor.type):
        return error
    original = decode(tensor.type, copy.original(name), tensor.n_weights).reshape(weights.shape)
    meant = float(np.square(weights - original).sum(dtype=np.float64))
    became = float(np.square(decode(tensor.type, data, weights.size).reshape(weights.shape) - original).sum())
    return error * became / meant if meant > 0 else 0.0
