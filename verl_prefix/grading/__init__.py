"""Grading a response against the true answer: what the answer is, whether it is right, and in bounded time."""
