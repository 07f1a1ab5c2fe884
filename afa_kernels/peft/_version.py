"""Which PEFT this integration works with."""

MINIMUM = (0, 17)


def require_peft() -> None:
    """Raise an ImportError that says what to install unless a PEFT that has LoRA variants is
    there."""
    wanted = f"afa_kernels.peft needs PEFT {MINIMUM[0]}.{MINIMUM[1]} or later"
    try:
        from peft import __version__ as found
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise  # PEFT is installed, but a package that it imports is missing
        raise ImportError(f"{wanted}: pip install 'afa-kernels[peft]'") from error
    if _release(found) < MINIMUM:
        raise ImportError(f"{wanted}, found {found}: its LoRA layers take no variants; pip install --upgrade peft")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
