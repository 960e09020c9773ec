"""The report of a dynamic quantization: what was chosen, why, and how it compares."""

from __future__ import annotations

from pathlib import Path

from homeinfer import __version__
from homeinfer.errors import HomeinferError
from homeinfer.quant.allocate import allocate
from homeinfer.quant.dynamic import EVALUATION_CHUNKS, Chosen, DynamicResult
from homeinfer.quant.evaluate import Evaluation
from homeinfer.quant.output_header import padded
from homeinfer.quant.preset_points import preset_points
from homeinfer.quant.report import picture, write_report
from homeinfer.quant.report_data import CurvePoint, Measured, QuantReport, TensorChoice
from homeinfer.quant.study import OnStage
from homeinfer.quant.tensor_types import role_of, stack_and_layer
from homeinfer.quant.texts import held_out_text

_CURVE = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3)


def make_report(
    path: Path,
    chosen: Chosen,
    result: DynamicResult,
    measured: Evaluation | None,
    asked: str,
    threads: int,
    on_progress: OnStage,
) -> None:
    """Measure llama.cpp's presets near the size, and write the report as one HTML file, with its picture beside it as
    an SVG. Raises HomeinferError when they can't be written."""
    presets: tuple[CurvePoint, ...] = ()
    if measured is not None:
        presets = preset_points(
            chosen.header, chosen.study.known, result.size_bytes, Path(result.path).absolute().parent,
            held_out_text()[0], EVALUATION_CHUNKS, threads, True,
            lambda at: on_progress("comparing with presets", at),
        )  # fmt: skip
    report = report_of(chosen, result, measured, asked, presets)
    write_report(path, report)
    path.with_suffix(".svg").write_text(picture(report))


def report_of(
    chosen: Chosen,
    result: DynamicResult,
    measured: Evaluation | None,
    asked: str,
    presets: tuple[CurvePoint, ...] = (),
) -> QuantReport:
    """Pure: what the report says."""
    header = chosen.header
    return QuantReport(
        model=str(header.get("general.name", Path(header.files[0].path).name)),
        source=Path(header.files[0].path).name,
        source_bytes=sum(file.size for file in header.files),
        destination=Path(result.path).name,
        size_bytes=result.size_bytes,
        limit_bytes=chosen.limit_bytes,
        bpw=result.bpw,
        asked=asked,
        predicted_kld=chosen.allocation.kld,
        measured=() if measured is None else (_measured(result, measured),),
        tensors=_tensors(chosen),
        curve=(*_curve(chosen, result), *presets),
        why=_why(chosen),
        notes=result.notes,
        calibration=chosen.calibration,
        seconds=result.seconds,
        version=__version__,
    )


def _measured(result: DynamicResult, found: Evaluation) -> Measured:
    return Measured(
        result.measured_on or "",
        found.mean_kld,
        found.mean_kld_stderr,
        found.kld_p99,
        found.same_top,
        found.ppl,
        found.ppl_reference,
    )


def _tensors(chosen: Chosen) -> tuple[TensorChoice, ...]:
    rows = []
    for tensor in chosen.header.tensors:
        option = chosen.allocation.choices.get(tensor.name)
        place = stack_and_layer(tensor.name)
        changed = option is not None and option.type != tensor.type
        rows.append(
            TensorChoice(
                name=tensor.name,
                layer=None if place is None else place[1],
                role=role_of(tensor.name),
                type=option.type if option else chosen.fixed.get(tensor.name, tensor.type),
                bytes=option.bytes if option else padded(tensor.nbytes),
                n_weights=tensor.n_weights,
                predicted_kld=option.kld if option else 0.0,
                method=chosen.study.known.method(tensor.name) if changed or tensor.name in chosen.fixed else "kept",
            )
        )
    return tuple(rows)


def _curve(chosen: Chosen, result: DynamicResult) -> tuple[CurvePoint, ...]:
    """Homeinfer's predicted KLD at other sizes, and the measured point."""
    points = []
    for factor in _CURVE:
        limit = int(chosen.limit_bytes * factor)
        try:
            found = allocate(chosen.items, limit - chosen.overhead)
        except HomeinferError:
            continue
        points.append(CurvePoint("homeinfer", chosen.overhead + found.bytes, found.kld, "predicted"))
    if result.mean_kld is not None:
        points.append(CurvePoint("this file", result.size_bytes, result.mean_kld, "measured"))
    return tuple(points)


def _why(chosen: Chosen) -> tuple[str, ...]:
    how = "measured by adding small errors" if chosen.study.sensitivity.measured else "assumed from another model"
    groups = sorted(chosen.study.sensitivity.per_tensor.items(), key=lambda each: -each[1])
    return (
        f"Each tensor has the type with which the sum of all predicted KLDs is least within {chosen.limit_bytes:,} "
        "bytes; the predicted KLD of a tensor is its error times how much an error there matters.",
        f"How much errors matter was {how}; most per unit of relative error in {groups[0][0]}." if groups else "",
        "Errors count the rounding of the weights and that of the activations, which llama.cpp's CPU kernels round "
        "per 32 values for some types and per 256 for others.",
        "Weights were rounded with the second moments of their inputs (error feedback), keys and values with the "
        "first token's weight, to which all others attend.",
    )
