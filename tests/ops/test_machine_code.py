"""Counting machine code: loops, what runs in every step of one, and clocks by the rules that are written down."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

from tokensel_kernels import clocks
from tokensel_kernels.machine_code import blocks_of, by_pipe, byte_loop, loops_of, read, tensor_loops
from tokensel_kernels.shapes import SHAPES


def program(*lines: str):
    """Instructions 16 bytes apart; a label goes before a line, and `-> label` is where it branches to."""
    places, code = {}, []
    for line in lines:
        if line.endswith(":"):
            places[line[:-1]] = 16 * len(code)
        else:
            code.append(line)
    text = ""
    for n, line in enumerate(code):
        for name, address in places.items():
            line = line.replace(f"-> {name}", f"0x{address:x}")
        text += f"        /*{16 * n:04x}*/                   {line} ;                 /* 0x000fe200 */\n"
    return read(text)


NESTED = program(
    "S2R R0, SR_TID.X",
    "tile:", "CS2R R24, SRZ",
    "step:", "UTMALDG.2D [UR8], [UR4]", "WARPGROUP.ARRIVE", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "@P0 BRA -> step",
    "FFMA R1, R24, R2, R3", "FMNMX R4, R1, R4, !PT", "MUFU.EX2 R5, R1", "ISETP.GE.AND P1, PT, R0, R2, PT",
    "ISETP.GE.U32.AND.EX P1, PT, R0, R2, PT, P1", "SHFL.BFLY PT, R6, R5, 0x2, 0x1f", "@P1 BRA -> tile",
    "STG.E [R2.64], R5", "EXIT",
)  # fmt: skip
FLATTENED = program(
    "step:", "WARPGROUP.ARRIVE", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "BRA.U !UP0, -> latch",
    "FFMA R1, R24, R2, R3", "MUFU.EX2 R5, R1", "FADD R5, R5, R1", "MUFU.EX2 R5, R5",
    "latch:", "IADD3 R7, R7, 0x1, RZ", "@P0 BRA -> step",
    "EXIT",
)  # fmt: skip


def test_a_nested_loop_is_a_step_and_what_is_around_it():
    (loop,) = tensor_loops(NESTED)
    assert loop.step == {"tensor": 4, "tma": 1, "barrier": 2, "control": 1}
    around = {"mufu": 1, "fma": 1, "compare_64": 1, "shuffle": 1, "control": 1, "alu": 3}
    assert loop.around == around and not loop.flattened and loop.wait == 1 and not loop.serialised


def test_a_flattened_loop_has_its_tile_s_end_behind_a_branch():
    (loop,) = tensor_loops(FLATTENED)
    assert loop.flattened and loop.around == {"mufu": 2, "fma": 2}
    assert loop.step == {"tensor": 1, "barrier": 1, "control": 2, "alu": 1}


def test_products_that_wait_for_each_other_are_told():
    product = (
        "WARPGROUP.ARRIVE",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    )
    (loop,) = tensor_loops(program("step:", *product * 4, "@P0 BRA -> step", "EXIT"))
    assert loop.serialised and loop.wait == 0


def test_loops_are_found_whatever_leaves_them():
    code = program("outer:", "NOP", "inner:", "NOP", "@P1 BRA -> done", "@P0 BRA -> inner", "@P2 BRA -> outer",
                   "done:", "EXIT")  # fmt: skip
    inner, outer = loops_of(blocks_of(code))
    assert inner.blocks < outer.blocks and len(inner.blocks) == 2
    assert not loops_of(blocks_of(program("NOP", "@P0 BRA -> end", "NOP", "end:", "EXIT")))
    assert tensor_loops([]) == [] and byte_loop([]) is None
    assert tensor_loops(program("HMMA.16816.F32.BF16 R0, R1, R2, R3", "EXIT")) == []  # no loop around it


@pytest.mark.parametrize(
    "operation, pipe",
    [
        ("HGMMA.64x256x16.F32.BF16", "tensor"), ("UTCHMMA", "tensor"), ("UTMALDG.2D", "tma"), ("UTMAREDG.2D", "tma"),
        ("MUFU.EX2", "mufu"), ("FFMA", "fma"), ("FADD.FTZ", "fma"), ("IMAD.WIDE", "fma"), ("FMNMX", "alu"),
        ("FSEL", "alu"), ("ISETP.GE.AND", "alu"), ("ISETP.NE.AND.EX", "compare_64"), ("LOP3.LUT", "alu"),
        ("SHFL.BFLY", "shuffle"), ("BAR.SYNC.DEFER_BLOCKING", "barrier"), ("SYNCS.PHASECHK", "barrier"),
        ("LDS.128", "shared"), ("STSM.16.M88.4", "shared"), ("LDG.E.128", "global"), ("STG.E.64", "global"),
        ("STL.64", "local"), ("LDL", "local"), ("BRA", "control"), ("UIADD3", "uniform"), ("F2FP.BF16.PACK_AB", "alu"),
    ],
)  # fmt: skip
def test_operations_go_through_their_pipes(operation, pipe):
    assert by_pipe(program(f"{operation} R0, R1")) == {pipe: 1}


def test_the_loop_that_reads_most_is_the_one_of_the_bytes():
    code = program("a:", "LDG.E.128 R0, [R2.64]", "LDG.E.128 R4, [R2.64]", "FADD R0, R1, R2", "@P0 BRA -> a",
                   "b:", "LDG.E R0, [R2.64]", "@P0 BRA -> b", "EXIT")  # fmt: skip
    assert byte_loop(code) == {"fma": 1, "global": 2, "control": 1}


def test_clocks_are_the_rules_arithmetic():
    pipes = {"alu": 100, "compare_64": 10, "fma": 50, "mufu": 30, "shuffle": 8, "uniform": 999, "tensor": 4}
    low, high = clocks.beside(pipes, warps=8)  # two warps on a partition
    assert low == 2 * 30 * 8  # MUFU is the busiest: 480, ALU 440, issue 396
    assert high == 2 * (110 * 2 + 50 + 8 * 2)  # and runs beside the rest
    assert clocks.beside(pipes, warps=4) == (low / 2, high / 2)
    assert clocks.programs_at_once(95, 100 * 1024, 8) == 2 and clocks.programs_at_once(170, 100 * 1024, 8) == 1
    assert clocks.programs_at_once(32, 0, 8) == 8 and clocks.programs_at_once(255, 200 * 1024, 4) == 1


def test_a_ratio_holds_tiles_waves_and_fills():
    (loop,) = tensor_loops(NESTED)
    flat = dataclasses.replace(loop, flattened=True)
    low, _ = clocks.beside(loop.around, 8)
    tile = 2 * 128 * 256 * 4096 / 4096  # 65,536 clocks

    def estimate(loop, works, tiles):
        return clocks.of_products(loop, 8, 1, (128, 256), works, tiles * tile * 4096.0)

    whole = estimate(loop, [clocks.Work(132, 4096, 1, 1)], 132)
    assert whole.main == tile and whole.waves == 1
    assert whole.ratio_low == pytest.approx((tile + low + clocks.FILL) / tile)
    late = estimate(loop, [clocks.Work(133, 4096, 2, 2)], 133)  # one tile more, and a wave for it
    assert late.waves == pytest.approx(2 * 132 / 133)
    assert late.ratio_low == pytest.approx(2 * (tile + low + clocks.FILL) / tile * 132 / 133)
    two = estimate(flat, [clocks.Work(264, 4096, 2, 1)], 264)  # a flattened loop waits once
    assert two.ratio_low == pytest.approx((2 * (tile + low) + clocks.FILL) / (2 * tile))
    # a last launch of another depth counts as what it is
    mixed = estimate(flat, [clocks.Work(132, 4096, 1, 1), clocks.Work(132, 1024, 1, 1)], 132 * 1.25)
    assert mixed.ratio_low == pytest.approx((1.25 * tile + 2 * (low + clocks.FILL)) / (1.25 * tile))


def test_attention_tiles_are_those_that_rows_see():
    # 16 queries of one head, 4 keys a tile; the first 4 keys are prompt: rows 4..15 see 1 prompt tile, the rest theirs
    assert clocks.attention_tiles(16, 1, 4, 4, only_prompt=False) == (3, 0 + 1 + 2, 3)
    assert clocks.attention_tiles(16, 1, 4, 4, only_prompt=True) == (3, 0, 0)
    assert clocks.attention_tiles(20, 1, 4, 4, only_prompt=False) == (4, 3, 7)  # the prompt ends inside a tile
    prompt, other, mixed = clocks.attention_tiles(8192, 4, 128, 128, only_prompt=False)
    rows = 6144 * 4 // 128
    assert prompt == rows * 16 and mixed == rows and other == sum((2048 + 32 * r) // 128 - 16 for r in range(rows))


def test_the_estimate_of_a_shape_needs_its_sizes():
    assert {s.vocabulary for s in SHAPES.values()} >= {128256, 152064, 256000}
    assert SHAPES["Llama-3.2-3B"].backbone_parameters == 28 * (3072 * 128 * 2 * 32 + 3 * 3072 * 8192)
