"""AnnealSchedule: exact ends, every kind, resuming, and clear errors."""

import copy
import math
import pickle
import warnings
from math import e as E

import pytest
from torch import nn

import afa_kernels as afa
from afa_kernels.schedule import KINDS

pytestmark = pytest.mark.fast


def linear_layers(count=2):
    return nn.Sequential(*(afa.AFALinear(nn.Linear(4, 4), r=2) for _ in range(count)))


@pytest.mark.parametrize("kind", [*KINDS, lambda p: 1 - p**3], ids=[*KINDS, "callable"])
@pytest.mark.parametrize(
    ("begin_frac", "end_frac"),
    [(0.0, 0.8), (0.1, 0.7), (0.0, 1.0), (0.35, 0.95), (0.5, 0.5), (0.0, 0.55)],
)
def test_every_kind_reaches_both_ends_exactly_and_never_rises(kind, begin_frac, end_frac):
    for total_steps in (1, 2, 7, 10, 100):
        for start, end in ((1.0, 0.0), (0.9, 0.2)):
            sched = afa.AnnealSchedule(total_steps, kind, start, end, begin_frac=begin_frac, end_frac=end_frac)
            values = [sched(step) for step in range(total_steps + 3)]
            for step, value in enumerate(values):
                # 0.55 * 100 is 55.00000000000001, and step 55 must be the end.
                if step >= end_frac * total_steps - 1e-9:
                    assert value == end
                elif step <= begin_frac * total_steps:
                    assert value == start
                assert end <= value <= start
            assert all(a >= b for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize(
    ("kind", "options", "progress", "expected"),
    [
        ("linear", {}, 0.25, 0.75),
        ("cosine", {}, 0.25, 0.5 * (1 + math.cos(math.pi / 4))),
        ("exponential", {"sharpness": 3}, 0.5, (E**-1.5 - E**-3) / (1 - E**-3)),
        ("polynomial", {"power": 3}, 0.5, 0.125),
        ("sigmoid", {}, 0.5, 0.5),
        ("step", {"steps": 4}, 0.49, 0.75),
        ("step", {"steps": 4}, 0.50, 0.5),
        ("constant", {}, 0.99, 1.0),
        (lambda p: p * p, {}, 0.5, 0.25),
    ],
)  # fmt: skip
def test_kinds_follow_their_formula(kind, options, progress, expected):
    sched = afa.AnnealSchedule(1000, kind, end_frac=1.0, **options)
    assert sched(round(1000 * progress)) == pytest.approx(expected, abs=1e-12)


def test_start_and_end_scale_the_blend():
    sched = afa.AnnealSchedule(100, "linear", start=0.8, end=0.4, begin_frac=0.2, end_frac=0.6)
    assert sched(40) == pytest.approx(0.6)


def test_alpha_may_rise():
    sched = afa.AnnealSchedule(10, "cosine", start=0.0, end=1.0)
    values = [sched(step) for step in range(11)]
    assert values[0] == 0.0 and values[-1] == 1.0 and values == sorted(values)


def test_step_drives_every_attached_layer():
    model, other = linear_layers(2), linear_layers(1)
    sched = afa.AnnealSchedule(10)
    sched.attach(model)
    sched.attach(other)
    for step in range(1, 12):
        returned = sched.step()
        assert sched.current_step == step
        assert returned == sched.alpha_t == sched(step)
        for layer in (*model, *other):
            assert layer.alpha_t == sched(step)
            assert layer.alpha_t_buffer.item() == pytest.approx(sched(step), abs=1e-7)
    assert all(layer.alpha_t == 0.0 for layer in model)


def test_attach_writes_the_current_value_and_keeps_no_model_alive():
    sched = afa.AnnealSchedule(10)
    sched.step()
    sched.step()
    model = linear_layers(1)
    sched.attach(model)
    assert model[0].alpha_t == sched(2) == 0.75
    del model
    sched.step()
    assert len(sched._layers) == 0


@pytest.mark.parametrize("saved_at", [0, 3, 8, 12])
def test_resuming_gives_the_same_sequence(saved_at):
    def make():
        model = linear_layers(1)
        return model, afa.AnnealSchedule(12, "sigmoid", sharpness=7).attach(model)

    model, sched = make()
    sequence = []
    for step in range(14):
        if step == saved_at:
            saved = pickle.loads(pickle.dumps((model.state_dict(), sched.state_dict())))
        sequence.append(model[0].alpha_t)
        sched.step()

    model, sched = make()
    model.load_state_dict(saved[0])
    sched.load_state_dict(saved[1])
    resumed = []
    for _ in range(saved_at, 14):
        resumed.append(model[0].alpha_t)
        sched.step()
    assert resumed == sequence[saved_at:]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"total_steps": 11}, "total_steps"),
        ({"kind": "cosine"}, "kind"),
        ({"kind": "polynomial", "power": 3}, "options"),
        ({"end_frac": 0.7}, "end_frac"),
        ({"kind": lambda p: 1 - p}, "kind"),
    ],
)
def test_a_state_of_another_schedule_is_refused(other, named):
    ours = {"total_steps": 10, "kind": "polynomial"}
    sched = afa.AnnealSchedule(**ours)
    sched.step()
    with pytest.raises(ValueError, match=named):
        sched.load_state_dict(afa.AnnealSchedule(**{**ours, **other}).state_dict())
    assert sched.current_step == 1


def test_a_callable_is_not_stored_but_its_step_is():
    sched = afa.AnnealSchedule(10, lambda p: 1 - p)
    sched.step()
    state = sched.state_dict()
    assert state["kind"] == "callable"
    again = afa.AnnealSchedule(10, lambda p: 1 - p)
    again.load_state_dict(state)
    assert again.current_step == 1


@pytest.mark.parametrize("state", [{}, {"step": 1}])
def test_a_foreign_state_is_refused(state):
    with pytest.raises(ValueError, match="missing"):
        afa.AnnealSchedule(10).load_state_dict(state)


def test_a_negative_step_in_a_state_is_refused():
    sched = afa.AnnealSchedule(10)
    with pytest.raises(ValueError, match="step"):
        sched.load_state_dict({**sched.state_dict(), "step": -1})


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"total_steps": 0}, ValueError, "total_steps.*got 0"),
        ({"total_steps": 2.5}, TypeError, "total_steps"),
        ({"total_steps": True}, TypeError, "total_steps"),
        ({"kind": "quadratic"}, ValueError, "kind.*linear, cosine.*'quadratic'"),
        ({"kind": 3}, TypeError, "kind"),
        ({"start": 1.5}, ValueError, "start.*1.5"),
        ({"end": float("nan")}, ValueError, "end.*nan"),
        ({"begin_frac": -0.1}, ValueError, "begin_frac"),
        ({"end_frac": 1.01}, ValueError, "end_frac"),
        ({"begin_frac": 0.9, "end_frac": 0.8}, ValueError, "begin_frac.*0.9"),
        ({"begin_frac": "0"}, TypeError, "begin_frac"),
        ({"kind": "polynomial", "power": 0}, ValueError, "power"),
        ({"kind": "polynomial", "power": "2"}, TypeError, "power"),
        ({"kind": "step", "steps": 2.5}, TypeError, "steps"),
        ({"kind": "sigmoid", "sharpness": 1e6}, ValueError, "sharpness"),
        ({"kind": "linear", "power": 2}, TypeError, "power"),
        ({"kind": lambda p: p, "power": 2}, TypeError, "power"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, named):
    with pytest.raises(error, match=named):
        afa.AnnealSchedule(**{"total_steps": 10, **arguments})


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), "half", None, True])
def test_a_callable_outside_its_range_is_named(value):
    with pytest.raises(ValueError, match="kind.*at step 3"):
        afa.AnnealSchedule(10, lambda p: value)(3)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_a_wrong_step_is_named(step, error):
    with pytest.raises(error, match="step"):
        afa.AnnealSchedule(10)(step)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="set_alpha_t"):
        afa.AnnealSchedule(10).attach(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["exponential", "sigmoid"])
@pytest.mark.parametrize("sharpness", [1e-3, 500.0])
def test_extreme_sharpness_stays_finite(kind, sharpness):
    sched = afa.AnnealSchedule(100, kind, end_frac=1.0, sharpness=sharpness)
    values = [sched(step) for step in range(101)]
    assert values[0] == 1.0 and values[-1] == 0.0
    assert all(0.0 <= v <= 1.0 for v in values)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_of_a_schedule_continues_alone(duplicate):
    model = linear_layers(1)
    sched = afa.AnnealSchedule(10, "polynomial", power=3).attach(model)
    sched.step()
    copied = duplicate(sched)
    value = model[0].alpha_t
    copied.step()
    assert model[0].alpha_t == value
    assert copied.alpha_t == sched.step()


def test_an_adapter_that_stands_elsewhere_jumps_with_a_warning():
    model = linear_layers(2)
    afa.set_alpha_t(model, 0.4)
    with pytest.warns(UserWarning, match=r"stands at 0.4 in 0 \(and 1 others\) and jumps to 1, .*start=0.4"):
        afa.AnnealSchedule(20).attach(model)
    assert model[0].alpha_t == 1.0


def test_a_finished_adapter_is_left_alone():
    model = linear_layers(2)
    afa.set_alpha_t(model, 0.0)
    with pytest.warns(UserWarning, match="is finished and stays at alpha_t = 0, where the schedule is at 1"):
        schedule = afa.AnnealSchedule(20).attach(model)
    schedule.step()
    assert [layer.alpha_t for layer in model] == [0.0, 0.0]


def test_a_loaded_adapter_is_not_new():
    saved, model = linear_layers(1), linear_layers(1)
    afa.set_alpha_t(saved, 0.4)
    model.load_state_dict(saved.state_dict())
    with pytest.warns(UserWarning, match="stands at 0.4 in 0 and jumps to 1"):
        afa.AnnealSchedule(20).attach(model)


def test_going_on_where_an_adapter_stands_says_nothing():
    model, new = linear_layers(1), linear_layers(1)
    afa.set_alpha_t(model, 0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        afa.AnnealSchedule(20, start=0.4).attach(model)
        afa.AnnealSchedule(20, start=0.7).attach(new)  # nobody has said where it stands
        resumed = afa.AnnealSchedule(20)
        resumed.load_state_dict(afa.AnnealSchedule(20).state_dict() | {"step": 10})
        afa.set_alpha_t(model, 0.375)
        resumed.attach(model)
    assert model[0].alpha_t == 0.375
