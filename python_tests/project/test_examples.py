"""The scripts in examples/ that a user copies run as they stand, learn, and leave an ordinary LoRA behind.

``accelerate_ddp.py`` runs on two processes in test_distributed.py, the demo in test_demo.py.
"""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from afa_kernels.peft import AFALoraConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(monkeypatch, script: str, *options: object) -> dict[str, object]:
    """Run a script as ``python examples/SCRIPT`` would; return its names."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    return runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def assert_plain_lora(folder: Path) -> None:
    """Nothing in what PEFT reads says that this adapter was anything but a LoRA."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA" and "afa_lora" not in config
    assert AFALoraConfig.from_pretrained(folder).alpha_t == 0.0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_peft_script(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "peft_lora.py", "--steps", 20, "--output", tmp_path)
    printed = capsys.readouterr().out
    rows = re.findall(r"alpha_t (\S+)  loss (\S+)", printed)
    assert [rows[0][0], rows[-1][0]] == ["1.00", "0.00"]
    assert float(rows[-1][1]) < float(rows[0][1]) - 0.3
    assert "stock PEFT and the merged model agree" in printed
    assert_plain_lora(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_script_for_experts(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", minversion="5.0")
    script = run(monkeypatch, "moe_trainer.py", "--steps", 20, "--output", tmp_path)
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert losses[-1] < losses[0] - 0.3
    assert "stock PEFT and the merged model agree" in printed
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert "afa_lora" not in config and len(config["target_parameters"]) == 4
    merged = script["Qwen3MoeForCausalLM"].from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in merged.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_trl_script(monkeypatch, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(0)
    script = run(monkeypatch, "trl_sft.py", "--steps", 10, "--output", tmp_path)
    assert_plain_lora(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    set_seed(0)  # the weights that the script drew
    base = script["base_model"](script["word_tokenizer"]()).eval()
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = base(input_ids=tokens).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=tokens).logits
        torch.testing.assert_close(merged(input_ids=tokens).logits, adapted, rtol=1e-3, atol=1e-3)
    assert (adapted - before).abs().max() > 0.05, "nothing was learned"


def test_the_script_of_many_adapters(monkeypatch, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    script = run(monkeypatch, "many_adapters.py", "--steps", 12, "--output", tmp_path)
    printed = capsys.readouterr().out
    rows = {name: (float(a), float(b)) for name, a, b in re.findall(r"^(\w+) +(\d\.\d+) +(\d\.\d+)$", printed, re.M)}
    assert rows.keys() == script["ADAPTERS"].keys()
    uniform = torch.tensor(256.0).log().item()
    assert all(at_once < uniform - 0.3 and alone < uniform - 0.3 for at_once, alone in rows.values()), rows
    rates = re.search(r"samples per second: (\S+) at once, (\S+) one after the other: (\S+) times", printed).groups()
    assert all(float(rate) > 0 for rate in rates)
    ids = script["samples_of"]("code")[:1]
    with torch.no_grad():
        before = script["base_model"]()(input_ids=ids).logits
        plain = peft.PeftModel.from_pretrained(script["base_model"](), tmp_path / "code")
        assert (plain(input_ids=ids).logits - before).abs().max() > 0.05
    config = json.loads((tmp_path / "numbers" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 16 and "afa_lora" not in config
