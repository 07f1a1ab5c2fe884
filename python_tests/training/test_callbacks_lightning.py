"""LightningAnnealCallback in real runs of Lightning's Trainer."""

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

import lightning.pytorch as lightning

import afa_kernels as afa
from afa_kernels.callbacks import LightningAnnealCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning",
    "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning",
    "ignore:.*The `srun` command",
)


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = afa.inject(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)), r=4)
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(self.net[0].alpha_t)
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def data():
    """Eight equal batches: Lightning begins a resumed epoch with the first again."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).repeat(8, 1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.sin(x[:, :2])), batch_size=4)


def fit(folder, *callbacks, module=None, ckpt_path=None, **options):
    module = module or Regression()
    trainer = lightning.Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **options,
    )  # fmt: skip
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return trainer, module


def test_alpha_follows_optimizer_steps_and_the_model_merges(tmp_path):
    trainer, module = fit(tmp_path, LightningAnnealCallback(merge=True), max_steps=5)
    assert module.seen == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert trainer.callback_metrics["alpha_t"] == 0.0
    assert module.net[0].merged and module.net[2].merged
    x = torch.randn(3, 8)
    merged = module.net(x)
    torch.testing.assert_close(afa.unload(module.net)(x), merged)


def test_accumulated_batches_are_one_step_and_epochs_give_the_length(tmp_path):
    callback = LightningAnnealCallback(end_frac=1.0)
    _, module = fit(tmp_path, callback, max_epochs=2, accumulate_grad_batches=4)
    assert module.seen == [value for value in (1.0, 0.75, 0.5, 0.25) for _ in range(4)]


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    checkpoint = tmp_path / "middle.ckpt"

    class SaveAt(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(checkpoint)

    _, whole = fit(tmp_path, LightningAnnealCallback(end_frac=1.0), SaveAt(), max_steps=6)
    callback = LightningAnnealCallback(end_frac=1.0)
    _, resumed = fit(tmp_path, callback, max_steps=6, ckpt_path=checkpoint)
    assert whole.seen == pytest.approx([1 - i / 6 for i in range(6)])
    assert resumed.seen == whole.seen[3:]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


def test_an_early_stop_is_forced_to_identity_with_a_warning(tmp_path):
    class StopAt(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 2

    with pytest.warns(UserWarning, match="ended after 2 optimizer steps, at alpha_t = 0.5"):
        _, module = fit(
            tmp_path, LightningAnnealCallback(end_frac=1.0), StopAt(), max_epochs=2,
            limit_train_batches=2,
        )  # fmt: skip
    assert module.net[0].alpha_t == 0.0


def test_a_training_of_unknown_length_needs_a_schedule(tmp_path):
    with pytest.raises(ValueError, match="the length of the training is unknown; set max_steps"):
        fit(tmp_path, LightningAnnealCallback(), max_epochs=-1)


def test_a_peft_model_is_driven_too(tmp_path):
    peft = pytest.importorskip("peft")
    from afa_kernels.peft import AFALoraConfig

    module = Regression()
    config = AFALoraConfig(target_modules=["0", "2"], r=4, anneal="cosine", anneal_end_frac=0.5)
    adapted = peft.get_peft_model(afa.unload(module.net), config)
    module.net = adapted.base_model.model
    fit(tmp_path, LightningAnnealCallback(), module=module, max_steps=4)
    assert module.seen == pytest.approx([1.0, 0.5, 0.0, 0.0])
    x = torch.randn(3, 8)
    y = module.net(x)
    torch.testing.assert_close(adapted.merge_and_unload()(x), y)


class Several(Regression):
    def __init__(self):
        super().__init__()
        afa.inject(afa.unload(self.net), adapters={"a": {}, "b": {}}, r=4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(tuple(branch.alpha_t for branch in self.net[0].adapters.values()))
        with afa.adapters_of(self.net, ["a", "b", "b", "a"]):
            return nn.functional.mse_loss(self.net(x), y)


def test_each_adapter_has_its_callback(tmp_path):
    callbacks = [LightningAnnealCallback(adapter="a", end_frac=1.0), LightningAnnealCallback(adapter="b", end_frac=0.5)]
    trainer, module = fit(tmp_path, *callbacks, module=Several(), max_steps=4)
    assert module.seen == [(1.0, 1.0), (0.75, 0.5), (0.5, 0.0), (0.25, 0.0)]
    assert trainer.callback_metrics["alpha_t/a"] == trainer.callback_metrics["alpha_t/b"] == 0.0
