"""The site: these pages, and the README as its first one, with interactive figures. `make docs` builds it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

project = "Progressive learning"
extensions = ["myst_parser"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page may go from h1 to h3
html_theme = "furo"
html_title = project
html_copy_source = False
html_static_path = [f"../Graphs/{name}" for name in ("vega.js", "figures.js", "figures.css")]
exclude_patterns = ["_build"]
pygments_style, pygments_dark_style = "default", "monokai"

ELSEWHERE = {"index": "README.md", "benchmarks": "benchmarks/README.md"}  # which pages have their text

LINK = re.compile(r"(?<!!)\[((?:[^][]|!\[[^]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")
PICTURE = re.compile(r"\[!\[[^]]*\]\([^)]*\)\]\((?:\.\./)?Graphs/([\w.-]+)\.html\)")


def as_page(app, name, source):
    """Turn a page that is written for the repository into one of the site."""
    folder = ROOT / "docs"
    if name in ELSEWHERE:
        file = ROOT / ELSEWHERE[name]
        tree = source[0] if name == "index" else ""
        source[0], folder = f"{file.read_text(encoding='utf-8')}\n{tree}", file.parent
        app.env.note_dependency(str(file))
    text = PICTURE.sub(lambda found: f"\n{figure(app, found[1])}\n", source[0])
    source[0] = LINK.sub(lambda found: link(found[1], found[2], folder), text)


def figure(app, name):
    """Take a figure's element out of its page."""
    path = ROOT / "Graphs" / f"{name}.html"
    app.env.note_dependency(str(path))
    return next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith('<div class="chart"'))


def link(text, target, folder):
    """Lead a link of a page in `folder` to where it is on the site; that to a folder becomes its name."""
    path, _, anchor = target.partition("#")
    if "://" in path or not path:
        return f"[{text}]({target})"
    place = (folder / path).resolve()
    if place.is_dir():
        return text
    if place == ROOT / "README.md":
        return f"[{text}](index.md{'#' + anchor if anchor else ''})"
    if place.suffix == ".md" and place.parent == ROOT / "docs":
        return f"[{text}]({place.name}{'#' + anchor if anchor else ''})"
    if place.suffix == ".md" and place.parent == ROOT / "benchmarks":
        return f"[{text}](benchmarks.md)"
    return f"[{text}]({'/'.join(['..', *place.relative_to(ROOT).parts])})"  # a file, as a download


def with_figures(app, page, template, context, doctree):
    """Have a page with figures load what draws them."""
    if doctree is not None and 'class="chart"' in context.get("body", ""):
        for name in ("vega.js", "figures.js"):
            app.add_js_file(name, loading_method="defer")
        app.add_css_file("figures.css")


def setup(app):
    app.connect("source-read", as_page)
    app.connect("html-page-context", with_figures)
