"""Draw the figures of `Graphs/`, and write what README and docs show between their marks, from `results/`.

python -m Graphs.draw               all of them
python -m Graphs.draw RUN_FOLDER    the report.html of a run again
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from Graphs.marks import filled
from Graphs.rows import ROOT
from Graphs.tables import Tables
from reporting.folder import PLAN, REPORT, RunFolder
from reporting.page import report_page

if TYPE_CHECKING:
    from Graphs.figure import Figure

RESULTS, FOLDER = os.path.join(ROOT, "results"), os.path.join(ROOT, "Graphs")
PAGES = ("README.md", *(os.path.join("docs", f"{name}.md") for name in ("results", "settings", "stages")))


def with_results(page: str, results: str = RESULTS) -> str:
    """Read a page, and return its text as the rows in `results` have it."""
    with open(os.path.join(ROOT, page), encoding="utf-8") as file:
        text = file.read()
    tables = Tables(results, "../" * page.count(os.sep))
    return filled(text, tables.table, tables.value)


def draw_all(figures: "Sequence[Figure]", folder: str) -> None:
    """Draw figures into a folder, and remove the files of those whose rows are gone."""
    for figure in figures:
        figure.write(folder)
    for file in os.listdir(folder):
        name, kind = os.path.splitext(file)
        if kind in (".svg", ".html") and name not in {figure.name for figure in figures}:
            os.remove(os.path.join(folder, file))


def main(arguments: Sequence[str]) -> None:
    """Draw all figures and write all pages, or, given the folder of a run, its report."""
    if arguments:
        run = RunFolder(arguments[0])
        if len(arguments) > 1 or not run.has(PLAN):
            sys.exit("error: give nothing, to draw the figures and write README and docs, or one folder of a run")
        run.write(REPORT, report_page(run))
        return
    from Graphs.figure import write_library, write_text  # a report needs none of what draws them
    from Graphs.figures import all_figures
    from Graphs.sizes import write

    write_library(FOLDER)
    write()
    draw_all(all_figures(RESULTS), FOLDER)
    for page in PAGES:
        write_text(os.path.join(ROOT, page), with_results(page))


if __name__ == "__main__":
    main(sys.argv[1:])
