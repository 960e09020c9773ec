"""Compare a model's windows with the whole model: the proof that an architecture may be cut.

`python -m tests.support.windows FILE…` prints a Comparison of each file as a line of JSON; llama.cpp may end the
process.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from homeinfer.engine.embedding import embedding_source
from homeinfer.engine.pipeline import Batch, Floats
from homeinfer.engine.window import LayerWindow
from homeinfer.engine.window_spec import WindowSpec
from homeinfer.errors import HomeinferError
from homeinfer.model.architectures import input_scale, is_exact
from homeinfer.model.cut_rules import n_layers
from homeinfer.model.header import Header, read_header
from homeinfer.model.window_file import cut_windows
from homeinfer.model.window_plan import why_not

PROMPT = 48
DECODED = 3
N_CTX = 64


class Difference(msgspec.Struct, frozen=True):
    """Largest absolute difference of the logits over a cut's prefill and decode, in units of their spread.

    exact: whether the architecture's rule promises the same bits.
    """

    cuts: tuple[int, ...]
    largest: float
    exact: bool


class Comparison(msgspec.Struct, frozen=True):
    """A model's cuts compared with the whole, or why that failed."""

    model: str
    differences: tuple[Difference, ...] = ()
    problem: str | None = None


def allowed_cuts(header: Header) -> list[tuple[int, ...]]:
    """Every single cut that is allowed, and as many windows as possible at once."""
    n = n_layers(header)
    single = [(c,) for c in range(1, n) if why_not(header, 0, c) is None and why_not(header, c, n) is None]
    finest: list[int] = []
    for c in range(1, n):
        start = finest[-1] if finest else 0
        if why_not(header, start, c) is None and why_not(header, c, n) is None:
            finest.append(c)
    return [*single, tuple(finest)] if len(finest) > 1 else list(single)


def windows_of(header: Header, cuts: Sequence[int], folder: Path, **options: object) -> list[LayerWindow]:
    """The windows between these cuts, loaded."""
    n = n_layers(header)
    edges = tuple(itertools.pairwise((0, *cuts, n)))
    whole = len(edges) == 1
    paths = [Path(header.files[0].path)] if whole else cut_windows(header, edges, folder)
    n_embd = int(header.arch_get("embedding_length"))
    base = {"n_ctx": N_CTX, "n_batch": N_CTX, "n_threads": 1, "embedding_length": n_embd, **options}
    return [
        LayerWindow(
            msgspec.convert(
                {
                    "path": str(path),
                    "first": first,
                    "last": last,
                    "n_layer": n,
                    "embedding": msgspec.to_builtins(embedding_source(header)) if first == 0 and not whole else None,
                    "input_scale": 1.0 if whole else input_scale(header, first),
                    **base,
                },
                WindowSpec,
            )
        )
        for (first, last), path in zip(edges, paths, strict=True)
    ]


def forward(windows: Sequence[LayerWindow], batch: Batch) -> Floats:
    """One batch through windows in order."""
    rows = batch.tokens
    for window in windows:
        rows = window.forward(rows, batch.positions, batch.sequences, batch.wanted)  # type: ignore[assignment]
    return rows  # type: ignore[return-value]


def logits_of(windows: Sequence[LayerWindow], n_vocab: int, seed: int = 0) -> Floats:
    """A prefill and some decode steps of seeded tokens: float32 [1 + DECODED, n_vocab]."""
    tokens = np.random.default_rng(seed).integers(0, n_vocab, PROMPT + DECODED).tolist()
    rows = [forward(windows, Batch.of(tokens[:PROMPT], 0))[0]]
    rows += [forward(windows, Batch.of([t], PROMPT + i))[0] for i, t in enumerate(tokens[PROMPT:])]
    return np.stack(rows)


def differences(path: Path) -> Iterator[Difference]:
    """Compare every allowed cut of a model with the whole."""
    header = read_header(path)
    whole = windows_of(header, (), path.parent)
    n_vocab = whole[0].n_vocab
    expected = logits_of(whole, n_vocab)
    with tempfile.TemporaryDirectory() as folder:
        for cuts in allowed_cuts(header):
            windows = windows_of(header, cuts, Path(folder))
            got = logits_of(windows, n_vocab)
            exact = all(is_exact(header, w.spec.first, w.spec.last) for w in windows)
            largest = np.nan_to_num(np.abs(got - expected).max() / expected.std(), nan=1e9, posinf=1e9)
            yield Difference(cuts, float(largest), exact)
            for window in windows:
                window.close()
    whole[0].close()


def compare(paths: Sequence[Path], at_once: int = 2) -> dict[str, Comparison]:
    """Compare the models in processes of their own: one that llama.cpp ends costs only the model that ended it."""
    with ThreadPoolExecutor(at_once) as pool:
        parts = pool.map(_compare, (paths[i::at_once] for i in range(at_once)))
        return {name: comparison for part in parts for name, comparison in part.items()}


def _compare(paths: Sequence[Path]) -> dict[str, Comparison]:
    found: dict[str, Comparison] = {}
    while todo := [path for path in paths if path.name not in found]:
        run = subprocess.run(
            [sys.executable, "-m", "tests.support.windows", *map(str, todo)],
            check=False,
            capture_output=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        )
        done = [msgspec.json.decode(line, type=Comparison) for line in run.stdout.splitlines()]
        found |= {comparison.model: comparison for comparison in done}
        if len(done) < len(todo):
            said = run.stderr.decode(errors="replace").strip().splitlines()
            problem = f"ended with {run.returncode}: {said[-1] if said else 'no word'}"
            found[todo[len(done)].name] = Comparison(todo[len(done)].name, problem=problem)
    return found


def main(paths: Sequence[str]) -> None:
    # nothing that is written here outlives the process, and two thousand waits for the disk are a third of its time
    os.fsync = lambda _file: None  # type: ignore[assignment]
    for path in map(Path, paths):
        try:
            result = Comparison(path.name, tuple(differences(path)))
        except HomeinferError as problem:
            result = Comparison(path.name, problem=str(problem))
        print(msgspec.json.encode(result).decode(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
