"""README, site and notebook: commands parse, links lead somewhere, figures come from rows, pages work in a browser."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import nbformat
import pytest
import study_rows
from nbclient import NotebookClient
from programs import ROOT, environment
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from Graphs.figure import page as page_of
from Graphs.figures import all_figures
from settings.resolve import resolve
from stages import plan_stages

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def of(page):
    return page.read_text(encoding="utf-8")


# ---- what a page says ----


def commands(page):
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", of(page), re.M | re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if "train.py" in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page):
    for command in commands(page):
        flags = command.split("train.py", 1)[1].split()
        resolve([re.sub(r"^runs/imagenette_s/\w+\.pth$", "README.md", flag) for flag in flags])


def test_the_commands_are_found():
    assert sum(len(commands(page)) for page in PAGES) >= 15


def test_make_targets_exist():
    for target in set(re.findall(r"(?:^|`)make ([\w-]+)", "".join(map(of, PAGES)), re.M)):
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0, target


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_within_the_repository_lead_somewhere(page):
    """As a reader of the repository follows them; those of the site are checked when it is built."""
    for target in re.findall(r"\]\(([^)\s]+)\)", of(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            place = page.parent / path if path else page
            assert place.exists(), f"{page.name}: {target}"
            if anchor and place.suffix == ".md":
                heads = [
                    re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-")
                    for head in re.findall(r"^#+ (.*)", of(place), re.M)
                ]
                assert anchor in heads, f"{page.name}: {target}"


FIGURE = re.compile(
    r"(?<![\w.-])(\d[\d.,]*(?: (?:to|or|and|±) \d[\d.,]*)*) ?(%|seconds?\b|s\b|ms\b|minutes?\b|hours?\b|images/s|images a second|MiB|GiB|times\b|kernels\b|points\b)"
)


def typed_figures(page):
    """The figures with a unit that stand in a page's own sentences: not in code, not between the marks of a tool."""
    text = re.sub(r"^```.*?^```|<!-- table .*?<!-- end of table -->|<!-- value .*?<!-- end -->|`[^`]*`", "", of(page), flags=re.M | re.S)  # fmt: skip
    return Counter(found[0] for found in FIGURE.finditer(" ".join(text.split())))


def test_every_figure_has_a_row_or_a_source():
    quoted = {}
    for line in of(ROOT / "tests" / "data" / "quoted_figures.txt").splitlines():
        if not line.startswith("#"):
            page, figure, source = line.split(" | ")
            assert source
            quoted.setdefault(page, Counter())[figure] += 1
    for page in PAGES:
        name, typed = page.relative_to(ROOT).as_posix(), typed_figures(page)
        listed = quoted.pop(name, Counter())
        assert not typed - listed, f"{name}: {typed - listed} have no row; write them by a mark, or name their source in tests/data/quoted_figures.txt, a line for each time"  # fmt: skip
        assert not listed - typed, (
            f"{name}: tests/data/quoted_figures.txt names figures that are gone: {listed - typed}"
        )
    assert not quoted


def test_no_line_begins_with_the_mark_of_a_figure():
    """Markdown takes a line that begins with a comment for HTML: its paragraph ends there, and its *words* stay bare."""
    for page in PAGES:
        assert not re.findall(r"^ {0,3}<!-- value.*", of(page), re.M), page


def test_a_typed_figure_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "It took 76 s, so\n12.5 %, `3 s`, 12.5 %, <!-- value a | b | c -->4 s<!-- end -->.\n<!-- table x -->\n5 s\n<!-- end of table -->\n"
    )
    assert typed_figures(page) == {"76 s": 1, "12.5 %": 2}


def test_messages_that_are_explained_are_messages_of_the_program():
    code = "".join(of(path) for path in ROOT.glob("**/*.py") if ".venv" not in path.parts and "tests" not in path.parts)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a message over several lines
    page = of(ROOT / "docs" / "troubleshooting.md")
    quoted = re.findall(r"^`([^`]+)`$", page, re.M)
    assert len(quoted) >= 20
    for message in quoted:
        assert message in code, message


# ---- the site ----


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does: any warning, such as a link that leads nowhere, fails it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(folder / "trees"), "docs", str(folder / "html")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


def test_every_page_is_on_the_site_with_its_figures(site):
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").exists(), page.name
    story = of(site / "index.html")
    shown = re.findall(r"Graphs/([\w.-]+)\.svg", of(ROOT / "README.md"))
    assert "schedule" in shown and all(f'<div class="chart" id="{name}">' in story for name in shown)
    assert "figures.js" in story and "figures.js" not in of(site / "settings.html")
    assert "train_crop_size" in of(site / "settings.html")


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, as Debian's packages chromium and chromium-driver have it."""
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver here; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        yield chrome


def look(browser, page, width=1200, theme="light"):
    """Open a page at a width, in the system's light or dark colours, and wait until its charts are drawn."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    drawn = "return [...document.querySelectorAll('.chart')].every(chart => chart.hasAttribute('data-drawn'))"
    WebDriverWait(browser, 30, 0.05).until(lambda chrome: chrome.execute_script(drawn))
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    wide = "return document.scrollingElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(wide) <= 0, f"{page.name} is wider than {width} px"


CHARTS = """
const light = colour => {  // relative luminance, WCAG 2
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255);
  const [red, green, blue] = parts.map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const behind = element => {  // the colour that shines through
  while (element && /rgba\\(.*, 0\\)/.test(getComputedStyle(element).backgroundColor)) element = element.parentElement;
  return element ? getComputedStyle(element).backgroundColor : matchMedia("(prefers-color-scheme: dark)").matches ? "rgb(18, 18, 18)" : "rgb(255, 255, 255)";
};
return [...document.querySelectorAll(".chart")].map(chart => {
  const place = chart.getBoundingClientRect(), drawing = chart.querySelector("svg").getBoundingClientRect();
  const lights = [light(getComputedStyle(chart.querySelector("svg text")).fill), light(behind(chart))].sort((a, b) => b - a);
  return {
    id: chart.id, width: drawing.width, height: drawing.height, room: place.width,
    marks: chart.querySelectorAll("svg .mark-symbol path, svg .mark-rect path, svg .mark-image image").length,
    contrast: (lights[0] + 0.05) / (lights[1] + 0.05),
  };
});
"""


@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (1200, "dark"), (375, "light")])
def test_every_figure_draws(browser, figure_pages, width, theme):
    """Those of made-up rows, so that all kinds are seen."""
    assert len(figure_pages) == 17
    for page in figure_pages:
        look(browser, page, width, theme)
        (chart,) = browser.execute_script(CHARTS)
        assert chart["id"] == page.stem and chart["marks"] >= 4 and chart["height"] > 100, chart
        most = max(chart["room"], 560 if page.stem == "schedule" else 0)  # which is scrolled on a phone
        assert 250 < chart["width"] <= most + 1 and chart["contrast"] > 3.9, chart


@pytest.fixture(scope="module")
def figure_pages(tmp_path_factory):
    rows, folder = tmp_path_factory.mktemp("rows"), tmp_path_factory.mktemp("figures")
    study_rows.write_all(rows)
    for name in ("vega.js", "figures.js", "figures.css"):
        shutil.copy(ROOT / "Graphs" / name, folder)
    for figure in all_figures(str(rows)):
        (folder / f"{figure.name}.html").write_text(page_of(figure.name, figure.title, figure.specification(), ""))
    return sorted(folder.glob("*.html"))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_story_in_light_and_dark(browser, site, theme):
    look(browser, site / "index.html", theme=theme)
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (theme == "dark")
    charts = browser.execute_script(CHARTS)
    assert charts and all(chart["marks"] >= 4 and chart["contrast"] > 3.9 for chart in charts), charts


def test_every_page_fits_a_phone(browser, site):
    pages = sorted(site.glob("*.html"))
    assert len(pages) > 10
    for page in pages:
        look(browser, page, width=375)


def test_a_figure_can_be_reached_and_saved_by_keyboard(browser, site):
    look(browser, site / "index.html")
    browser.execute_script("document.querySelector('.chart').previousElementSibling.tabIndex = -1; document.querySelector('.chart').previousElementSibling.focus()")  # fmt: skip
    inside = "return document.activeElement.closest('.chart') !== null"
    for _ in range(10):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        if browser.execute_script(inside):
            break
    assert browser.execute_script(inside)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    menu = "return [...document.activeElement.closest('details[open]').querySelectorAll('a')].map(link => link.textContent)"
    assert browser.execute_script(menu) == ["Save as SVG", "Save as PNG"]
    described = browser.execute_script("return document.querySelector('.chart svg [aria-label], .chart [aria-label]').getAttribute('aria-label')")  # fmt: skip
    assert described


# ---- the notebook ----


def test_the_notebook_s_settings_for_a_gpu_are_settings():
    cells = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4).cells
    chosen = next(cell.source for cell in cells if "cuda.is_available" in cell.source).split("else:")[0]
    config = resolve(" ".join(re.findall(r'"(--[^"]*)"', chosen)).split())
    stages = [stage.image_size for stage in plan_stages(config)]
    assert config.dataset == "imagenette-160px" and config.download and stages == [96, 117, 138, 160]


def test_the_notebook_runs_on_a_cpu(tmp_path, monkeypatch):
    """Through all of its cells, in a short training; a second run of it finds the first finished."""
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "keep it without outputs: they would grow old"
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    small = "--dataset digits --model shufflenet_v2_x0_5 --epochs 2 --stages 2 --batch-size 128 --workers 0 "
    small += "--train-crop-size 16 24 --val-resize-size 24 --val-crop-size 24 --clearml off --device cpu"
    parameters.source = f'repository, budget, settings = "", "10m", "{small}"'
    for cell in notebook.cells:
        cell.source = cell.source.replace("runs/notebook", str(tmp_path / "run"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.update(environment({"CUDA_VISIBLE_DEVICES": ""}))
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "finished" in printed and "stage 1, 24 px, epoch 2/2" in printed and "'image_size': 16" in printed
    assert (
        sum(output.output_type == "display_data" for cell in notebook.cells for output in cell.get("outputs", [])) == 2
    )
    assert (tmp_path / "run" / "summary.json").exists()
