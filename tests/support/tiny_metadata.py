"""The recipes of all tiny models."""

from __future__ import annotations

from tests.support.tiny_cuts import CUTS
from tests.support.tiny_dense import DENSE
from tests.support.tiny_experts import EXPERTS
from tests.support.tiny_hybrid import HYBRID
from tests.support.tiny_recipe import Recipe, Value

RECIPES: tuple[Recipe, ...] = (*DENSE, *EXPERTS, *HYBRID, *CUTS)

__all__ = ["RECIPES", "Recipe", "Value"]
