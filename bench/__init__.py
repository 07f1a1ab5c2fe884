"""Benchmarks of the operator, the layer and a training step against what people use today:
``python -m bench --help``."""

import os

# Before torch starts its profiler, which counts memory here: it reports each start on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")
