"""cuda_report reads what the compiler says; each fault that it is there for is named."""

import pytest

from tools import cuda_report
from tools.sass import main_loops

MANGLED = "_ZN3afa17project_dy_kernelINS_4Bf16ELi64EEEvNS_15ProjectDyParamsE"
PTXAS = f"""\
ptxas info    : Compiling entry function '{MANGLED}' for 'sm_90'
ptxas info    : Function properties for {MANGLED}
    40 bytes stack frame, 16 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 70 registers, used 1 barriers, 440 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5otherv' for 'sm_90'
ptxas info    : Used 250 registers
"""
SASS = f"""\
\t\tFunction : {MANGLED}
        /*0130*/              @!P0 LDGSTS.E.BYPASS.128 [R3], [R4.64] ;   /* 0x000 */
        /*0140*/                   LDSM.16.M88.4 R8, [R2] ;              /* 0x000 */
        /*0150*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ; /* 0x000 */
        /*0160*/                   HMMA.16816.F32.BF16 R4, R8, R14, R4 ; /* 0x000 */
        /*0170*/                   ACQBULK ;                             /* 0x000 */
        /*0180*/                   LDG.E R4, [R2.64] ;                   /* 0x000 */
        /*1170*/              @P1  STL [R1], R4 ;                        /* 0x000 */
"""


SOUND = {"HMMA": 32, "LDGSTS": 16, "LDSM": 20, "ACQBULK": 1}


def sound_row(**changes):
    row = cuda_report.Row("90", "project", 64, "bf16", registers=70, register_budget=128)
    row.threads, row.shared_bytes, row.blocks_per_sm = 128, 50_000, 4
    row.opcodes, row.instructions = dict(SOUND), [187]
    for name, value in changes.items():
        setattr(row, name, value)
    return row


@pytest.mark.parametrize(
    "mangled, identity",
    [
        (MANGLED, ("project_dy", 64, "bf16")),
        (
            "_ZN3afa14project_kernelINS_4Fp16ELi16EEEvNS_13ProjectParamsE",
            ("project", 16, "fp16"),
        ),
        ("_ZN3afa8x_kernelINS_4Fp16ELi64EEEvNS_11OuterParamsE", ("x", 64, "fp16")),
        ("_ZN3afa13reduce_kernelINS_4Bf16EEEvNS_12ReduceParamsE", ("reduce", 0, "bf16")),
        ("_Z5otherv", None),
    ],
)
def test_kernels_are_recognised(mangled, identity):
    assert cuda_report.identify(mangled) == identity


def test_what_ptxas_says():
    rows = cuda_report.parse_ptxas(PTXAS, "90")
    assert list(rows) == [MANGLED]
    row = rows[MANGLED]
    assert (row.registers, row.stack, row.spill_bytes) == (70, 40, 44)


def test_instructions_are_counted():
    expected = {"HMMA": 2, "LDGSTS": 1, "LDSM": 1, "LDL": 0, "STL": 1, "ACQBULK": 1, cuda_report.EARLY: 1}
    assert cuda_report.count_opcodes(SASS) == {MANGLED: expected}


def test_a_sound_kernel_passes():
    row = sound_row()
    cuda_report.check(row)
    assert row.faults == []


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"spill_bytes": 44}, "44 bytes of spills"),
        ({"registers": 129}, "129 registers, budget 128"),
        ({"stack": 64}, "64 bytes of stack, budget 48"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory, the block gets 232448"),
        ({"blocks_per_sm": 0}, "no block fits an SM"),
        ({"instructions": [187, 20]}, "2 main loops, expected 1"),
        ({"opcodes": SOUND | {"HMMA": 0}}, "no HMMA in the SASS"),
        ({"opcodes": SOUND | {"LDGSTS": 0}}, "no LDGSTS in the SASS"),
        ({"opcodes": SOUND | {"ACQBULK": 0}}, "does not wait for the kernel before it, or touches memory first"),
        (
            {"opcodes": SOUND | {cuda_report.EARLY: 1}},
            "does not wait for the kernel before it, or touches memory first",
        ),
        ({"opcodes": SOUND | {"ACQBULK": 0}, "arch": "80"}, None),
    ],
)
def test_each_fault_is_named(changes, fault):
    row = sound_row(**changes)
    cuda_report.check(row)
    assert row.faults == ([fault] if fault else [])


def test_occupancy_is_the_scarcest_resource():
    plan = {"threads": 128, "stages": 2, "shared_bytes": 50_000, "registers": 240, "tile_bytes": 8192}
    row = sound_row(registers=121)
    cuda_report.add_launch(row, {("90", "project", 64): plan})
    assert row.blocks_per_sm == 4  # 65536 / (128 * 128), and 228 KB / (50000 + 1024) bytes
    row.registers = 240
    cuda_report.add_launch(row, {("90", "project", 64): plan})
    assert row.blocks_per_sm == 2 and row.occupancy == 256 / 2048
    assert row.register_budget == 240


def test_the_rate_that_instructions_allow():
    """8 KB for each 187 instructions of four warps, of which 132 x 4 schedulers issue half of one per cycle."""
    plan = {"threads": 128, "stages": 2, "shared_bytes": 50_000, "registers": 240, "tile_bytes": 8192}
    row = sound_row(kernel="forward", instructions=[187, 400])
    cuda_report.add_launch(row, {("90", "forward", 64): plan})
    # The second loop moves as much again, since it reads and writes y.
    assert row.rate == pytest.approx(min(8192 / 187, 2 * 8192 / 400) / 4 * 132 * 4 * 0.5 * 1.755e9)


def sass(*lines: str) -> str:
    """Return code as nvdisasm prints it, each line behind a label with its number."""
    return "".join(f".L_x_{i}:\n        /*{16 * i:04x}*/                   {line} ;\n" for i, line in enumerate(lines))


LOADS, PRODUCT = "LDGSTS.E.BYPASS.128 [R3], [R4.64]", "HMMA.16816.F32.BF16 R4, R8, R12, R4"
LOOPS = {
    "a path that is skipped, and one that has to be taken": (
        [
            "MOV R1, R2",
            "@P1 BRA `(.L_x_3)",
            "FMUL R1, R1, R1",
            "@P2 BRA `(.L_x_5)",
            LOADS,
            PRODUCT,
            "@P0 BRA `(.L_x_1)",
            "EXIT",
        ],
        [5],
    ),
    "an inner loop, passed once, and a store": (
        [LOADS, PRODUCT, "FADD R1, R1, R1", "@P1 BRA `(.L_x_2)", "STG.E.128 [R1.64], R4", "@P0 BRA `(.L_x_0)", "EXIT"],
        [6],
    ),
    "two, one behind the other, in a loop of their own": (
        [
            "MOV R1, R2",
            LOADS,
            PRODUCT,
            "@P0 BRA `(.L_x_1)",
            "MOV R1, R2",
            LOADS,
            "MOV R1, R2",
            PRODUCT,
            "@P0 BRA `(.L_x_5)",
            "@P2 BRA `(.L_x_0)",
            "EXIT",
        ],
        [3, 4],
    ),
    "a jump table": (
        [
            LOADS,
            'BRX R24 -0x10d0 (*"BRANCH_TARGETS .L_x_2,.L_x_3"*)',
            "BRA `(.L_x_6)",
            "MOV R1, R2",
            "MOV R1, R2",
            "BRA `(.L_x_6)",
            PRODUCT,
            "@P0 BRA `(.L_x_0)",
            "EXIT",
        ],
        [5],
    ),
    "a loop that only copies is none": ([LOADS, "@P0 BRA `(.L_x_0)", PRODUCT, "EXIT"], []),
    "a condition among the operands of a jump": (
        [LOADS, "BRA.U !UP0, `(.L_x_3)", "FMUL R1, R1, R1", PRODUCT, "BRA.U UP1, `(.L_x_0)", "EXIT"],
        [4],
    ),
}


@pytest.mark.parametrize("which", LOOPS)
def test_the_instructions_of_a_turn_of_a_main_loop(which):
    lines, expected = LOOPS[which]
    assert main_loops(sass(*lines)) == expected
