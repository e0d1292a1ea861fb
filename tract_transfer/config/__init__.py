"""Schemas of configs, and reading them from YAML; what cannot be used raises ConfigError."""
