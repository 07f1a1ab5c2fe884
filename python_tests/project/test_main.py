"""``python -m afa_kernels`` says what is here, what is not, and why."""

import os
import re
import subprocess
import sys

import torch
from helpers import altered

import afa_kernels as afa
from afa_kernels import __main__ as report
from afa_kernels.backend import choice


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
    broken = altered(
        choice.get("torch"),
        name="broken",
        status=lambda: afa.BackendStatus(False, "the device is on fire"),
    )
    monkeypatch.setitem(choice._BACKENDS, "broken", broken)
    assert report.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, status in afa.backends().items():
        line = next(line for line in lines if line.split()[:1] == [name])
        assert ("not available: " + status.reason if not status else "available") in line
    assert any("the device is on fire" in line for line in lines)


def test_the_self_test_runs_every_backend(capsys):
    assert report.main(["--self-test"]) == 0
    lines = capsys.readouterr().out.partition("self-test")[2].splitlines()
    for name, status in afa.backends().items():
        if status and choice.get(name).automatic:
            assert any(line.startswith(name) and ": ok; " in line for line in lines), lines


def test_the_self_test_finds_a_wrong_result(monkeypatch, capsys):
    torch_backend = choice.get("torch")

    def forward(x, a, b, *rest, out, **options):
        z = torch_backend.forward(x, a, b, *rest, out=out, **options)
        out.mul_(1.01)
        return z

    broken = altered(torch_backend, name="broken", forward=forward)
    monkeypatch.setitem(choice._BACKENDS, "broken", broken)
    assert report.main(["--self-test"]) == 1
    assert re.search(r"float32 .*: y is \d.\de-\d+ from float64, allowed", capsys.readouterr().out)
