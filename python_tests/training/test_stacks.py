"""The package in other people's training stacks, as docs/stacks.md and docs/lightning.md show it: each stack in an
environment of its own with the wheel, and its own training entry on a tiny model.

Slow: it compiles the wheel, or takes that of ``AFA_WHEEL``, and installs each stack with all that it asks for.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from wheel_helpers import ROOT, environment, run, the_wheel

from afa_kernels import AnnealSchedule

yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "stacks.md"
STEPS, END_FRAC = 20, 0.8  # of every training on the page


def block(section: str, language: str, page: Path = PAGE) -> str:
    """Return the block of a section that is in that language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text_of(section, page), re.MULTILINE | re.DOTALL)
    return found


def text_of(section: str, page: Path) -> str:
    return page.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return the_wheel(tmp_path_factory.mktemp("wheel"))


class Stack:
    """An environment with a stack and the wheel, and a folder to train in."""

    def __init__(self, python: Path, folder: Path):
        self.python, self.folder = python, folder

    def run(self, *command: object) -> str:
        """Run a command of the environment."""
        variables = {
            "PATH": f"{self.python.parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(str(ROOT / "python_tests" / folder) for folder in ("", "training")),
            "AXOLOTL_DO_NOT_TRACK": "1",
            "DO_NOT_TRACK": "1",
        }
        return run(*command, cwd=self.folder, env=variables)

    def versions(self) -> dict[str, str]:
        listed = json.loads(run(self.python, "-m", "pip", "list", "--format", "json"))
        return {entry["name"].lower(): entry["version"].partition("+")[0] for entry in listed}


@contextmanager
def stack(wheel: Path, folder: Path, *requirements: str) -> Iterator[Stack]:
    with environment(folder / "environment", "torch==2.13.*", *requirements) as python:
        made = Stack(python, folder)
        before = made.versions()
        run(python, "-m", "pip", "install", wheel)
        after = made.versions()
        assert "afa-kernels" in after and before.items() <= after.items(), "the wheel changed what the stack had"
        yield made


def assert_on_the_page(section: str, versions: dict[str, str], *named: str, page: Path = PAGE) -> None:
    """Check that the page says which versions ran."""
    said = " ".join(text_of(section, page).partition("\nRan: ")[2].split())
    for name in (*named, "torch"):
        version = versions[name.lower().replace("-", "")]
        assert f"{name} {version}" in said, (said, version)


def assert_annealed(record: dict, steps: int = STEPS, kind: str = "linear") -> None:
    """Check what a recorder wrote down."""
    schedule = [AnnealSchedule(steps, kind, end_frac=END_FRAC)(step) for step in range(steps + 1)]
    assert record["alphas"] == pytest.approx(schedule[:-1]) and schedule[-1] == 0.0
    assert record.get("logged", schedule[1:]) == pytest.approx(schedule[1:])
    assert record["difference"] > 1e-3, "the activation made no difference"
    assert record["trained"] and all("lora_" in name for name in record["trained"])
    assert set(record["changed"]) == set(record["trained"])
    losses, half = record["losses"], steps // 2
    assert len(losses) == steps and sum(losses[half:]) < 0.98 * sum(losses[:half]), losses


def check(there: Stack, *arguments: object) -> dict:
    return json.loads(there.run(there.python, "-m", "stack_worker", "check", *arguments).splitlines()[-1])


def test_axolotl(wheel, tmp_path):
    with stack(wheel, tmp_path, "axolotl==0.19.0") as axolotl:
        axolotl.run(axolotl.python, "-m", "stack_worker", "write")
        config = yaml.safe_load(block("axolotl", "yaml"))
        config["plugins"].append("stack_axolotl.RecorderPlugin")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        axolotl.run("axolotl", "train", "config.yaml")
        record = check(axolotl, "model", "out")
        assert_annealed(record)
        axolotl.run("axolotl", "merge-lora", "config.yaml", "--lora-model-dir", "./out")
        assert check(axolotl, "out/merged") == record
        assert_on_the_page("axolotl", axolotl.versions(), "axolotl", "PEFT")


def test_llama_factory(wheel, tmp_path):
    with stack(wheel, tmp_path, "llamafactory==0.9.5") as llama_factory:
        without_cuda_audio(llama_factory)
        llama_factory.run(llama_factory.python, "-m", "stack_worker", "write")
        (tmp_path / "config.yaml").write_text(block("LLaMA-Factory", "yaml"))
        script = block("LLaMA-Factory", "python")
        assert script.count("callbacks=[AnnealCallback(") == 1
        script = script.replace("callbacks=[", "callbacks=[__import__('stack_worker').Recorder(), ")
        (tmp_path / "train.py").write_text(script)
        llama_factory.run(llama_factory.python, "train.py", "config.yaml")
        assert_annealed(check(llama_factory, "model", "out"))
        assert_on_the_page("LLaMA-Factory", llama_factory.versions(), "LLaMA-Factory", "PEFT")


def test_litgpt(wheel, tmp_path):
    with stack(wheel, tmp_path, "litgpt==0.5.13") as litgpt:
        litgpt.run(litgpt.python, "-m", "stack_lightning")
        before = """
import torch
from stack_lightning import Recorder

tokens = torch.arange(3, 19)[None]
recorder = Recorder(lambda module: module.llm(tokens))
"""
        after = """
saved = LLM.load("out", distribute=None)
saved.trainer_setup()  # in float32, where LLM.load alone takes bfloat16
torch.testing.assert_close(saved(tokens), recorder.computed, atol=1e-4, rtol=1e-4)
print(recorder.as_json())
"""
        record = run_recorded(litgpt, before, block("litgpt", "python"), after)
        assert_annealed(record)
        assert {name.split(".")[-2] for name in record["trained"]} == {"qkv", "proj", "fc_1", "fc_2"}
        assert_on_the_page("litgpt", litgpt.versions(), "litgpt", "Lightning")


def test_lightning(wheel, tmp_path):
    """What the extra installs, and the page of Lightning."""
    page = ROOT / "docs" / "lightning.md"
    with stack(wheel, tmp_path, "lightning==2.6.6") as lightning:
        lightning.run(lightning.python, "-m", "pip", "install", f"afa-kernels[lightning] @ {wheel.as_uri()}")
        before = """
import torch
from stack_lightning import Recorder

recorder = Recorder(lambda module: module.net(x))
"""
        after = """
torch.testing.assert_close(module.net(x), recorder.computed)
assert not any(hasattr(layer, "set_alpha_t") for layer in module.modules())
print(recorder.as_json())
"""
        record = run_recorded(lightning, before, block("Example", "python", page), after)
        assert_annealed(record, steps=16, kind="cosine")
        assert_on_the_page("What it does", lightning.versions(), "Lightning", page=page)


def test_torchtune(wheel, tmp_path):
    # Its command-line tool needs functions that torchao had up to 0.11, and PEFT refuses a torchao before 0.16.
    needs = "torchao==0.11.0 torchdata datasets omegaconf sentencepiece tiktoken blobfile kagglehub psutil transformers"
    with stack(wheel, tmp_path, *needs.split()) as torchtune:
        torchtune.run(torchtune.python, "-m", "pip", "install", "--no-deps", "torchtune==0.6.1")
        torchtune.run(torchtune.python, "-m", "stack_worker", "write")
        torchtune.run(torchtune.python, "-m", "stack_torchtune")
        recipe = block("torchtune", "python")
        assert recipe.count("    recipe.train()\n") == 1
        recorded = "    torch.save(__import__('stack_torchtune').record(recipe), 'record.pt')\n"
        (tmp_path / "recipe.py").write_text(recipe.replace("    recipe.train()\n", recorded))
        torchtune.run("tune", "run", "recipe.py", "--config", "config.yaml")
        torchtune.run(torchtune.python, "-m", "pip", "uninstall", "--yes", "torchao")
        torchtune.run(torchtune.python, "-m", "pip", "install", "peft")
        assert_annealed(check(torchtune, "model", "out/epoch_1"))
        assert_on_the_page("torchtune", torchtune.versions(), "torchtune")


def run_recorded(there: Stack, before: str, page: str, after: str) -> dict:
    """Run a script of a page with a recorder among its callbacks."""
    assert page.count("callbacks=[") == 1
    (there.folder / "page.py").write_text(before + page.replace("callbacks=[", "callbacks=[recorder, ") + after)
    return json.loads(there.run(there.python, "page.py").splitlines()[-1])


def without_cuda_audio(there: Stack) -> None:
    """Take torchaudio's compiled part away where torch has no CUDA: PyPI's asks for CUDA libraries at import."""
    code = (
        "import torch, importlib.util, pathlib\n"
        "folder = pathlib.Path(importlib.util.find_spec('torchaudio').origin).parent\n"
        "[file.unlink() for file in folder.rglob('*.so') if torch.version.cuda is None]"
    )
    there.run(there.python, "-c", code)
