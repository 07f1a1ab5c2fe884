"""The subjects of the contract, as fixtures."""

import pytest

from adapters.subjects import SUBJECTS, Injected

# The first needs torch alone; the libraries of the others take seconds to import.
_ALL = [pytest.param(each, id=each.id, marks=pytest.mark.long if i else ()) for i, each in enumerate(SUBJECTS)]


@pytest.fixture(params=_ALL)
def subject(request):
    return request.param


@pytest.fixture(params=[each for each in _ALL if isinstance(each.values[0], Injected)])
def injected(request):
    """A subject whose layers are this package's: their state has alpha_t, and merging may keep the weight. The state of
    a model of PEFT is that of stock PEFT, and PEFT subtracts to unmerge."""
    return request.param
