"""Marks in Markdown between which tools write: what stands there comes from rows, and is not typed.

    <!-- table NAME -->                 a table, a picture or a printed output: whole lines
    <!-- end of table -->
    ... took <!-- value NAME -->76<!-- end --> seconds      a figure inside a sentence

No page that has them needs a tool to be read: both are comments, which Markdown does not show.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

BLOCK = re.compile(r"(<!-- table ([^\n]+?) -->\n)(.*?)(<!-- end of table -->)", re.S)
VALUE = re.compile(r"(<!-- value ([^\n]+?) -->)(.*?)(<!-- end -->)", re.S)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def with_table(text: str, name: str, content: str) -> str:
    """Put a table between its marks in the text of a page, and return the text.

    Raises:
        ValueError: the page has no such marks.
    """
    places = [found for found in BLOCK.finditer(text) if found[2] == name]
    if len(places) != 1:
        raise ValueError(f"{len(places)} places for the table {name}, not one")
    return text[: places[0].start(3)] + content.strip("\n") + "\n" * bool(content) + text[places[0].end(3) :]


def write_tables(page: str, tables: Mapping[str, Callable[[], str]]) -> None:
    """Write tables, given by name, between their marks in the file `page`."""
    with open(page, encoding="utf-8") as file:
        text = file.read()
    for name, table in tables.items():
        text = with_table(text, name, table())
    with open(page, "w", encoding="utf-8") as file:
        file.write(text)


def filled(text: str, table: Callable[[str], str], value: Callable[[str], str]) -> str:
    """Fill all marks of a page.

    table, value: what belongs between the marks of a name
    """
    for name in [found[2] for found in BLOCK.finditer(text)]:
        text = with_table(text, name, table(name))
    return VALUE.sub(lambda found: f"{found[1]}{value(found[2])}{found[4]}", text)
