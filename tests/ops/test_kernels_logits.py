"""Statistics from logits: sums of each thread, joined once; the label's logit by a load of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from kernel_inputs import DEVICE
from oracles import DTYPES, FIELDS, assert_within_budget, head_of, truth_of_logits

from tokensel import token_stats_from_logits
from tokensel.ops.token_stats import MOMENTS, stats_of_sums, sums_of
from tokensel_kernels.logits_stats import write_logits_sums

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_scratch")

HEADS = [
    {},
    {"bias": True},
    {"logit_scale": 0.3},
    {"softcap": 5.0},
    {"softcap": 30.0, "logit_scale": -1.7},
    {"bias": True, "softcap": 20.0, "logit_scale": 0.6},
]


def logits_of(N, V, dtype=torch.float32, scale=4.0):
    return (torch.randn(N, V, device=DEVICE) * scale).to(dtype)


def stats_of(logits, labels, wanted=MOMENTS, **head):
    """Statistics of one model's logits, as the chunked implementation has them computed."""
    sums = torch.full((sums_of(wanted), 1, 1, len(labels)), torch.nan, device=DEVICE)
    write_logits_sums([logits], labels, sums[:, :, 0], ignore_index=-100, **head)
    return stats_of_sums(sums, labels, -100, wanted)[0]


def exactly(logits, labels, bias=None, **head):
    """(float64 truth, what eager float32 gives)."""
    eye = torch.eye(logits.shape[1], device=DEVICE)
    heads = (head_of(logits, eye.to(d), bias, head.get("softcap"), head.get("logit_scale", 1.0), d) for d in WIDE)
    return [truth_of_logits(z, labels) for z in heads]


WIDE = (torch.float64, torch.float32)


def options_of(head, V):
    return head | ({"bias": torch.randn(V, device=DEVICE)} if "bias" in head else {})


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("V", [1, 128, 300, 513])
def test_any_number_of_columns_and_every_option(V, head):
    logits, labels = logits_of(4, V), torch.randint(0, V, (4,), device=DEVICE)
    labels[2] = -100
    head = options_of(head, V)
    exact, eager = exactly(logits, labels, **head)
    stats = stats_of(logits, labels, **head)
    assert_within_budget(stats, exact, eager, labels)
    plain = stats_of(logits, labels, (), **head)
    assert_within_budget(plain, exact, eager, labels, FIELDS[:3])
    assert (stats.nll[2], stats.lse[2]) == (0, -torch.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_the_label_is_the_number_that_the_loop_has_seen(head, dtype):
    logits = logits_of(8, 333, dtype)
    head = options_of(head, 333)
    z = head_of(logits, torch.eye(333, device=DEVICE), **head)
    best = z.argmax(-1)
    stats = stats_of(logits, best, **head)
    assert torch.equal(stats.target_logit, stats.top1) and stats.correct.all()
    second = z.scatter(1, best[:, None], -torch.inf).argmax(-1)
    distinct = z.gather(1, second[:, None])[:, 0].float() < z.amax(-1).float()
    assert not stats_of(logits, second, **head).correct[distinct & (stats.top1 < 4.99)].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 1, 4, 7])
def test_rows_begin_anywhere(first, dtype):
    """A row between two multiples of 16 bytes is read from the one before, and what is there does not count."""
    for V, stride in ((1, 351), (130, 352), (257, 352), (333, 351), (333, 352)):
        wide = torch.full((4, stride), torch.nan, device=DEVICE, dtype=dtype)
        logits = wide[:, first : first + V]
        logits.copy_(logits_of(4, V, dtype))
        labels = torch.tensor([0, V - 1, V // 2, V // 3], device=DEVICE)
        exact, eager = (truth_of_logits(logits.to(d), labels) for d in WIDE)
        assert_within_budget(stats_of(logits, labels), exact, eager, labels)


@pytest.mark.parametrize("first_column", [0, 10_000])
def test_a_label_that_no_column_has_reads_nothing(first_column):
    labels = torch.tensor([-7, -1, 150, 151, 10_000, 2**40, -(2**40)], device=DEVICE) + first_column
    logits = logits_of(len(labels), 150)
    stats = stats_of(logits, labels, first_column=first_column)
    torch.testing.assert_close(stats.lse, logits.logsumexp(-1))
    assert (stats.nll == torch.inf).all() and not stats.correct.any()


def test_labels_count_from_the_first_column():
    logits = logits_of(4, 90)
    labels = torch.tensor([1000, 1007, 1089, 1001], device=DEVICE)
    stats = stats_of(logits, labels, first_column=1000)
    assert torch.equal(stats.target_logit, logits.gather(1, labels[:, None] - 1000)[:, 0])


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("shift", [-1e4, 1e4, -3e37])
@pytest.mark.parametrize("scale", [0.0, 30.0], ids=["flat", "peaked"])
def test_flat_peaked_and_far_off_logits(scale, shift, entropy):
    logits = torch.randn(2, 300, device=DEVICE) * scale + shift
    labels = torch.randint(0, 300, (2,), device=DEVICE)
    exact, eager = (truth_of_logits(logits.to(d), labels) for d in WIDE)
    assert_within_budget(
        stats_of(logits, labels, MOMENTS if entropy else ()), exact, eager, labels, FIELDS if entropy else FIELDS[:3]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", ["-inf", "-1e30", "-1e300"])
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # the interpreter's; it is -inf, as on a GPU
def test_columns_that_are_masked_add_nothing(dtype, low):
    low = float(low) if low == "-inf" else max(float(low), torch.finfo(dtype).min)
    labels = torch.tensor([0, 299, 150, 40, 41], device=DEVICE)
    logits = torch.full((5, 300), low, device=DEVICE, dtype=dtype)
    logits[torch.arange(5), labels] = torch.tensor([1.0, -2.0, 3.0, 0.0, 50.0], device=DEVICE).to(dtype)
    stats = stats_of(logits, labels)
    for name in ("nll", "entropy", "logp_var"):
        assert torch.equal(getattr(stats, name), torch.zeros(5, device=DEVICE)), name
    assert stats.correct.all()


def test_a_row_without_any_finite_logit_is_no_number_of_its_own_only():
    logits = logits_of(3, 200)
    logits[1] = -torch.inf
    labels = torch.tensor([3, 4, 5], device=DEVICE)
    stats = stats_of(logits, labels, ())
    assert stats.lse.isfinite().tolist() == [True, False, True] and stats.nll[[0, 2]].isfinite().all()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("column", [0, 130, 299])
def test_a_nan_among_the_logits_shows(column, entropy):
    logits, labels = logits_of(3, 300), torch.tensor([5, 6, 7], device=DEVICE)
    logits[1, column] = torch.nan
    stats = stats_of(logits, labels, MOMENTS if entropy else ())
    assert stats.nll.isnan().tolist() == [False, True, False]
    if entropy:
        assert stats.entropy.isnan().tolist() == [False, True, False]


def test_two_models_of_two_types_are_read_in_one_launch():
    logits, old = logits_of(8, 333), logits_of(8, 333, torch.bfloat16)
    labels = torch.randint(0, 333, (8,), device=DEVICE)
    labels[3] = -100
    both = token_stats_from_logits(logits, labels, old, entropy=True, impl="fused")
    for stats, z in zip(both, (logits, old), strict=True):
        alone = token_stats_from_logits(z, labels, entropy=True, impl="fused")[0]
        assert all(torch.equal(getattr(stats, name), getattr(alone, name)) for name in FIELDS)


def test_ignored_rows_are_not_read_and_their_sums_stay():
    logits, labels = logits_of(5, 140), torch.tensor([3, -100, 5, -100, 7], device=DEVICE)
    sums = torch.full((3, 1, 5), 7.5, device=DEVICE)
    write_logits_sums([logits], labels, sums, ignore_index=-100)
    assert (sums[:, :, labels == -100] == 7.5).all() and (sums[:, :, labels != -100] != 7.5).all()
    again = torch.full((3, 1, 5), 7.5, device=DEVICE)
    write_logits_sums([logits.masked_fill((labels == -100)[:, None], torch.nan)], labels, again, ignore_index=-100)
    assert torch.equal(sums, again)


# What the compiler makes of it

COUNTED = """
import json, sys, torch
from tokensel_kernels.compiled import ARCHITECTURES
from tokensel_kernels.launches import written_down
from tokensel_kernels.logits_stats import write_logits_sums
from tokensel_kernels.machine_code import blocks_of, by_pipe, disassemble, loops_of

found = {}
for name, dtype, V, options in [
    ("bfloat16", torch.bfloat16, 128256, {}), ("odd", torch.bfloat16, 50257, {}), ("float32", torch.float32, 8192, {}),
    ("softcap", torch.float32, 8192, {"softcap": 30.0}), ("moments", torch.bfloat16, 128256, {}),
]:
    with written_down("sm_90", 132) as launches:
        logits = torch.empty(4096, V, dtype=dtype, device="meta")
        sums = torch.empty(5 if name == "moments" else 3, 1, 4096, device="meta")
        labels = torch.empty(4096, dtype=torch.int64, device="meta")
        write_logits_sums([logits], labels, sums, ignore_index=-100, **options)
    usage, code = disassemble(launches[0].compile(ARCHITECTURES["sm_90"]).asm["cubin"])
    blocks = blocks_of(code)
    loop = [i for n in sorted(loops_of(blocks)[0].blocks) for i in blocks[n].code]
    loads = [i.operation for i in loop if i.pipe == "global"]
    found[name] = {"pipes": by_pipe(loop), "loads": loads, "spills": any(i.pipe == "local" for i in code),
                   "nan": any(i.operation.endswith(".NAN") for i in loop)}
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def counted():
    """In a process of its own, where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COUNTED], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# instructions for 16 bytes of a thread; clocks of a warp on its quarter of a processor (8 a MUFU, 2 an ALU instruction)
# may not be more than its 512 bytes take at 4.3 TB/s: 132 processors at 1.75 GHz get 18.6 a clock, a quarter 4.65
@pytest.mark.parametrize(
    "case, instructions", [("bfloat16", 57), ("odd", 57), ("float32", 30), ("softcap", 75), ("moments", 96)]
)
def test_bytes_alone_bound_the_loop(case, instructions, counted):
    found = counted[case]
    pipes, vectors = found["pipes"], len(found["loads"])
    assert set(found["loads"]) == {"LDG.E.128"} and vectors >= 2 and not found["spills"]
    assert not {"barrier", "shuffle", "shared", "local"} & set(pipes)
    assert sum(pipes.values()) <= instructions * vectors
    assert found["nan"] == (case == "moments")  # a maximum that would swallow a NaN; the interpreter's never does
    alu, mufu = pipes["alu"] + pipes.get("compare_64", 0), pipes["mufu"]
    assert max(8 * mufu, 2 * alu + pipes["fma"]) <= 512 / 4.65 * vectors * (1.02 if case == "moments" else 1)
