"""Recipes of the user's own: a TOML file that gives every tensor a type.

    name = "my-mix"                 # up to 64 characters; kept in the written file
    description = "what it is for"  # optional
    base = "Q4_K_M"                 # what no rule matches is as in this recipe (any name that --recipe takes),
    # default = "Q4_K"              # or has this type: one of the two

    [[rule]]                        # the first rule that matches a tensor decides its type
    type = "Q6_K"
    role = ["ffn_down", "attn_v"]   # one role or several: the tensor's name without layer and `.weight`
    layers = "0-3, 8-20/4, -1"      # numbers, ranges, every 4th of a range; -1 is the last layer
    depth = [0.0, 0.25]             # the first quarter of the layers: from <= layer / layers < to
    tensor = "blk\\.1[0-9]\\."        # a regular expression (Python's) found in the tensor's name

A rule has a type and at least one of the four conditions, and matches where all that it has hold. Keys that
are not listed here, rules that match nothing and types that do not exist are refused, naming the rule.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, printable
from homeinfer.model.records import MAX_LAYERS
from homeinfer.quant.recipes import Recipe, recipe_for
from homeinfer.quant.tensor_rules import TensorRule, checked_pattern, checked_type, with_tensor_rules
from homeinfer.quant.tensor_types import fitting_type, keeps_type, misfit_note

_LONGEST_NAME = 64
_KEYS = ("name", "description", "base", "default", "rule")
_CONDITIONS = ("role", "layers", "depth", "tensor")
_RANGE = re.compile(r"(-?\d{1,4})(?:\s*-\s*(-?\d{1,4})(?:\s*/\s*(\d{1,4}))?)?")
_FTYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q5_K": 17, "Q5_1": 9, "Q5_0": 8, "Q4_K": 15, "Q4_1": 3,
    "Q4_0": 2, "IQ4_NL": 25, "IQ4_XS": 30, "Q3_K": 12, "IQ3_S": 26, "IQ3_XXS": 23, "Q2_K": 10, "IQ2_S": 28,
    "IQ2_XS": 20, "IQ2_XXS": 19, "IQ1_M": 31, "IQ1_S": 24, "TQ2_0": 37, "TQ1_0": 36, "Q2_0": 41, "Q1_0": 40,
    "MXFP4": 38, "NVFP4": 38,
}  # fmt: skip
"""The llama_ftype that general.file_type has for a file of mostly that type."""


def named_recipe(name: str, header: Header) -> Recipe:
    """The recipe of that name, or of that file when it ends in `.toml`, for this model; HomeinferError when there
    is none."""
    if name.strip().lower().endswith(".toml"):
        return recipe_from_toml(_read(Path(name)), printable(name, 1000), header)
    return recipe_for(name, header)


def recipe_from_toml(text: str, file: str, header: Header) -> Recipe:
    """The recipe that a TOML text describes, for this model; file is its name in messages. Raises HomeinferError."""
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise HomeinferError(f"{file}: this is no TOML: {printable(str(error))}; correct it there") from None
    _refuse_unknown(file, table, _KEYS)
    name = _text(file, table, "name")
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise HomeinferError(f"{file}: 'name' must be a text of 1 to {_LONGEST_NAME} characters")
    _text(file, table, "description")
    rules = table.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise HomeinferError(f"{file}: 'rule' must be a list of tables: write [[rule]] above each")
    made = [_rule(f"{file}: rule {index}", rule, header) for index, rule in enumerate(rules, 1)]
    return with_tensor_rules(_start(file, table, name, header), header, made)


def _read(path: Path) -> str:
    file = printable(os.fspath(path), 1000)
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise HomeinferError(f"{file}: there is no such recipe file; check the path") from None
    except UnicodeDecodeError:
        raise HomeinferError(f"{file}: this recipe file is not UTF-8 text; choose another file") from None
    except OSError as error:
        raise HomeinferError(f"{file}: the recipe file can't be read: {error.strerror}; check the path") from None


def _start(file: str, table: Mapping[str, Any], name: str, header: Header) -> Recipe:
    """What holds before any rule: the base under the new name, or the default for every tensor."""
    base, default = _text(file, table, "base"), _text(file, table, "default")
    if bool(base) == bool(default):
        raise HomeinferError(f"{file}: give one of 'base' (a recipe) and 'default' (a type) for what no rule matches")
    if base:
        try:
            start = recipe_for(base, header)
        except HomeinferError as error:
            raise HomeinferError(f"{file}: 'base': {error}") from None
        return Recipe(name, start.ftype, start.overrides, start.notes, start.copy)
    wanted = checked_type(f"{file}: 'default'", default)
    widths = {tensor.name: tensor.shape[0] for tensor in header.tensors if not keeps_type(tensor, header.architecture)}
    overrides = tuple((name, fitting_type(wanted, width)) for name, width in widths.items())
    misfits = [(wanted, got) for _, got in overrides if got != wanted]
    ftype = _FTYPES[wanted]
    is_float = wanted in ("F32", "F16", "BF16")
    return Recipe(
        name,
        _FTYPES["Q8_0"] if is_float else ftype,
        overrides,
        (misfit_note(misfits),) if misfits else (),
        file_type=ftype if is_float else None,
    )


def _rule(label: str, table: Mapping[str, Any], header: Header) -> TensorRule:
    _refuse_unknown(label, table, ("type", *_CONDITIONS))
    if "type" not in table:
        raise HomeinferError(f"{label}: it has no 'type'; add one, such as type = \"Q6_K\"")
    if not any(key in table for key in _CONDITIONS):
        raise HomeinferError(f"{label}: it says nothing of its tensors; add one of {', '.join(_CONDITIONS)}")
    label += f" ({', '.join(f'{key} = {printable(str(table[key]), 60)}' for key in _CONDITIONS if key in table)})"
    pattern = _text(label, table, "tensor") if "tensor" in table else None
    return TensorRule(
        label,
        checked_type(label, _text(label, table, "type")),
        checked_pattern(label, pattern) if pattern is not None else None,
        _roles(label, table["role"]) if "role" in table else None,
        _layers(label, table["layers"], header.n_layer) if "layers" in table else None,
        _depth(label, table["depth"]) if "depth" in table else None,
    )


def _refuse_unknown(label: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        raise HomeinferError(f"{label}: there is no key '{printable(unknown[0], 60)}'; the keys are {', '.join(known)}")


def _text(label: str, table: Mapping[str, Any], key: str) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise HomeinferError(f"{label}: '{key}' must be a text in quotes")
    return value


def _roles(label: str, value: object) -> frozenset[str]:
    roles = [value] if isinstance(value, str) else value
    if not isinstance(roles, list) or not roles or not all(isinstance(role, str) and role for role in roles):
        raise HomeinferError(f"{label}: 'role' must be a role, such as \"ffn_down\", or a list of them")
    return frozenset(roles)


def _layers(label: str, value: object, n_layer: int) -> frozenset[int]:
    parts = str(value).split(",") if isinstance(value, (str, int)) and not isinstance(value, bool) else []
    layers: set[int] = set()
    for part in parts:
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            parts = []
            break
        first, last = (int(end) + (n_layer if int(end) < 0 else 0) for end in (match[1], match[2] or match[1]))
        if not 0 <= first <= last < MAX_LAYERS or last >= n_layer or match[3] == "0":
            raise HomeinferError(f"{label}: 'layers': there is no '{part.strip()}' in layers 0 to {n_layer - 1}")
        layers.update(range(first, last + 1, int(match[3] or 1)))
    if not parts:
        raise HomeinferError(f"{label}: 'layers' must be like \"0-3, 8-20/4, -1\"")
    return frozenset(layers)


def _depth(label: str, value: object) -> tuple[float, float]:
    if isinstance(value, list) and len(value) == 2 and all(type(end) in (int, float) for end in value):
        first, last = float(value[0]), float(value[1])
        if 0 <= first < last <= 1:
            return first, last
    raise HomeinferError(f"{label}: 'depth' must be two fractions from 0 to 1, the lower first, such as [0.0, 0.25]")
