"""Recipes: complete conversions as readable YAML files, with the recipes that ship with Subquad."""

from subquad.recipes.load import load_recipe, recipe_names
from subquad.recipes.schema import Recipe
from subquad.recipes.stage import Stage

__all__ = ["Recipe", "Stage", "load_recipe", "recipe_names"]
