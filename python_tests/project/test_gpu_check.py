"""gpu_check without a GPU: it says what it would do, and the same code runs on the PTX machine."""

import json

import ptx_cuda
import pytest
import torch
from conftest import skip_unless_available

from tools import gpu_by_owner, gpu_check, gpu_choice, gpu_steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_lists_every_step_and_has_its_own_status(capsys, tmp_path):
    assert gpu_check.main(["--out", str(tmp_path)]) == gpu_check.NO_GPU == 77
    told = capsys.readouterr().out
    for step in gpu_check.STEPS:
        assert step.name in told and step.what in told
    assert "Nothing was checked" in told
    assert not list(tmp_path.iterdir())


def test_an_unknown_step_is_an_error(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "nonsense"])
    assert "expected some of backends, kernels" in capsys.readouterr().err


def test_the_rehearsal_runs_the_steps_on_the_machine(capsys, tmp_path):
    skip_unless_available(ptx_cuda.NAME)
    steps = [
        "backends",
        "kernels",
        "graphs",
        "streams",
        "devices",
        "sanitizer",
        "by_owner",
        "beta",
    ]
    steps += ["bandwidth", "launches", "choice", "model"]
    assert gpu_check.main(["--rehearse", ptx_cuda.NAME, "--only", ",".join(steps), "--out", str(tmp_path)]) == 0
    head, *records = map(json.loads, (tmp_path / "gpu-rehearsal-cpu.jsonl").read_text().splitlines())
    assert head["kind"] == "environment"
    assert [record["step"] for record in records] == steps
    status = {record["step"]: record["status"] for record in records}
    needs_gpu = {"graphs", "streams", "devices", "sanitizer", "by_owner", "launches", "choice", "model"}
    assert {name for name, value in status.items() if value == "absent"} == needs_gpu
    assert all(record["message"] for record in records), "an absent step must say why"


def test_a_step_that_raises_fails_alone():
    def broken(context):
        raise RuntimeError("no such kernel")

    outcome = gpu_check.run_step(gpu_steps.Step("broken", "raises", broken), gpu_steps.Context.rehearsal("cpu"))
    assert outcome.status == "failed" and "no such kernel" in outcome.message


def test_a_call_by_owner_that_is_less_accurate_than_torch_fails(monkeypatch):
    context = gpu_steps.Context.rehearsal("reference")
    right = gpu_by_owner.step

    def wrong(case, device, backend, dtype, frozen):
        y, dx, da, db = right(case, device, backend, dtype, frozen=frozen)
        if backend == "reference" and dtype == torch.bfloat16:
            db[-1] *= 1.02  # of one owner
        return y, dx, da, db

    monkeypatch.setattr(gpu_by_owner, "step", wrong)
    outcome = gpu_by_owner.check_by_owner(context)
    assert outcome.status == "failed" and {row["what"] for row in outcome.rows} == {"dB"}


def test_a_backend_that_is_chosen_and_slower_than_another_is_a_failure():
    fast = gpu_choice.Measured(1, 128, "cuda", {"torch": 3.0, "cuda": 1.0, "triton": 0.99})
    slow = gpu_choice.Measured(8192, 128, "triton", {"torch": 3.0, "cuda": 1.0, "triton": 1.1})
    assert gpu_choice.outcome_of([fast]).status == "ok"
    outcome = gpu_choice.outcome_of([fast, slow])
    assert outcome.status == "failed" and "1 of 2 shapes" in outcome.message
    assert outcome.rows[1]["behind the fastest"] == "10.0%"
