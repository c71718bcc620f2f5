"""What people look at: a page of samples with each token's fate, a plot of REL, a table for the terminal.

Rows that are watched while training are in `tokensel.report.watch`, which needs transformers and is not imported here.
"""

from __future__ import annotations

from tokensel.report.page import TOKEN_FIELDS, write_selection_page
from tokensel.report.plot import plot_rel
from tokensel.report.table import format_table

__all__ = ["TOKEN_FIELDS", "format_table", "plot_rel", "write_selection_page"]
