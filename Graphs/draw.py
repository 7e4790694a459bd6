"""Figures and tables from `results/` and run folders."""

import os
import sys

from reporting.folder import read_json
from reporting.page import report_page

RESULTS_PAGE = os.path.join("docs", "results.md")


def results_table(root: str) -> str:
    """A Markdown table of the finished runs kept in `root`, one folder each, from their own files."""
    lines = [
        "| run | image sizes | epochs | top-1 % | seeds | training, minutes | relative cost | machine | commit |",
        "|" + "---|" * 9,
    ]
    for name in sorted(os.listdir(root)):
        summary = read_json(os.path.join(root, name, "summary.json"))
        if summary is None:
            continue
        sizes = ", ".join(str(stage["image_size"]) for stage in summary["stages"])
        versions = summary["versions"]
        cells = [
            f"[{name}](../{os.path.basename(root)}/{name}/config.yaml)",
            sizes,
            summary["epochs"],
            f"{summary['top1']:.2f}",
            f"1 (seed {summary['seed']})",
            f"{summary['train_seconds'] / 60:.1f}",
            f"{summary['relative_cost']:.2f}",
            f"{summary['device']}, {versions['system']}, torch {versions['torch']}",
            (summary["commit"] or "before the first")[:16],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write_results(root: str, page: str = RESULTS_PAGE) -> None:
    """Put the table into the page, between its two marks."""
    with open(page, encoding="utf-8") as file:
        before, _, rest = file.read().partition("<!-- table -->\n")
    after = rest.partition("<!-- end of table -->")[2]
    with open(page, "w", encoding="utf-8") as file:
        file.write(f"{before}<!-- table -->\n{results_table(root)}\n<!-- end of table -->{after}")


def main(folder: str) -> None:
    if os.path.exists(os.path.join(folder, "report", "plan.json")):
        with open(os.path.join(folder, "report.html"), "w", encoding="utf-8") as file:
            file.write(report_page(folder))
    else:
        write_results(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not os.path.isdir(sys.argv[1]):
        sys.exit(
            "usage: python -m Graphs.draw RUN_FOLDER   draws its report.html again\n       python -m Graphs.draw results      writes the table of docs/results.md"
        )
    main(sys.argv[1])
