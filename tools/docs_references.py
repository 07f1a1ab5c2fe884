"""Turns the references of docstrings, ``:func:`afa_lora```, into links of the site."""

import re

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([\w.]+)`")


class References(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_others: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)


def _link(role: re.Match) -> str:
    name = role[1].removeprefix("afa_kernels.")
    return f"[`{name}`][afa_kernels.{name}]" if name in _public() else f"`{role[1]}`"


def _public() -> set[str]:
    from tools.docs_site import public_names

    return {name.removeprefix("afa_kernels.") for names in public_names().values() for name in names}
