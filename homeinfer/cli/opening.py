"""From a model's path to something that answers, the running cluster or this machine alone: shared by run and chat."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from homeinfer.cli import ui
from homeinfer.cli.default_model import default_model
from homeinfer.cluster.coordinator.running import running_cluster
from homeinfer.cluster.local import RingOptions, start_local_ring
from homeinfer.engine.answers import Generator
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.folders import state_folder, windows_folder
from homeinfer.model.architectures import check_generates
from homeinfer.model.header import Header, read_header
from homeinfer.model.window_file import missing_bytes
from homeinfer.model.window_plan import layer_bytes, n_layers, split_layers


@dataclasses.dataclass(frozen=True)
class LocalOptions:
    """Where a model answers and what it may take there, as typed."""

    local: Annotated[
        bool, typer.Option("--local", help="Answer on this machine alone, also when a cluster is running.")
    ] = False
    local_ring: Annotated[
        int, typer.Option(metavar="N", min=1, max=64, help="Run as a ring of N devices on this machine.")
    ] = 1
    ctx: Annotated[int, typer.Option(min=0, help="Context length in tokens; 0: the model's own, 4,096 at most.")] = 0
    threads: Annotated[int, typer.Option("--threads", "-t", min=0, help="Threads per device; 0: one per core.")] = 0
    gpu_layers: Annotated[
        int, typer.Option(min=-1, help="Layers of each device on its GPU, where it has one; -1: all.")
    ] = 0
    stream: Annotated[
        bool, typer.Option("--stream", help="Map the weights and read them when needed, instead of loading them.")
    ] = False

    def ring(self) -> RingOptions:
        """A ring on this machine."""
        return RingOptions(
            devices=self.local_ring,
            n_ctx=self.ctx,
            n_threads=self.threads,
            gpu_layers=self.gpu_layers,
            resident=not self.stream,
        )


class Opened(msgspec.Struct, frozen=True, eq=False):
    """A model that is ready to answer. name: how to call it on screen."""

    name: str
    header: Header
    tokenizer: Tokenizer
    generator: Generator


def model_name(model: Path | None) -> str:
    """How to call the model on screen."""
    return "SmolLM2-135M-Instruct (embedded)" if model is None else model.name


@contextmanager
def opened(model: Path | None, options: RingOptions, *, local: bool = False, quiet: bool = False) -> Iterator[Opened]:
    """The running cluster, if this is its model or none was named; else read, cut, load and join here.

    Everything that was started is ended again on the way out. local: without the cluster. Raises HomeinferError.
    """
    if not local and options.devices == 1 and running_cluster(state_folder()) is not None:
        from homeinfer.cli.cluster_opening import opened_cluster

        with opened_cluster(model, options, quiet=quiet) as ready:
            if ready is not None:
                yield ready
                return
    with _opened_here(model, options, quiet=quiet) as ready:
        yield ready


@contextmanager
def _opened_here(model: Path | None, options: RingOptions, *, quiet: bool) -> Iterator[Opened]:
    header = read_header(model or default_model())
    check_generates(header)
    tokenizer = Tokenizer(header.files[0].path)
    windows = split_layers(header, options.devices)
    to_cut = missing_bytes(header, windows, windows_folder()) if len(windows) > 1 else 0
    names = [f"device-{i + 1} (layers {ui.layer_range(first, last)})" for i, (first, last) in enumerate(windows)]
    with ui.copying("cutting windows", to_cut) as on_cut, ui.loading(names) as on_load:
        pipeline = start_local_ring(header, options, on_cut=on_cut, on_load=on_load)
    try:
        if len(windows) > 1 and not quiet:
            ui.show_plan(pipeline.devices, layer_bytes(header, n_layers(header)))
        yield Opened(model_name(model), header, tokenizer, Generator(pipeline, tokenizer))
    finally:
        pipeline.close()
        tokenizer.close()
