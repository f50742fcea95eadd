"""Data preparation: sources to verl's parquet (`verl-prefix data`), and the CPU testbed."""
