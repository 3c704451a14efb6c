"""Recipes: a whole conversion as one readable YAML file, and those that ship with Subquad."""

from subquad.recipes.load import load_recipe, recipe_names
from subquad.recipes.schema import Recipe
from subquad.recipes.stage import Stage

__all__ = ["Recipe", "Stage", "load_recipe", "recipe_names"]
