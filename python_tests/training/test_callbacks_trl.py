"""The trainers of TRL, each run for a few steps and merged."""

import math

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

import torch
import trl
from datasets import Dataset
from hf_models import WORDS, assert_merges, llama, sentences, tokenizer
from peft import get_peft_model
from peft_models import fill_adapters
from test_callbacks import Recorder

import afa_kernels as afa
from afa_kernels.callbacks import AnnealCallback
from afa_kernels.peft import AFALoraConfig, AFALoraLayer

COMMON = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def sft(model, folder, **shared):
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(output_dir=folder, **COMMON),
        train_dataset=Dataset.from_dict({"text": sentences()}),
        **shared,
    )


def dpo(model, folder, arguments=None, **shared):
    pairs = {"prompt": sentences(8, 3), "chosen": [" w5 w6"] * 8, "rejected": [" w7 w8"] * 8}
    return trl.DPOTrainer(
        model,
        args=trl.DPOConfig(output_dir=folder, **(COMMON | (arguments or {}))),
        train_dataset=Dataset.from_dict(pairs),
        **shared,
    )


def grpo(model, folder, arguments=None, **shared):
    def low_words(completions, **_):
        return [float(sum(word in WORDS[:9] for word in c.split())) for c in completions]

    arguments = COMMON | {"per_device_train_batch_size": 8, "beta": 0.1} | (arguments or {})
    return trl.GRPOTrainer(
        model,
        reward_funcs=low_words,
        args=trl.GRPOConfig(output_dir=folder, num_generations=4, max_completion_length=6, **arguments),
        train_dataset=Dataset.from_dict({"prompt": sentences(8, 3)}),
        **shared,
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_a_trainer_anneals_and_its_model_merges(make, tmp_path):
    recorder = Recorder()
    trainer = make(
        llama(),
        str(tmp_path),
        processing_class=tokenizer(),
        peft_config=AFALoraConfig(target_modules="all-linear", r=4, anneal_end_frac=0.5, task_type="CAUSAL_LM"),
        callbacks=[AnnealCallback(), recorder],
    )
    trainer.train()
    assert recorder.in_steps == [1.0, 0.5, 0.0, 0.0]
    layers = [m for m in trainer.model.modules() if isinstance(m, AFALoraLayer)]
    assert len(layers) == 7 and all(layer.alpha_t == 0.0 for layer in layers)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert_merges(trainer.model, llama())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stands", [0.0, 0.5])
@pytest.mark.parametrize("make", [dpo, grpo])
def test_the_reference_of_an_adapter_that_was_trained_before_is_that_adapter(make, stands, tmp_path):
    """With the learning rate 0 nothing moves: the loss of DPO is ln 2, the KL divergence of GRPO is 0."""
    config = AFALoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    model = fill_adapters(get_peft_model(llama(), config))
    afa.set_alpha_t(model, stands)
    still = {"learning_rate": 0.0, "max_steps": 2}
    trainer = make(model, str(tmp_path), still, processing_class=tokenizer())
    trainer.train()
    logged = trainer.state.log_history
    measured = [entry["loss"] - math.log(2) if make is dpo else entry["kl"] for entry in logged if "loss" in entry]
    assert len(measured) == 2
    assert measured == pytest.approx([0.0, 0.0], abs=1e-6)  # of numbers near 1, in float32


@pytest.mark.parametrize("stands", [0.0, 0.5])
def test_grpo_with_vllm_is_refused_before_identity(stands, tmp_path):
    model = get_peft_model(llama(), AFALoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    afa.set_alpha_t(model, stands)
    message = "use_vllm: .* at alpha_t = 0.5 no weight" if stands else "vLLM is not available"  # not refused by us
    with pytest.raises((ValueError, ImportError), match=message):
        grpo(model, str(tmp_path), {"use_vllm": True}, processing_class=tokenizer(), callbacks=[AnnealCallback()])
