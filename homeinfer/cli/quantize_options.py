"""The options of `homeinfer quantize`, and how small they say the result is to be."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated

import typer

from homeinfer.cli.shared_options import wrong_usage
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from homeinfer.quant.budget import (
    Budget,
    budget_of_bpw,
    budget_of_devices,
    budget_of_size,
    check_budget,
    parse_size,
    read_profiles,
)
from homeinfer.quant.recipes import RECIPES

_SMALL = "How small: one of these"
_CHOICE = "What decides the types"
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_SOURCE_TYPE = re.compile(r"[-._](f16|bf16|f32|fp16|fp32|q8_0)$", re.IGNORECASE)

SourceArgument = Annotated[
    Path, typer.Argument(metavar="SRC", help="The F16 or BF16 model: a GGUF file, or any part of a split one.")
]
DestinationArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="DST",
        help="The GGUF file to write; beside SRC and named after it and the recipe unless given.",
        show_default=False,
    ),
]


def _list_recipes(wanted: bool) -> None:
    if not wanted:
        return
    from homeinfer.cli import quantize_tables

    quantize_tables.show_recipes(RECIPES.values())
    raise typer.Exit


ListOption = Annotated[
    bool, typer.Option("--list-recipes", callback=_list_recipes, is_eager=True, help="Show all recipes and exit.")
]


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """What `quantize` is to make, and from what it is to choose, as typed."""

    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.toml",
            help=f"A recipe: {', '.join(RECIPES)} (--list-recipes says more), or a file of your own.",
            rich_help_panel=_SMALL,
        ),
    ] = None
    bpw: Annotated[
        float | None, typer.Option(metavar="X", help="At most X bits per weight, such as 3.5.", rich_help_panel=_SMALL)
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="A file of at most so many bytes: 98833504, 40GB, 3.5G, 40GiB.", rich_help_panel=_SMALL
        ),
    ] = None
    fit: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PROFILE.json",
            help="What the memory of these devices holds with 4,096 tokens of context; several files add up. From "
            'homeinfer profile, or {"devices": [{"name": "desk", "memory_bytes": 16000000000}]}',
            rich_help_panel=_SMALL,
        ),
    ] = None
    tpot: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="With --fit: instead, as large as these devices can run in MS milliseconds per token.",
            rich_help_panel=_SMALL,
        ),
    ] = None
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="How much each input counts, from homeinfer imatrix or llama.cpp.",
            rich_help_panel=_CHOICE,
        ),
    ] = None
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Instead: measure it on these texts (UTF-8).", rich_help_panel=_CHOICE),
    ] = None
    tensor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=TYPE",
            help="The type of tensors whose name the regular expression is found in, such as 'ffn_down=Q6_K'; before "
            "everything else, and the first that matches decides.",
            rich_help_panel=_CHOICE,
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing, show types and sizes; SRC may be a header alone.")
    ] = False
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write what was chosen and why, and its picture as FILE.svg; measures near presets, too.",
        ),
    ] = None
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Take a source that is quantized already; some quality is lost.")
    ] = False
    force: Annotated[bool, typer.Option("--force", help="Overwrite DST if it exists.")] = False
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores unless given.")] = None

    @property
    def texts(self) -> tuple[Path, ...]:
        return tuple(self.text or ())

    def asked(self) -> str:
        """How small, as it was written."""
        if self.fit:
            return f"--fit {' '.join(map(str, self.fit))}{'' if self.tpot is None else f' --tpot {self.tpot:g}'}"
        return f"--bpw {self.bpw:g}" if self.bpw is not None else f"--size {self.size}"


def check_usage(options: QuantizeOptions) -> str:
    """Which one of the four ways to say how small was taken, as the end of a file name; exits with 2 when it isn't one,
    or when options contradict each other."""
    ways = {
        "--recipe": Path(options.recipe.strip()).stem if options.recipe else None,
        "--bpw": f"{options.bpw:g}bpw" if options.bpw is not None else None,
        "--size": re.sub(r"\s", "", options.size) if options.size is not None else None,
        "--fit": ("fit" if options.tpot is None else f"{options.tpot:g}ms") if options.fit else None,
    }
    given = {way: label for way, label in ways.items() if label is not None}
    _check_numbers(options)
    if not given:
        wrong_usage("say how small: --recipe NAME, --bpw X, --size 40GB or --fit PROFILE.json; --help has examples")
    if len(given) > 1:
        wrong_usage(f"{' and '.join(given)} both say how small; give one of them")
    if options.recipe is not None and options.report is not None:
        wrong_usage("--report shows what was measured: it goes with --bpw, --size and --fit, not with --recipe")
    if options.imatrix is not None and options.text:
        wrong_usage("--imatrix and --text both say what counts; give one of them")
    return next(iter(given.values()))


def _check_numbers(options: QuantizeOptions) -> None:
    bpw, tpot = options.bpw, options.tpot
    if options.size is not None:
        _wanted_size(options.size)
    if bpw is not None and not 0 < bpw < math.inf:
        wrong_usage(f"--bpw: {bpw} bits per weight are none; write a number such as 3.5")
    if tpot is not None and not options.fit:
        wrong_usage("--tpot goes with --fit PROFILE.json, which says on which devices")
    if tpot is not None and not 0 < tpot < math.inf:
        wrong_usage(f"--tpot: {tpot} milliseconds per token can't be; write a number such as 200")


def budget_for(header: Header, options: QuantizeOptions) -> Budget:
    """The limit that --bpw, --size or --fit sets; HomeinferError for bad profiles, and where nothing fits into it."""
    if options.fit:
        budget = _budget_to_fit(header, options.fit, options.tpot)
    elif options.bpw is not None:
        budget = budget_of_bpw(header, options.bpw)
    else:
        budget = budget_of_size(_wanted_size(options.size or ""))
    check_budget(header, budget)
    return budget


def _budget_to_fit(header: Header, fit: list[Path], tpot: float | None) -> Budget:
    """By planning where all profiles were measured, else by memory alone."""
    from homeinfer.cluster.profiles_file import are_measured, read_device_profiles

    if not are_measured(fit):
        if tpot is not None:
            raise HomeinferError(
                "--tpot needs profiles with measurements, and at least one has only names and memory: make them with "
                "homeinfer profile SRC -o FILE"
            )
        return budget_of_devices(header, read_profiles(fit))
    from homeinfer.quant.budget_plan import budget_in_memory, budget_of_tpot

    devices = read_device_profiles(fit)
    return budget_in_memory(header, devices) if tpot is None else budget_of_tpot(header, devices, tpot)


def planned_note(header: Header, written: Path, fit: list[Path], tpot: float | None) -> str | None:
    """What the plan for a written file is predicted to do, where the profiles can tell."""
    from homeinfer.cluster.profiles_file import are_measured, read_device_profiles

    if not are_measured(fit):
        return None
    from homeinfer.quant.budget_plan import predicted_tpot

    found = predicted_tpot(header, read_header(written), read_device_profiles(fit))
    if found is None:
        return None
    missed = f", which is more than the {tpot:g} asked for" if tpot is not None and found > tpot else ""
    return f"on these devices a plan takes {found:,.1f} ms per token{missed}; homeinfer plan shows it"


def _wanted_size(size: str) -> int:
    try:
        return parse_size(size)
    except HomeinferError as error:
        wrong_usage(f"--size: {error}")


def default_destination(source: Path, label: str) -> Path:
    """Beside the source: model-F16.gguf and Q4_K_M give model-Q4_K_M.gguf."""
    stem = _SOURCE_TYPE.sub("", _PART.sub("", source.stem))
    return source.with_name(f"{stem}-{label.upper() if label.upper() in RECIPES else label}.gguf")


def megabytes(nbytes: int) -> str:
    """1.60 MB, as rich.filesize.decimal writes it, without the cost of importing it."""
    size = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.2f} {unit}" if unit != "bytes" else f"{nbytes} bytes"
