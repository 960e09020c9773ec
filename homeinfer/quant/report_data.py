"""What a report of a quantization shows, as frozen data."""

from __future__ import annotations

import msgspec


class TensorChoice(msgspec.Struct, frozen=True):
    """One tensor of the written file.

    layer is None for what stands outside the layers; role is the name without layer and suffix
    ("attn_q", "ffn_down_exps", "token_embd"); predicted_kld is this tensor's share of the predicted
    mean KLD, in nats; method is how it was rounded: "hessian", "imatrix", "plain" or "kept".
    """

    name: str
    layer: int | None
    role: str
    type: str
    bytes: int
    n_weights: int
    predicted_kld: float
    method: str


class CurvePoint(msgspec.Struct, frozen=True):
    """A file size and its mean KLD in nats; kind is "preset" (llama.cpp's, measured), "predicted"
    (homeinfer's allocation at that size) or "measured" (a file that homeinfer wrote)."""

    label: str
    size_bytes: int
    mean_kld: float
    kind: str


class Measured(msgspec.Struct, frozen=True):
    """What evaluation gave on one text: KLD in nats, same_top as a fraction, perplexities."""

    text: str
    mean_kld: float
    mean_kld_stderr: float
    kld_p99: float
    same_top: float
    ppl: float
    ppl_reference: float


class QuantReport(msgspec.Struct, frozen=True):
    """Everything the report says.

    measured has one entry a text; the curve was measured on the first. asked is the wish in the
    user's words ("--size 107MB"), why has sentences on what decided, seconds is the time it took.
    """

    model: str
    source: str
    source_bytes: int
    destination: str
    size_bytes: int
    limit_bytes: int | None
    bpw: float
    asked: str
    predicted_kld: float | None
    measured: tuple[Measured, ...]
    tensors: tuple[TensorChoice, ...]
    curve: tuple[CurvePoint, ...]
    why: tuple[str, ...]
    notes: tuple[str, ...]
    calibration: str
    seconds: float
    version: str
