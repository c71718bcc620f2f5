"""One selection step on a CPU: losses of two models, keep, loss, backward. Four ways of doing the same.

    python -m benchmarks.selection_step [--rows 2048 --vocabulary 128256 --hidden 1024 --rounds 3]

| way             | what it is                                                                                  |
| tokensel        | token_stats_pair, the method `rel`, selected_cross_entropy                                  |
| published       | the published code's: [N, V] logits of both models, float32 cross-entropy, masked mean      |
| torch_chunked   | torch.nn.functional.linear_cross_entropy, chunked: losses of all rows, then loss of the kept |
| matrix_products | tokensel's own products alone, 2 G + 3 rho G with G = 2 N V D operations: the floor          |

The head is trained. Extra memory is the peak above inputs and gradients, each way in a fresh process.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import tokensel
from benchmarks import measure
from tokensel.products import exact_products
from tokensel.report import format_table
from tokensel.select import top_share
from tokensel.stats import vocabulary_blocks

SAMPLE_ROWS = 256  # rows are samples of this many response tokens


@dataclass(frozen=True)
class Case:
    rows: int
    vocabulary: int
    hidden: int
    rho: float
    dtype: str


@dataclass
class Step:
    """Inputs of a step, and what a way leaves: loss, kept rows, and gradients in `hidden` and `weight`."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    old_hidden: Tensor  # (N, D)
    old_weight: Tensor  # (V, D)
    labels: Tensor  # (N,)
    sample: Tensor  # (N,)
    rho: float

    @staticmethod
    def make(case: Case) -> Step:
        generator = torch.Generator().manual_seed(0)
        N, V, D, dtype = case.rows, case.vocabulary, case.hidden, getattr(torch, case.dtype)

        def normal(*shape: int, std: float) -> Tensor:
            return torch.empty(shape).normal_(std=std, generator=generator).to(dtype)

        hidden, weight = normal(N, D, std=1), normal(V, D, std=2 / math.sqrt(D))  # logits with a spread of 2
        old_hidden = (hidden.float() + 0.05 * normal(N, D, std=1).float()).to(dtype)  # the model a little earlier
        old_weight = weight.clone()
        labels = torch.randint(V, (N,), generator=generator)
        step = Step(hidden, weight, old_hidden, old_weight, labels, torch.arange(N) // SAMPLE_ROWS, case.rho)
        step.hidden.requires_grad_()
        step.weight.requires_grad_()
        return step

    def keep(self, nll: Tensor, old_nll: Tensor) -> Tensor:
        return top_share(old_nll - nll, torch.ones_like(self.labels, dtype=torch.bool), self.sample, self.rho)

    @functools.cached_property
    def float32_inputs(self) -> tuple[Tensor, ...]:
        return tuple(t.detach().float() for t in (self.hidden, self.old_hidden, self.weight, self.old_weight))

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def with_tokensel(s: Step) -> tuple[float, Tensor]:
    now, old = tokensel.token_stats_pair((s.hidden, s.weight), (s.old_hidden, s.old_weight), s.labels)
    keep = s.keep(now.nll, old.nll)
    loss = tokensel.selected_cross_entropy(s.hidden, s.weight, s.labels, keep, stats=now)
    loss.backward()
    return float(loss.detach()), keep


def as_published(s: Step) -> tuple[float, Tensor]:
    with torch.no_grad():
        old_nll = F.cross_entropy((s.old_hidden @ s.old_weight.T).float(), s.labels, reduction="none")
    nll = F.cross_entropy((s.hidden @ s.weight.T).float(), s.labels, reduction="none")
    keep = s.keep(nll.detach(), old_nll)
    loss = (nll * keep).sum() / keep.sum()
    loss.backward()
    return float(loss.detach()), keep


def with_torch_chunked(s: Step) -> tuple[float, Tensor]:
    # "none" with a gradient would form every row's; losses first and a second call on kept rows is its fastest use
    chunked = {"options": torch.nn.LinearCrossEntropyOptions()}
    with torch.no_grad():
        old_nll = F.linear_cross_entropy(s.old_hidden, s.old_weight, s.labels, reduction="none", **chunked)
        nll = F.linear_cross_entropy(s.hidden, s.weight, s.labels, reduction="none", **chunked)
    keep = s.keep(nll.float(), old_nll.float())
    loss = F.linear_cross_entropy(s.hidden[keep], s.weight, s.labels[keep], reduction="mean", **chunked)
    loss.backward()
    return float(loss.detach()), keep


@torch.no_grad()
def matrix_products(s: Step) -> None:
    """The products of `with_tokensel` in its block shapes and precision, and nothing else."""
    x, old_x, weight, old_weight = s.float32_inputs
    V, kept = len(weight), math.ceil(s.rho * len(x))
    x_kept = x[:kept]
    R, C = vocabulary_blocks(len(x), V, 256)
    z, dx, dw = torch.empty(R, C), torch.zeros_like(x_kept), torch.empty(C, x.shape[1])
    with exact_products(s.hidden.dtype):
        for start in range(0, V, C):
            w, old_w = weight[start : start + C], old_weight[start : start + C]
            for rows, head in ((x, w), (old_x, old_w), (x_kept, w)):
                for part in rows.split(R):
                    torch.mm(part, head.T, out=z[: len(part), : len(head)])
            for first in range(0, kept, R):
                dz = z[: len(x_kept[first : first + R]), : len(w)]
                dx[first : first + R].addmm_(dz, w)
                torch.mm(dz.T, x_kept[first : first + R], out=dw[: len(w)])


WAYS: dict[str, Callable[[Step], tuple[float, Tensor] | None]] = {
    "tokensel": with_tokensel,
    "published": as_published,
    "torch_chunked": with_torch_chunked,
    "matrix_products": matrix_products,
}


def peak_extra_memory(way: str, case: Case) -> float:
    """MiB above inputs and gradients; runs in a process of its own."""
    WAYS[way](Step.make(Case(64, 512, 64, case.rho, case.dtype)))  # what libraries allocate once is not the step's
    step = Step.make(case)
    gradients = (step.hidden.nbytes + step.weight.nbytes) / 2**20
    return measure.peak_extra_mib(lambda: WAYS[way](step)) - gradients


def exact_selection(case: Case) -> tuple[float, Tensor]:
    """Loss and kept rows of the same inputs in float64, a block of the vocabulary at a time."""
    s = Step.make(case)
    pairs = ((s.hidden.double(), s.weight.double()), (s.old_hidden.double(), s.old_weight.double()))
    now, old = tokensel.token_stats_pair(*pairs, s.labels)
    keep = s.keep(now.nll, old.nll)
    return float(now.nll[keep].mean()), keep


def run_case(case: Case, rounds: int) -> dict:
    """Times, extra memory and agreement with float64 of every way."""
    step = Step.make(case)
    exact_loss, exact_keep = exact_selection(case)
    results: dict[str, dict] = {}
    for name, way in WAYS.items():  # also the warm-up
        outcome = way(step)
        step.clear()
        results[name] = {}
        if outcome is not None:
            loss, keep = outcome
            swapped = int((keep & ~exact_keep).sum())
            results[name] = {"loss_error": loss - exact_loss, "rows_kept_unlike_float64": swapped}

    def timed(way: Callable) -> Callable[[], None]:
        def run() -> None:
            way(step)
            step.clear()

        return run

    seconds = measure.interleaved_seconds({name: timed(way) for name, way in WAYS.items()}, rounds)
    for name, median in measure.medians(seconds).items():
        results[name] |= {"seconds": seconds[name], "median_seconds": median}
    for name in WAYS:
        if name != "matrix_products":
            results[name]["extra_mib"] = measure.in_fresh_process(peak_extra_memory, name, case)
    return {"case": asdict(case), "ways": results}


def summary(result: dict) -> list[dict]:
    """Rows for the terminal: medians, ratios to tokensel, extra memory."""
    ours = result["ways"]["tokensel"]
    return [
        {
            result["case"]["dtype"]: name,
            "seconds": f"{way['median_seconds']:.2f}",
            "time / tokensel": f"{way['median_seconds'] / ours['median_seconds']:.2f}",
            "extra MiB": f"{way['extra_mib']:.0f}" if "extra_mib" in way else "-",
            "memory / tokensel": f"{way['extra_mib'] / ours['extra_mib']:.1f}" if "extra_mib" in way else "-",
            "kept unlike float64": way.get("rows_kept_unlike_float64", "-"),
        }
        for name, way in result["ways"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rho", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/selection_step.cpu.json"))
    options = parser.parse_args()
    report = {"machine": measure.machine(), "results": []}
    for dtype in ("float32", "bfloat16"):
        case = Case(options.rows, options.vocabulary, options.hidden, options.rho, dtype)
        print(f"\n{case}", flush=True)
        report["results"].append(run_case(case, options.rounds))
        print(format_table(summary(report["results"][-1])), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{options.output} written; {report['machine']['cpu']}, {report['machine']['threads']} threads")


if __name__ == "__main__":
    main()
