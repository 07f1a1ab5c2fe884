"""Benchmarks: each module is a command, ``python -m bench.<name>``; results go to bench/results/ as JSON lines."""
