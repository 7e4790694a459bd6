"""The benchmarks: each runs on a small tree and leaves rows of the right shape, and what they measure with is
right. How fast anything is, no test says."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import ROOT, program
from runs import make_tree, write_run

from learning.models import build_model

sys.path.append(str(ROOT / "benchmarks"))  # behind the program's own modules
common, trees, loader, step, end_to_end, progressive, overhead, prediction, tables, fit_time = map(
    importlib.import_module,
    "common trees loader step end_to_end progressive overhead prediction tables fit_time".split(),
)

linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")
SMALL = ["--model", "shufflenet_v2_x0_5", "--device", "cpu", "--batch-size", "6"]


def rows_of(script, *argv):
    """What a benchmark leaves, run in this process; the same row must not lead back to a person or a machine's disk."""
    file = Path(argv[argv.index("--json") + 1])
    assert common.run(script.main, script.read_options(list(map(str, argv)))) == 0
    text = file.read_text()
    assert str(ROOT) not in text and str(Path.home()) not in text and str(file.parent) not in text
    return json.loads(text)


def assert_origin(row, name):
    """Where a row comes from stands in it."""
    assert row["benchmark"] == name
    assert row["machine"]["cores"] >= 1 and row["machine"]["cpu"] and row["machine"]["gpu"] is None
    assert {"python", "torch", "torchvision"} <= row["versions"].keys()
    assert row["date"].endswith("+00:00") and "commit" in row and "model" in row["settings"] | {"model": None}


def in_this_process(function, *args, watch=False):
    """Instead of a fresh process, whose start takes seconds; that it holds half a GiB is pretended."""
    return function(*args), 0.5 if watch else None


def forked_training(flags, folder, uuid=None):
    """Instead of an honest start of train.py."""
    done = program("--clearml", "off", *flags, "--output-dir", folder)
    assert done.returncode == 0, done.stderr


# ---- each script ----


def test_loader_as_a_newcomer_runs_it(tmp_path):
    tree, file = make_tree(tmp_path / "images"), tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/loader.py", "--data", str(tree), "--image-size", "24", "--policy", "ra", "--json", str(file), "--device", "cpu", "--batch-size", "8", "--seconds", "0.05", "--repeats", "2"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert [row["way"] for row in rows] == ["reference", "worker", "store-worker", "store-device"]
    for row in rows:
        assert_origin(row, "loader")
        assert row["images_per_second"] > 0 and row["images_per_cpu_second"] > 0 and len(row["rounds"]) == 2
        assert row["settings"]["policy"] == "ra" and row["settings"]["data"] == "images"
    assert rows[0]["times_reference"] == 1
    assert "store-device" in done.stdout
    assert not (tree / "store").exists() and not (tree / ".decode_cache").exists()  # nothing beside the images


def test_loader_with_workers(tmp_path):
    tree, file = make_tree(tmp_path / "images"), tmp_path / "rows.json"
    rows = rows_of(loader, "--data", tree, "--image-size", 24, "--policy", "none", "--json", file, "--device", "cpu", "--batch-size", 8, "--seconds", 0.05, "--repeats", 1, "--workers", 1)  # fmt: skip
    assert [row["settings"]["workers"] for row in rows] == [1, 1, 1, 1]
    assert all(row["images_per_second"] > 0 for row in rows)


def test_building_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "fresh_process", in_this_process)
    tree, file = make_tree(tmp_path / "images"), tmp_path / "rows.json"
    rows = rows_of(loader, "--data", tree, "--json", file, "--device", "cpu", "--build", "--repeats", 1)
    assert [row["way"] for row in rows] == ["decode-once", "build-store"]
    for row in rows:
        assert_origin(row, "loader")
        assert row["seconds"] > 0 and row["images_per_second"] == pytest.approx(24 / row["seconds"])  # 2 classes of 12
    assert rows[1]["peak_rss_gib"] == 0.5
    assert rows[1]["times_decode_once"] == pytest.approx(rows[1]["seconds"] / rows[0]["seconds"])


def test_step(tmp_path):
    file = tmp_path / "rows.json"
    held = b"x" * (2 << 30)  # of this process; the fresh ones must not count it as theirs
    rows = rows_of(step, *SMALL, "--json", file, "--image-size", 32, "--classes", 7, "--steps", 2, "--repeats", 2, "--memory-sizes", 32)  # fmt: skip
    assert [row["way"] for row in rows] == ["bare", "ours", "ours-ema", "reference", "fresh", "stage-to-stage"]
    for row in rows[:4]:
        assert_origin(row, "step")
        for measured in row["rounds"]:
            assert measured["images_per_second"] * measured["ms_per_step"] == pytest.approx(6 * 1000)  # batches of 6
        assert len(row["rounds"]) == 2 and row["times_bare"] > 0
    assert rows[0]["times_bare"] == 1
    assert rows[4]["image_size"] == rows[5]["image_size"] == 32
    assert all(row["peak_memory_gib"] is None or 0.05 < row["peak_memory_gib"] < 2 for row in rows[4:])
    assert len(held) == 2 << 30


def test_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "fresh_process", in_this_process)
    monkeypatch.setattr(end_to_end, "run_training", forked_training)
    tree, file = make_tree(tmp_path / "images"), tmp_path / "rows.json"
    rows = rows_of(end_to_end, *SMALL, "--data", tree, "--json", file, "--image-sizes", 32, 40, "--epochs", 1, "--steps", 1, "--workers", 0, "--", "--auto-augment", "ra")  # fmt: skip
    assert [(row["way"], row["image_size"]) for row in rows] == [
        ("train", 32), ("ceiling", 32), ("reference", 32), ("train", 40), ("ceiling", 40), ("reference", 40),
    ]  # fmt: skip
    for row in rows:
        assert_origin(row, "end_to_end")
        assert row["settings"]["flags"] == ["--auto-augment", "ra"] and row["batch_size"] == 6
        share, times = (row["images_per_second"] / rows[row["stage"] * 3 + i]["images_per_second"] for i in (1, 2))
        assert row["share_of_ceiling"] == pytest.approx(share) and row["times_reference"] == pytest.approx(times)
        assert row["way"] == "ceiling" or 0 <= row["data_wait_fraction"] <= 1


def test_progressive(tmp_path, monkeypatch):
    monkeypatch.setattr(progressive, "run_training", forked_training)
    tree, file = make_tree(tmp_path / "images"), tmp_path / "rows.json"
    staged, fixed = rows_of(progressive, *SMALL, "--data", tree, "--json", file, "--stages", 2, "--image-size", 32, 64, "--epochs", 2, "--workers", 0)  # fmt: skip
    assert_origin(staged, "progressive")
    assert (staged["way"], fixed["way"], fixed["relative_cost"]) == ("staged", "fixed", 1)
    # 41 million multiply-adds at 224 px (arXiv:1807.11164, Table 8), of which the head's 1.02 stay at every size:
    # 1.84 at 32 px, for one epoch, and 4.29 at 64 px, for the other.
    assert staged["relative_cost"] == pytest.approx((1.84 + 4.29) / (2 * 4.29), abs=0.005)
    assert staged["time_ratio"] == pytest.approx(staged["train_seconds"] / fixed["train_seconds"])
    assert staged["times_relative_cost"] == pytest.approx(staged["time_ratio"] / staged["relative_cost"])


def test_runs_that_fit_a_time(tmp_path, monkeypatch):
    tree, file, ran = make_tree(tmp_path / "images"), tmp_path / "rows.json", []

    def pretend(flags, folder):
        ran.append(flags)
        Path(folder).mkdir()
        fitted = {"error": -0.01, "lengths": [3, 2], "before": 9.0}
        summary = {"fit_time": fitted, "stages": [{"image_size": 64}, {"image_size": 128}], "train_seconds": 80.0}
        Path(folder, "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(fit_time, "run_training", pretend)
    rows = rows_of(fit_time, "--data", tree, "--json", file, "--device", "cpu", "--times", 0.5)
    assert [row["way"] for row in rows] == list(fit_time.RUNS) and len(rows) == 10
    assert_origin(rows[0], "fit_time")
    for row, (minutes, _), flags in zip(rows, fit_time.RUNS.values(), ran):
        assert row["asked_seconds"] == 30 * minutes and f"{30 * minutes:g}s" in flags
        assert row["within"] and row["share_used"] == pytest.approx(row["seconds"] / (30 * minutes))
    assert sum(minutes for minutes, _ in fit_time.RUNS.values()) == 72  # as its head says


def test_overhead(tmp_path, monkeypatch):
    tree, file = make_tree(tmp_path / "images"), tmp_path / "rows.json"
    seconds = {("ours", 1): 20.0, ("ours", 3): 50.0, ("bare", 1): 14.0, ("bare", 3): 34.0}
    monkeypatch.setattr(overhead, "measure", lambda way, epochs, *_: seconds[way, epochs])
    ours, bare = rows_of(overhead, *SMALL, "--data", tree, "--json", file, "--images", 12, "--workers", 0)
    assert_origin(ours, "overhead")
    assert (ours["way"], ours["cpu_seconds_per_epoch"], ours["fixed_cpu_seconds"], ours["times_bare"]) == ("ours", 15, 5, 1.25)  # fmt: skip
    assert (bare["way"], bare["cpu_seconds_per_epoch"], bare["fixed_cpu_seconds"], bare["times_bare"]) == ("bare", 10, 4, 1)  # fmt: skip


@pytest.mark.parametrize("way", ["ours", "bare"])
def test_processor_seconds_of_a_whole_program(tmp_path, way):
    overhead.link(str(make_tree(tmp_path / "images")), tmp_path / "linked", 12)
    options = overhead.read_options([*SMALL, "--data", str(tmp_path), "--workers", "0"])
    assert 0.5 < overhead.measure(way, 1, tmp_path / "linked", options) < 60  # importing torch alone takes a second


def test_links_to_images_again_where_there_are_too_few(tmp_path):
    tree = make_tree(tmp_path / "images", splits=[("train", 3)])
    overhead.link(str(tree), tmp_path / "linked", 20)
    # every fifth of 20 for validation; two classes in turn by groups of five
    counts = {
        str(f.relative_to(tmp_path / "linked")): len(list(f.iterdir())) for f in (tmp_path / "linked").glob("*/*")
    }
    assert counts == {"train/0": 8, "train/1": 8, "val/0": 2, "val/1": 2}
    assert len({f.resolve() for f in (tmp_path / "linked").rglob("*.png")}) == 6


def test_prediction(tmp_path):
    tree, file = make_tree(tmp_path / "images"), tmp_path / "rows.json"
    run = write_run(tmp_path / "run", ["a", "b"], "--model", SMALL[1], model=build_model(SMALL[1], 2)[0])
    rows = rows_of(prediction, "--run", run, "--device", "cpu", "--data", tree, "--json", file, "--images", 20, "--batch-size", 8, "--workers", 0, "--repeats", 1)  # fmt: skip
    assert_origin(rows[0], "prediction")
    assert [row["way"] for row in rows] == ["evaluate", "predict", "memory", "memory-tenfold"]
    times = rows[1]["images_per_second"] / rows[0]["images_per_second"]
    assert rows[1]["times_evaluate"] == pytest.approx(times) and rows[1]["image_size"] == 32
    assert [(row["images"], row["damaged"], row["every_one_a_row"]) for row in rows[2:]] == [
        (20, 1, True),
        (200, 2, True),
    ]
    assert all(row["peak_rss_gib"] is None or 0.05 < row["peak_rss_gib"] < 2 for row in rows[2:])


@pytest.mark.parametrize("script", [loader, step, end_to_end, progressive, overhead, prediction])
def test_help_says_what_and_how_long(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.read_options(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "minute" in text and f"python benchmarks/{script.__name__}.py" in text


def test_a_failed_training_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("import sys\nsys.exit('one\\nerror: lr must be in (0, inf), got 0')")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    with pytest.raises(common.ConfigError, match=r"^train.py ended with status 1: lr must be in \(0, inf\), got 0$"):
        end_to_end.run_training([], str(tmp_path / "run"))


# ---- what they measure with ----


def test_ways_take_turns_and_the_first_round_is_discarded():
    turns = []
    ways = {way: lambda way=way: {"turn": turns.append(way) or len(turns)} for way in "ABC"}
    rounds = common.interleave(ways, repeats=2)
    assert "".join(turns) == "ABCABCABC"
    assert rounds == {"A": [{"turn": 4}, {"turn": 7}], "B": [{"turn": 5}, {"turn": 8}], "C": [{"turn": 6}, {"turn": 9}]}


def test_a_ratio_is_taken_within_rounds():
    # 2, 1 and 5 times; the medians, 3 and 2, would say 1.5
    assert common.ratio([{"x": 2.0}, {"x": 3.0}, {"x": 10.0}], [{"x": 1.0}, {"x": 3.0}, {"x": 2.0}], "x") == 2
    assert common.ratio([{"x": None}], [{"x": None}], "x") is None
    assert common.medians([{"x": 1.0, "y": None}, {"x": 5.0, "y": None}]) == {
        "x": 3.0, "y": None, "rounds": [{"x": 1.0, "y": None}, {"x": 5.0, "y": None}],
    }  # fmt: skip


@linux
def test_processor_time_and_memory_of_a_worker():
    """It counts while the worker lives, with what the worker itself started, and once both are gone."""
    burn = "import time\nheld = b'x' * (200 << 20)\nwhile time.process_time() < 0.4: pass\n"
    nested = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\n"
    code = burn + nested + "print('done', flush=True)\ninput()"
    before = common.cpu_seconds(workers=1)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        worker.stdout.readline()
        assert 0.75 < common.cpu_seconds(workers=1) - before < 5
        assert 200 << 20 <= common.resident_bytes(worker.pid) < 300 << 20
        worker.communicate("\n")
    assert 0.75 < common.cpu_seconds(workers=1) - before < 5


@pytest.mark.parametrize("layout", ["splits", "classes", "flat"])
def test_any_folder_of_images(tmp_path, layout):
    tree = make_tree(tmp_path / "images", splits=[("train", 10), ("val", 2)])
    data = {"splits": tree, "classes": tree / "train", "flat": tree / "train" / "bee"}[layout]
    classes = ["images"] if layout == "flat" else ["ant", "bee"]
    with trees.image_tree(str(data), limit=5 * len(classes)) as linked:
        for name in classes:
            places = sorted(Path(linked, "train", name).iterdir())
            source = tree / "train" / ("bee" if layout == "flat" else name)
            # Of 0.png to 9.png every second one
            assert [place.resolve().name for place in places] == [f"{i}.png" for i in (0, 2, 4, 6, 8)]
            assert np.array_equal(Image.open(places[1]), Image.open(source / "2.png"))
            assert [place.resolve() for place in Path(linked, "val", name).iterdir()] == [source / "0.png"]
        assert sorted(path.name for path in Path(linked, "train").iterdir()) == classes
    assert not Path(linked).exists()


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "rows.json").write_text('{"not": "a list"}')
    options = ["--data", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert common.run(loader.main, loader.read_options(options)) == 2
    assert capsys.readouterr().err == f"error: --json {tmp_path}/rows.json holds no list of rows; give another file\n"
    assert (tmp_path / "rows.json").read_text() == '{"not": "a list"}'
    options[-1] = str(tmp_path / "other.json")
    assert common.run(loader.main, loader.read_options(options)) == 2
    assert "no images there" in capsys.readouterr().err


def test_rows_are_added(tmp_path):
    args = step.read_options(["--json", str(tmp_path / "new" / "rows.json"), "--device", "cpu"])
    common.save(args, [{"way": "one"}])
    common.save(args, [{"way": "two"}, {"way": "three"}])
    text = (tmp_path / "new" / "rows.json").read_text()
    assert [row["way"] for row in json.loads(text)] == ["one", "two", "three"]
    assert len(text.splitlines()) == 3 + 2  # a row a line, and the brackets


def test_earlier_rows_do_not_make_the_code_dirty(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=tmp_path, check=True)

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    rows, code = tmp_path / "benchmarks" / "results" / "step.json", tmp_path / "train.py"
    rows.write_text("[]")
    code.write_text("")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "x")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common.records, "commit", lambda: "abc-dirty")
    rows.write_text("[1]")
    assert common.commit() == "abc"
    code.write_text("pass")
    assert common.commit() == "abc-dirty"


def test_the_tables_of_the_performance_page_are_the_rows(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(tables.PAGE.read_text())
    tables.write(page)
    assert page.read_text() == tables.PAGE.read_text()  # nothing typed by hand


def test_a_table_shows_the_newest_run_of_each_setting(tmp_path, monkeypatch):
    settings, machine = {"data": "photos", "image_size": 128, "policy": "ra"}, {"gpu": None, "cpu": "C", "cores": 2}
    rows = [
        {"way": "worker", "images_per_cpu_second": speed, "times_reference": times, "settings": settings, "machine": machine, "versions": {"torch": "2.6"}, "commit": "ab" * 20, "date": "2026-01-02T03"}
        for speed, times in ((1234.4, 1.251), (2345.6, 2.349))
    ]  # fmt: skip
    (tmp_path / "loader.json").write_text(json.dumps(rows))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = tables.table("loader").splitlines()
    assert lines[2:] == [
        "| photos | 128 | ra | worker | 2,346 | 2.35 |",
        "",
        "*`benchmarks/loader.py`: C, 2 cores, torch 2.6, commit abababababab, 2026-01-02*",
    ]
    assert tables.table("step").startswith("Not measured yet")
