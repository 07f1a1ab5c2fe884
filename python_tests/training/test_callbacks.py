"""AnnealCallback in real runs of transformers.Trainer: steps, resumption, early stops, merging."""

import copy
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from hf_models import assert_merges, llama, logits, token_rows
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import afa_kernels as afa
from afa_kernels.callbacks import AnnealCallback
from afa_kernels.peft import AFALoraConfig, AFALoraLayer, accelerate


class Recorder(TrainerCallback):
    """Notes alpha_t of the layers at the beginning of each micro step's optimizer step, and what
    reporters would see."""

    def __init__(self):
        self.in_steps, self.logged = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        layers = [m for m in model.modules() if hasattr(m, "set_alpha_t")]
        self.in_steps.append(layers[0].alpha_t)
        assert len({layer.alpha_t for layer in layers}) == 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(logs.get("alpha_t"))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def adapted(**options):
    config = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"} | options
    return get_peft_model(llama(), AFALoraConfig(**config))


def trainer(model, folder, *callbacks, **arguments):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **(defaults | arguments)),
        train_dataset=token_rows(),
        eval_dataset=token_rows(4),
        callbacks=list(callbacks),
    )


def test_alpha_follows_the_schedule_of_the_configuration_and_the_model_merges(tmp_path):
    model, recorder = adapted(anneal_end_frac=0.5), Recorder()
    run = trainer(model, tmp_path, AnnealCallback(), recorder)
    run.train()
    assert recorder.in_steps == [1.0, 0.5, 0.0, 0.0]
    steps = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["alpha_t"] for entry in steps] == [0.5, 0.0, 0.0, 0.0]
    assert_merges(run.model, llama())


def test_one_step_of_the_schedule_per_optimizer_step(tmp_path):
    """Not per micro batch, and the length of the training comes from the epochs."""
    recorder = Recorder()
    run = trainer(
        adapted(), tmp_path, AnnealCallback(kind="linear", end_frac=1.0), recorder,
        max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    run.train()
    assert run.state.global_step == 4
    assert recorder.in_steps == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("attached", [False, True])
def test_adapters_that_a_framework_made_are_given_an_activation(tmp_path, attached):
    model, recorder = get_peft_model(llama(), LoraConfig(target_modules="all-linear", r=4)), Recorder()
    callback = AnnealCallback(activation="gelu", kind="cosine", end_frac=0.5)
    run = trainer(model, tmp_path, *([] if attached else [callback]), recorder)
    if attached:
        callback.attach(run)
    run.train()
    with pytest.warns(UserWarning, match="'default' is finished and stays at alpha_t = 0, where the schedule is at 1"):
        run.train()  # again: the model has the activation already
    assert recorder.in_steps == pytest.approx([1.0, 0.5, 0.0, 0.0] + [0.0] * 4)
    afa.set_alpha_t(run.model, 1.0)
    run.train()
    assert recorder.in_steps[8:] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert run.model.peft_config["default"].activation == "gelu"
    assert_merges(run.model, llama())


def test_attached_to_a_trainer_it_comes_before_the_reporters(tmp_path):
    recorder = Recorder()
    run = trainer(adapted(), tmp_path, recorder, max_steps=2)
    callback = AnnealCallback(end_frac=1.0)
    assert callback.attach(run) is callback
    run.train()
    assert recorder.logged == [0.5, 0.0, 0.0]


def test_a_run_resumed_from_a_checkpoint_goes_on_as_if_it_had_not_stopped(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(adapted(), tmp_path / "whole", AnnealCallback(end_frac=1.0), **options)
    whole.train()
    checkpoint = os.path.join(tmp_path, "whole", "checkpoint-2")
    assert AFALoraConfig.from_pretrained(checkpoint).alpha_t == 0.5
    recorder = Recorder()
    resumed = trainer(adapted(), tmp_path / "resumed", AnnealCallback(end_frac=1.0), recorder, **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert recorder.in_steps == [0.5, 0.25]
    torch.testing.assert_close(logits(resumed.model), logits(whole.model))


def test_an_early_stop_is_forced_to_identity_with_a_warning(tmp_path):
    run = trainer(adapted(), tmp_path, AnnealCallback(end_frac=1.0, merge=True), StopAt(2))
    with pytest.warns(UserWarning, match="ended after 2 optimizer steps, at alpha_t = 0.5; it was"):
        run.train()
    layers = [m for m in run.model.modules() if isinstance(m, AFALoraLayer)]
    assert all(layer.merged and layer.alpha_t == 0.0 for layer in layers)


def test_an_early_stop_can_be_left_as_it_is(tmp_path):
    callback = AnnealCallback(end_frac=1.0, finish="warn", merge=True)
    run = trainer(adapted(), tmp_path, callback, StopAt(2))
    with pytest.warns(UserWarning, match="cannot be merged, so nothing was merged"):
        run.train()
    layer = next(m for m in run.model.modules() if isinstance(m, AFALoraLayer))
    assert layer.alpha_t == 0.5 and not layer.merged


def test_the_best_model_comes_back_with_its_own_alpha(tmp_path):
    run = trainer(
        adapted(), tmp_path, AnnealCallback(end_frac=1.0, finish="warn"),
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="the one after 1 optimizer steps, at alpha_t = 0.75"):
        run.train()  # greater is better: the best loss is the first
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    layer = next(m for m in run.model.modules() if isinstance(m, AFALoraLayer))
    assert layer.alpha_t == 0.75


def test_merge_at_the_end_leaves_a_model_with_the_same_outputs(tmp_path):
    run = trainer(adapted(), tmp_path, AnnealCallback(merge=True, end_frac=0.5))
    run.train()
    merged = logits(run.model)
    run.model.unmerge_adapter()
    torch.testing.assert_close(logits(run.model), merged)
    run.model.merge_adapter()
    torch.testing.assert_close(logits(run.model.unload()), merged)


def test_layers_of_inject_are_driven_too(tmp_path):
    model = afa.inject(llama(), r=4)
    run = trainer(model, tmp_path, AnnealCallback(lambda step: 1 - step / 4, merge=True))
    run.train()
    assert all(m.merged for m in model.modules() if isinstance(m, afa.AFALinear))
    merged = logits(model)
    torch.testing.assert_close(logits(afa.unload(model)), merged)


def test_a_schedule_that_is_longer_than_the_training_warns(tmp_path):
    callback = AnnealCallback(afa.AnnealSchedule(100, end_frac=1.0))
    with pytest.warns(UserWarning) as caught:
        trainer(adapted(), tmp_path, callback, max_steps=2).train()
    begins, ends = (str(w.message) for w in caught if w.category is UserWarning)
    assert "made for 100 optimizer steps and the training has 2, so alpha_t ends at 0.98" in begins
    assert "at alpha_t = 0.98; it was set to 0" in ends


def test_a_late_annealed_adapter_is_installed(tmp_path):
    """As PEFT before 0.19 leaves it: the configuration is there, the layer does not know it."""
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    model.peft_config["default"] = AFALoraConfig(target_modules=["q_proj"])
    trainer(model, tmp_path, AnnealCallback(), max_steps=2).train()
    assert any(isinstance(m, AFALoraLayer) for m in model.modules())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: llama(), "expected layers with set_alpha_t, found none in LlamaForCausalLM"),
        (
            lambda: accelerate(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))),
            "no active adapter is annealed",
        ),
    ],
    ids=["no layers", "plain adapters"],
)
def test_nothing_to_anneal_is_an_error(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        trainer(model(), tmp_path, AnnealCallback()).train()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"finish": "stop"}, ValueError, "finish: expected 'force' or 'warn', got 'stop'"),
        ({"schedule": 3}, TypeError, "schedule: expected an AnnealSchedule or a function"),
        ({"schedule": abs, "kind": "cosine"}, TypeError, "schedule: given already, got kind too"),
        ({"kind": "quick"}, ValueError, "kind: expected one of"),
        ({"activation": "step"}, ValueError, "activation: expected one of"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        AnnealCallback(**arguments)


def test_frameworks_are_imported_when_needed_and_missing_ones_named():
    """One process, because each has to import torch."""
    code = """
import importlib, sys
import afa_kernels, afa_kernels.callbacks
frameworks = ("transformers", "peft", "lightning", "pytorch_lightning")
print([name for name in frameworks if name in sys.modules])
for name in frameworks:
    sys.modules[name] = None
for module in ("callbacks.trainer", "callbacks.lightning", "peft"):
    try:
        importlib.import_module(f"afa_kernels.{module}")
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, *errors = done.stdout.splitlines()
    assert loaded == "[]"
    for extra, error in zip(("hf", "lightning", "peft"), errors, strict=True):
        assert f"pip install 'afa-kernels[{extra}]'" in error


def test_a_peft_without_variants_is_refused(monkeypatch):
    import peft

    from afa_kernels.peft._version import require_peft

    monkeypatch.setattr(peft, "__version__", "0.16.0")
    with pytest.raises(ImportError, match=r"needs PEFT 0.17 or later, found 0.16.0"):
        require_peft()


def test_the_frozen_weights_are_untouched(tmp_path):
    model = adapted()
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer(model, tmp_path, AnnealCallback(), max_steps=2).train()
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value), name


def test_a_finished_adapter_stays_finished(tmp_path):
    model, recorder = adapted(), Recorder()
    afa.set_alpha_t(model, 0.0)
    callback = AnnealCallback()
    with pytest.warns(UserWarning, match="'default' is finished and stays at alpha_t = 0, where the schedule is at 1"):
        trainer(model, tmp_path, callback, recorder).train()
    assert recorder.in_steps == [0.0] * 4 and callback.alpha_t == 0.0
    assert set(recorder.logged[:-1]) == {0.0}


def test_an_adapter_goes_on_where_it_stands(tmp_path):
    """A second phase: with the configuration's schedule the adapter would jump."""
    model, recorder = adapted(), Recorder()
    afa.set_alpha_t(model, 0.5)
    with pytest.warns(UserWarning, match="'default' stands at 0.5 in .*q_proj .* jumps to 1, .* start=0.5"):
        trainer(model, tmp_path, AnnealCallback()).train()
    afa.set_alpha_t(model, 0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="alpha_t")
        trainer(model, tmp_path, AnnealCallback(start=0.5, end_frac=1.0), recorder).train()
    assert recorder.in_steps == [0.5, 0.375, 0.25, 0.125]


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"max_steps": 8}, "the schedule total_steps=4, and this training has total_steps=8"),
        ({"activation": "gelu"}, {}, r"the activations \['silu'\], and this training has \['gelu'\]"),
        ({"anneal": "cosine"}, {}, "the schedule kind='linear', and this training has kind='cosine'"),
    ],
    ids=["longer", "activation", "schedule"],
)
def test_what_differs_from_the_checkpoint_is_said(tmp_path, options, arguments, message):
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer(adapted(anneal_end_frac=1.0), tmp_path, AnnealCallback(), **saving).train()
    checkpoint = os.path.join(tmp_path, "checkpoint-2")
    model = adapted(anneal_end_frac=1.0, **options)
    resumed = trainer(model, tmp_path / "on", AnnealCallback(), **(saving | arguments))
    with pytest.warns(UserWarning) as caught:
        resumed.train(resume_from_checkpoint=checkpoint)
    said = [str(warning.message) for warning in caught]
    assert any(re.search("resume: the checkpoint was saved with " + message, each) for each in said), said
    jumps = [each for each in said if "stands at 0.5" in each and "jumps to 0.75" in each]
    assert len(jumps) == ("max_steps" in arguments)


def test_a_resumed_adapter_that_is_finished_stays_so(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer(adapted(anneal_end_frac=0.5), tmp_path, AnnealCallback(), **saving).train()
    recorder = Recorder()
    longer = trainer(adapted(anneal_end_frac=0.5), tmp_path / "on", AnnealCallback(), recorder, max_steps=8)
    with pytest.warns(UserWarning, match="'default' is finished and stays at .*, where the schedule is at 0.25"):
        longer.train(resume_from_checkpoint=os.path.join(tmp_path, "checkpoint-3"))
    assert recorder.in_steps == [0.0] * 5


def test_an_injected_model_is_not_saved_in_files_that_nothing_reads(tmp_path):
    model = afa.inject(llama(), r=4)
    run = trainer(model, tmp_path / "run", AnnealCallback(), save_strategy="steps", save_steps=2, max_steps=2)
    run.train()
    again = trainer(afa.inject(llama(), r=4), tmp_path / "again", AnnealCallback(), max_steps=2)
    again.train(resume_from_checkpoint=os.path.join(tmp_path, "run", "checkpoint-2"))
    torch.testing.assert_close(logits(again.model), logits(model))
    afa.merge(model)
    for save in (run.save_model, copy.deepcopy(model).save_pretrained):
        with pytest.raises(ValueError, match="save_pretrained: the model has AFA layers.*save_adapter"):
            save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    wanted = logits(model)
    afa.unload(model).save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "saved")), wanted)
