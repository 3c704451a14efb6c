"""A run as people read it: one HTML page, a model card, a picture, a table in the terminal.

Everything is read back from the files of the run folder, so that a report can be made again at any time, from a
finished run or from one that only got so far. Every number comes from those files (or is the ratio of two that do).
"""

from subquad.report.bench_tables import draw_bench, print_bench
from subquad.report.card import write_model_card
from subquad.report.page import write_report
from subquad.report.plan_table import print_plan, saving_warning
from subquad.report.plots import plan_picture, write_picture
from subquad.report.table import print_table

__all__ = [
    "draw_bench",
    "plan_picture",
    "print_bench",
    "print_plan",
    "print_table",
    "saving_warning",
    "write_model_card",
    "write_picture",
    "write_report",
]
