"""Figures and tables: drawn from rows, current, complete, and left out where there are no rows."""

import json
import math
import os
import re
from types import SimpleNamespace

import altair
import numpy as np
import pytest
import study_rows
from PIL import Image
from programs import ROOT

from Graphs import draw, schedule, sizes, studies
from Graphs.figure import as_element, picture, vl_version
from Graphs.figures import SCHEDULE, all_figures
from Graphs.marks import filled, with_table
from Graphs.rows import first_and_last, time_spent
from Graphs.tables import Tables, prose
from studies.rows import read_rows, write_rows


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Made-up rows of all small studies."""
    folder = tmp_path_factory.mktemp("results")
    study_rows.write_all(folder)
    return str(folder)


def specification(results, name):
    return next(figure for figure in all_figures(results) if figure.name == name).specification()


def values(specification):
    """The values of all layers, each with the layer's mark."""

    def layers(chart, mark=None):
        mark = chart.get("mark", mark)
        data = chart.get("data")
        if data and "values" in data:
            yield (mark["type"] if isinstance(mark, dict) else mark), data["values"]
        for layer in chart.get("layer", []):
            yield from layers(layer, mark)

    return list(layers(specification))


# ---- what is committed ----


@pytest.mark.parametrize("figure", all_figures(draw.RESULTS), ids=lambda figure: figure.name)
def test_no_figure_is_older_than_its_rows(figure):
    assert figure.is_current(draw.FOLDER), f"Graphs/{figure.name} is older than its rows, or not there: make graphs"


@pytest.mark.parametrize(("cost", "same"), [(0.5582639350825257, True), (0.55826394, False)])
def test_the_schedule_s_last_digits_are_python_s(monkeypatch, cost, same):
    (figure,) = [figure for figure in all_figures(draw.RESULTS) if figure.name == "schedule"]
    contents = []
    for relative_cost in (0.5582639350825256, cost):
        plan = SimpleNamespace(as_dict=lambda number=relative_cost: {"relative_cost": number})
        monkeypatch.setattr(schedule, "make_plan", lambda config, plan=plan: plan)
        contents.append(figure.content())
    assert (contents[0] == contents[1]) is same


def test_every_picture_and_page_is_of_a_figure():
    names = {figure.name for figure in all_figures(draw.RESULTS)}
    found = {os.path.splitext(name)[0] for name in os.listdir(draw.FOLDER) if name.endswith((".svg", ".html"))}
    assert found == names


@pytest.mark.parametrize("page", draw.PAGES)
def test_pages_are_what_the_tool_writes(page):
    """`make graphs` would change nothing; a figure in a sentence without a row ends it with an error."""
    assert draw.with_results(page) == (ROOT / page).read_text(encoding="utf-8")


def test_pages_with_marks_are_all_written():
    marked = {
        str(page.relative_to(ROOT))
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        if re.search(r"<!-- (table|value) ", page.read_text(encoding="utf-8"))
    }
    others = {os.path.join("docs", f"{page}.md") for page in ("performance", "reliability")}  # of tables.py, torture.py
    assert marked == {*draw.PAGES, *others}


def test_tables_show_what_is_known_by_hand():
    """Table 6 of the paper, column S, in the README, and a run whose figures were noted."""
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "results.md").read_text()
    assert "| 1 | 88-174 | 185 | 8.333 | 0.1667 |" in readme and "| 3 | 262-348 | 300 | 15 | 0.3 |" in readme
    assert "| [imagenette_b0_fixed](../results/imagenette_b0_fixed/config.yaml) | 128 | 4 | 63.62 |" in page


def test_the_printed_output_agrees_with_the_run_it_is_of():
    printed = (ROOT / "results" / "quickstart" / "output.txt").read_text()
    records = [
        json.loads(line) for line in (ROOT / "results" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    ]
    lines = re.findall(
        r"^stage (\d), (\d+) px, epoch (\d+)/10: loss ([\d.]+), top1 ([\d.]+), (\d+) images/s", printed, re.M
    )
    assert len(lines) == len(records) == 10
    for line, record in zip(lines, records):
        assert line[:3] == (str(record["stage"]), str(record["image_size"]), str(record["epoch"] + 1))
        expected = (record["loss"], record["top1"], record["images_per_second"])
        assert all(abs(float(text) - value) <= 0.5 for text, value in zip(line[3:], expected))
        assert abs(float(line[3]) - record["loss"]) < 1e-4 and abs(float(line[4]) - record["top1"]) < 0.01


# ---- rows that come, change and go ----


def test_without_rows_there_is_the_schedule_alone(tmp_path):
    assert [figure.name for figure in all_figures(str(tmp_path))] == ["schedule"]
    assert [figure.name for figure in all_figures(str(tmp_path / "nowhere"))] == ["schedule"]


def test_the_figures_of_the_issue_come_with_their_rows(results):
    assert {figure.name for figure in all_figures(results)} == {
        "schedule", "reproduce_small_time", "reproduce_small_epochs", "reproduce_small_throughput", "epochs_small",
        "epochs_small_time", "epochs_small_parallel", "dropout_small", "dropout_small_parallel", "image_size_small",
        "image_size_small_parallel", "ra_magnitude_small", "ra_magnitude_small_conditions",
        "transfer_small", "schedules_small", "schedules_small_time", "strengths_small",
    }  # fmt: skip


def test_full_size_has_the_original_study_s_page(tmp_path):
    study_rows.write_reproduce(tmp_path, "reproduce", seeds=2)
    study_rows.write_dropout(tmp_path, "of_my_own")
    names = [figure.name for figure in all_figures(str(tmp_path))]
    assert names == [
        "schedule", "of_my_own", "of_my_own_parallel", "reproduce_time", "ImageNetTE-EfficientNetV2-S", "reproduce_throughput",
    ]  # fmt: skip


def test_a_changed_row_makes_its_figures_old_and_no_others(tmp_path, results):
    folder, rows = tmp_path / "Graphs", tmp_path / "results"
    folder.mkdir()
    rows.mkdir()
    study_rows.write_dropout(rows)
    study_rows.write_epochs(rows)
    figures = {figure.name: figure for figure in all_figures(str(rows))[1:]}
    for figure in figures.values():
        assert not figure.is_current(folder)
        figure.write(folder)
        assert figure.is_current(folder)
    changed = read_rows(f"{rows}/dropout_small.csv")
    changed[0]["top1"] += 0.5
    write_rows(f"{rows}/dropout_small.csv", changed)
    old = {name for name, figure in figures.items() if not figure.is_current(folder)}
    assert old == {"dropout_small", "dropout_small_parallel"}
    os.remove(folder / "epochs_small.svg")
    assert not figures["epochs_small"].is_current(folder)


def test_a_figure_whose_rows_are_gone_goes_too(tmp_path):
    folder, rows = tmp_path / "Graphs", tmp_path / "results"
    folder.mkdir()
    rows.mkdir()
    (folder / "figures.js").write_text("")
    study_rows.write_epochs(rows)
    draw.draw_all(all_figures(str(rows))[1:], str(folder))
    (rows / "epochs_small.csv").rename(rows / "mine.csv")
    draw.draw_all(all_figures(str(rows))[1:], str(folder))
    assert {path.name for path in folder.iterdir()} == {
        "figures.js", "mine.svg", "mine.html", "mine_parallel.svg", "mine_parallel.html",
    }  # fmt: skip


def test_rows_of_epochs_means_and_differences_are_no_studies(tmp_path):
    study_rows.write_reproduce(tmp_path, seeds=2)
    (tmp_path / "reproduce_small_means.csv").write_text("column,condition,mean,sd,n,low,high\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "begun.csv").write_text((tmp_path / "reproduce_small.csv").read_text().splitlines(keepends=True)[0])
    assert studies.studies_in(str(tmp_path)) == ["reproduce_small"]
    (tmp_path / "reproduce_small_epochs.csv").unlink()
    assert [figure.name for figure in all_figures(str(tmp_path))] == ["schedule", "reproduce_small_time"]


# ---- what is drawn ----


def test_every_figure_names_its_rows_its_device_and_n(results):
    for figure in all_figures(results)[1:]:
        text = json.dumps(figure.specification())
        study = figure.place.split()[0]
        runs = len(read_rows(f"{results}/{study}.csv"))
        assert (
            f"results/{study}.csv" in text
            and f"{runs} runs: " in text
            and "cpu (Linux x86_64, 2 cores), torch 2.14.1" in text
        )


def test_a_seed_is_a_point_and_the_mean_has_student_s_interval(tmp_path):
    write_rows(f"{tmp_path}/mine.csv", [study_rows.row("a", seed, top1) for seed, top1 in enumerate([70.0, 71.0, 72.0])] + [study_rows.row("b", 0, 60.0)])  # fmt: skip
    marks = {mark: rows for mark, rows in values(specification(str(tmp_path), "mine")) if mark != "text"}
    assert [(row["condition"], row["top1"]) for row in marks["circle"]] == [("a", 70), ("a", 71), ("a", 72), ("b", 60)]
    # Student's 97.5 % quantile of 2 degrees of freedom is 4.303: 71 ± 4.303 * 1 / sqrt(3)
    (bar,) = marks["rule"]  # none of a single run
    assert (bar["mean"], bar["n"]) == (71, 3) and bar["low"] == pytest.approx(71 - 2.484, abs=1e-3)
    assert [row["condition"] for row in marks["point"]] == ["a", "b"]


def test_time_is_a_processor_s_on_a_cpu_and_the_clock_s_elsewhere(tmp_path, results):
    chart = specification(results, "reproduce_small_time")
    points = next(rows for mark, rows in values(chart) if mark == "circle")
    row = read_rows(f"{results}/reproduce_small.csv")[0]
    assert "processor minutes" in json.dumps(chart) and points[0]["x"] == pytest.approx(
        row["cpu_seconds"] / 60, rel=1e-4
    )
    rows = [row | {"device": "NVIDIA H100"} for row in read_rows(f"{results}/reproduce_small.csv")]
    write_rows(f"{tmp_path}/reproduce.csv", rows)
    write_rows(f"{tmp_path}/reproduce_epochs.csv", read_rows(f"{results}/reproduce_small_epochs.csv"))
    chart = specification(str(tmp_path), "reproduce_time")
    points = next(rows for mark, rows in values(chart) if mark == "circle")
    assert "processor" not in json.dumps(chart) and points[0]["x"] == pytest.approx(row["train_seconds"] / 60, rel=1e-4)


def test_stages_are_marked_where_they_are(results):
    shaded = next(rows for mark, rows in values(specification(results, "reproduce_small_epochs")) if mark == "rect")
    assert [(row["from"], row["to"], row["px"]) for row in shaded] == [(0, 3, "64 px"), (3, 6, "80 px"), (6, 9, "96 px"), (9, 12, "128 px")]  # fmt: skip


@pytest.mark.parametrize(("device", "median", "unit"), [("cpu", 50, "per processor second"), ("NVIDIA H100", 20, "per second")])  # fmt: skip
def test_throughput_is_the_median_of_the_epochs_at_a_size(tmp_path, device, median, unit):
    """On a CPU, of what the processor took: here two fifths of the time, as where the run was halted now and then."""
    study_rows.write_reproduce(tmp_path, seeds=1)
    rows = read_rows(f"{tmp_path}/reproduce_small.csv")
    write_rows(f"{tmp_path}/reproduce_small.csv", [row | {"device": device} for row in rows])
    epochs = read_rows(f"{tmp_path}/reproduce_small_epochs.csv")
    for row, speed in zip([row for row in epochs if row["image_size"] == 64], [10, 30, 20] * 3):
        row |= {"images_per_second": speed, "epoch_seconds": 50.0, "cpu_seconds": 20.0}
    write_rows(f"{tmp_path}/reproduce_small_epochs.csv", epochs)
    chart = specification(str(tmp_path), "reproduce_small_throughput")
    bars = next(rows for mark, rows in values(chart) if mark == "bar")
    assert [row["px"] for row in bars] == [64, 80, 96, 128] and bars[0]["median"] == median
    assert f'"images {unit}"' in json.dumps(chart)


def test_parallel_coordinates_have_an_axis_for_what_varies(results):
    lines = next(rows for mark, rows in values(specification(results, "image_size_small_parallel")) if mark == "line")
    assert list(dict.fromkeys(row["axis"] for row in lines)) == [
        "image size first", "image size last", "processor minutes", "top-1 accuracy, %",
    ]  # fmt: skip
    assert all(0 <= row["at"] <= 1 for row in lines)
    same = [row["value"] for row in lines if row["condition"] == "64 → 64" and row["axis"].startswith("image")]
    assert same == [64, 64] * 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [("[0.1, 0.3]", (0.1, 0.3)), (0.2, (0.2, 0.2)), (5, (5, 5)), (None, None), ("paper", None), ("[]", None), ("[null]", None)],
)  # fmt: skip
def test_first_and_last_of_a_schedule(value, expected):
    assert first_and_last(value) == expected


def test_magnitudes_are_drawn_by_size_and_scale(results):
    lines = next(rows for mark, rows in values(specification(results, "ra_magnitude_small")) if mark == "line")
    groups = list(dict.fromkeys(row["group"] for row in lines))
    assert groups == [
        "64 px, paper scale",
        "64 px, torchvision scale",
        "128 px, paper scale",
        "128 px, torchvision scale",
    ]
    assert [row["x"] for row in lines if row["group"] == groups[0]] == [0, 5, 10, 15]
    assert all(row["n"] == 3 for row in lines)


def test_a_figure_counts_the_runs_that_it_shows(tmp_path):
    magnitudes = {"2": "2", "5": "5", "5 → 15": "[5, 15]", "none": "9"}
    write_rows(f"{tmp_path}/ra_magnitude_small.csv", [
        study_rows.row(name, seed, 50.0 + seed, varying={"train_crop_size": "64", "ra_magnitude": magnitude, "auto_augment": "" if name == "none" else "ra"})
        for name, magnitude in magnitudes.items() for seed in range(3)
    ])  # fmt: skip
    by_size, conditions = (json.dumps(specification(str(tmp_path), name)) for name in ("ra_magnitude_small", "ra_magnitude_small_conditions"))  # fmt: skip
    assert "6 runs: 2 conditions, seeds 0, 1, 2" in by_size and "12 runs: 4 conditions" in conditions


def test_a_study_that_is_judged_by_the_average_of_the_weights_is_drawn_by_it(tmp_path):
    """As its table is: reproduce.yaml says top1_ema."""
    study_rows.write_reproduce(tmp_path, "reproduce", seeds=2)
    study_rows.write_reproduce(tmp_path, "reproduce_small", seeds=2)
    rows = read_rows(f"{tmp_path}/reproduce.csv")
    shown = {name: specification(str(tmp_path), name) for name in ("reproduce_time", "ImageNetTE-EfficientNetV2-S", "reproduce_small_time")}  # fmt: skip
    dots = {name: next(rows for mark, rows in values(chart) if mark == "circle") for name, chart in shown.items()}
    assert dots["reproduce_time"][0]["top1"] == rows[0]["top1_ema"] == rows[0]["top1"] + 2
    assert dots["reproduce_small_time"][0]["top1"] == rows[0]["top1"]
    assert dots["ImageNetTE-EfficientNetV2-S"][-1]["top1"] > rows[-1]["top1"] + 4.9  # 5 higher in rows of epochs
    assert ["accuracy of the weights' average" in json.dumps(chart) for chart in shown.values()] == [True, True, False]


def test_times_that_were_meant_to_be_equal_are_seen_from_near(tmp_path, results):
    def domain(folder, name):
        (x,) = {json.dumps(layer["encoding"]["x"]["scale"]["domain"]) for layer in flat(specification(folder, name)) if layer.get("mark", {}).get("type") == "circle"}  # fmt: skip
        return json.loads(x)

    rows = [
        study_rows.row(name, seed, 40 + seed, 300.0 + 10 * seed)
        for name in ("fixed", "equal compute")
        for seed in range(2)
    ]
    write_rows(f"{tmp_path}/schedules_small.csv", rows)
    assert [figure.name for figure in all_figures(str(tmp_path))] == [
        "schedule",
        "schedules_small_time",
        "schedules_small",
    ]
    assert domain(str(tmp_path), "schedules_small_time") == pytest.approx([0.95 * 5, 1.05 * 310 / 60])
    assert domain(results, "reproduce_small_time")[0] == 0


def test_accuracy_on_images_that_chose_nothing_comes_first(results):
    points = next(rows for mark, rows in values(specification(results, "transfer_small")) if mark == "circle")
    rows = read_rows(f"{results}/transfer_small.csv")
    assert points[0]["top1"] == rows[0]["held_out_top1"] != rows[0]["top1"] and points[0]["group"] == "pneumonia"
    assert points[-1]["top1"] == rows[-1]["top1"] and points[-1]["group"] == "monkeys"


def test_class_weights_are_judged_by_what_all_classes_count_alike_in(tmp_path):
    measured = {"none": (70.0, 80.0), "effective number": (75.0, 79.0)}  # balanced accuracy, and of test images
    write_rows(str(tmp_path / "class_weights_small.csv"), [
        study_rows.row(condition, seed, 85.0, varying={"class_weights": "auto" * (condition != "none")},
                       balanced_accuracy=balanced + seed, held_out_top1=held_out, held_out_balanced_accuracy=held_out - 1)
        for condition, (balanced, held_out) in measured.items() for seed in range(3)
    ])  # fmt: skip
    (figure,) = [figure for figure in all_figures(str(tmp_path)) if figure is not SCHEDULE]
    points = next(rows for mark, rows in values(figure.specification()) if mark == "circle")
    assert [point["top1"] for point in points] == [70, 71, 72, 75, 76, 77]
    table = Tables(str(tmp_path)).table("study class_weights_small")
    assert "balanced accuracy %, 95 % interval" in table and "+5.00 [+5.00, +5.00] against none" in table
    assert "test images: balanced accuracy %" in table and "78.00 [78.00, 78.00]" in table


def test_the_schedule_shows_each_stage_s_images_as_large_as_they_are():
    chart = SCHEDULE.specification()
    sides = [layer["mark"]["width"] for layer in flat(chart) if layer.get("mark", {}).get("type") == "image"]
    assert [round(side / sides[-1], 3) for side in sides] == [round(size / 300, 3) for size in (128, 185, 242, 300)]
    text = json.dumps(chart)
    assert "0.56 of their arithmetic" in text and "RandAugment 11.67" in text and "dropout 0.1667" in text
    images = {row["url"] for mark, rows in values(chart) if mark == "image" for row in rows}
    assert len(images) == 8 and all(image.startswith("data:image/jpeg;base64,") for image in images)


def test_the_picture_of_augment_size_is_what_the_presets_do_now():
    with Image.open(sizes.PICTURE) as kept:
        kept, drawn = (np.asarray(image).astype(int) for image in (kept, sizes.draw()))
    assert kept.shape == drawn.shape and np.abs(kept - drawn).mean() < 3, "make graphs"  # which JPEG changes
    apart = drawn[:, 2 * drawn.shape[1] // 3 :]
    assert all(part.mean() > 1 for part in np.split(apart, len(sizes.SHOWN)))


def flat(chart):
    for layer in chart.get("layer", []):
        yield layer
        yield from flat(layer)


def test_no_number_is_drawn_that_is_none(results):
    def check(content):
        if isinstance(content, dict):
            return all(check(value) for key, value in content.items() if key != "scale")
        if isinstance(content, list):
            return all(map(check, content))
        return not (isinstance(content, float) and not math.isfinite(content))

    assert all(check(figure.specification()) for figure in all_figures(results))


def test_a_title_cannot_end_the_element_it_stands_in():
    assert as_element("name", {"title": "</script><b>"}).count("</") == 2


def test_a_picture_is_the_same_whatever_was_drawn_before():
    chart = altair.Chart(altair.Data(values=[{"x": 1}, {"x": 3}])).mark_rule(clip=True)
    specification = chart.encode(altair.X("x:Q", scale=altair.Scale(domainMax=2))).to_dict()
    first, again = picture(specification, ""), picture(specification, "")
    assert first == again and 'id="clip0"' in first


def test_the_library_is_of_the_version_that_figures_are_written_in():
    with open(os.path.join(draw.FOLDER, "vega.js"), encoding="utf-8") as file:
        version = re.search(r"Vega-Lite v([\d.]+)", file.readline())[1]
    assert version.split(".")[0] == vl_version().split(".")[0] == altair.SCHEMA_VERSION.lstrip("v").split(".")[0]


# ---- tables and figures in sentences ----


def test_a_study_s_table_links_config_and_rows_and_says_what_is_undecided(tmp_path):
    runs = [study_rows.row(name, seed, top1) for name, some in {"fixed": (70.0, 72.0), "same": (70.1, 71.9), "lower": (60.0, 62.2)}.items() for seed, top1 in enumerate(some)]  # fmt: skip
    write_rows(f"{tmp_path}/reproduce_small.csv", runs)
    table = Tables(str(tmp_path), "../").table("study reproduce")
    assert table.startswith(
        "Not run at full size yet (`python sweep.py configs/studies/reproduce.yaml`). At small scale:"
    )
    rows = [line for line in table.splitlines() if line.startswith("| [")]
    assert rows[0].startswith("| [fixed](../configs/studies/reproduce_small.yaml) | [2](../results/reproduce_small.csv#L2-L3) | 71.00 [58.29, 83.71] |  |")  # fmt: skip
    # differences 0.1 and -0.1: the interval holds 0; -10 and -9.8: -9.9 ± 12.7062 x 0.1
    assert "against fixed, undecided" in rows[1] and "| -9.90 [-11.17, -8.63] against fixed |" in rows[2]
    assert Tables(str(tmp_path)).table("verdicts") == (
        "- `reproduce_small`: *lower* -9.90 [-11.17, -8.63] against fixed. Undecided: *same*."
    )
    write_rows(f"{tmp_path}/reproduce.csv", runs)
    assert "Not run" not in Tables(str(tmp_path)).table("study reproduce")


def test_a_study_without_rows_says_how_to_run_it(tmp_path):
    tables = Tables(str(tmp_path))
    assert tables.table("study dropout").startswith("Not run yet. `python sweep.py configs/studies/dropout.yaml`")
    assert tables.table("figure dropout") == "" and tables.table("verdicts") == "No study has been run yet."


def test_the_story_with_rows_has_every_table_and_picture(tmp_path):
    """Of all small studies: the rows that there are, which sentences quote, and made ones in place of those to come."""
    study_rows.write_all(tmp_path)
    for kept in (ROOT / "results").iterdir():
        (tmp_path / kept.name).unlink(missing_ok=True)
        (tmp_path / kept.name).symlink_to(kept)
    story = draw.with_results("README.md", str(tmp_path))
    assert story.count("Not run yet") == 0 and story.count("Not run at full size yet") == 10
    shown = re.findall(r"\(Graphs/([\w-]+)\.svg\)", story)
    assert shown[0] == "reproduce_small_time" and len(shown) == 17
    elsewhere = {"epochs_small_time", "staged_192px_epochs", "schedules_small", "class_weights_small"}
    assert {*shown} == {figure.name for figure in all_figures(str(tmp_path))} - elsewhere
    results = draw.with_results(os.path.join("docs", "results.md"), str(tmp_path))
    assert "(../results/imagenette_b0_fixed/config.yaml)" in results
    assert {*re.findall(r"\(\.\./Graphs/([\w-]+)\.svg\)", results)} == elsewhere


def test_one_seed_has_no_interval_to_draw(tmp_path):
    """An empty layer has the page complain of an axis that is infinitely long."""
    study_rows.write_reproduce(tmp_path, seeds=1)
    (figure,) = (one for one in all_figures(str(tmp_path)) if one.name == "reproduce_small_time")
    assert not re.search(r'"[xy]": {"field": "low"', json.dumps(figure.specification()))
    study_rows.write_reproduce(tmp_path, seeds=2)
    assert re.search(r'"[xy]": {"field": "low"', json.dumps(figure.specification()))


def test_a_data_set_of_transfer_is_compared_within_itself(results):
    table = Tables(results).table("study transfer | pneumonia")
    assert "monkeys, from" not in table and "AUC" in table
    assert (
        "[pneumonia, from scratch](configs/studies/transfer_small.yaml) | [3](results/transfer_small.csv#L2-L4)"
        in table
    )
    verdicts = Tables(results).table("verdicts").splitlines()[-1]
    assert "*monkeys, from Imagenette*" in verdicts and "against monkeys, from scratch" in verdicts


def test_a_figure_is_of_the_full_size_where_there_is_one(tmp_path):
    study_rows.write_reproduce(tmp_path, seeds=2)
    tables = Tables(str(tmp_path))
    assert tables.table("figure reproduce epochs").endswith("(Graphs/reproduce_small_epochs.html)")
    study_rows.write_reproduce(tmp_path, "reproduce", seeds=2)
    assert tables.table("figure reproduce epochs").endswith("(Graphs/ImageNetTE-EfficientNetV2-S.html)")
    assert tables.table("figure dropout | reproduce time").endswith("(Graphs/reproduce_time.html)")


@pytest.mark.parametrize(
    ("device", "seconds", "unit", "shown"),
    [("cpu", 600, "processor minutes", 10), ("cpu", 90, "processor seconds", 90), ("H200", 600, "minutes", 11), ("H200", 50, "seconds", 55)],
)  # fmt: skip
def test_short_trainings_are_told_in_seconds(device, seconds, unit, shown):
    """The made-up clock runs 1.1 times as long as the processor."""
    rows = [study_rows.row("a", 0, 70.0, seconds) | {"device": device}]
    found, spent = time_spent(rows)
    assert found == unit and spent(rows[0]) == pytest.approx(shown)


def test_figures_in_sentences(tmp_path, results):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"top1": 98.333}')
    tables = Tables(str(tmp_path))
    text = "a <!-- value run | top1 | .1f -->0<!-- end --> b"
    assert filled(text, tables.table, tables.value) == "a <!-- value run | top1 | .1f -->98.3<!-- end --> b"
    write_rows(f"{tmp_path}/mine.csv", [study_rows.row(name, 0, top1) for name, top1 in (("a", 70.0), ("b", 68.5))])
    assert tables.value("mine | a | top1 | .1f") == "70.0" and tables.value("mine | b minus a | top1 | +.1f") == "-1.5"
    for nothing in (
        "run | top5 | .1f",
        "other | top1 | .1f",
        "mine | c | top1 | .1f",
        "mine | a minus c | top1 | .1f",
        "mine | a | no | .1f",
        "mine",
    ):
        with pytest.raises(ValueError, match="value"):
            tables.value(nothing)


def test_help_is_shown_as_it_is_written():
    assert prose("S0+(Se-S0)*i/(M-1), `a_b`, of ra_scale <x>") == "S0+(Se-S0)\\*i/(M-1), `a_b`, of ra\\_scale \\<x>"
    stages = Tables("results").table("settings stages")
    assert (
        "(Se-S0)\\*i/(M-1)" in stages and "| `stages` |" in stages and "| whole number in [1, 1000] | `1` |" in stages
    )
    with pytest.raises(ValueError, match="no settings of the group 'other'"):
        Tables("results").table("settings other")


def test_a_page_without_marks_for_a_table_is_refused():
    text = "before\n<!-- table a -->\nold\n<!-- end of table -->\nafter"
    assert with_table(text, "a", "new") == "before\n<!-- table a -->\nnew\n<!-- end of table -->\nafter"
    assert with_table(text, "a", "") == "before\n<!-- table a -->\n<!-- end of table -->\nafter"
    with pytest.raises(ValueError, match="0 places for the table b"):
        with_table(text, "b", "new")
    with pytest.raises(ValueError, match="no table 'of contents'"):
        Tables("results").table("of contents")
