"""Writes kernels/estimates.json, what the machine code says of each chip: python -m tools.write_estimates

Ratios of `tokensel kernels` for three models, and of each work by both implementations, which `impl="auto"` compares on
a chip where nothing has been measured. The docs' tables are made from the same file. Some minutes.
"""

from __future__ import annotations

import json
import statistics

import triton
from tqdm.auto import tqdm

from tokensel.ops.block_shapes import Chip, estimated_ratio, resident_block
from tokensel.ops.chunked_grad import gradient_limits
from tokensel_kernels.clocks import KEPT
from tokensel_kernels.compiled import PROCESSORS, ROWS, CompiledKernel, compile_all
from tokensel_kernels.rates import ESTIMATES
from tokensel_kernels.shapes import SHAPES

MODELS = ("Llama-3.1-8B", "Qwen2.5-7B", "Gemma-2-2B")
CACHE = {"sm_90": 50 * 2**20}  # bytes of L2
BACKWARD = ("logits_gradient", "hidden_gradient", "head_gradient")


def fused(kernels: list[CompiledKernel]) -> dict[str, float]:
    """The ratio of each work without options, the mean of low and high."""
    plain = {(k.kernel, k.case.partition(", ")[2]): k for k in kernels}

    def ratio(kernel: str, case: str) -> float:
        found = plain[kernel, case]
        return statistics.mean((found.ratio_low or 0.0, found.ratio_high or 0.0))

    gradient = statistics.mean(ratio(kernel, "") for kernel in BACKWARD)
    return {"statistics": ratio("hidden_stats", "two models"), "gradient": gradient}


def chunked(shape: str, chip: Chip) -> dict[str, float]:
    """The same of library products in blocks that stay in L2."""
    sizes = SHAPES[shape]
    ratios = {}
    mib, most_columns = gradient_limits(ROWS, 2)
    blocks = {
        "statistics": resident_block(ROWS, sizes.vocabulary, 256 * 2**20, chip),
        "gradient": resident_block(ROWS, sizes.vocabulary, mib * 2**20, chip, most_columns=most_columns, sums=True),
    }
    for work, block in blocks.items():
        if block is None:
            raise ValueError(f"no block of {shape} fits the cache of {chip}")
        kept = KEPT if work == "gradient" else None
        ratios[work] = statistics.mean(estimated_ratio(ROWS, sizes.vocabulary, sizes.hidden, chip, block, kept))
    return ratios


def main() -> None:
    content: dict[str, dict] = {}
    for arch, cache in CACHE.items():
        shapes = {}
        for shape in MODELS:
            compiled = tqdm(compile_all(arch, shape), desc=f"{shape} on {arch}", unit="kernel")
            shapes[shape] = [kernel for kernel in compiled if kernel.estimate]
        by_fused, by_chunked = fused(shapes[MODELS[0]]), chunked(MODELS[0], Chip(PROCESSORS[arch], cache))
        works = {work: {"fused": round(by_fused[work], 3), "chunked": round(by_chunked[work], 3)} for work in by_fused}
        rows = {
            shape: [
                {"kernel": k.kernel, "case": k.case, "low": round(k.ratio_low, 3), "high": round(k.ratio_high, 3)}
                for k in kernels
            ]
            for shape, kernels in shapes.items()
        }
        content[arch] = {"triton": triton.__version__, "works": works, "shapes": rows}
    ESTIMATES.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{ESTIMATES}: {sum(len(rows) for arch in content.values() for rows in arch['shapes'].values())} ratios")


if __name__ == "__main__":
    main()
