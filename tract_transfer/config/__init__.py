"""Schemas of configs, and reading them from YAML with `_BASE_` and overrides."""
