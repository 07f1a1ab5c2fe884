"""Whole models: where the layers go, and the files they are saved in."""
