"""A CPU testbed: arithmetic chains, a tiny Qwen2 base model, and data files in verl's contract.

Run `python -m data_prep.testbed --out DIR`.
"""
