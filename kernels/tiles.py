"""Known-good tiles per chip family: a table to read, no tuning at import or on a first call.

A product tile is (rows, columns, depth) elements, warps and pipeline stages. What a family must be able to run is
checked by `tokensel kernels`, ahead of time: no spills, shared memory within the chip's limit.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

GROUP = 16  # row tiles that sweep the vocabulary together: 16 · 128 rows of 4,096 bfloat16 are 16 MiB of L2


@dataclass(frozen=True)
class ProductTile:
    """How one product kernel is cut and run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool = False
    processors: int = 1  # of the device it runs on
    precision: str = "ieee"  # of float32 inputs

    def constants(self) -> dict:
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "GROUP": GROUP,
            "TMA": self.tma,
            "PRECISION": self.precision,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


_FLOAT32 = ProductTile(64, 64, 16, 4, 3)  # in full precision, without tensor cores
_FLOAT32_STATS = ProductTile(32, 64, 16, 4, 2)
_SMALL = ProductTile(16, 64, 16, 4, 1, precision="widened")  # so that a test of ragged shapes is more than one tile

# family -> kind of product -> bytes of an element -> tile. "stats": online softmax behind the product; "full_stats":
# with bias, softcap, entropy and variance, which need more registers; "gradient": logits to their gradient; "matmul":
# a product alone.
TILES: dict[str, dict[str, dict[int, ProductTile]]] = {
    "sm_80": {
        "stats": {2: ProductTile(128, 128, 32, 8, 4), 4: _FLOAT32_STATS},
        "full_stats": {2: ProductTile(128, 64, 32, 4, 4), 4: _FLOAT32_STATS},
        "gradient": {2: ProductTile(128, 64, 32, 4, 4), 4: _FLOAT32},
        "matmul": {2: ProductTile(128, 128, 32, 8, 4), 4: _FLOAT32},
    },
    "sm_90": {
        "stats": {2: ProductTile(128, 256, 64, 8, 3, tma=True), 4: _FLOAT32_STATS},
        "full_stats": {2: ProductTile(128, 128, 64, 8, 4, tma=True), 4: _FLOAT32_STATS},
        "gradient": {2: ProductTile(128, 128, 64, 8, 4, tma=True), 4: _FLOAT32},
        "matmul": {2: ProductTile(128, 128, 64, 8, 3, tma=True), 4: _FLOAT32},
    },
    "sm_100": {
        "stats": {2: ProductTile(128, 128, 64, 8, 4, tma=True), 4: _FLOAT32_STATS},
        "full_stats": {2: ProductTile(128, 128, 64, 8, 4, tma=True), 4: _FLOAT32_STATS},
        "gradient": {2: ProductTile(128, 128, 64, 8, 4, tma=True), 4: _FLOAT32},
        "matmul": {2: ProductTile(128, 128, 64, 8, 3, tma=True), 4: _FLOAT32},
    },
    "gfx942": {
        "stats": {2: ProductTile(128, 128, 64, 8, 2), 4: _FLOAT32_STATS},
        "full_stats": {2: ProductTile(128, 64, 64, 8, 2), 4: _FLOAT32_STATS},
        "gradient": {2: ProductTile(128, 128, 64, 8, 2), 4: _FLOAT32},
        "matmul": {2: ProductTile(128, 128, 64, 8, 2), 4: _FLOAT32},
    },
    "interpreter": {kind: {2: _SMALL, 4: _SMALL} for kind in ("stats", "full_stats", "gradient", "matmul")},
}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False


def _family(device: torch.device) -> tuple[str, int]:
    """(chip family, processors) of the device that kernels run on.

    Raises:
        ValueError: no GPU, or a chip that is too old.
    """
    return ("interpreter", 2) if interpreting() else _gpu_family(device)


@functools.lru_cache
def _gpu_family(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        raise ValueError(
            f"impl='fused' needs a GPU and the tensors are on {device}; use impl='chunked' (or set "
            "TRITON_INTERPRET=1 before the start, to debug the kernels)"
        )
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942", properties.multi_processor_count
    major, minor = properties.major, properties.minor
    if major < 8:
        raise ValueError(f"impl='fused' needs compute capability 8.0 or newer; {properties.name} has {major}.{minor}")
    # 8.6, 8.9 and 12.x have little shared memory; their tile is the oldest family's
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80"), properties.multi_processor_count


def product_tile(like: Tensor, kind: str) -> ProductTile:
    """The table's tile for a tensor's device and type."""
    family, processors = _family(like.device)
    return dataclasses.replace(TILES[family][kind][like.element_size()], processors=processors)


@dataclass(frozen=True)
class AttentionTile:
    """Score tile of (rows of all heads of a group, keys), warps, stages."""

    rows: int
    keys: int
    warps: int
    stages: int
    precision: str = "ieee"


ATTENTION_TILES: dict[str, dict[int, AttentionTile]] = {
    "sm_80": {2: AttentionTile(128, 32, 8, 2), 4: AttentionTile(16, 16, 4, 2)},
    "sm_90": {2: AttentionTile(128, 128, 8, 2), 4: AttentionTile(16, 16, 4, 2)},
    "sm_100": {2: AttentionTile(128, 32, 8, 2), 4: AttentionTile(16, 16, 4, 2)},
    "gfx942": {2: AttentionTile(128, 64, 8, 1), 4: AttentionTile(16, 16, 4, 1)},
    "interpreter": {size: AttentionTile(16, 16, 4, 1, "widened") for size in (2, 4)},
}


def attention_tile(like: Tensor, group: int) -> tuple[int, dict]:
    """(queries of a tile, the kernel's constants) for q [B, Hq, S, d] and `group` query heads a key head, padded to a
    power of two."""
    tile = ATTENTION_TILES[_family(like.device)[0]][like.element_size()]
    constants = {"KEYS": tile.keys, "PRECISION": tile.precision, "num_warps": tile.warps, "num_stages": tile.stages}
    return max(1, attention_rows(tile, like.shape[-1]) // group), constants


def attention_rows(tile: AttentionTile, head_size: int) -> int:
    """Rows of a score tile: half as many for large heads, whose queries fill the registers."""
    return tile.rows // 2 if head_size > 128 else tile.rows


def row_columns(like: Tensor) -> int:
    """Columns that a kernel which streams rows takes at a time: 16 bytes a thread of eight warps."""
    return 128 if _family(like.device)[0] == "interpreter" else 4096 // like.element_size()


def aligned(matrix: Tensor) -> Tensor:
    """The matrix, or a copy whose rows begin at multiples of 16 bytes, as descriptors and wide loads need."""
    if matrix.stride(-1) == 1 and not (matrix.data_ptr() % 16 or matrix.stride(0) * matrix.element_size() % 16):
        return matrix
    per_16_bytes = 16 // matrix.element_size()
    width = triton.cdiv(matrix.shape[1], per_16_bytes) * per_16_bytes
    copy = matrix.new_empty(matrix.shape[0], width)[:, : matrix.shape[1]]
    return copy.copy_(matrix)


def tile_source(matrix: Tensor, rows: int, columns: int, tile: ProductTile) -> object:
    """What `load_tile` reads (rows, columns) of an aligned matrix from: with TMA a descriptor, else itself."""
    if not tile.tma:
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
