"""A ring of devices that are all on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil

from homeinfer.cluster.engine_messages import Pace
from homeinfer.cluster.ring import RingPipeline
from homeinfer.cluster.ring_start import DeviceStart, RingStart, start_ring
from homeinfer.engine.embedding import embedding_source
from homeinfer.engine.window_spec import WindowSpec
from homeinfer.folders import windows_folder
from homeinfer.model.architectures import can_shift, context_length, input_scale
from homeinfer.model.header import Header
from homeinfer.model.window_file import Progress, cut_windows
from homeinfer.model.window_plan import n_layers, split_layers

_ALL_LAYERS = -1


class RingOptions(msgspec.Struct, frozen=True):
    """How a local ring is made. n_ctx 0: what the model was trained with, 4,096 at most."""

    devices: int = 1
    n_ctx: int = 0
    n_batch: int = 512
    n_seq: int = 1
    n_threads: int = 0
    gpu_layers: int = 0
    gpu: int | None = None
    resident: bool = True
    flash_attention: bool = False
    network: bool = False


def threads(wanted: int) -> int:
    """Threads of an engine: what was asked for, or one per core that this process may use."""
    if wanted > 0:
        return wanted
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def window_specs(
    header: Header, windows: Sequence[tuple[int, int]], options: RingOptions, progress: Progress | None = None
) -> list[WindowSpec]:
    """The windows' files, written where they are missing, and how to load each. Raises HomeinferError."""
    whole = len(windows) == 1
    paths = [Path(header.files[0].path)] if whole else cut_windows(header, tuple(windows), windows_folder(), progress)
    return [window_spec(header, path, first, last, options) for (first, last), path in zip(windows, paths, strict=True)]


def window_spec(header: Header, path: Path, first: int, last: int, options: RingOptions) -> WindowSpec:
    """How to load layers [first, last) from their file, which is the model itself where they are all of it."""
    n = n_layers(header)
    is_whole = (first, last) == (0, n)
    return WindowSpec(
        path=str(path),
        first=first,
        last=last,
        n_layer=n,
        n_ctx=context_length(header, options.n_ctx),
        embedding_length=int(header.arch_get("embedding_length", 0)),
        embedding=embedding_source(header) if first == 0 and not is_whole else None,
        input_scale=1.0 if is_whole else input_scale(header, first),
        resident=options.resident,
        gpu_layers=options.gpu_layers,
        gpu=options.gpu,
        n_batch=options.n_batch,
        n_seq=options.n_seq,
        n_threads=threads(options.n_threads),
        flash_attention=options.flash_attention,
        can_shift=can_shift(header, first, last),
    )


def placed(options: RingOptions, place: str, gpu: int) -> RingOptions:
    """With what a plan says of a run of layers: where they are (plan.LayerPlace), and on which of the device's GPUs."""
    is_on_gpu = place == "g"
    return msgspec.structs.replace(
        options, resident=place == "r", gpu_layers=_ALL_LAYERS if is_on_gpu else 0, gpu=gpu if is_on_gpu else None
    )


def start_local_ring(
    header: Header,
    options: RingOptions,
    *,
    on_cut: Progress | None = None,
    on_load: Callable[[list[float]], None] = lambda _shares: None,
) -> RingPipeline:
    """Start `options.devices` engine processes on this machine and join them to a ring.

    on_cut gets the bytes written for missing window files, on_load each device's share of weights loaded.
    Raises HomeinferError when the model can't be cut so, or an engine does not come up; nothing stays behind.
    """
    specs = window_specs(header, split_layers(header, options.devices), options, on_cut)
    listen = "tcp://127.0.0.1:*" if options.network else ""
    devices = tuple(DeviceStart(f"device-{i}", (spec,), listen) for i, spec in enumerate(specs, 1))
    ring = RingStart(
        devices,
        vocabulary=header.files[0].path,
        most_bytes=most_logits(header, options.n_batch),
        head_listen=listen,
        pace=Pace(
            chunk=options.n_batch, ahead=1, groups=1
        ),  # devices that share one machine win nothing by working at once
    )
    return start_ring(ring, on_load)


def most_logits(header: Header, n_batch: int) -> int:
    """Bytes of the largest message that may come back to the head: a row of logits for each token of a batch."""
    embedding = header.tensor("token_embd.weight")
    n_vocab = embedding.shape[-1] if embedding is not None else 1 << 20
    return n_batch * n_vocab * 4 + (1 << 16)
