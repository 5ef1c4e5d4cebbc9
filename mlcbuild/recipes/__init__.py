"""Recipes: YAML files that say what to build. Read with positions, checked, expanded to variants."""
