"""``python -m afa_kernels`` says what is here, what is not, and why."""

import dataclasses
import os
import subprocess
import sys

import torch

import afa_kernels as afa
from afa_kernels import __main__ as report
from afa_kernels.backend import registry


def test_the_command_runs():
    done = subprocess.run(
        [sys.executable, "-m", "afa_kernels"],
        capture_output=True,
        text=True,
        env={**os.environ, "AFA_KERNELS_BACKEND": "torch"},
    )
    assert done.returncode == 0, done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    assert "cpu: " in done.stdout
    assert "AFA_KERNELS_BACKEND=torch" in done.stdout


def test_every_backend_is_named_with_its_state(monkeypatch, capsys):
    broken = dataclasses.replace(
        registry.get("torch"),
        name="broken",
        status=lambda: afa.BackendStatus(False, "the device is on fire"),
    )
    monkeypatch.setitem(registry._BACKENDS, "broken", broken)
    assert report.main() == 0
    lines = capsys.readouterr().out.splitlines()
    for name, status in afa.backends().items():
        line = next(line for line in lines if line.split()[:1] == [name])
        assert ("not available: " + status.reason if not status else "available") in line
    assert any("the device is on fire" in line for line in lines)
