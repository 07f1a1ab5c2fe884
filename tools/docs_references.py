"""Turns the references of docstrings, ``:func:`afa_lora```, into links of the site."""

import re
from functools import lru_cache

import griffe

from tools.docs_site import public_names

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([\w.]+)`")


class References(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_others: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)


def _link(role: re.Match) -> str:
    name = role[1].rpartition(".")[2]
    address = _addresses().get(name)
    return f"`{role[1]}`" if address is None else f"[`{name}`][{address}]"


@lru_cache
def _addresses() -> dict[str, str]:
    """Return the full name of each public name."""
    return {full.rpartition(".")[2]: full for names in public_names().values() for full in names}
