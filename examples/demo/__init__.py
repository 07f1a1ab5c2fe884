"""The demo, ``python -m examples.demo``: data, a classifier, the training loop, the checks, the report."""
