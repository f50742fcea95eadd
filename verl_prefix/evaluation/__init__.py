"""Evaluation of a checkpoint: samples from a vLLM server or verl's validation dump, one estimator for both."""
