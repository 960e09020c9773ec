"""`homeinfer plan`: who would hold which layers, how fast that is, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import typer

from homeinfer.cli.option_groups import with_options
from homeinfer.cli.plan_options import (
    CompareOption,
    DemandOptions,
    FilesArgument,
    JsonOption,
    ProfilesOption,
    TimelineOption,
    model_and_profiles,
    parse_link,
)
from homeinfer.cluster.plan_files import check_writable
from homeinfer.cluster.planning.plan import Constraints, Prediction, Workload
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.model.architectures import check_generates
from homeinfer.model.header import read_header

_ASSUMED_LINK = "300 Mbit/s with 1 ms of delay"


@with_options
def plan(
    files: FilesArgument,
    profiles: ProfilesOption = None,
    *,
    demands: DemandOptions,
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
    workload, constraints = demands.workload(), demands.constraints()
    parse_link(demands.link)
    if timeline is not None:
        check_writable(timeline)
    report, prediction = _planned(model, paths, workload, constraints, demands.link, compare, timeline is not None)
    if timeline is not None:
        _write_timeline(timeline, report, prediction)
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
