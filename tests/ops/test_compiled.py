"""The compiler's report of the whole tile table, for chips that need not be there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tokensel_kernels.compiled import ARCHITECTURES
from tokensel_kernels.roofline import attention_estimates, estimates

PRODUCTS = {"hidden_stats", "logits_gradient", "hidden_gradient", "head_gradient", "attention_mass"}
MATRIX = {"sm_80": "MMA", "sm_90": "WGMMA", "sm_100": "tcgen05", "gfx942": "MFMA"}


# sm_90 up to what is unusual; elsewhere everything for every chip, on sm_90 with the heads of other models, too
SCRIPT = """
import dataclasses, itertools, json, sys
from tokensel_kernels.compiled import compile_all

arch, whole, *others = sys.argv[1:]
rows = itertools.takewhile(lambda kernel: whole == "True" or "unaligned" not in kernel.case, compile_all(arch))
rows = list(rows)
for shape in others:
    rows += itertools.takewhile(lambda kernel: kernel.kernel != "key_tiles", compile_all(arch, shape))
print(json.dumps([dataclasses.asdict(row) for row in rows]))
"""
OTHERS = ("Qwen2.5-7B", "Gemma-2-2B")
CHIPS = [("sm_90", False)]
CHIPS += [
    pytest.param((arch, True), marks=[pytest.mark.chips, pytest.mark.xdist_group(arch)], id=arch)
    for arch in ARCHITECTURES
]


def compiled_in_a_process(*command):
    """Runs Python where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module", params=CHIPS, ids=str)
def everything(request):
    """(chip, rows of all models)"""
    arch, whole = request.param
    done = compiled_in_a_process("-c", SCRIPT, arch, str(whole), *(OTHERS if whole and arch == "sm_90" else ()))
    assert done.returncode == 0, done.stderr
    return arch, json.loads(done.stdout)


@pytest.fixture
def reports(everything):
    """(chip, its rows for a Llama)"""
    arch, found = everything
    return arch, [row for row in found if row["shape"] == "Llama-3.1-8B"]


def test_no_kernel_spills_or_takes_more_than_the_chip_has(reports):
    arch, found = reports
    assert {r["arch"] for r in found} == {arch}
    assert len({(r["kernel"], r["case"], r["element"]) for r in found}) == len(found) > 50
    for report in found:
        where = f"{report['kernel']} ({report['case']}, {report['element']})"
        assert report["spilled"] == 0, where
        assert report["shared"] <= report["shared_limit"], where
        assert report["narrow_offsets"] == 0, where
        assert not report["serialised"], where
        assert 0 < report["registers"] <= (512 if arch == "gfx942" else 255), where


def test_half_precision_products_use_matrix_units(reports):
    arch, found = reports
    half = [r for r in found if r["element"] == "bf16"]
    assert {r["kernel"] for r in half if MATRIX[arch] in r["instructions"]} == PRODUCTS
    for report in half:
        assert (MATRIX[arch] in report["instructions"]) == (report["kernel"] in PRODUCTS), report
    for size in (64, 128, 256):
        assert any(f"head size {size}" in r["case"] for r in half)


def test_products_load_by_tensor_memory_where_there_is_one(reports):
    arch, found = reports
    users = {r["kernel"] for r in found if "TMA" in r["instructions"]}
    assert users == (PRODUCTS if arch in ("sm_90", "sm_100") else set())


def test_every_variant_of_a_launch_is_compiled(reports):
    """Losing one would hide what it costs."""
    cases = {(r["kernel"], r["case"].partition(", ")[2]) for r in reports[1] if r["element"] == "bf16"}
    options = ("two models", "two models, bias", "two models, softcap", "two models, entropy", "one model")
    options += ("two models, bias, softcap, entropy", "two models, every statistic")
    assert {("hidden_stats", o) for o in options} <= cases
    assert {("logits_gradient", o) for o in ("", "bias", "softcap", "bias, softcap")} <= cases


# What the machine code of a Hopper GPU has to stay below: ratios to the products at full rate, to bytes, and to
# FlashAttention-2's forward. (kernel, part of its case, highest)
LLAMA = [
    ("hidden_stats", "two models", 1.08),
    ("hidden_stats", "two models, bias", 1.08),
    ("hidden_stats", "two models, entropy", 1.12),
    ("hidden_stats", "two models, every statistic", 1.15),
    ("hidden_stats", "two models, softcap", 1.15),
    ("logits_gradient", "", 1.10),
    ("hidden_gradient", "", 1.15),
    ("head_gradient", "", 1.05),
    ("logits_stats", "two models", 1.0),
    ("attention_mass", "head size 128, group 4", 0.35),
    ("attention_mass", "head size 128, group 4, lse given", 0.12),
]
QWEN = [("hidden_stats", "two models", 1.08), ("logits_gradient", "", 1.10), ("head_gradient", "", 1.05)]
GEMMA = [("hidden_stats", "two models", 1.15), ("hidden_stats", "two models, softcap", 1.26)]


def assert_estimates(found, highest):
    ratios = {(r["kernel"], r["case"].partition(", ")[2]): r for r in found if r["ratio_high"]}
    for kernel, case, most in highest:
        report = ratios[kernel, case]
        assert 0 < report["ratio_low"] <= report["ratio_high"] <= most, (kernel, case, report["ratio_high"])
        if kernel in PRODUCTS - {"attention_mass"}:
            assert report["flattened"] and report["wait"] == 1, (kernel, case)
            # a step's other instructions hide behind its products
            assert sum(report["pipes"]["step"].values()) < 200, (kernel, case)
            assert "compare_64" not in report["pipes"]["around"], (kernel, case)
        if kernel == "attention_mass":  # whole tiles have no mask: scale and exponential alone, and maxima without lse
            most = 40 if "lse" in case else 120
            assert report["pipes"]["step"]["alu"] + report["pipes"]["step"].get("compare_64", 0) < most, case


def test_the_machine_code_of_a_hopper_gpu_keeps_what_was_reached(everything):
    arch, found = everything
    if arch != "sm_90":
        assert all(r["estimate"] is None for r in found)
        return
    for shape, highest in {"Llama-3.1-8B": LLAMA, "Qwen2.5-7B": QWEN, "Gemma-2-2B": GEMMA}.items():
        if rows := [r for r in found if r["shape"] == shape]:
            assert_estimates(rows, highest)
    backward = [r["ratio_high"] for r in found if r["kernel"] in ("logits_gradient", "hidden_gradient", "head_gradient")
                and r["shape"] == "Llama-3.1-8B" and r["ratio_high"] and "," not in r["case"]]  # fmt: skip
    assert len(backward) == 3 and sum(backward) / 3 <= 1.10


def test_what_the_docs_and_auto_read_is_what_is_compiled(everything):
    """`make estimates` writes it anew."""
    import triton

    from tokensel_kernels.rates import ESTIMATES

    arch, found = everything
    written = json.loads(ESTIMATES.read_text()).get(arch)
    if written is None or written["triton"] != triton.__version__:
        pytest.skip(f"no estimates of {arch} by Triton {triton.__version__} are written down")
    shapes = {r["shape"] for r in found}
    for shape, rows in ((s, r) for s, r in written["shapes"].items() if s in shapes):
        now = {(r["kernel"], r["case"]): [round(r["ratio_low"], 3), round(r["ratio_high"], 3)]
               for r in found if r["shape"] == shape and r["estimate"]}  # fmt: skip
        then = {(r["kernel"], r["case"]): [r["low"], r["high"]] for r in rows}
        of_head = {key for key in then if key[0] != "attention_mass"}
        assert {key: then[key] for key in now} == now and of_head <= set(now), shape


def test_the_command_prints_and_writes_what_it_finds(tmp_path, monkeypatch, capsys):
    from tokensel.cli import main
    from tokensel_kernels import compiled

    estimate = {"main": 65536.0, "beside_low": 2080.0, "beside_high": 2090.0, "fill": 750.0, "waves": 1.002}
    plain = {"registers": 170, "spilled": 0, "shared": 147480, "shared_limit": 232448, "narrow_offsets": 0}
    plain |= {
        "instructions": {"WGMMA": 8},
        "pipes": {"step": {"tensor": 4}, "around": {}},
        "flattened": True,
        "wait": 1,
    }
    plain |= {"serialised": False, "arch": "sm_90", "element": "bf16", "shape": "Qwen2.5-7B"}
    with_estimate = {"estimate": estimate, "ratio_low": 1.048, "ratio_high": 1.052}
    rows = [
        compiled.CompiledKernel(kernel="hidden_stats", case="128x256x64", **plain, **with_estimate),
        compiled.CompiledKernel(
            kernel="kept_rows", case="4096", **plain, estimate=None, ratio_low=None, ratio_high=None
        ),
    ]
    monkeypatch.setattr(compiled, "compile_all", lambda arch, shape, every: iter(rows))
    file = tmp_path / "r.json"
    assert not main(["kernels", "--arch", "sm_90", "--shape", "Qwen2.5-7B", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "144 of 227" in printed and "2,080 to 2,090" in printed and "1.048 to 1.052" in printed
    assert "rows of Qwen2.5-7B" in printed and 'impl="auto" is: chunked on a CPU' in printed
    assert "On sm_90, gradient: fused (estimated for sm_90: fused 1." in printed
    assert json.loads(file.read_text())[0]["ratio_high"] == 1.052
    assert main(["kernels", "--arch", "sm_90", "--json", str(tmp_path / "no" / "r.json")]) == 2
    assert "r.json is in a folder that is not there" in capsys.readouterr().err


def test_a_product_reads_only_what_the_kernel_before_it_wrote():
    """The logits' gradient is zero to the end of its tiles; the products after it read steps of their depth."""
    from tokensel_kernels.tiles import TILES

    for family, kinds in TILES.items():
        for size in (2, 4):
            written, read = kinds["gradient"][size], kinds["matmul"][size]
            assert written.rows % read.depth == written.columns % read.depth == 0, (family, size)


NARROW_AND_WIDE = """
import triton, triton.language as tl
from triton.compiler import ASTSource
from tokensel_kernels.compiled import ARCHITECTURES, narrow_offsets

@triton.jit
def clear(z_ptr, row_stride, ROWS: tl.constexpr, BITS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.arange(0, ROWS)[:, None] * row_stride  # of a tile: may be narrow
    at = (rows.to(tl.int64) if BITS == 64 else rows)[:, None] * row_stride
    tl.store(z_ptr + at + inside + tl.arange(0, 16)[None, :], 0.0)

for bits in (32, 64):
    signature = {"z_ptr": "*fp32", "row_stride": "i32", "ROWS": "constexpr", "BITS": "constexpr"}
    source = ASTSource(clear, signature, {(2,): 16, (3,): bits}, {})
    print(len(narrow_offsets(triton.compile(source, target=ARCHITECTURES["sm_80"]).asm["ttir"])))
"""


@pytest.mark.slow
def test_offsets_in_32_bits_are_found(tmp_path):
    """What the reports count is a product of a row and a stride that would wrap around past 2^31 elements."""
    file = tmp_path / "narrow_and_wide.py"  # Triton reads a kernel's source from a file
    file.write_text(NARROW_AND_WIDE)
    done = compiled_in_a_process(file)
    assert done.stdout.split() == ["1", "0"], done.stderr


def test_an_unknown_chip_is_named(capsys, monkeypatch):
    from tokensel.cli import main

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["kernels", "--arch", "sm_12"]) == 2
    assert "arch must be one of sm_80, sm_90, sm_100, gfx942; got 'sm_12'" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels", "--arch", "sm_90"]) == 2
    assert "unset it" in capsys.readouterr().err


def test_an_unknown_shape_is_named(capsys, monkeypatch):
    from tokensel.cli import main

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["kernels", "--arch", "sm_90", "--shape", "Llama-9"]) == 2
    assert "shape must be one of Llama-3.2-3B, Llama-3.1-8B, " in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_triton_cannot_compile_is_said():
    """And not skipped: a release that does not know a chip, or a pass that fails."""
    script = """
import dataclasses
from triton.backends.compiler import GPUTarget
from tokensel_kernels import compiled
compiled.ARCHITECTURES["sm_90"] = GPUTarget("another", 90, 32)
next(iter(compiled.compile_all("sm_90")))
"""
    done = compiled_in_a_process("-c", script)
    assert done.returncode == 1
    assert re.search(r"RuntimeError: Triton [\d.]+ cannot compile kept_rows \(.*\) for sm_90: ", done.stderr), (
        done.stderr
    )


@pytest.mark.parametrize(
    "V, D, pair, backward, logits", [(128256, 4096, 21.8, 19.6, 0.98), (151936, 3584, 22.6, 20.3, 1.16)]
)
def test_estimates_are_the_arithmetic_of_the_products(V, D, pair, backward, logits):
    """Milliseconds on an H200 at N = 8192: two products, three of 60 %, two reads of bfloat16 logits."""
    found = {e.kernel.partition(",")[0]: e.milliseconds() for e in estimates(8192, V, D)}
    assert found["hidden_stats"] == pytest.approx(pair, abs=0.06)
    assert found["logits_stats"] == pytest.approx(logits, abs=0.01)
    gradients = ("logits_gradient", "hidden_gradient", "head_gradient")
    assert sum(found[name] for name in gradients) == pytest.approx(backward, abs=0.06)
    # 60 %: float32 read and bfloat16 written, three of a bfloat16 block, against the two of logits_stats
    assert found["block_gradient (chunked)"] == pytest.approx(logits * 0.6 * 3 / 2, abs=0.01)
    assert found["gather_kept"] == pytest.approx(2 * 0.6 * 8192 * D * 2 / 4.3e9, rel=1e-6)


def test_every_product_has_its_operations_and_bytes(reports):
    named = {e.kernel.split(",")[0].split(" ")[0] for e in (*estimates(64, 64, 64), *attention_estimates(64))}
    assert named >= PRODUCTS | {"logits_stats", "block_gradient"} and named <= {r["kernel"] for r in reports[1]}


def test_a_given_lse_leaves_only_the_prompt_columns():
    whole, given = attention_estimates(8192)
    assert whole.operations / given.operations == pytest.approx(2.5)  # 1/4 + 3/8 of S columns against 1/4
    assert whole.bytes == given.bytes
