"""Hydra presets: one YAML per method under `prefix/`."""
