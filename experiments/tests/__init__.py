"""Tests of the experiments, on tiny models."""
