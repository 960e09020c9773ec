"""Second moments of each weight's inputs, kept on disk: what a Hessian-aware rounding and a choice of types need.

The error of a rounded weight Ŵ in the layer's output is tr((Ŵ-W)·H·(Ŵ-W)ᵀ) with H = mean(xxᵀ) over the inputs x (GPTQ,
Frantar et al. 2023, section 3). Two things are added to that:

- Every later token attends to a chunk's first (an attention sink; Xiao et al. 2024), so errors in its keys and values
  weigh more than one token's share: weights that make them get mean(x₀x₀ᵀ) of the chunks' first tokens added. Other
  roles don't: in a trial on SmolLM2 it did nothing there, or harm.
- llama.cpp's CPU kernels round activations to 8 bit, which at 4.5 bpw errs about as much as the weights themselves.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import psutil

from homeinfer.errors import HomeinferError
from homeinfer.model.layers import layer_of
from homeinfer.model.records import Header, printable
from homeinfer.quant import moments_file as files
from homeinfer.quant.checks import size_text
from homeinfer.quant.kept import model_digest, tokens_digest
from homeinfer.quant.moments_file import Index, Input
from homeinfer.quant.observe import Ints, Mode, Observed
from homeinfer.quant.observer_process import gather_in_process, observe_in_process

Floats = npt.NDArray[np.float32]

WIDEST: Final = 16384
"""Of wider inputs only the diagonal is kept: a gram would take more than 1 GiB."""
_SINK_ROLE: Final = re.compile(r"(?:.+\.)?(?:cross_)?attn_(?:qkv|kv|k|v)(?:_a_mqa|_a|_b)?\.weight")
"""Makers of keys or values: attn_k, attn_v, attn_qkv, and of latent attention attn_kv_a_mqa, attn_kv_b, attn_k_b,
attn_v_b. attn_q, attn_q_a, attn_q_b and attn_output are none."""
_EXPERTS: Final = re.compile(r"exps\b")
_PROBE_TOKENS: Final = 16
_SHARE_OF_MEMORY: Final = 4


class Moments:
    """The kept moments of one model and text; arrays are read when they are asked for.

    unobserved are weights that no product uses, inputs what the others have. Asking for a weight that is not among
    those gathered is a KeyError; HomeinferError says that files were removed meanwhile.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index
        self.inputs = index.inputs
        self.unobserved = index.unobserved

    def input(self, weight: str) -> Input:
        return self.inputs[self._index.weights[weight]]

    def has(self, weight: str) -> bool:
        """Whether this weight's inputs were gathered."""
        return weight in self._index.weights

    def key(self, weight: str) -> str:
        """The same for weights with the same Hessian."""
        return f"{self._index.weights[weight]}{'+firsts' if _SINK_ROLE.fullmatch(weight) else ''}"

    def has_hessian(self, weight: str) -> bool:
        """False where only the diagonal is kept, and for weights that were not observed."""
        return weight in self._index.weights and self.input(weight).has_gram

    def hessian(self, weight: str) -> Floats:
        """Mean of xxᵀ, with the first tokens' added for keys and values: float32 [n, n], a copy. KeyError where there
        is none."""
        entry = self.input(weight)
        if not entry.has_gram:
            raise KeyError(weight)
        kept = files.map_gram(self._folder, self._index.weights[weight], entry)
        if kept is None:
            raise self._lost()
        hessian = np.array(kept)
        firsts = self._firsts(weight)
        if len(firsts):
            hessian += firsts.T @ firsts / np.float32(len(firsts))
        return hessian

    def importance(self, weight: str) -> Floats:
        """The diagonal of the Hessian, float32 [n], also where that is not kept."""
        firsts = self._firsts(weight)
        added = np.square(firsts).mean(axis=0) if len(firsts) else np.float32(0)
        return self._small(weight).squares + added

    def noise(self, weight: str, activation: Literal["Q8_K", "Q8_0"]) -> Floats:
        """Mean squared error of each input channel when rows are rounded as llama.cpp's CPU kernels do, float32 [n]:
        to Q8_K for weights of K- and IQ types, Q8_0 for those of 32-wide ones and IQ4_NL. Of several matrices in one
        tensor it is an estimate."""
        small = self._small(weight)
        return small.q8_k if activation == "Q8_K" else small.q8_0

    def _firsts(self, weight: str) -> Floats:
        firsts = self._small(weight).firsts
        return firsts if _SINK_ROLE.fullmatch(weight) else firsts[:0]

    def _small(self, weight: str) -> files.Small:
        small = files.read_small(self._folder, self._index.weights[weight], self.input(weight))
        if small is None:
            raise self._lost()
        return small

    def _lost(self) -> HomeinferError:
        return HomeinferError(f"{_name(self._folder)}: measurements were removed or damaged meanwhile; run it again")


def gather_moments(
    header: Header,
    chunks: Sequence[Ints],
    weights: Sequence[str],
    folder: Path,
    *,
    threads: int,
    memory_bytes: int | None = None,
    on_progress: Callable[[float], None] | None = None,
    model: str | None = None,
) -> Moments:
    """The moments of these weights while the model reads each chunk (int32 [n]) by itself, taken from `folder` as far
    as they are there, and kept there.

    The model runs as often as it takes for the grams of a run to stay below memory_bytes (a quarter of what is
    available), first the early layers, whose runs are short. What a run gave is kept even if a later one ends.
    model is model_digest(header), if that is known. Raises HomeinferError for a full disk, and as `observe` does.
    """
    chunks = [np.ascontiguousarray(chunk, np.int32) for chunk in chunks if len(chunk)]
    model, tokens = model or model_digest(header), tokens_digest(chunks)
    kept = open_moments(folder, model, tokens, weights)
    if kept is not None:
        return kept
    if not chunks or not weights:
        raise HomeinferError(f"{_name(header.files[0].path)}: there is nothing to measure: no tokens, or no weights")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        index = _planned(header, chunks, weights, folder, threads, (model, tokens))
        missing = [number for number, entry in enumerate(index.inputs) if not files.is_whole(folder, number, entry)]
        _require_space(folder, sum(files.nbytes(index.inputs[number], len(chunks)) for number in missing))
        limit = psutil.virtual_memory().available // _SHARE_OF_MEMORY if memory_bytes is None else memory_bytes
        sizes = {number: files.nbytes(index.inputs[number], len(chunks)) for number in missing}
        _run(header, chunks, index, plan_passes(sizes, limit), folder, threads, on_progress)
        files.write_index(folder, files.INDEX, index)
    except OSError as error:
        raise _not_kept(folder, error) from None
    return Moments(folder, index)


def open_moments(folder: Path, model: str, tokens: str, weights: Iterable[str]) -> Moments | None:
    """What `gather_moments` kept of these weights, of the model and the tokens with these digests; None where anything
    is missing, other or damaged. Reads all of it once."""
    index = files.read_index(folder, files.INDEX)
    if index is None or not index.holds(model, tokens, weights):
        return None
    whole = all(files.is_whole(folder, number, entry) for number, entry in enumerate(index.inputs))
    return Moments(folder, index) if whole else None


def plan_passes(sizes: Mapping[int, int], limit: int) -> list[list[int]]:
    """Inputs (by number, in the order in which the model reaches them) for each run: as many as fit, at least one."""
    passes: list[list[int]] = []
    used = 0
    for number, size in sizes.items():
        if not passes or used + size > limit:
            passes.append([])
            used = 0
        passes[-1].append(number)
        used += size
    return passes


def _planned(
    header: Header,
    chunks: Sequence[Ints],
    weights: Sequence[str],
    folder: Path,
    threads: int,
    digests: tuple[str, str],
) -> Index:
    """The index of an earlier, interrupted gathering, or a new one in a folder that is empty now."""
    files.remove_partial(folder, psutil.pid_exists)
    for name in (files.INDEX, files.PLAN):
        known = files.read_index(folder, name)
        if known is not None and known.holds(*digests, weights):
            return known
    files.remove_inputs(folder)
    ordered = sorted(weights, key=lambda name: _depth(header, name))
    probe = [chunks[0][:_PROBE_TOKENS]]
    modes = {name: Mode.SUM2 if _is_stacked(header, name) else Mode.ROWS for name in ordered}
    observed = observe_in_process(header.files[0].path, probe, modes, threads)
    index = _index(header, ordered, observed, chunks, digests)
    files.write_index(folder, files.PLAN, index)
    return index


def _index(
    header: Header, weights: Sequence[str], observed: Observed, chunks: Sequence[Ints], digests: tuple[str, str]
) -> Index:
    """What has which input, as the probe showed it."""
    leaders = observed.inputs | {name: name for name in observed.squares}
    followers: dict[str, list[str]] = {}
    for name in weights:
        if name in leaders:
            followers.setdefault(leaders[name], []).append(name)
    times = {name: n // observed.tokens for name, n in observed.n_rows.items()}
    total = sum(map(len, chunks))
    inputs = tuple(_input(header, name, shared, total * times.get(name, 1)) for name, shared in followers.items())
    numbers = {name: number for number, shared in enumerate(followers.values()) for name in shared}
    return Index(files.FORMAT, *digests, len(chunks), inputs, numbers, observed.unused)


def _input(header: Header, name: str, followers: Iterable[str], n_rows: int) -> Input:
    shape = header.by_name[name].shape
    is_stacked = _is_stacked(header, name)
    return Input(
        name=name,
        width=shape[0],
        n_rows=n_rows,
        has_gram=shape[0] <= WIDEST and not is_stacked,
        has_firsts=not is_stacked and any(map(_SINK_ROLE.fullmatch, followers)),
        is_stacked=is_stacked,
    )


def _run(
    header: Header,
    chunks: Sequence[Ints],
    index: Index,
    passes: Sequence[Sequence[int]],
    folder: Path,
    threads: int,
    on_progress: Callable[[float], None] | None,
) -> None:
    costs = [numbers[-1] + 1 + len(numbers) for numbers in passes]  # layers to pass, and grams to sum up
    done = 0

    def report(fraction: float) -> None:
        if on_progress is not None:
            on_progress((done + cost * fraction) / sum(costs))

    for numbers, cost in zip(passes, costs, strict=True):
        inputs = {number: index.inputs[number] for number in numbers}
        gather_in_process(header.files[0].path, chunks, inputs, folder, threads, report)
        report(1)
        done += cost


def _is_stacked(header: Header, name: str) -> bool:
    """Several matrices that every token passes, one per head: attn_k_b, attn_v_b."""
    tensor = header.tensor(name)
    return tensor is not None and any(extent > 1 for extent in tensor.shape[2:]) and not _EXPERTS.search(name)


def _depth(header: Header, name: str) -> int:
    layer = layer_of(name)
    return len(header.tensors) if layer is None else layer


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HomeinferError(
            f"{_name(folder)}: the disk is too full to keep measurements: {size_text(needed)} are needed, "
            f"{size_text(free)} are free; make room or set HOMEINFER_KEPT to another folder"
        )


def _not_kept(folder: Path, error: OSError) -> HomeinferError:
    return HomeinferError(
        f"{_name(folder)}: measurements can't be kept there: {error.strerror or error}; "
        "set HOMEINFER_KEPT to another folder"
    )


def _name(path: Path | str) -> str:
    return printable(str(path), 1000)
