"""`homeinfer plan`: who would hold which layers, how fast that is, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import typer

from homeinfer.cli.plan_options import (
    CompareOption,
    ContextOption,
    FilesArgument,
    ForbidOption,
    HeadOption,
    HeadroomOption,
    JsonOption,
    KvTypeOption,
    LinkOption,
    ObjectiveOption,
    PrivateOption,
    ProfilesOption,
    PromptOption,
    RequireOption,
    RoundsOption,
    SequencesOption,
    TimelineOption,
    WireOption,
    model_and_profiles,
    parse_link,
)
from homeinfer.cli.shared_options import parse_headroom
from homeinfer.cluster.plan_files import check_writable
from homeinfer.cluster.planning.plan import Constraints, Prediction, Workload
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.model.architectures import check_generates
from homeinfer.model.header import read_header

_PROMPT = 512
_ASSUMED_LINK = "300 Mbit/s with 1 ms of delay"
_INTERRUPTED = 130


def plan(
    files: FilesArgument,
    profiles: ProfilesOption = None,
    ctx: ContextOption = 4096,
    sequences: SequencesOption = 1,
    prompt_tokens: PromptOption = None,
    objective: ObjectiveOption = "latency",
    kv_type: KvTypeOption = "f16",
    wire: WireOption = "f32",
    link: LinkOption = None,
    head: HeadOption = None,
    require: RequireOption = None,
    forbid: ForbidOption = None,
    private_layers: PrivateOption = 1,
    rounds: RoundsOption = 0,
    headroom: HeadroomOption = "10%",
    compare: CompareOption = False,
    timeline: TimelineOption = None,
    json: JsonOption = False,
) -> None:
    """Show what your machines would do with a model, before anything heavy moves.

    Who holds which layers, how fast it answers, how much memory stays free, who isn't worth including and why, what
    would help most. Nothing is loaded and nothing is sent: the model's header and the profiles are enough.

    First, on each device: homeinfer profile model.gguf -o desk.json

    Example: homeinfer plan model.gguf --profiles desk.json laptop.json phone.json

    Example, four long talks at once: homeinfer plan model.gguf --profiles *.json --ctx 16384 --sequences 4

    Example, without the phone: homeinfer plan model.gguf --profiles *.json --forbid phone

    Example, with other rules beside it and a picture: the same with --compare --timeline token.svg
    """
    model, paths = model_and_profiles(files, profiles)
    workload = Workload(
        n_ctx=ctx,
        sequences=sequences,
        prompt_tokens=min(prompt_tokens or _PROMPT, ctx),
        kv_type=kv_type,
        wire=wire,
        headroom=parse_headroom(headroom),
        objective=objective,
    )
    constraints = Constraints(
        head=head or "",
        required=tuple(require or ()),
        forbidden=tuple(forbid or ()),
        private_first=private_layers,
        private_last=private_layers,
        rounds=rounds,
    )
    parse_link(link)
    if timeline is not None:
        check_writable(timeline)
    try:
        report, prediction = _planned(model, paths, workload, constraints, link, compare, timeline is not None)
        if timeline is not None:
            _write_timeline(timeline, report, prediction)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    if json:
        typer.echo(msgspec.json.encode(report))
        return
    from homeinfer.cli.plan_tables import show_report

    show_report(report)
    if timeline is not None:
        typer.echo(f"\n{timeline}: one token's way around the ring")


def _planned(
    model: Path,
    paths: Sequence[Path],
    workload: Workload,
    constraints: Constraints,
    link: str | None,
    compare: bool,
    timeline: bool,
) -> tuple[PlanReport, Prediction]:
    from homeinfer.cli.bars import fraction_bar
    from homeinfer.cluster.plan_files import planned_model
    from homeinfer.cluster.planning import planner
    from homeinfer.cluster.planning.remarks import remarks
    from homeinfer.cluster.profiles_file import read_device_profiles

    network = parse_link(link)
    header = read_header(model, allow_truncated=True)
    check_generates(header)
    measured = read_device_profiles(paths)
    devices = planner.with_network(measured, network)
    with fraction_bar("planning") as on_progress:
        planned = planner.plan_model(header, devices, workload, constraints, on_progress)
        advice = planner.advice_for(header, planned)
        others = planner.compare_rules(planned.problem) if compare else ()
    report = planner.report_of(
        planned_model(header),
        devices,
        constraints,
        planned,
        advice=advice,
        compare=others,
        notes=remarks(header, measured, "" if link else _ASSUMED_LINK),
    )
    return report, planner.predict(planned, timeline=timeline)


def _write_timeline(path: Path, report: PlanReport, prediction: Prediction) -> None:
    from homeinfer.cli.plan_tables import speed_line
    from homeinfer.cluster.plan_files import write_text
    from homeinfer.cluster.planning.report import lanes_of
    from homeinfer.cluster.planning.timeline_svg import timeline_svg

    write_text(path, timeline_svg(prediction.timeline, lanes_of(report), report.model.name, speed_line(report)))
