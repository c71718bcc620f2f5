"""Known-good tiles per chip family: `tiles.json`, no tuning at import or on a first call.

The file is family -> kind of product -> size of an element -> tile. Kinds: "stats", online softmax behind the product;
"full_stats", the same with a softcap or more sums, which need more registers; "gradient", logits to their gradient;
"matmul", a product alone; "attention", the mass on prompt keys.

What a family must be able to run is checked by `tokensel kernels`, ahead of time: no spills, shared memory within the
chip's limit. `tokensel tune` writes such a file for the GPU at hand; TOKENSEL_TILES=FILE puts it before the table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path

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
    specialize: bool = False  # warps of their own for loads, products and epilogue (Blackwell)
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


@dataclass(frozen=True)
class AttentionTile:
    """Score tile of (rows of all heads of a group, keys), warps, stages."""

    rows: int
    keys: int
    warps: int
    stages: int
    precision: str = "ieee"


Table = dict[str, dict[str, dict[int, "ProductTile | AttentionTile"]]]  # family -> kind -> bytes of an element -> tile

FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942")
KINDS = {kind: ProductTile for kind in ("stats", "full_stats", "gradient", "matmul")}
KINDS |= {"attention": AttentionTile}
SIZES = {"half": 2, "float32": 4}
TRITON = (3, 4)  # the first with descriptors made on the host
# Three products of 10 + 11 bits each: as exact as a chain of float32 multiply-adds, on matrix units
TF32 = ("sm_80", "sm_90", "sm_100")
CHIPS_WITH = {"tma": ("sm_90", "sm_100"), "specialize": ("sm_100",)}  # fields that not every family may set
MOST = {"warps": 32, "stages": 16}  # of a file's tile; of other fields 1,024, the side of Triton's largest tile
SHIPPED = Path(__file__).with_name("tiles.json")


def file_fields(kind: str) -> list[str]:
    """What a tile of this kind consists of in a file; the rest is known where it runs."""
    fields = [field.name for field in dataclasses.fields(KINDS[kind])]
    return [name for name in fields if name not in ("processors", "precision")]


def _entry(kind: str, tile: ProductTile | AttentionTile) -> dict:
    fields = {name: getattr(tile, name) for name in file_fields(kind)}
    return {name: value for name, value in fields.items() if name != "specialize" or value}


def read_tiles(path: str | Path, below: Table | None = None) -> Table:
    """The tiles of a file, over those of another table.

    Raises:
        ValueError: the file, the entry, what was expected and what is there.
    """

    def need(condition: bool, where: str, expected: str, value: object) -> None:
        if not condition:
            raise ValueError(f"tiles of {path}: {where} must be {expected}; got {reprlib.repr(value)}")

    def named(entry: object, where: str, names: tuple[str, ...]) -> dict:
        need(isinstance(entry, dict) and set(entry) <= set(names), where, f"of {', '.join(names)}", entry)
        return entry

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"tiles of {path} cannot be read: {error}") from error
    table: Table = {family: {k: dict(sizes) for k, sizes in kinds.items()} for family, kinds in (below or {}).items()}
    for family, kinds in named(content, "a family", FAMILIES).items():
        for kind, sizes in named(kinds, f"a kind of {family}", tuple(KINDS)).items():
            for size, entry in named(sizes, f"a size of {family} {kind}", tuple(SIZES)).items():
                where, names = f"{family} {kind} {size}", file_fields(kind)
                known = isinstance(entry, dict) and set(names) - {"specialize"} <= set(entry) <= set(names)
                need(known, where, f"all of {', '.join(names)}", entry)
                for name, value in entry.items():
                    at = f"{name} of {where}"
                    if name in CHIPS_WITH:
                        need(isinstance(value, bool), at, "true or false", value)
                        need(not value or family in CHIPS_WITH[name], at, "false: the chip has no such unit", value)
                        continue
                    whole = isinstance(value, int) and not isinstance(value, bool)
                    need(whole and value > 0, at, "a positive whole number", value)
                    most = MOST.get(name, 1024)
                    need(value <= most, at, f"at most {most}", value)
                    need(name == "stages" or value.bit_count() == 1, at, "a power of two", value)
                    need(name in ("warps", "stages") or value >= 16, at, "at least 16", value)
                table.setdefault(family, {}).setdefault(kind, {})[SIZES[size]] = KINDS[kind](**entry)
    for family, kinds in table.items():
        for size, number in SIZES.items():
            depth = misfit(kinds, number)
            need(not depth, f"depth of {family} matmul {size}", "a divisor of rows and columns of gradient", depth)
    return table


def misfit(kinds: dict[str, dict[int, ProductTile | AttentionTile]], size: int) -> int | None:
    """The depth of the products after the logits' gradient, if it does not divide that gradient's tile: it is zero to
    the end of its tiles and no further, and they read steps of their depth."""
    written, read = (kinds.get(kind, {}).get(size) for kind in ("gradient", "matmul"))
    if written and read and (written.rows % read.depth or written.columns % read.depth):
        return read.depth
    return None


def write_tiles(path: str | Path, table: Table) -> None:
    """Writes a table as `read_tiles` reads it, one tile a line."""
    sizes = {number: name for name, number in SIZES.items()}
    families = []
    for family, kinds in table.items():
        lines = []
        for kind, tiles in kinds.items():
            entries = {sizes[n]: _entry(kind, tile) for n, tile in tiles.items()}
            inner = ",\n".join(f'   "{size}": {json.dumps(entry)}' for size, entry in entries.items())
            lines.append(f'  "{kind}": {{\n{inner}\n  }}')
        families.append(f' "{family}": {{\n' + ",\n".join(lines) + "\n }")
    Path(path).write_text("{\n" + ",\n".join(families) + "\n}\n", encoding="utf-8")


def _load() -> Table:
    table = read_tiles(SHIPPED)
    if path := os.environ.get("TOKENSEL_TILES"):
        table = read_tiles(path, table)
    # so that a test of ragged shapes is more than one tile
    small = ProductTile(16, 64, 16, 4, 1, precision="widened")
    table["interpreter"] = {kind: dict.fromkeys(SIZES.values(), small) for kind in KINDS}
    table["interpreter"]["attention"] = dict.fromkeys(SIZES.values(), AttentionTile(16, 16, 4, 1, "widened"))
    return table


TILES = _load()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False


def chip_family(device: torch.device) -> tuple[str, int]:
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
    if (version := tuple(map(int, triton.__version__.split(".")[:2]))) < TRITON:
        needed, found = (".".join(map(str, v)) for v in (TRITON, version))
        raise ValueError(
            f"impl='fused' needs Triton {needed} or newer (PyTorch 2.8); this is {found}; use impl='chunked'"
        )
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942", properties.multi_processor_count
    major, minor = properties.major, properties.minor
    if major < 8:
        raise ValueError(
            f"impl='fused' needs compute capability 8.0 or newer; {properties.name} has {major}.{minor}; use "
            "impl='chunked'"
        )
    # 8.6, 8.9 and 12.x have little shared memory; their tile is the oldest family's
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80"), properties.multi_processor_count


def on_device(like: Tensor) -> contextlib.AbstractContextManager:
    """Within, kernels are launched on the tensor's own GPU, which need not be the current one."""
    return torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()


def product_tile(like: Tensor, kind: str, *matrices: Tensor) -> ProductTile:
    """The table's tile for a tensor's device and type.

    matrices: what is to be read by descriptors. Where the rows of one are not aligned, a tile that reads by pointers,
    so that no head is copied.
    """
    family, processors = chip_family(like.device)
    size = like.element_size()
    tile = TILES[family][kind][size]
    if not all(map(is_aligned, matrices)):  # half as wide, for the addresses and masks that pointers take
        narrow = TILES["sm_80"][kind][size] if tile.tma and family in CHIPS_WITH["tma"] else tile
        tile = dataclasses.replace(narrow, tma=False, columns=max(16, narrow.columns // 2))
    precision = "tf32x3" if size == 4 and family in TF32 else tile.precision
    return dataclasses.replace(tile, processors=processors, precision=precision)


def row_columns(like: Tensor) -> int:
    """Columns that a kernel which streams rows takes at a time: 16 bytes a thread of eight warps."""
    return 128 if chip_family(like.device)[0] == "interpreter" else 4096 // like.element_size()


def is_aligned(matrix: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, as descriptors need."""
    size = matrix.element_size()
    return matrix.stride(-1) == 1 and not (matrix.data_ptr() % 16 or matrix.stride(0) * size % 16)


def empty_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows, columns] for a kernel to write, of the type and on the device of `like`, its rows aligned."""
    step = 16 // like.element_size()
    return torch.empty(rows, triton.cdiv(columns, step) * step, dtype=like.dtype, device=like.device)[:, :columns]


def tile_source(matrix: Tensor, rows: int, columns: int, tile: ProductTile) -> object:
    """What `load_tile` reads (rows, columns) of an aligned matrix from: with TMA a descriptor, else itself."""
    if not tile.tma:
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
