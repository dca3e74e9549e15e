"""Recipes: single files, each one objective, read from top to bottom. See recipes/README.md."""
