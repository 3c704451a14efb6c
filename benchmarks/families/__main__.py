"""Every causal language model and image encoder of transformers as a teacher: what works, and what does not.

    python -m benchmarks.families [--family NAME ...] [--out FILE] [--resume] [--workers N] [--page docs/families.md]

Every family is a tiny random model (tiny.py), tried in a process of its own with a time limit (checks.py). The page's
table is written from the JSON (page.py).
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command_of, facts
from benchmarks.families.isolated import LIMIT, isolated
from benchmarks.families.page import summary, write_page
from benchmarks.families.tiny import CLASSES, families
from subquad.errors import nearest
from subquad.utils.files import write_json

RESULTS = Path(__file__).parents[1] / "results" / "families.json"


def sweep(names: Sequence[str], report: dict[str, Any], out: Path, workers: int = 1) -> None:
    """Tries these families, and writes the report after each of them."""
    rows = {row["family"]: row for row in report["rows"]}
    with ThreadPoolExecutor(workers) as pool:
        for outcome in pool.map(isolated, names):
            rows[outcome.family] = outcome.row()
            report["rows"] = [rows[name] for name in sorted(rows)]
            write_json(out, report)
            print(f"{outcome.family:28} {outcome.outcome:9} {outcome.detail}", flush=True)
    print(summary(report["rows"]))


def main(argv: Sequence[str] | None = None) -> None:
    """Tries what was asked for, prints and writes the outcomes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", nargs="+", metavar="NAME", help="model types; all others keep the file's results")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="JSON of the outcomes")
    parser.add_argument("--resume", action="store_true", help="leave out families that the file has already")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="families at a time")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="write the table into this page")
    arguments = parser.parse_args(argv)
    known = [*dict.fromkeys([*families(), *families(CLASSES)])]
    for name in arguments.family or []:
        if name not in known:
            parser.error(f"transformers has no family '{name}': {nearest(name, known).partition('(valid')[0]}")
    report = facts(command_of("benchmarks.families", argv), {"limit": LIMIT}, torch.device("cpu"))
    keeps = (arguments.resume or arguments.family) and arguments.out.is_file()
    kept = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"] if keeps else []
    report["rows"] = [row for row in kept if row["family"] in known]
    done = {row["family"] for row in kept} if arguments.resume else set()
    names = [name for name in arguments.family or known if name not in done]
    sweep(names, report, arguments.out, arguments.workers)
    if arguments.page:
        write_page(arguments.page, report)


if __name__ == "__main__":
    main()
