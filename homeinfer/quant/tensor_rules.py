"""Rules that give tensors a type: `--tensor REGEX=TYPE`, and the rules of recipe files.

Pure: a rule looks at names and layers of a header, and applying rules gives exact tensor names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import msgspec

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, TensorInfo, printable
from homeinfer.quant.recipes import Recipe
from homeinfer.quant.tensor_types import (
    fitting_type,
    keeps_type,
    misfit_note,
    role_of,
    stack_and_layer,
    type_named,
)

_FTYPE_Q8_0 = 7
_UNQUANTIZED_FTYPES = {0: "F32", 1: "F16", 32: "BF16"}


class TensorRule(msgspec.Struct, frozen=True):
    """Which tensors get a type: those that meet every condition that is given.

    label names the rule in messages; pattern is a regular expression (Python's) searched in the tensor's name;
    roles are names without layer and suffix ("ffn_down"); layers are their numbers; depth is [from, to) as
    fractions of the model's layers.
    """

    label: str
    type: str
    pattern: str | None = None
    roles: frozenset[str] | None = None
    layers: frozenset[int] | None = None
    depth: tuple[float, float] | None = None

    def matches(self, tensor: TensorInfo, n_layer: int) -> bool:
        if self.pattern is not None and not re.search(self.pattern, tensor.name):
            return False
        if self.roles is not None and role_of(tensor.name) not in self.roles:
            return False
        if self.layers is None and self.depth is None:
            return True
        place = stack_and_layer(tensor.name)
        if place is None or (self.layers is not None and place[1] not in self.layers):
            return False
        return self.depth is None or self.depth[0] <= place[1] / n_layer < self.depth[1]


def parse_tensor_rule(text: str) -> TensorRule:
    """`REGEX=TYPE` as --tensor takes it; HomeinferError when it is none."""
    pattern, equals, type_text = text.rpartition("=")
    label = f"--tensor '{printable(text, 120)}'"
    if not equals or not pattern or not type_text.strip():
        raise HomeinferError(f"{label}: a rule is REGEX=TYPE, such as 'ffn_down=Q6_K'")
    return TensorRule(label, checked_type(label, type_text), checked_pattern(label, pattern))


def checked_type(label: str, text: str) -> str:
    """The type of that name; HomeinferError that starts with the label when there is none."""
    try:
        return type_named(text)
    except HomeinferError as error:
        raise HomeinferError(f"{label}: {error}") from None


def checked_pattern(label: str, pattern: str) -> str:
    """The regular expression itself; HomeinferError that starts with the label when it is none."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise HomeinferError(
            f"{label}: the regular expression is wrong: {error}; see Python's re for the rules"
        ) from None
    return pattern


def with_tensor_rules(recipe: Recipe, header: Header, rules: Sequence[TensorRule]) -> Recipe:
    """The recipe with the rules before it: the first rule that matches a tensor decides its type.

    Raises HomeinferError for a rule that matches no tensor. What llama.cpp never quantizes keeps its type, and
    rows that a type's blocks do not divide get the best type that fits: the recipe's notes say so.
    """
    if not rules:
        return recipe
    wanted, notes = _decided(header, rules)
    misfits, chosen = [], {}
    for name, type_name in wanted.items():
        chosen[name] = fitting_type(type_name, header.by_name[name].shape[0])
        if chosen[name] != type_name:
            misfits.append((type_name, chosen[name]))
    notes += [misfit_note(misfits)] if misfits else []
    text = " ".join(f"{rule.pattern}={rule.type}" for rule in rules if rule.label.startswith("--tensor"))
    metadata = (*recipe.metadata, ("homeinfer.tensor_rules", text)) if text else recipe.metadata
    made = msgspec.structs.replace(_heeding_overrides(recipe, header), notes=(*recipe.notes, *notes), metadata=metadata)
    others = ((name, type_name) for name, type_name in made.overrides if name not in chosen)
    return msgspec.structs.replace(made, overrides=(*chosen.items(), *others))


def _decided(header: Header, rules: Sequence[TensorRule]) -> tuple[dict[str, str], list[str]]:
    """Tensor → the type that its first rule wants, of tensors that can change, and notes on the others."""
    n_layer = max(header.n_layer, 1)
    wanted: dict[str, str] = {}
    notes: list[str] = []
    taken: set[str] = set()
    for rule in rules:
        found = [tensor for tensor in header.tensors if rule.matches(tensor, n_layer)]
        if not found:
            raise HomeinferError(f"{rule.label}: no tensor of this model matches{_nearest(rule, header)}")
        mine = [tensor for tensor in found if tensor.name not in taken]
        if not mine:
            notes.append(f"{rule.label}: earlier rules decide all {len(found)} tensors that it matches")
        taken.update(tensor.name for tensor in mine)
        kept = [tensor for tensor in mine if keeps_type(tensor, header.architecture)]
        wanted |= {tensor.name: rule.type for tensor in mine if not keeps_type(tensor, header.architecture)}
        if any(tensor.type != rule.type for tensor in kept):
            notes.append(_kept_note(rule, kept))
    return wanted, notes


def _kept_note(rule: TensorRule, kept: Sequence[TensorInfo]) -> str:
    names = ", ".join(printable(tensor.name) for tensor in kept[:3]) + (", …" if len(kept) > 3 else "")
    types = "/".join(sorted({tensor.type for tensor in kept}))
    number = "1 tensor stays" if len(kept) == 1 else f"{len(kept)} tensors stay"
    return f"{rule.label}: {number} {types}, since llama.cpp never quantizes norms, biases and the like: {names}"


def _nearest(rule: TensorRule, header: Header) -> str:
    """The names most like what a rule asked for, as the end of a sentence: one a role, since layers look alike."""
    first = {role_of(tensor.name): tensor.name for tensor in reversed(header.tensors)}
    asked = sorted(rule.roles) if rule.roles is not None else [re.sub(r"\\.|[^\w.]", "", rule.pattern or "")]
    roles = [role for text in asked for role in difflib.get_close_matches(role_of(text), first, n=3, cutoff=0.4)]
    names = roles if rule.roles is not None else [first[role] for role in roles]
    if not names:
        names = [name for text in asked for name in difflib.get_close_matches(text, first.values(), n=3, cutoff=0.0)]
    return f"; the nearest names are {', '.join(map(printable, names[:3]))}" if names else ""


def _heeding_overrides(recipe: Recipe, header: Header) -> Recipe:
    """The same recipe in a form whose overrides llama.cpp heeds: it does not where everything is copied or
    becomes a float type, so there every tensor is named, under the type number of Q8_0."""
    floating = _UNQUANTIZED_FTYPES.get(recipe.ftype)
    if not recipe.copy and floating is None:
        return recipe
    named = dict(recipe.overrides)
    complete = tuple(
        (tensor.name, named.get(tensor.name) or (tensor.type if recipe.copy else str(floating)))
        for tensor in header.tensors
        if not keeps_type(tensor, header.architecture)
    )
    file_type = header.get("general.file_type") if recipe.copy else recipe.ftype
    return msgspec.structs.replace(
        recipe,
        ftype=_FTYPE_Q8_0,
        overrides=complete,
        copy=False,
        file_type=file_type if isinstance(file_type, int) and file_type >= 0 else None,
    )
