"""From a model and texts to its imatrix."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, printable
from homeinfer.quant.generated_file import read_generated, write_generated
from homeinfer.quant.imatrix import Imatrix, from_observed, unreached_notes
from homeinfer.quant.observe import Ints, Mode, observable
from homeinfer.quant.observer_process import generate_in_process, observe_in_process, tokenize_in_process
from homeinfer.quant.quantizer_process import usable_cores
from homeinfer.quant.self_text import LENGTH, N_SEQUENCES, SEED
from homeinfer.quant.texts import DEFAULT_NAME, chunks_of, default_text, read_texts

CHUNK_SIZE = 512


class Calibration(msgspec.Struct, frozen=True):
    """An imatrix, the tokens it is of, and what the user should know of it."""

    imatrix: Imatrix
    tokens: int
    notes: tuple[str, ...]


def calibration_chunks(
    model: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]] = (),
    *,
    chunk_size: int = CHUNK_SIZE,
    chunks: int | None = None,
) -> list[Ints]:
    """What a model reads to be observed: chunks of tokens (int32 [chunk_size]) of the texts, or of a default one.

    Raises HomeinferError for texts that can't be read and for a model without a vocabulary.
    """
    text = read_texts(texts) if texts else default_text()
    tokens = tokenize_in_process(model, text)
    return chunks_of(tokens.ids, chunk_size, tokens.begin)[:chunks]


def study_chunks(
    header: Header,
    texts: Sequence[str | os.PathLike[str]] = (),
    *,
    chunks: int,
    threads: int,
    folder: Path,
    n_sequences: int = N_SEQUENCES,
    length: int = LENGTH,
    seed: int = SEED,
    on_progress: Callable[[float], None] | None = None,
) -> list[Ints]:
    """calibration_chunks (so many, at most), then what the model itself writes (`self_text.generate`).

    What it wrote is kept in `folder`, which is expected to be the model's own, and read from there the next time. A
    model larger than this machine's free memory writes nothing, since each token would read all of it from disk.
    Raises HomeinferError for what is wrong with the texts, the model, or the folder.
    """
    model = header.files[0].path
    given = calibration_chunks(model, texts, chunks=chunks)
    path = folder / f"generated-{seed}-{n_sequences}x{length}.npy"
    n_vocab = header.by_name["token_embd.weight"].shape[1]
    kept = read_generated(path, n_sequences, length, n_vocab)
    if kept is not None:
        return given + kept
    if header.nbytes > psutil.virtual_memory().available:
        return given
    made = generate_in_process(
        model, n_sequences=n_sequences, length=length, seed=seed, threads=threads, on_progress=on_progress
    )
    write_generated(path, made)
    return given + made


def calibrate(
    header: Header,
    texts: Sequence[str | os.PathLike[str]] = (),
    *,
    chunk_size: int = CHUNK_SIZE,
    chunks: int | None = None,
    threads: int | None = None,
    output_tensor: bool = True,
    on_progress: Callable[[float], None] | None = None,
) -> Calibration:
    """The imatrix of a model that reads these texts, all of them or so many chunks, or a default text.

    Raises HomeinferError for what is wrong with the texts or the model, also where llama.cpp ends its process.
    """
    model = header.files[0].path
    weights = dict.fromkeys(observable(header, output_tensor=output_tensor), Mode.SUM2)
    if not weights:
        raise HomeinferError(f"{printable(model, 1000)}: this model has no weights that an imatrix is of")
    given = calibration_chunks(model, texts, chunk_size=chunk_size, chunks=chunks)
    observed = observe_in_process(model, given, weights, threads or usable_cores(), on_progress)
    datasets = tuple(Path(text).name for text in texts) or (DEFAULT_NAME,)
    # a text shorter than one chunk makes one of its own size
    imatrix = from_observed(observed, len(given[0]), len(given), datasets)
    short = (f"the text has only {len(given)} of {chunks} chunks",) if chunks and len(given) < chunks else ()
    return Calibration(imatrix, observed.tokens, (*short, *unreached_notes(imatrix)))
