"""Operations and bytes of each kernel's call, and the least time they take on a chip: a prediction to measure against.

An estimate is the larger of operations / peak and bytes / bandwidth. It knows nothing of waves, launches or epilogues.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokensel_kernels.tiles import GROUP, TILES

# Taken for an H200, as others report it: a bfloat16 matrix product, operations a second; a device copy, bytes a second.
H200 = (790e12, 4.3e12)


@dataclass(frozen=True)
class Estimate:
    """One call in bfloat16."""

    kernel: str
    shape: str
    operations: float
    bytes: float

    def milliseconds(self, peak: float = H200[0], bandwidth: float = H200[1]) -> float:
        return 1e3 * max(self.operations / peak, self.bytes / bandwidth)


def estimates(N: int, V: int, D: int, *, rho: float = 0.6, arch: str = "sm_90") -> list[Estimate]:
    """Calls of a selection step: N rows, vocabulary V, hidden size D, a share rho of the rows kept."""
    product = 2.0 * N * V * D
    head, hidden = 2.0 * V * D, 2.0 * N * D
    row_tiles = -(-N // TILES[arch]["stats"][2].rows)
    groups = -(-2 * row_tiles // GROUP)  # each sweeps the heads of both models once
    gradient = 2.0 * rho * N * V
    shape, kept = f"N {N}, V {V}, D {D}", f"{rho:.0%} kept"
    return [
        Estimate("hidden_stats, two models", shape, 2 * product, 2 * groups * head + 2 * hidden),
        Estimate("logits_stats, two models", shape, 0.0, 2 * 2.0 * N * V),
        Estimate(f"gather_kept, {kept}", shape, 0.0, 2 * rho * hidden),
        Estimate(f"logits_gradient, {kept}", shape, rho * product, head + rho * hidden + gradient),
        Estimate(f"hidden_gradient, {kept}", shape, rho * product, head + gradient + 2 * rho * hidden),
        Estimate(f"head_gradient, {kept}", shape, rho * product, head + gradient + rho * hidden),
        Estimate(f"block_gradient (chunked), {kept}", shape, 0.0, 2 * gradient + gradient),  # float32 in, half out
    ]


def attention_estimates(S: int, heads: int = 32, key_heads: int = 8, d: int = 128) -> list[Estimate]:
    """Mass of one layer and sequence, the first quarter of it prompt."""
    shape = f"S {S}, heads {heads}/{key_heads} of {d}"
    prompt, response = S // 4, S - S // 4
    read = 2.0 * S * d * (heads + key_heads)
    pairs = response * prompt + response**2 / 2
    return [
        Estimate("attention_mass", shape, 2.0 * heads * d * pairs, read),
        Estimate("attention_mass, lse given", shape, 2.0 * heads * d * response * prompt, read),
    ]


def as_row(estimate: Estimate) -> dict:
    """A row for the terminal."""
    return {
        "kernel": estimate.kernel,
        "shape": estimate.shape,
        "operations, T": f"{estimate.operations / 1e12:.2f}",
        "bytes, G": f"{estimate.bytes / 1e9:.2f}",
        "at least, ms on an H200": f"{estimate.milliseconds():.2f}",
        "measured": "not measured",
    }
