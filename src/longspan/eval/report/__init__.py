"""Rows of a comparison as a terminal table and as one self-contained HTML file; no measuring."""

from .columns import COLUMNS, headline
from .page import render_page, write_page
from .terminal import comparison_table

__all__ = ["COLUMNS", "comparison_table", "headline", "render_page", "write_page"]
