"""From a plan to what its devices load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from homeinfer.cluster.local import RingOptions, placed, window_spec
from homeinfer.cluster.planning.plan import Prediction, Ring
from homeinfer.engine.window_spec import WindowSpec
from homeinfer.model.header import Header
from homeinfer.model.window_file import Progress, cut_windows
from homeinfer.model.window_plan import n_layers


def device_windows(
    header: Header,
    ring: Ring,
    device: str,
    options: RingOptions,
    folder: Path,
    progress: Progress | None = None,
) -> tuple[WindowSpec, ...]:
    """What a device of a plan loads, in the order of the ring: one window for each run of layers in the same place.

    Files are cut into `folder` where they are missing; the whole model is taken as it is. `options` says all that
    places don't. Raises HomeinferError for layers that can't be a window.
    """
    runs = [(*run, window.gpu) for window in ring.windows if window.device == device for run in window.runs()]
    edges = tuple((first, last) for first, last, _, _ in runs)
    is_whole = edges == ((0, n_layers(header)),)
    paths = [Path(header.files[0].path)] if is_whole else cut_windows(header, edges, folder, progress)
    return tuple(
        window_spec(header, path, first, last, placed(options, place, gpu))
        for (first, last, place, gpu), path in zip(runs, paths, strict=True)
    )


def stream_bytes(prediction: Prediction) -> Mapping[str, int]:
    """Each device's memory for streamed layers, as the plan foresees it."""
    return {load.name: load.stream_buffer_bytes for load in prediction.loads}
