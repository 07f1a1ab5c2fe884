"""vLLM serves adapters at any alpha_t, in engines of its own (`make vllm-check`).

float32 throughout: the noise of 16 bits would hide an activation that is applied to the wrong number.
"""

import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
pytest.importorskip("peft")

import torch
import vllm
from engine import ENVIRONMENT
from peft import LoraConfig, get_peft_model
from peft_models import fill_adapters
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.lora.model_manager import LoRAModelManager

import afa_kernels as afa
from afa_kernels.peft import AFALoraConfig
from afa_kernels.vllm import plugin, save_rollout

pytestmark = pytest.mark.slow
ENGINE = {"dtype": "float32", "enable_lora": True, "max_lora_rank": 8, "max_loras": 3, "max_num_seqs": 16}
VOCABULARY = 128
GAP = 1e-4


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    # vLLM's attention on a CPU takes heads of 32 and more.
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def adapted(activation: str | None, seed: int = 0, r: int = 8, targets="all-linear"):
    """Return a model whose adapter says something, with an activation or, for None, stock PEFT's LoRA."""
    options = {"target_modules": targets, "r": r, "lora_alpha": 2 * r}
    config = LoraConfig(**options) if activation is None else AFALoraConfig(**options, activation=activation)
    return fill_adapters(get_peft_model(llama(), config).eval(), seed)


def prompts(n: int, length: int = 12) -> list[list[int]]:
    return torch.randint(3, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(n)).tolist()


class Job:
    """Adapters in their folders, and what an engine is asked with them."""

    def __init__(self, folder: Path, base: Path, **engine):
        self.folder, self.engine = folder, ENGINE | {"model": str(base)} | engine
        self.adapters, self.models = [], {None: llama()}

    def add(self, model, name: str | None = None) -> str:
        """Save the adapter of ``model`` and return the name it is asked for with."""
        rollout = save_rollout(model, self.folder / "adapters" / f"a{len(self.adapters)}")
        self.add_folder(name or rollout.name, rollout.path)
        self.models[name or rollout.name] = model
        return name or rollout.name

    def add_folder(self, name: str, path: Path) -> None:
        self.adapters.append((name, len(self.adapters) + 1, str(path)))

    def run(self, *steps: dict, plugin: bool = True, in_process: bool = True) -> list:
        files = [self.folder / name for name in ("job.json", "result.json")]
        files[0].write_text(json.dumps({"engine": self.engine, "adapters": self.adapters, "steps": steps}))
        environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not in_process))}
        if not plugin:
            environment["VLLM_PLUGINS"] = ""
        program = [sys.executable, str(Path(__file__).with_name("engine.py")), *map(str, files)]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(files[1].read_text())


@torch.no_grad()
def gap(model, prompt: list[int], tokens: list[int], logprobs: list[float]) -> float:
    """Return the largest difference to the log-probabilities that ``model`` gives the tokens."""
    whole = torch.tensor([prompt + tokens])
    expected = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = expected.gather(-1, whole[0, len(prompt) :, None])[:, 0]
    return (expected - torch.tensor(logprobs)).abs().max().item()


def assert_as_trained(job: Job, batch: list, result: list) -> None:
    assert not isinstance(result, dict), result
    for (name, prompt), (tokens, logprobs) in zip(batch, result, strict=True):
        assert len(tokens) == 8
        assert gap(job.models[name], prompt, tokens, logprobs) <= GAP, name
        others = [gap(model, prompt, tokens, logprobs) for other, model in job.models.items() if other != name]
        assert min(others) > 100 * GAP, "the models do not differ"


@pytest.mark.parametrize("in_process", [True, False])
def test_every_activation_and_alpha_t_in_mixed_batches_with_eviction(in_process, base, tmp_path):
    """More adapters than slots, of all activations, at 0, between and at 1, beside rows without an adapter."""
    job = Job(tmp_path, base)
    names = []
    for seed, (activation, alpha_t) in enumerate(zip(afa.activations(), itertools.cycle([0.5, 1.0, 0.25]))):  # noqa: B905
        model = adapted(activation, seed)
        afa.set_alpha_t(model, alpha_t)
        names.append(job.add(model))
    finished = adapted("silu", 20)
    afa.set_alpha_t(finished, 0.0)
    names += [job.add(finished), job.add(adapted("tanh", 21, r=3))]  # of a smaller rank, and where it starts
    texts = prompts(3 * len(names))
    batches = []
    for first in range(len(names)):  # each batch shares two adapters with the one before it
        chosen = [names[(first + i) % len(names)] for i in range(3)]
        batches.append(list(zip([*chosen, None, chosen[0]], texts[3 * first :] + texts, strict=False)))
    for batch, result in zip(batches, job.run(*({"batch": b} for b in batches), in_process=in_process), strict=True):
        assert_as_trained(job, batch, result)


def test_versions_of_one_adapter_without_a_reset_of_the_cache(base, tmp_path):
    """Same prompt, same folder, alpha_t and weights moving: a version that is served from the prefixes of another one
    would show."""
    job = Job(tmp_path, base, max_loras=1)
    prompt = prompts(1, 40)[0]  # more than one block of the cache
    names = []
    for step in range(6):
        model = adapted("gelu", seed=step // 2)
        afa.set_alpha_t(model, 1.0 - step / 5)
        rollout = save_rollout(model, tmp_path / "policy", keep=6)
        job.add_folder(rollout.name, rollout.path)
        job.models[rollout.name] = model
        names.append(rollout.name)
    assert len(set(names)) == 6
    for name, result in zip(names, job.run(*({"batch": [[n, prompt]]} for n in names)), strict=True):
        assert_as_trained(job, [[name, prompt]], result)


def test_plain_lora_keeps_stock_vllms_bits(base, tmp_path):
    job = Job(tmp_path, base)
    names = [job.add(adapted(None, seed)) for seed in range(3)]
    annealed = adapted("silu", 9)
    afa.set_alpha_t(annealed, 0.0)
    names.append(job.add(annealed))
    batches = [[list(pair) for pair in zip(names[first:], prompts(3), strict=False)] for first in (0, 1)]
    steps = [{"batch": batch} for batch in batches]
    ours, stock = job.run(*steps), job.run(*steps, plugin=False)
    assert ours == stock
    for batch, result in zip(batches, ours, strict=True):
        assert_as_trained(job, batch, result)


def test_an_engine_without_the_plugin_refuses(base, tmp_path):
    job = Job(tmp_path, base)
    model = adapted("silu")
    afa.set_alpha_t(model, 0.5)
    (result,) = job.run({"load": job.add(model)}, plugin=False)
    assert "bias" in result["error"]


@pytest.mark.parametrize("sharded", [True, False])
def test_tensor_parallel_engines(sharded, base, tmp_path):
    """Row-parallel layers add up z of their parts only where adapters are fully sharded."""
    job = Job(tmp_path, base, tensor_parallel_size=2, fully_sharded_loras=sharded)
    above, inputs, finished = adapted("silu", 0), adapted("gelu", 1, targets=["q_proj", "up_proj"]), adapted("silu", 2)
    afa.set_alpha_t(above, 0.5)
    afa.set_alpha_t(finished, 0.0)
    names = [job.add(model) for model in (above, inputs, finished)]
    batch = [[name, prompt] for name, prompt in zip(names, prompts(3), strict=True)]
    if sharded:
        (result,) = job.run({"batch": batch})
        assert_as_trained(job, batch, result)
        return
    refused, result = job.run({"load": names[0]}, {"batch": batch[1:]})
    assert "o_proj is split along its input" in refused["error"] and "fully_sharded_loras" in refused["error"]
    assert_as_trained(job, batch[1:], result)


def _change(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["afa_lora"] |= values
    file.write_text(json.dumps(config))


def test_what_cannot_be_served_is_refused_with_its_reason(base, tmp_path):
    """And the engine goes on."""
    job = Job(tmp_path, base)
    expected = {}
    for values, message in (
        ({"alpha_t": 1.5}, "alpha_t"),
        ({"alpha_t": float("nan")}, "alpha_t"),
        ({"activation": "mish"}, "no known activation"),
        ({"format_version": 99}, "format_version 1, got 99"),
    ):
        rollout = save_rollout(adapted("silu"), tmp_path / f"changed{len(expected)}")
        _change(rollout.path, **values)
        job.add_folder(f"changed{len(expected)}", rollout.path)
        expected[f"changed{len(expected)}"] = message

    layers = adapted(None).unload()
    afa.inject(layers, ["q_proj", "v_proj"], r=8)
    afa.set_alpha_t(fill_adapters(layers), 0.5)
    agreeing = save_rollout(layers, tmp_path / "injected")
    job.add_folder("agreeing", agreeing.path)
    job.models["agreeing"] = layers
    layers.model.layers[0].self_attn.q_proj.set_alpha_t(0.75)
    job.add_folder("differing", save_rollout(layers, tmp_path / "injected").path)
    afa.set_alpha_t(layers, 0.5)
    expected["differing"] = "the layers differ in activation or alpha_t"

    head = adapted("silu", targets=["lm_head", "q_proj"])
    expected[job.add(head, "head")] = "is no linear layer"
    prompt = prompts(1)[0]
    loads = [{"load": name} for name in expected] * 2  # what was refused is not there the second time
    results = job.run(*loads, {"batch": [["agreeing", prompt], [None, prompt]]})
    for (name, message), result in zip([*expected.items()] * 2, results, strict=False):
        assert message in result["error"], name
    for name, served in zip(("agreeing", None), results[-1], strict=True):
        assert gap(job.models[name], prompt, *served) <= GAP


def test_the_plugin_goes_once_into_versions_that_it_knows(monkeypatch, caplog):
    stock = inspect.unwrap(LoRAModelManager.__init__)  # an engine in this process has put it in
    monkeypatch.setattr(LoRAModelManager, "__init__", stock)
    with monkeypatch.context() as other, caplog.at_level("WARNING", logger="vllm.afa_kernels"):
        other.setattr(vllm, "__version__", "9.9.0+cpu")
        plugin.register()
    assert LoRAModelManager.__init__ is stock
    assert "adapters at alpha_t > 0 are refused: it knows vLLM from" in caplog.text and "9.9.0" in caplog.text
    plugin.register()
    first = LoRAModelManager.__init__
    assert first is not stock
    plugin.register()
    assert LoRAModelManager.__init__ is first


def test_experts_that_vllm_fuses_are_refused():
    experts = SimpleNamespace(
        modules={"mlp.experts": object.__new__(FusedMoEWithLoRA)}, _get_lora_layer_weights=lambda *_: object()
    )
    assert "fused mixture of experts" in plugin._why_not_served(experts, None)
