"""Settings of ``sft.py``: a YAML file, overridden by flags."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

import afa_kernels as afa
from experiments.harness.adaptation import METHODS

TASKS = ("lm", "classification")
_OPTIONAL_COUNTS = ("keep_layers", "test_examples")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Everything that a run of ``sft.py`` depends on."""

    task: str = _setting("lm", "lm or classification")
    model: str | None = _setting(None, "Hugging Face id or folder; default: the small model of the task")
    data: str | None = _setting(None, "Hugging Face id, file or folder; default: text of this Python")
    keep_layers: int | None = _setting(None, "only the first layers of an encoder, for classification; default: all")
    text_column: str = _setting("text", "of --data")
    label_column: str = _setting("label", "of --data, for classification")
    methods: tuple[str, ...] = _setting(tuple(METHODS), "what is compared")
    seeds: int = _setting(5, "runs of each method, seeds 0, 1, ...")
    steps: int = _setting(150, "optimizer steps")
    batch_size: int = _setting(8, "samples in a step, over all processes")
    length: int = _setting(128, "tokens of a sample at most")
    evaluate_every: int = _setting(15, "steps between the points of the curve")
    curve_examples: int = _setting(64, "validation samples of a point of the curve")
    test_examples: int | None = _setting(None, "test samples of the final score; default: all")
    r: int = _setting(2, "rank of the adapters")
    lora_alpha: float = _setting(4.0, "their scale is lora_alpha / r")
    target_modules: str = _setting("all-linear", "what the adapters adapt, as in afa_kernels.inject")
    schedule: str = _setting("linear", "kind of afa_kernels.AnnealSchedule")
    schedule_options: dict[str, float] = field(default_factory=dict, metadata={"help": "its option, in the file only"})
    anneal_end_frac: float = _setting(0.6, "of the steps, where alpha_t reaches 0")
    warmup_frac: float = _setting(0.1, "of the steps, where the learning rate rises")
    decay_from_frac: float = _setting(0.6, "of the steps, from where the learning rate falls")
    head_learning_rate: float = _setting(1e-2, "of a new head, in every method that trains more")
    learning_rates: dict[str, float] = field(default_factory=dict, metadata={"help": "peak of each method"})
    grids: dict[str, list[float]] = field(default_factory=dict, metadata={"help": "tried by --tune, in the file only"})
    tuning_seed: int = _setting(1000, "of --tune, no seed of the comparison")
    tuning_seeds: int = _setting(1, "of --tune, from --tuning-seed on; rates are chosen by the mean score")
    bf16: bool = _setting(False, "bfloat16 autocast; what is frozen is stored in bfloat16")
    checkpoint_every: int = _setting(50, "steps between checkpoints of an unfinished run")
    output: str = _setting("outputs/sft", "folder of all results")

    def __post_init__(self):
        _check(self)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"methods": list(self.methods)}


def read(file: Path, kind: type[Settings] = Settings, **overrides: Any) -> Settings:
    """Return the settings of a YAML file, with ``overrides`` in place of what it says; ``kind`` is their class.

    Raises:
        ValueError: the file is missing or no mapping, has an unknown entry, or a value does not fit.
    """
    if not file.is_file():
        raise ValueError(f"config: no file {file}")
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config: {file} is no YAML: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"config: expected entries such as 'steps: 100' in {file}, got {type(entries).__name__}")
    return make(entries | overrides, kind)


def make(entries: dict[str, Any], kind: type[Settings] = Settings) -> Settings:
    """Return the settings with these entries; others have their defaults.

    Raises:
        ValueError: as in :func:`read`.
    """
    defaults = kind()
    unknown = sorted(set(entries) - set(asdict(defaults)))
    if unknown:
        raise ValueError(f"{unknown[0]}: unknown setting; known are {', '.join(asdict(defaults))}")
    typed = {name: _typed(name, value, getattr(defaults, name)) for name, value in entries.items()}
    return replace(defaults, **typed)


def _typed(name: str, value: Any, default: Any) -> Any:
    """Return ``value`` in the type of the setting. YAML reads 1e-3 as text: numbers may come so."""
    if name in ("learning_rates", "grids", "schedule_options") and not isinstance(value, dict):
        raise ValueError(f"{name}: expected a mapping, got {value!r}")
    if name == "methods":
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"methods: expected a list, got {value!r}")
        return tuple(value)
    if name == "learning_rates":
        return {method: _number(name, rate) for method, rate in value.items()}
    if name == "grids":
        return {method: [_number(name, rate) for rate in rates] for method, rates in value.items()}
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        return value
    if isinstance(default, float):
        return _number(name, value)
    if isinstance(default, int) or name in _OPTIONAL_COUNTS:
        if (value is not None or default is not None) and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name}: expected a whole number, got {value!r}")
        return value
    if isinstance(default, str) and not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None


def _check(s: Settings) -> None:
    def expect(name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ValueError(f"{name}: expected {wanted}, got {getattr(s, name)!r}")

    expect("task", s.task in TASKS, f"one of {', '.join(TASKS)}")
    known = f"some of {', '.join(METHODS)}"
    expect("methods", bool(s.methods) and set(s.methods) <= set(METHODS), known)
    expect("learning_rates", set(s.learning_rates) <= set(METHODS), f"rates of {known}")
    expect("grids", set(s.grids) <= set(METHODS), f"grids of {known}")
    expect("learning_rates", all(rate > 0 for rate in s.learning_rates.values()), "positive rates")
    for name in (
        "seeds",
        "steps",
        "batch_size",
        "evaluate_every",
        "curve_examples",
        "r",
        "checkpoint_every",
        "tuning_seeds",
    ):
        expect(name, getattr(s, name) >= 1, "at least 1")
    expect("length", s.length >= 2, "at least 2 tokens")
    for name in _OPTIONAL_COUNTS:
        expect(name, getattr(s, name) is None or getattr(s, name) >= 1, "at least 1")
    expect("keep_layers", s.keep_layers is None or s.task == "classification", "nothing but for classification")
    expect("warmup_frac", 0 <= s.warmup_frac <= 1, "a fraction in [0, 1]")
    expect("decay_from_frac", 0 <= s.decay_from_frac <= 1, "a fraction in [0, 1]")
    expect("head_learning_rate", s.head_learning_rate > 0, "a positive rate")
    expect("tuning_seed", not 0 <= s.tuning_seed < s.seeds, f"a seed that the {s.seeds} runs do not use")
    afa.AnnealSchedule(s.steps, s.schedule, end_frac=s.anneal_end_frac, **s.schedule_options)  # says what does not fit


def add_flags(parser: argparse.ArgumentParser, kind: type[Settings] = Settings) -> None:
    """Add ``--config`` and a flag for every setting that is no mapping."""
    parser.add_argument("--config", type=Path, help="YAML file; flags override it")
    for item in fields(kind):
        flag = f"--{item.name.replace('_', '-')}"
        if item.default is MISSING:
            continue
        help_text = item.metadata["help"] + ("" if item.default is None else f" ({item.default})")
        if item.name == "methods":
            help_text = f"{item.metadata['help']}: {', '.join(METHODS)} (all)"
            parser.add_argument(flag, nargs="+", choices=list(METHODS), metavar="METHOD", help=help_text)
        elif item.default is False:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        else:
            value = int if item.name in _OPTIONAL_COUNTS else type(item.default) if item.default is not None else str
            parser.add_argument(flag, type=value, help=help_text)
    parser.add_argument(
        "--learning-rate", nargs="+", default=[], metavar="METHOD=RATE", help="peak learning rates, such as lora=3e-3"
    )


def from_flags(chosen: argparse.Namespace, kind: type[Settings] = Settings) -> Settings:
    """Return the settings of the parsed flags.

    Raises:
        ValueError: as in :func:`read`.
    """
    names = [item.name for item in fields(kind)]
    given = {name: getattr(chosen, name) for name in names if getattr(chosen, name, None) is not None}
    settings = read(chosen.config, kind, **given) if chosen.config else make(given, kind)
    return replace(settings, learning_rates=settings.learning_rates | _rates(chosen.learning_rate))


def _rates(pairs: Sequence[str]) -> dict[str, float]:
    rates = {}
    for pair in pairs:
        method, separator, rate = pair.partition("=")
        if not separator:
            raise ValueError(f"learning_rate: expected METHOD=RATE, got {pair!r}")
        rates[method] = _number("learning_rate", rate)
    return rates
