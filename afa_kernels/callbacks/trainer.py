"""The callback for transformers.Trainer and the trainers built on it (TRL's)."""

from collections.abc import Callable
from typing import Any

from afa_kernels.alpha_t import places_of
from afa_kernels.callbacks.annealer import Annealer
from afa_kernels.operator import checks

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ImportError("AnnealCallback needs transformers: pip install 'afa-kernels[hf]'") from error


# Set on the arguments of a trainer that generates from the adapter instead of merged weights (afa_kernels.vllm.trl).
SERVES_ADAPTERS = "afa_serves_adapters"
_SAVED = "afa_kernels"  # where trainer_state.json has what Annealer.state() returns


class AnnealCallback(TrainerCallback):
    """Anneals alpha_t over a training: ``Trainer(..., callbacks=[AnnealCallback()])``.

    alpha_t is a function of the optimizer step alone, so gradient accumulation does not change it,
    a run resumed from a checkpoint continues where it was, and all ranks agree without talking. It
    is set before the first step and after each one; a checkpoint of step n holds alpha_t(n). It is
    logged as ``alpha_t``.

    Args:
        schedule: an :class:`afa_kernels.AnnealSchedule` or a function of the optimizer step; by
            default one is made for ``max_steps`` (computed from the epochs if need be), from
            ``options`` or else from the model's :class:`afa_kernels.peft.AFALoraConfig`.
        finish: when training stops before ``alpha_t = 0``, early for example: ``"force"`` sets it
            to 0 and warns that this changes the function; ``"warn"`` leaves it and warns.
        merge: merge the branches into the frozen weights when training ends.
        activation: where a framework made plain LoRA adapters, give those that will be annealed this activation before
            training begins (:func:`afa_kernels.peft.add_activation`). By default the model has annealed layers.
        adapter: anneal this adapter alone, and log ``alpha_t/NAME``: one callback for each adapter of a model whose
            batches are mixed. By default all adapters, and in a PEFT model the active ones.
        **options: arguments of :class:`afa_kernels.AnnealSchedule` without ``total_steps``.

    A finished adapter, at alpha_t = 0, stays so. An adapter that stands elsewhere than the schedule, and a checkpoint
    that was saved with another schedule or activation, give a warning that says how to mean it; ``trainer_state.json``
    has what is compared. With ``load_best_model_at_end`` the best checkpoint's own alpha_t comes back before ``finish``
    applies.

    Raises:
        TypeError, ValueError: an argument does not fit, or (when the trainer is made) it generates with vLLM from a
            branch that is not linear yet.
    """

    def __init__(
        self,
        schedule: Callable[[int], float] | None = None,
        *,
        finish: str = "force",
        merge: bool = False,
        activation: str | None = None,
        adapter: str | None = None,
        **options: Any,
    ):
        if activation is not None:
            checks.options(activation, 1.0, 0.0, None)
        self._annealer = Annealer(schedule, finish, merge, options, adapter)
        self._activation = activation
        self._adapted = None  # the model that has the activation

    @property
    def alpha_t(self) -> float | None:
        """The current value; None before training."""
        return self._annealer.alpha_t

    def attach(self, trainer) -> "AnnealCallback":
        """Put this callback before all others of ``trainer``, so that those that report to
        trackers see ``alpha_t`` in what they log. Given as ``callbacks=`` it comes after them, and
        ``alpha_t`` is in ``log_history`` and on the console only."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._add_activation(model)  # before the optimizer and what wraps or shards the model
        self._refuse_vllm(args, model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._add_activation(model)  # of a callback that came to a finished trainer
        self._refuse_vllm(args, model)
        saved = state.stateful_callbacks.get(_SAVED, {}).get(self._annealer.key)
        self._annealer.begin(model, state.max_steps, state.global_step, saved)
        self._save(state)

    def on_step_end(self, args, state, control, **kwargs):
        self._annealer.set_step(state.global_step)
        self._save(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.alpha_t is None:
            return
        if logs is not None:
            logs[self._annealer.key] = self.alpha_t
        if state.log_history:
            state.log_history[-1][self._annealer.key] = self.alpha_t

    def on_train_end(self, args, state, control, **kwargs):
        best = _best_step(state) if args.load_best_model_at_end else None
        if best is None:
            self._annealer.end(f"training ended after {state.global_step} optimizer steps")
        else:
            self._annealer.set_step(best)
            self._annealer.end(f"the best checkpoint is the one after {best} optimizer steps")

    def _save(self, state) -> None:
        state.stateful_callbacks.setdefault(_SAVED, {})[self._annealer.key] = self._annealer.state()

    def _refuse_vllm(self, args, model) -> None:
        if not getattr(args, "use_vllm", False) or getattr(args, SERVES_ADAPTERS, False):
            return
        above = [place for place in places_of(model, self._annealer.adapter) if place.state.alpha_t != 0.0]
        if above:
            raise ValueError(
                f"use_vllm: vLLM would generate from merged weights, and at alpha_t = {above[0].state.alpha_t:g} no "
                "weight equals the branch; use afa_kernels.vllm.trl.GRPOTrainer, which gives vLLM the adapter, or "
                "train with use_vllm=False until alpha_t is 0"
            )

    def _add_activation(self, model) -> None:
        if self._activation is not None and self._adapted is not model:
            from afa_kernels.peft import add_activation

            add_activation(model, self._activation, adapter=self._annealer.adapter)
            self._adapted = model


def _best_step(state) -> int | None:
    """Return the optimizer step of the best checkpoint; transformers before 4.51 has it in the name
    of the folder only."""
    step = getattr(state, "best_global_step", None)
    if step is None and state.best_model_checkpoint:
        number = state.best_model_checkpoint.rpartition("-")[2]
        step = int(number) if number.isdecimal() else None
    return step
