"""The native CPU kernels for every instruction set, and the cap that makes a machine of a lesser kind."""

import os
import subprocess
import sys

import pytest
from helpers import run_on_isa

from afa_kernels.backend import compiled, cpu

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(not cpu.BACKEND.status(), reason=cpu.BACKEND.status().reason),
]


ISAS = compiled._C.cpu_isas() if cpu.BACKEND.status() else []
FEATURES = {"generic": set(), "avx2": {"avx2"}, "avx512": {"avx2", "avx512", "avx512_halved"}}
FEATURES["avx512bf16"] = FEATURES["avx512"] | {"avx512_bf16"}
FEATURES["amx"] = FEATURES["avx512bf16"] | {"amx_tile", "amx_bf16"}
FEATURES["neon"] = {"neon"}
FEATURES["neonbf16"] = {"neon", "neon_bf16"}


@pytest.mark.long
@pytest.mark.parametrize("isa", ISAS)
def test_the_cap_makes_a_machine_of_that_kind(isa):
    best = ISAS.index(isa) + 1
    run_on_isa(
        isa,
        "import afa_kernels\nfrom afa_kernels.backend import compiled\n"
        f"assert compiled._C.cpu_isas() == {ISAS[:best]!r}, compiled._C.cpu_isas()\n"
        "assert afa_kernels.backends()['cpu'].details['isas'] == compiled._C.cpu_isas()\n"
        "features = set(compiled._C.cpu_features())\n"
        f"assert features <= {FEATURES[isa]!r}, features\n"
        f"assert {isa!r} in ('generic', 'avx512bf16', 'amx', 'neonbf16') or {isa!r} in features, features\n",
    )


@pytest.mark.long
@pytest.mark.parametrize("name", ["mmx", "amx", "neonbf16"])
def test_impossible_instruction_set_is_an_error(name):
    if name != "mmx" and (name in ISAS or os.environ.get("AFA_CPU_ISA")):
        pytest.skip("this machine has it, or a cap hides whether it has")
    script = (
        "from afa_kernels.backend import cpu, compiled\nstatus = cpu.BACKEND.status()\n"
        f"assert not status and {name!r} in status.reason and 'generic' in status.reason, status\n"
        "try:\n    compiled._C.cpu_isas()\n"
        f"except ValueError as error:\n    assert {name!r} in str(error), error\n"
        "else:\n    raise AssertionError('no error')\n"
    )
    environment = os.environ | {"AFA_CPU_ISA": name}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
