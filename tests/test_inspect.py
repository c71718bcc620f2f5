"""The compiler's report of the whole tile table, for chips that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tokensel_kernels.inspect import ARCHITECTURES, HEAD_SIZES
from tokensel_kernels.roofline import attention_estimates, estimates

PRODUCTS = {"hidden_stats", "logits_gradient", "hidden_gradient", "head_gradient", "attention_mass"}
MATRIX = {"sm_80": "MMA", "sm_90": "WGMMA", "sm_100": "tcgen05", "gfx942": "MFMA"}


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def reports(request, tmp_path_factory):
    """What `tokensel kernels` writes; in a process of its own, where kernels are compiled and not interpreted."""
    file = tmp_path_factory.mktemp("kernels") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tokensel.cli", "kernels", "--arch", request.param, "--json", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "registers  spilled" in done.stdout and 'impl="auto" is: chunked on a CPU' in done.stdout
    return request.param, json.loads(file.read_text())


def test_no_kernel_spills_or_takes_more_than_the_chip_has(reports):
    arch, found = reports
    assert len(found) == 30 and {r["arch"] for r in found} == {arch}
    for report in found:
        where = f"{report['kernel']} ({report['case']}, {report['element']})"
        assert report["spilled"] == 0, where
        assert report["shared"] <= report["shared_limit"], where
        assert 0 < report["registers"] <= (512 if arch == "gfx942" else 255), where


def test_half_precision_products_use_matrix_units(reports):
    arch, found = reports
    half = [r for r in found if r["element"] == "bf16"]
    assert {r["kernel"] for r in half if MATRIX[arch] in r["instructions"]} == PRODUCTS
    for report in half:
        assert (MATRIX[arch] in report["instructions"]) == (report["kernel"] in PRODUCTS), report
    sizes = [f"head size {d}" for d in HEAD_SIZES]
    assert all(any(size in r["case"] for r in half) for size in sizes)


def test_products_with_the_head_load_by_tensor_memory_where_there_is_one(reports):
    arch, found = reports
    users = {r["kernel"] for r in found if "TMA" in r["instructions"]}
    assert users == (PRODUCTS - {"attention_mass"} if arch in ("sm_90", "sm_100") else set())


def test_a_product_reads_only_what_the_kernel_before_it_wrote():
    """The logits' gradient is zero to the end of its tiles; the products after it read steps of their depth."""
    from tokensel_kernels.tiles import TILES

    for family, kinds in TILES.items():
        for size in (2, 4):
            written, read = kinds["gradient"][size], kinds["matmul"][size]
            assert written.rows % read.depth == written.columns % read.depth == 0, (family, size)


def test_an_unknown_chip_is_named(capsys, monkeypatch):
    from tokensel.cli import main

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["kernels", "--arch", "sm_12"]) == 2
    assert "arch must be one of sm_80, sm_90, sm_100, gfx942; got 'sm_12'" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels", "--arch", "sm_90"]) == 2
    assert "unset it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "V, D, pair, backward, logits", [(128256, 4096, 21.8, 19.6, 0.98), (151936, 3584, 22.6, 20.3, 1.16)]
)
def test_estimates_are_the_arithmetic_of_the_products(V, D, pair, backward, logits):
    """Milliseconds on an H200 at N = 8192: two products, three of 60 %, two reads of bfloat16 logits."""
    stats, from_logits, *gradients = (e.milliseconds() for e in estimates(8192, V, D))
    assert stats == pytest.approx(pair, abs=0.06)
    assert from_logits == pytest.approx(logits, abs=0.01)
    assert sum(gradients) == pytest.approx(backward, abs=0.06)


def test_a_given_lse_leaves_only_the_prompt_columns():
    whole, given = attention_estimates(8192)
    assert whole.operations / given.operations == pytest.approx(2.5)  # 1/4 + 3/8 of S columns against 1/4
    assert whole.bytes == given.bytes
