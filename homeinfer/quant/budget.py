"""How small: bits per weight, bytes, or the memory of a cluster, all as a limit on the bytes of the file.

Pure but for the reading of profiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path

import msgspec

from homeinfer.errors import HomeinferError
from homeinfer.model.header import TYPE_SIZES, Header, TensorInfo, printable
from homeinfer.model.layers import layer_weights
from homeinfer.quant.output_header import header_bytes, padded
from homeinfer.quant.tensor_types import ALWAYS_IMATRIX_TYPES, keeps_type, tensor_bytes

FIT_CONTEXT = 4096
"""Tokens of context that --fit leaves room for."""
FIT_BATCH = 512
"""Tokens that a device computes at once (WindowSpec.n_batch)."""
PROCESS_BYTES = 120_000_000
"""What an engine process takes beside weights, KV cache and compute buffers."""
HEADROOM = 0.10
"""The share of a device's memory that --fit leaves to everything else."""
LAYER_SPREAD = 1.25
"""How much heavier than its share of the source the heaviest layer may become, since bits are not spread evenly."""

CANDIDATE_TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
"""The types that any model can be quantized to; those for weights trained as ternary or FP4 are left out."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(?:([kmgt])(i?)b?|b)?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_OUTSIDE = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")


class Budget(msgspec.Struct, frozen=True):
    """The most bytes that the written file may have, and in whose words."""

    limit_bytes: int
    says: str


class Device(msgspec.Struct, frozen=True):
    """One device of a profile; what else a profile says is not needed here."""

    name: str
    memory_bytes: int


class Profile(msgspec.Struct, frozen=True):
    """A profile file: the devices of a cluster, or some of them."""

    devices: tuple[Device, ...]


def parse_size(text: str) -> int:
    """Bytes: "98833504", "40GB" and "3.5G" (powers of 1,000), "40 GiB" and "3.5Gi" (powers of 1,024), in any case.

    Raises HomeinferError for what is no size.
    """
    match = _SIZE.fullmatch(text)
    size = 0
    if match is not None:
        unit = (match[2] or "").lower()
        size = int(Decimal(match[1]) * (1024 if match[3] else 1000) ** _POWERS[unit])
    if not 0 < size < 2**63:
        raise HomeinferError(
            f"'{printable(text, 40)}' is no size; write bytes, or a number such as 40GB, 3.5G or 40GiB"
        )
    return size


def budget_of_size(size: int) -> Budget:
    return Budget(size, f"{size:,} bytes")


def budget_of_bpw(header: Header, bpw: float) -> Budget:
    """So many bits per weight for the tensors, at most, and what stands before them in the file."""
    if not (math.isfinite(bpw) and bpw > 0):
        raise HomeinferError(f"{bpw} bits per weight are none; write a number such as 3.5")
    return Budget(header_bytes(header, {}) + math.floor(bpw * header.n_weights / 8), f"{bpw:g} bits per weight")


def budget_of_devices(header: Header, devices: Sequence[Device]) -> Budget:
    """The largest file that surely fits these devices' memory, layers kept whole, with a context of FIT_CONTEXT.

    Each device gives its memory without HEADROOM, PROCESS_BYTES and compute buffers; the KV cache of all layers is
    taken off the sum. Layers are handed out in order and whole, so a device may stay empty by almost one layer: with
    n devices n - 1 of the heaviest layer (its share of the source's bytes by LAYER_SPREAD) are left out, and the caches
    of n - 1 layers. Embedding and output stay together on the largest device. Devices that would lower the limit so
    are not counted.
    """
    room = sorted((_room(header, device) for device in devices), reverse=True)
    cache = kv_cache_bytes(header, FIT_CONTEXT)
    layers = [layer.nbytes / max(header.nbytes, 1) for layer in layer_weights(header)]
    heaviest = LAYER_SPREAD * max(layers, default=0.0)
    ends = max(1.0 - sum(layers), 0.0)
    each = cache / max(len(layers), 1)
    limit = max(int((sum(room[: more + 1]) - cache - more * each) / (1 + more * heaviest)) for more in range(len(room)))
    if ends > 0 and len(room) > 1:
        limit = min(limit, int(room[0] / ends))
    memory = sum(device.memory_bytes for device in devices)
    named = f"the memory of {', '.join(printable(device.name, 40) for device in devices[:4])}"
    says = f"{named}{' and others' if len(devices) > 4 else ''}: {memory:,} bytes"
    if limit <= 0:
        raise HomeinferError(
            f"{says}: nothing is left for weights: the KV cache of {FIT_CONTEXT:,} tokens takes {cache:,} bytes and "
            "each device keeps some for computing; add a device or take a smaller model"
        )
    return Budget(limit, f"{says}, of which {limit:,} are for the file")


def _room(header: Header, device: Device) -> int:
    return int(device.memory_bytes * (1 - HEADROOM)) - PROCESS_BYTES - compute_bytes(header, FIT_CONTEXT)


def read_profiles(paths: Iterable[Path]) -> tuple[Device, ...]:
    """The devices of all profile files; HomeinferError for a file that is none."""
    devices: list[Device] = []
    for path in paths:
        name = printable(str(path), 1000)
        try:
            profile = msgspec.json.decode(path.read_bytes(), type=Profile)
        except OSError as error:
            raise HomeinferError(f"{name}: the profile can't be read: {error.strerror}; check the path") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HomeinferError(
                f"{name}: this is no profile: {printable(str(error))}; it must be like "
                '{"devices": [{"name": "desk", "memory_bytes": 16000000000}]}'
            ) from None
        if not profile.devices or any(device.memory_bytes <= 0 for device in profile.devices):
            raise HomeinferError(
                f"{name}: the profile must name at least one device, each with more than 0 memory_bytes"
            )
        devices += profile.devices
    return tuple(devices)


def smallest_bytes(header: Header, types: Sequence[str] = CANDIDATE_TYPES) -> int:
    """The smallest file that these types can give."""
    return header_bytes(header, {}) + sum(padded(_least(header, tensor, types)) for tensor in header.tensors)


def source_bytes(header: Header) -> int:
    """The source as one file, every type as it is."""
    return header_bytes(header, {}) + sum(padded(tensor.nbytes) for tensor in header.tensors)


def check_budget(header: Header, budget: Budget, types: Sequence[str] = CANDIDATE_TYPES) -> None:
    """Raise HomeinferError, with the numbers, when no file of these types is so small, or the source itself is."""
    least, most = smallest_bytes(header, types), source_bytes(header)
    name = printable(header.files[0].path, 1000)
    if budget.limit_bytes < least:
        raise HomeinferError(
            f"{name}: {budget.says}: that is a file of at most {budget.limit_bytes:,} bytes, and the smallest that the "
            f"types can give is {least:,} ({_bpw(header, least)} bits per weight); ask for more"
        )
    if budget.limit_bytes >= most:
        raise HomeinferError(
            f"{name}: {budget.says}: that is a file of up to {budget.limit_bytes:,} bytes, and the source itself has "
            f"only {most:,} ({_bpw(header, most)} bits per weight): use it as it is, or ask for less"
        )


def _bpw(header: Header, size: int) -> str:
    return f"{8 * (size - header_bytes(header, {})) / max(header.n_weights, 1):.2f}"


def _least(header: Header, tensor: TensorInfo, types: Sequence[str]) -> int:
    if keeps_type(tensor, header.architecture):
        return tensor.nbytes
    fitting = (name for name in types if tensor.shape[0] % TYPE_SIZES[name][0] == 0)
    usable = (name for name in fitting if tensor.name not in _OUTSIDE or name not in ALWAYS_IMATRIX_TYPES)
    return min([tensor_bytes(tensor, name) for name in usable], default=min(tensor.nbytes, 2 * tensor.n_weights))


def kv_cache_bytes(header: Header, n_ctx: int) -> int:
    """The KV cache of all layers in F16 for so many tokens, and recurrent layers' states in F32.

    Sliding windows are counted at full length.
    """
    rank = _number(header, "attention.kv_lora_rank")
    absorbed = any(tensor.name.endswith("attn_k_b.weight") for tensor in header.tensors)
    n_embd, n_head = _number(header, "embedding_length"), max(_per_layer(header, "attention.head_count", 0), 1)
    key = _number(header, "attention.key_length") or n_embd // n_head
    value = _number(header, "attention.value_length") or key
    total = 0
    for layer in range(header.n_layer):
        if rank and absorbed:
            width = 2 * rank + _number(header, "rope.dimension_count")
        else:
            heads = _per_layer(header, "attention.head_count_kv", layer) or _per_layer(
                header, "attention.head_count", layer
            )
            width = heads * (key + value)
        total += 2 * n_ctx * width + _state_bytes(header)
    return total


def compute_bytes(header: Header, n_ctx: int) -> int:
    """A device's compute buffers: attention scores of a batch, activations, and logits, all in F32."""
    heads = max((_per_layer(header, "attention.head_count", layer) for layer in range(header.n_layer)), default=1)
    widest = max((max(tensor.shape[:2]) for tensor in header.tensors if tensor.name.startswith("blk.")), default=0)
    vocabulary = max((tensor.shape[1] for tensor in header.tensors if tensor.name in _OUTSIDE), default=0)
    return 4 * FIT_BATCH * (heads * n_ctx + 4 * widest + vocabulary)


def _state_bytes(header: Header) -> int:
    inner, state = _number(header, "ssm.inner_size"), _number(header, "ssm.state_size")
    conv, groups = _number(header, "ssm.conv_kernel"), _number(header, "ssm.group_count")
    return 4 * (inner * state + max(conv - 1, 0) * (inner + 2 * groups * state))


def _number(header: Header, key: str) -> int:
    value = header.arch_get(key, 0)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _per_layer(header: Header, key: str, layer: int) -> int:
    """A key that is one number for all layers, or a list with one for each."""
    value = header.arch_get(key, 0)
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else 0
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
