"""Layers: a frozen layer with one branch, with many, and several that share their input."""
