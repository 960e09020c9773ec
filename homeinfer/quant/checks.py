"""What must hold before a file is written, and what to tell about it afterwards."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

from homeinfer.errors import HomeinferError
from homeinfer.model.header import TYPE_SIZES, Header, printable
from homeinfer.quant.importance import Importance, refuse_missing
from homeinfer.quant.quantizer_messages import Planned
from homeinfer.quant.recipes import PlannedTensor, Recipe, misfit_note, plan


def checked_destination(destination: Path, header: Header, force: bool) -> Path:
    """The file to write, symbolic links followed; HomeinferError when it can't be."""
    name = path_name(destination)
    target = Path(os.path.realpath(destination))
    try:
        if target.is_dir():
            raise HomeinferError(f"{name}: this is a directory; name the file to write")
        if not target.parent.is_dir():
            raise HomeinferError(f"{name}: the folder {path_name(target.parent)} does not exist; create it first")
        if target.exists():
            if any(target.samefile(file.path) for file in header.files):
                raise HomeinferError(f"{name}: this is the source itself; name another file to write")
            if not target.is_file():
                raise HomeinferError(f"{name}: this is not a regular file; name another one to write")
            if not force:
                raise HomeinferError(f"{name}: the file exists already; --force overwrites it")
    except OSError as error:
        raise HomeinferError(f"{name}: {error.strerror}; name another file to write") from None
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise HomeinferError(f"{name}: no permission to write in {path_name(target.parent)}; choose another folder")
    return target


def require_space(target: Path, needed: int) -> None:
    """Raise HomeinferError unless the disk has room for that many bytes."""
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise HomeinferError(
            f"{path_name(target)}: the disk is too full: {size_text(needed)} are needed, {size_text(free)} are free; "
            "free some space or choose a smaller recipe"
        )


def checked_plan(
    header: Header, planned: Planned, recipe: Recipe, importance: Importance | None
) -> tuple[PlannedTensor, ...]:
    """Every tensor as it will be; HomeinferError when llama.cpp would not write it so."""
    if {name for name, _ in planned.types} != {tensor.name for tensor in header.tensors}:
        source = path_name(Path(header.files[0].path))
        raise HomeinferError(f"{source}: llama.cpp reads other tensors in this file; convert the model again")
    changed = [(name, kind) for name, kind in planned.types if header.by_name[name].type != kind]
    refuse_missing(importance, changed, recipe.ftype, f"recipe {recipe.name}")
    return plan(header, planned.types)


def refuse_requantizing(header: Header, tensors: tuple[PlannedTensor, ...], recipe: Recipe) -> None:
    """Raise HomeinferError when weights that are quantized already would be quantized again, or nothing at all."""
    source = path_name(Path(header.files[0].path))
    lossy = requantized_types(header, tensors)
    if lossy:
        raise HomeinferError(
            f"{source}: this model is quantized already ({', '.join(lossy)}); take its F16 or BF16 original, "
            "or quantize it once more with --requantize and lose some quality"
        )
    if all(old.type == new.type for old, new in zip(header.tensors, tensors, strict=True)):
        raise HomeinferError(f"{source}: every tensor has the type that {recipe.name} gives it already")


def requantized_types(header: Header, tensors: tuple[PlannedTensor, ...]) -> dict[str, int]:
    """Quantized types that become another type, with the number of their tensors."""
    pairs = zip(header.tensors, tensors, strict=True)
    changed = (old.type for old, new in pairs if old.type != new.type)
    return dict(Counter(old for old in changed if TYPE_SIZES[old][0] > 1))


def all_notes(
    header: Header,
    tensors: tuple[PlannedTensor, ...],
    recipe: Recipe,
    planned: Planned,
    importance: Importance | None,
) -> tuple[str, ...]:
    """What a user should know of the imatrix, the recipe and the plan."""
    notes = importance.notes if importance is not None else ()
    return (*notes, *recipe.notes, *_plan_notes(header, tensors, recipe, planned.misfits))


def _plan_notes(
    header: Header, tensors: tuple[PlannedTensor, ...], recipe: Recipe, misfits: tuple[tuple[str, str], ...]
) -> tuple[str, ...]:
    """misfits are llama.cpp's: (tensor, type that its rows do not fit)."""
    chosen = {tensor.name: tensor.type for tensor in tensors}
    notes = []
    if misfits:
        notes.append(misfit_note((wanted, chosen[name]) for name, wanted in misfits))
    kept = [name for name, type_name in recipe.overrides if chosen.get(name) != type_name]
    if kept:
        notes.append(f"llama.cpp chose another type than the recipe for {len(kept)} tensors: {', '.join(kept[:3])}…")
    lossy = requantized_types(header, tensors)
    if lossy:
        counts = ", ".join(f"{count} {old}" for old, count in lossy.items())
        notes.append(f"warning: quantized twice ({counts} before): the F16 or BF16 original gives a better model")
    return tuple(notes)


def path_name(path: Path) -> str:
    return printable(str(path), 1000)


def size_text(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"
