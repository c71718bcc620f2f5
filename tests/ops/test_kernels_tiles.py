"""The Triton kernels against float64: on a GPU if there is one, else in Triton's interpreter (small, ragged shapes)."""

from __future__ import annotations

import dataclasses
import json
import types

import pytest
import torch
from kernel_inputs import DEVICE, make

from tokensel import (
    prompt_attention_mass,
    token_stats,
    token_stats_pair,
)
from tokensel_kernels import tiles

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_scratch")


# The choice


def test_bad_choices_are_named(no_interpreter, monkeypatch):
    hidden, weight, labels, _ = make()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="impl='fused' needs a GPU .* TRITON_INTERPRET=1"):
            token_stats(hidden, weight, labels, impl="fused")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="takes float16, bfloat16 or float32, not torch.float64; use impl='chunked'"):
        token_stats(hidden.double(), weight.double(), labels, impl="fused")
    wide = torch.zeros(1, 1, 2, 257, device=DEVICE)
    with pytest.raises(ValueError, match="takes head sizes up to 256 .64, 96, .*; q has 257; use impl='chunked'"):
        prompt_attention_mass(wide, wide, torch.zeros(1, 2, dtype=torch.bool, device=DEVICE), impl="fused")
    monkeypatch.setattr("tokensel.ops.checks.HAS_TRITON", False)
    with pytest.raises(ImportError, match="pip install triton; or use impl='chunked'"):
        token_stats(hidden, weight, labels, impl="fused")


def test_a_chip_that_is_too_old_is_named(no_interpreter, monkeypatch):
    chip = {"name": "Tesla V100", "major": 7, "minor": 0, "multi_processor_count": 80}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(**chip))
    tiles._gpu_family.cache_clear()
    with pytest.raises(ValueError, match="compute capability 8.0 or newer; Tesla V100 has 7.0; use impl='chunked'"):
        tiles.chip_family(torch.device("cuda", 0))
    for major, family in ((8, "sm_80"), (9, "sm_90"), (10, "sm_100"), (12, "sm_80")):
        tiles._gpu_family.cache_clear()
        chip["major"] = major
        assert tiles.chip_family(torch.device("cuda", 0)) == (family, 80)
    tiles._gpu_family.cache_clear()


@pytest.mark.parametrize("rows", [0.0, 0.99])
def test_a_workspace_that_holds_no_row_is_named(rows, gpu_chunked):
    hidden, weight, labels, _ = make()
    row = 64 * 4 / 2**20  # 64 columns of float32, of one model at a time
    common = {"impl": "chunked", "workspace_mib": row * rows or 1e-9}
    with pytest.raises(ValueError, match="holds no row of 1 x 64 float32 logits; it needs at least 0.0010"):
        token_stats_pair((hidden, weight), (hidden, weight), labels, **common)


# The table of tiles


def test_tiles_are_written_as_they_are_read(tmp_path):
    shipped = tiles.read_tiles(tiles.SHIPPED)
    assert set(shipped) == set(tiles.FAMILIES) and all(set(kinds) == set(tiles.KINDS) for kinds in shipped.values())
    tiles.write_tiles(tmp_path / "again.json", shipped)
    assert (tmp_path / "again.json").read_text() == tiles.SHIPPED.read_text()


def test_a_file_of_tiles_goes_before_the_table(tmp_path, monkeypatch):
    file = tmp_path / "mine.json"
    mine = tiles.ProductTile(64, 128, 64, 4, 5, tma=True)
    tiles.write_tiles(file, {"sm_90": {"stats": {2: mine}}})
    monkeypatch.setenv("TOKENSEL_TILES", str(file))
    table, shipped = tiles._load(), tiles.read_tiles(tiles.SHIPPED)
    assert table["sm_90"]["stats"] == {2: mine, 4: shipped["sm_90"]["stats"][4]}
    assert table["sm_90"]["matmul"] == shipped["sm_90"]["matmul"] and table["sm_80"] == shipped["sm_80"]
    monkeypatch.delenv("TOKENSEL_TILES")
    assert tiles._load()["sm_90"] == shipped["sm_90"]


def test_three_tf32_products_are_as_exact_as_a_chain_of_float32():
    """What "tf32x3" does, by its definition: 10 + 11 bits of each factor, the product of the low ones left out."""

    def high(t):  # rounded to 10 bits of mantissa
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    D = 1024
    x, w = torch.randn(32, D), torch.randn(300, D) / D**0.5 * 3
    low_x, low_w = high(x - high(x)), high(w - high(w))
    three, chain = torch.zeros(2, 32, 300)
    for k in range(0, D, 8):  # matrix units add up eight products at a time
        part = slice(k, k + 8)
        for a, b in ((low_x, high(w)), (high(x), low_w), (high(x), high(w))):
            three = (three.double() + a[:, part].double() @ b[:, part].double().T).float()
        for d in range(k, k + 8):
            chain = (chain.double() + x[:, d : d + 1].double() * w[:, d].double()).float()
    exact = x.double() @ w.double().T
    assert (three - exact).abs().max() <= 2 * (chain - exact).abs().max()
    one = high(x).double() @ high(w).double().T
    assert (one - exact).abs().max() > 50 * (chain - exact).abs().max()  # a single one would not do


def test_float32_takes_three_tf32_products_where_the_chip_has_them(monkeypatch):
    like = torch.empty(2, 2)
    for family, expected in (("sm_90", "tf32x3"), ("sm_80", "tf32x3"), ("gfx942", "ieee"), ("interpreter", "widened")):
        monkeypatch.setattr(tiles, "chip_family", lambda device, family=family: (family, 7))
        assert tiles.product_tile(like, "stats").precision == expected
        if family != "interpreter":
            assert tiles.product_tile(like.half(), "stats").precision == "ieee"


@pytest.mark.parametrize("D", [33, 40])
def test_a_head_whose_rows_are_not_aligned_is_read_by_pointers(D, monkeypatch):
    """It is not copied, which would double the model's largest matrix in every call."""
    monkeypatch.setattr(tiles, "chip_family", lambda device: ("sm_90", 132))
    head = torch.empty(150, D, dtype=torch.bfloat16)
    tile = tiles.product_tile(head, "stats", head)
    assert tile.tma == (D == 40) and (tile.tma or 2 * tile.columns == tiles.TILES["sm_80"]["stats"][2].columns)
    assert tiles.product_tile(head, "stats").tma
    rows = tiles.empty_rows(7, D, head)
    assert rows.shape == (7, D) and tiles.is_aligned(rows) and rows.dtype == torch.bfloat16


def test_an_old_triton_is_named(monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.3.1")
    with pytest.raises(ValueError, match="needs Triton 3.4 or newer .PyTorch 2.8.; this is 3.3; use impl='chunked'"):
        tiles._gpu_family.__wrapped__(torch.device("cuda", 7))


GOOD = {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3, "tma": False}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("1" * 5000, "cannot be read"),
        ('{"sm_90": ' + "9" * 4000 + "}", r"a kind of sm_90 must be of .*; got 9+\.\.\.9+$"),
        ({"sm_90": {"stats": {"half": GOOD | {"rows": 2**4000}}}}, "rows of sm_90 stats half must be at most 1024;"),
        ({"sm_90": {"stats": {"half": GOOD | {"stages": 10**9}}}}, "stages of sm_90 stats half must be at most 16;"),
        ({"sm_90": {"stats": {"half": GOOD | {"warps": 64}}}}, "warps of sm_90 stats half must be at most 32; got 64"),
        ({"sm_90": {"stats": {"half": GOOD | {"rows": float("inf")}}}}, "rows .* a positive whole number; got inf"),
        ({"sm_90": {"stats": {"half": None}}}, "sm_90 stats half must be all of rows, columns, .*; got None"),
        ("[]", r"a family must be of sm_80, sm_90, sm_100, gfx942; got \[\]"),
        ({"sm_12": {}}, "a family must be of sm_80, .*; got {'sm_12'"),
        ({"sm_90": {"stat": {}}}, "a kind of sm_90 must be of stats, full_stats, .*; got {'stat'"),
        ({"sm_90": {"stats": {"bf16": GOOD}}}, "a size of sm_90 stats must be of half, float32; got {'bf16'"),
        ({"sm_90": {"stats": {"half": {"rows": 64}}}}, "sm_90 stats half must be all of rows, columns, depth, warps"),
        ({"sm_90": {"attention": {"half": GOOD}}}, "sm_90 attention half must be all of rows, keys, warps, stages;"),
        (
            {"sm_90": {"stats": {"half": GOOD | {"rows": 96}}}},
            "rows of .* must be a power of two; got 96",
        ),
        ({"sm_90": {"stats": {"half": GOOD | {"depth": 8}}}}, "depth of sm_90 stats half must be at least 16; got 8"),
        ({"sm_90": {"stats": {"half": GOOD | {"warps": 0}}}}, "warps .* a positive whole number; got 0"),
        ({"sm_90": {"stats": {"half": GOOD | {"stages": "3"}}}}, "stages .* a positive whole number; got '3'"),
        ({"sm_90": {"stats": {"half": GOOD | {"tma": 1}}}}, "tma of sm_90 stats half must be true or false; got 1"),
        ({"sm_80": {"stats": {"half": GOOD | {"tma": True}}}}, "tma of sm_80 .* false: the chip has no such unit"),
        ({"sm_90": {"stats": {"half": GOOD | {"specialize": True}}}}, "specialize of sm_90 .* false: the chip has no"),
        (
            {"sm_90": {"attention": {"half": {"rows": 64, "keys": 64, "warps": 4, "stages": 2, "specialize": True}}}},
            "sm_90 attention half must be all of rows, keys, warps, stages;",
        ),
        (
            {"sm_90": {"matmul": {"half": GOOD | {"depth": 256}}}},
            "depth of sm_90 matmul half must be a divisor",
        ),
    ],
)
def test_a_bad_file_of_tiles_is_named(content, message, tmp_path, monkeypatch):
    file = tmp_path / "mine.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv("TOKENSEL_TILES", str(file))
    with pytest.raises(ValueError, match=f"tiles of .*mine.json.*{message}"):
        tiles._load()
    file.unlink()
    with pytest.raises(ValueError, match="mine.json cannot be read: .*No such file"):
        tiles._load()


def test_tuning_takes_the_fastest_tile_that_runs(tmp_path, monkeypatch):
    from triton.runtime.errors import OutOfResources

    from tokensel_kernels import tune

    family = tiles.chip_family(torch.device(DEVICE))[0]
    start = tiles.ProductTile(16, 64, 16, 4, 3, precision="widened")
    table = {kind: {4: start} for kind in tiles.KINDS}
    table["attention"] = {4: tiles.AttentionTile(16, 16, 4, 1, "widened")}
    monkeypatch.setitem(tiles.TILES, family, table)
    timed = tune.calls(20, 70, 24, 8, torch.float32, DEVICE)
    once, said = set(timed), []

    def milliseconds(call):  # rows of 32, few stages and depths of 64 are fast, but attention holds no more than 16
        kind = next(kind for kind in timed if timed[kind] is call)
        if kind in once:
            once.remove(kind), call()
        tile = table[kind][4]
        if kind == "attention" and tile.rows > 16:
            raise OutOfResources(1, 2, "shared memory")
        return abs(tile.rows - 32) / 16 + tile.stages + abs(getattr(tile, "depth", 64) - 64) / 16

    timed = {kind: (lambda call=call: call()) for kind, call in timed.items()}  # two kinds have one call
    found = tune.tune(timed, family, 4, milliseconds=milliseconds, tell=said.append)[family]
    assert not once and set(found) == set(tiles.KINDS)
    best = dataclasses.replace(start, rows=32, depth=64, stages=1)
    for kind in ("stats", "full_stats", "gradient"):
        assert found[kind][4] == best == table[kind][4]
    assert found["matmul"][4] == dataclasses.replace(best, depth=32)  # gradients of 32 rows are zero no further
    assert found["attention"][4].rows == 16
    assert any("attention: AttentionTile(rows=32" in line and "does not run: out of resource" in line for line in said)
    tiles.write_tiles(tmp_path / "tuned.json", {"sm_90": found})
    written = tiles.read_tiles(tmp_path / "tuned.json")["sm_90"]
    assert written["stats"][4] == dataclasses.replace(best, precision="ieee")


def test_a_tile_of_the_table_that_does_not_run_is_an_error(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from tokensel_kernels import tune

    def fail(error):
        raise error

    family = tiles.chip_family(torch.device(DEVICE))[0]
    timed = {"stats": lambda: None}
    with pytest.raises(RuntimeError, match="the table's own tile of stats, ProductTile.* does not run"):
        tune.tune(timed, family, 4, milliseconds=lambda call: fail(OutOfResources(1, 2, "shared memory")))
    with pytest.raises(RuntimeError, match="an illegal memory access"):  # not the tile's fault
        tune.tune(timed, family, 4, milliseconds=lambda call: fail(RuntimeError("an illegal memory access")))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_tuning_needs_a_gpu(tmp_path, capsys):
    from tokensel.cli import main

    assert main(["tune", "--output", str(tmp_path / "mine.json")]) == 2
    assert "tokensel tune times kernels on the GPU at hand, and PyTorch finds none" in capsys.readouterr().err
    (tmp_path / "mine.json").touch()
    assert main(["tune", "--output", str(tmp_path / "mine.json")]) == 2
    assert "mine.json exists; move it away" in capsys.readouterr().err
