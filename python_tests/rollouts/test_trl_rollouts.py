"""GRPO whose rollouts come from vLLM while alpha_t moves (`make vllm-check`)."""

import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("vllm")
pytest.importorskip("trl")

from engine import ENVIRONMENT

os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")

from peft import get_peft_model
from peft_models import fill_adapters
from trl import GRPOConfig

import afa_kernels as afa
from afa_kernels.callbacks import AnnealCallback
from afa_kernels.peft import AFALoraConfig
from afa_kernels.vllm import Rollout
from afa_kernels.vllm.annealed import Slots
from afa_kernels.vllm.trl import GRPOTrainer
from examples import trl_grpo_vllm as example

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
MEAN, LARGEST = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "base"
    example.save_base(folder)
    return folder


def trainer(base, folder, *, adapter=True, max_logprob_gap=1e-4, **arguments):
    options = {
        "max_steps": 4, "learning_rate": 2e-2, "per_device_train_batch_size": 16, "num_generations": 8,
        "max_completion_length": 8, "logging_steps": 1, "report_to": "none", "bf16": False, "use_cpu": True,
        "use_vllm": True, "vllm_max_model_length": 32, "vllm_gpu_memory_utilization": 0.3, "save_strategy": "no",
    }  # fmt: skip
    model = example.LlamaForCausalLM.from_pretrained(base)
    if adapter:
        config = AFALoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, anneal_end_frac=1.0)
        model = fill_adapters(get_peft_model(model, config))  # the activation matters from the first step on
    return GRPOTrainer(
        model,
        reward_funcs=example.low_numbers,
        args=GRPOConfig(str(folder), **(options | arguments)),
        train_dataset=example.Dataset.from_dict({"prompt": ["1 2 3 4", "5 6 7 8"] * 8}),
        processing_class=example.number_tokenizer(),
        callbacks=[AnnealCallback()],
        max_logprob_gap=max_logprob_gap,
    )


def assert_rolled_out_as_trained(one) -> None:
    steps = [entry for entry in one.state.log_history if "reward" in entry]
    assert [entry["alpha_t"] for entry in steps] == [0.75, 0.5, 0.25, 0.0]
    assert all(0.0 <= entry[MEAN] <= entry[LARGEST] <= 1e-4 for entry in steps)
    assert all(entry["grad_norm"] > 0 for entry in steps)


def test_colocated(base, tmp_path, monkeypatch):
    one = trainer(base, tmp_path)
    one.train()
    assert_rolled_out_as_trained(one)
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == ["version-000003", "version-000004"]

    # The same engine, as if its plugin did nothing: the next step stops the training.
    afa.set_alpha_t(one.model, 1.0)
    monkeypatch.setattr(Slots, "apply", lambda _slots, z, _rows: z)
    one._last_loaded_step = -1
    with pytest.raises(RuntimeError, match="max_logprob_gap: in step 0 vLLM's log-probabilities are .* another policy"):
        one.train()


def test_server(base, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = [
        "--model", str(base), "--port", str(port), "--dtype", "float32", "--max-model-len", "32", "--enforce-eager",
        "--block-size", "32", "--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", "8",
    ]  # fmt: skip
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with open(tmp_path / "server.log", "w") as log:
        program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *served]
        server = subprocess.Popen(program, env=environment, stdout=log, stderr=log)
    try:
        where = {"vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{port}"}
        one = trainer(base, tmp_path, **where)
        one.train()
        assert_rolled_out_as_trained(one)
        listed = one.vllm_generation.vllm_client._get(f"http://127.0.0.1:{port}/v1/models")["data"]
        assert [entry["id"] for entry in listed] == [str(base), "rollouts-4"]  # and no older version
        missing = Rollout("missing", 1, tmp_path / "missing")
        with pytest.raises(RuntimeError, match=r"/v1/load_lora_adapter: 40\d: .*missing.*GRPOTrainer"):
            one.vllm_generation._post("load", missing, lora_path=str(missing.path))
    finally:
        server.terminate()
        server.wait(60)


def test_what_an_engine_with_adapters_does_not_do(base, tmp_path):
    with pytest.raises(ValueError, match="vllm_enable_sleep_mode: .* expected False"):
        trainer(base, tmp_path, vllm_enable_sleep_mode=True)
    with pytest.raises(ValueError, match="vllm_importance_sampling_correction: expected True"):
        trainer(base, tmp_path, vllm_importance_sampling_correction=False)
    with pytest.raises(ValueError, match="found none in LlamaForCausalLM|expected a PEFT model"):
        trainer(base, tmp_path, adapter=False)


def test_without_vllm_it_is_trls_trainer(base, tmp_path):
    one = trainer(base, tmp_path, use_vllm=False, max_steps=1)
    one.train()
    assert one.state.log_history[0]["alpha_t"] == 0.0
