"""Steps that end as steps on a GPU may, for the tests of tools/gpu_check.py."""

import ctypes
import resource
import subprocess
import time

from tools.gpu_check import Absent, run_step

_LIMIT = 4 << 30


def fine(card):
    yield {"what": 1}
    yield {"what": 2, "more": "a|b"}


def wrong(card):
    yield {"what": "right"}
    yield {"what": "other", "fault": "0.5 is not 0.25"}


def raises(card):
    yield {"what": "before"}
    raise RuntimeError("an illegal memory access was encountered")


def crashes(card):
    yield {"what": "before"}
    ctypes.string_at(0)


def hangs(card):
    """With a process of its own, which outlives one that is only terminated."""
    child = subprocess.Popen(["sleep", "600"])
    yield {"child": child.pid}
    print("waiting for a barrier", flush=True)
    time.sleep(600)


def fills_the_memory(card):
    yield {"what": "before"}
    resource.setrlimit(resource.RLIMIT_AS, (_LIMIT, _LIMIT))
    bytearray(2 * _LIMIT)


def absent(card):
    raise Absent("no such tool")
    yield


STEPS = {step.__name__: step for step in (fine, wrong, raises, crashes, hangs, fills_the_memory, absent)}

if __name__ == "__main__":
    raise SystemExit(run_step(STEPS, lambda: None))
