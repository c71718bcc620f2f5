"""A table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: list[dict], left: Sequence[str] = ()) -> str:
    """Rows of the same keys as aligned text: the first column and those in `left` to the left, numbers to the right.

    Raises:
        ValueError: no rows, or rows with different keys.
    """
    columns = column_names(rows)
    cells = [columns, *[[str(row[c]) for c in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == columns[0] or column in left else cell.rjust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def column_names(rows: list[dict]) -> list[str]:
    """The keys that all rows have, in their order.

    Raises:
        ValueError: no rows, or rows with different keys.
    """
    if not rows:
        raise ValueError("table rows are empty; give at least one row")
    columns = list(rows[0])
    for number, row in enumerate(rows):
        if list(row) != columns:
            raise ValueError(f"row {number} has the columns {list(row)} but row 0 has {columns}")
    return columns
