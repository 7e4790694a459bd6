"""benchmarks/gpu.py: its rehearsal, how it goes on and what it survives, the figures it derives, its page, its studies."""

import importlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import measurements
import psutil
import pytest
import torch
from _pytest.config import get_config
from programs import ROOT
from runs import make_tree
from torch import nn

from settings.resolve import resolve
from studies.study import read_study

sys.path.append(str(ROOT / "benchmarks"))  # behind the program's own modules
gpu, parts, work, rows_of, page, end_to_end, tables, setups = map(
    importlib.import_module,
    ["gpu", "gpu_parts", "gpu_work", "gpu_rows", "gpu_page", "end_to_end", "tables", "gpu_setup"],
)

MACHINE = {"gpu": "A card", "cpu": "C", "cores": 2}


# ---- a rehearsal ----


def start(out, *options):
    return gpu.main(gpu.read_options(["--out", str(out), "--rehearse", *options]))


def test_a_rehearsal_leaves_rows_and_a_page_and_goes_on(tmp_path, capsys):
    out = tmp_path / "out"
    parts = ["ceilings", "smoke", "step", "profile", "batch"]
    assert start(out, "--parts", *parts, "--minutes", "4", "--scratch", str(tmp_path / "scratch")) == 0
    assert {file.name for file in out.iterdir()} == {
        "rows.jsonl",
        "report.html",
        "setup.json",
        "log.txt",
        "profile.json.gz",
    }
    text = (out / "rows.jsonl").read_text()
    assert str(ROOT) not in text and str(tmp_path) not in text
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:
        assert (
            row["benchmark"] == "gpu" and row["settings"]["model"] == "shufflenet_v2_x0_5" and row["settings"]["tiny"]
        )
        assert {"machine", "versions", "commit", "date"} <= row.keys()
    # In the order asked for, by worth within a part: the first and the last size, then the rest
    ended = [(row["part"], row["item"], row["status"]) for row in rows if "status" in row]
    assert ended == [
        ("ceilings", "ceilings", "done"), ("smoke", "32 px", "done"), ("smoke", "40 px", "done"),
        ("step", "32 px", "done"), ("step", "40 px", "done"), ("step", "48 px", "done"),
        ("profile", "32 px", "done"), ("batch", "32 px", "done"), ("batch", "40 px", "done"),
    ]  # fmt: skip
    ways = [row["way"] for row in rows if row["part"] == "step" and row.get("image_size") == 40]
    assert ways == ["bare", "ours", "reference"]
    assert [row["batch_size"] for row in rows if row["part"] == "batch" and "way" in row] == [2, 4] * 2
    (profiled,) = [row for row in rows if row.get("way") == "profile"]
    assert profiled["steps"] == 2 and profiled["kernels_per_step"] > 100
    assert (out / "profile.json.gz").stat().st_size > 1000
    html = (out / "report.html").read_text()
    assert html.count("<svg") == 3 and "a rehearsal" in html and "Not finished" not in html
    capsys.readouterr()

    # The same again measures nothing; another part goes on in the same folder, with no time it is left.
    assert start(out, "--parts", "smoke", "step") == 0
    assert (out / "rows.jsonl").read_text() == text
    assert start(out, "--parts", "smoke", "reference", "--box", "reference=0") == 3
    assert (out / "rows.jsonl").read_text() == text
    assert start(out, "--parts", "smoke", "reference", "--plan") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "smoke           1 min  32 px (done); 40 px (done)",
        "reference     1.5 min  32 px; 40 px",
    ]

    with pytest.raises(gpu.ConfigError, match=r"holds rows of another batch_size; give another folder$"):
        start(out, "--batch-size", "7")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--parts", "smok"], "'smok' is no part; accepted: smoke, tests, "),
        (["--parts", "none.yaml"], "'none.yaml' is no part"),
        (["--box", "smoke"], "must be PART=MINUTES, got 'smoke'"),
    ],
)
def test_a_wrong_option_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        gpu.read_options(["--out", "x", *options])
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_data_are_needed_unless_it_is_a_rehearsal(tmp_path):
    with pytest.raises(
        gpu.ConfigError,
        match=r"^--data DIR is missing, .* whole, profile, .* need it, smoke, tests, ceilings, step, batch do not$",
    ):
        gpu.main(gpu.read_options(["--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()
    assert gpu.main(gpu.read_options(["--out", str(tmp_path / "out"), "--plan"])) == 0


def test_parts_without_images_may_go_before_the_others(tmp_path):
    """As where the images are still on their way."""

    def prepare(*options):
        return gpu.prepare(gpu.read_options(["--out", str(tmp_path / "out"), "--device", "cpu", *options]))

    assert prepare("--parts", "ceilings").data is None
    data = make_tree(tmp_path / "images")
    setup = prepare("--parts", "whole", "--data", str(data))
    assert setup.data == "images" and prepare("--parts", "ceilings").data == "images"

    def linked():
        return {path.resolve() for path in Path(setup.tree, "train").rglob("*.*")}

    few = linked()
    more = data / "train" / "ant" / "later.png"
    shutil.copy(next(iter(few)), more)  # the folder has grown
    prepare("--parts", "whole", "--data", str(data))
    assert linked() == few | {more} and not os.path.exists(f"{setup.tree}.new")
    with pytest.raises(gpu.ConfigError, match=r"holds rows of another data; give another folder"):
        prepare("--parts", "whole", "--data", str(make_tree(tmp_path / "others")))


def test_a_study_gets_its_half_minute_within_the_minutes(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "run_study", lambda name, setup, data, parallel, limit, log: seen.append(limit))
    start = time.monotonic()
    assert gpu.main(gpu.read_options(["--out", str(tmp_path / "out"), "--rehearse", "--parts", "staged", "--box", "staged=50", "--minutes", "2"])) == 0  # fmt: skip
    assert 85 < seen[0] - start < 120  # of 120 seconds 30 are for saving


def test_all_parts_by_default_but_the_race(monkeypatch):
    args = gpu.read_options(["--out", "x"])
    items = gpu.items_of(args, setups.Setup(device="cpu"))
    assert list(items) == [part for part in gpu.BOXES if part != "race"]
    assert [item.name for item in items["whole"]] == ["128, 185, 242, 300 px", "192, 256, 320 px"]
    assert [item.name for item in items["step"]] == [f"{size} px" for size in (128, 300, 185, 242, 192, 256, 320)]
    assert [part for part, of in items.items() if any(item.last for item in of)] == ["profile"]
    monkeypatch.setattr(setups, "find_device", lambda name, local_rank: torch.device("cuda"))
    assert [item.name for item in gpu.items_of(args, setups.Setup())["whole"]] == [
        "128, 185, 242, 300 px", "192, 256, 320 px", "128, 185, 242, 300 px, eager", "192, 256, 320 px, eager",
    ]  # fmt: skip
    args.parts = ["race", "configs/leaderboard/studies/race_20.yaml"]
    assert [item.name for of in gpu.items_of(args, setups.Setup(device="cpu")).values() for item in of] == [
        "configs/leaderboard/studies/race.yaml", "configs/leaderboard/studies/race_20.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {"smoke": 1, "whole": 4, "staged": 8}),
        ("--minutes 60", {"smoke": 1, "whole": 4, "staged": 8}),
        ("--minutes 15", {"smoke": 0.5, "whole": 2, "staged": 4}),
        ("--minutes 15 --box whole=7", {"smoke": 0.5, "whole": 7, "staged": 4}),
        ("--minutes 15 --rehearse", {"smoke": 1, "whole": 4, "staged": 8}),
        ("--minutes 4.5 --parts ceilings step", {"ceilings": 0.5, "step": 4}),  # they add up to 4.5
        ("--minutes 2.25 --parts ceilings step", {"ceilings": 0.25, "step": 2}),
        (
            "--minutes 9 --parts race configs/studies/staged_192px.yaml",
            {"race": 3, "configs/studies/staged_192px.yaml": 6},
        ),
    ],
)
def test_boxes_are_of_half_an_hour_and_shrink_with_less(options, expected):
    args = gpu.read_options(["--out", "x", *options.split()])
    assert {part: gpu.box_of(part, args) for part in expected} == expected


# ---- what ends badly ----


def test_a_measurement_that_fails_dies_or_never_ends_costs_itself(tmp_path, monkeypatch):
    log = tmp_path / "log.txt"
    worker = work.Worker(setups.TINY, str(log))

    def rows(function, *args):
        return worker.measure(parts.Item("part", "name", function, args), time.monotonic() + 200)

    try:
        first = list(rows(measurements.well, 1, 2))
        assert [row["value"] for row in first] == [1, 2]
        process = first[0]["process"]
        failing = rows(measurements.badly)
        assert next(failing)["process"] == process  # its rows count, up to there
        with pytest.raises(work.Ended, match=r"^RuntimeError: no such luck$") as end:
            next(failing)
        assert not end.value.cut and "in two lines" in log.read_text()
        breaking = rows(measurements.broken)
        assert next(breaking)["process"] == process  # a failure did not cost the process
        with pytest.raises(work.Ended, match=r"^RunError: cuda_graphs: the step of this model broke its capture$"):
            next(breaking)
        (after,) = worker.measure(
            parts.Item("part", "name", measurements.well, (3,), last=True), time.monotonic() + 200
        )
        assert after["process"] != process  # but a capture that broke did, and the next one has a new one
        process = after["process"]
        (after,) = rows(measurements.well, 4)
        assert after["process"] != process  # nor does one go on that has profiled
        os.kill(after["process"], signal.SIGKILL)
        worker.process.join(20)
        running = rows(measurements.never)
        row = next(running)
        process = row["process"]
        assert process != after["process"]
        with monkeypatch.context() as patch:
            patch.setattr(work, "time", SimpleNamespace(monotonic=lambda: 1e12))
            with pytest.raises(work.Ended, match=r"^time was over$") as end:
                next(running)
        assert end.value.cut
        assert not any(psutil.pid_exists(number) and psutil.Process(number).status() != "zombie" for number in (process, row["child"]))  # fmt: skip
        dying = rows(measurements.dying)
        assert next(dying) == {"way": "dying"}
        with pytest.raises(work.Ended, match="ended with status 7; see ") as end:
            next(dying)
        assert not end.value.cut
    finally:
        worker.close()


def test_a_study_is_told_its_time_and_how_it_ended(tmp_path, monkeypatch):
    sweep, told = tmp_path / "sweep.py", tmp_path / "told.json"
    sweep.write_text(f"import json, pathlib, sys\npathlib.Path({str(told)!r}).write_text(json.dumps(sys.argv[1:]))\nprint('error: no val/ there', file=sys.stderr)\nsys.exit(int(sys.argv[1]))")  # fmt: skip
    monkeypatch.setattr(work.common, "ROOT", tmp_path)
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: 100.0))
    setup = setups.Setup(device="cpu", workers=7, out=str(tmp_path / "out"), scratch=str(tmp_path / "scratch"))

    def carry_out(status):
        work.run_study(status, setup, str(tmp_path / "data"), 3, 190.0, str(tmp_path / "log"))

    carry_out("0")
    flags = json.loads(told.read_text())
    assert flags[:5] == ["0", "--parallel", "3", "--time-budget", "90s"]
    assert flags[flags.index("--results") + 1] == f"{tmp_path}/out/results"
    assert flags[flags.index("--output-dir") + 1] == f"{tmp_path}/scratch/trainings"
    assert flags[flags.index("--checkpoint-every") + 1] == "1h"
    assert flags[flags.index("--workers") + 1] == "2" and flags[flags.index("--data-path") + 1] == f"{tmp_path}/data"
    for status, message, cut in (("3", "time was over", True), ("2", "no val/ there", False), ("1", "some runs failed; see .*log", False)):  # fmt: skip
        with pytest.raises(work.Ended, match=f"^{message}$") as end:
            carry_out(status)
        assert end.value.cut is cut


@pytest.mark.parametrize(
    ("card", "data", "digest", "taken"),
    [
        ("A card", "imagenette-224", None, 2),
        ("Another", "imagenette-224", None, 0),  # its times would stand beside those of the first
        ("A card", "imagenette2-160", None, 0),
        ("A card", "imagenette-224", "0123456789ab", 0),  # a study that has changed since
    ],
)
def test_a_study_begins_with_the_rows_that_this_card_has_in_results(tmp_path, monkeypatch, card, data, digest, taken):
    name, study = "staged_192px", str(ROOT / "configs/studies/staged_192px.yaml")
    digest = digest or read_study(study, "", []).runs[0].settings_digest
    (tmp_path / "results").mkdir()
    for part in ("", "_epochs", "_means", "_differences"):
        (tmp_path / "results" / f"{name}{part}.csv").write_text(
            f"condition,seed,device,settings\nprogressive,0,A card,{digest}\nprogressive,1,A card,{digest}\n"
        )
    monkeypatch.setattr(work.common, "ROOT", tmp_path)
    monkeypatch.setattr(setups, "find_device", lambda name, local_rank: torch.device("cuda"))
    monkeypatch.setattr(work, "find_device", lambda name, local_rank: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    setup = setups.Setup(out=str(tmp_path / "out"))

    def take_over():
        return work.take_over(study, setup, f"somewhere/{data}")

    assert take_over() == taken
    left = sorted(file.name for file in (tmp_path / "out").rglob("*.csv"))
    parts_of = ["", "_differences", "_epochs", "_means"] if taken else []
    assert left == [f"{name}{part}.csv" for part in parts_of]
    assert take_over() == 0  # what is there stays


def test_tests_that_fail_are_named(tmp_path, monkeypatch):
    seen = []

    def run(command, **options):
        seen.append(command)
        assert command[1:5] == ["-m", "pytest", "-m", "gpu"]
        (report,) = [word.removeprefix("--junitxml=") for word in command if word.startswith("--junitxml=")]
        cases = '<testcase classname="a" name="good"/><testcase classname="b" name="bad"><failure/></testcase><testcase classname="c" name="broken"><error/></testcase>'
        Path(report).write_text(
            f'<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1">{cases}</testsuite></testsuites>'
        )
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(parts.subprocess, "run", run)
    (row,) = parts.tests(setups.Setup(scratch=str(tmp_path)))
    assert (row["tests"], row["failures"], row["errors"], row["skipped"]) == (4, 1, 1, 1)
    assert row["broken"] == "b.bad, c.broken" and row["exit_status"] == 1
    asked = {word for word in seen[0] if word.endswith(".py")}
    marked = re.compile(r"mark" r"\.gpu\b")  # in two pieces, so that it does not find itself
    assert asked == {str(path) for path in ROOT.glob("tests/**/*.py") if marked.search(path.read_text())}
    assert {"test_graphs", "test_run", "test_decode", "test_scores"} <= {Path(word).stem for word in asked}
    assert "--dist" not in seen[0]  # without a GPU they are skipped
    monkeypatch.setattr(setups, "find_device", lambda name, local_rank: torch.device("cuda"))
    next(parts.tests(setups.Setup(scratch=str(tmp_path))))
    assert seen[1][seen[1].index("--dist") + 1] == "load"
    monkeypatch.setattr(parts.subprocess, "run", lambda command, **options: SimpleNamespace(returncode=3))
    with pytest.raises(RuntimeError, match=r"^pytest ended with status 3$"):  # it failed, and is tried again
        next(parts.tests(setups.Setup(scratch=str(tmp_path))))


def test_without_xdist_the_tests_run_as_well():
    """As gpu.py has them run where it is not installed: the number of processes is told to xdist alone."""
    manager = get_config().pluginmanager  # of pytest's own plugins
    assert not manager.has_plugin("xdist")
    manager.register(conftest, "conftest")
    manager.check_pending()  # or it would end with `unknown hook`


def test_rows_after_a_crash(tmp_path):
    rows = rows_of.Rows(tmp_path)
    assert rows.read() == [] and rows.ended("C") == {}
    machine = {"gpu": None, "cpu": "C"}
    rows.add({"part": "step", "item": "a", "status": "done", "machine": machine})
    with open(rows.path, "a") as file:
        file.write('{"part": "st')  # cut short
    rows.add({"part": "step", "item": "b", "status": "cut", "machine": machine})
    rows.add({"part": "step", "item": "b", "status": "failed", "machine": machine})
    assert len(rows.read()) == 3
    assert rows.ended("C") == {("step", "a"): "done", ("step", "b"): "failed"}
    assert rows.ended("another card") == {}
    assert [row["item"] for row in rows_of.unfinished(rows.read())] == ["b"]


def test_utilisation_is_sampled_while_a_line_of_metrics_is_half_written(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 42\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epo')
    waits = iter([False, False, True])
    end_to_end.watch_gpu("GPU-1", str(tmp_path), SimpleNamespace(wait=lambda seconds: next(waits)))
    assert json.loads((tmp_path / "utilisation").read_text()) == [[1, 42.0], [1, 42.0]]


# ---- figures ----


def test_idle_time_is_what_no_kernel_covers():
    assert parts.idle_share([(0, 2), (5, 6), (1, 3), (1.5, 2.5)]) == pytest.approx(2 / 6)  # 3 to 5, of 0 to 6
    assert parts.idle_share([(4, 9)]) == 0
    assert parts.idle_share([]) is None  # a profiler that saw no kernels


def test_the_longest_kernels():
    events = [SimpleNamespace(name=name, time_range=SimpleNamespace(elapsed_us=lambda us=us: us)) for name, us in (("a", 1000), ("b", 1500), ("a", 2000), ("c", 500))]  # fmt: skip
    first, second, _ = parts.longest(events, 2)
    assert first == {"kernel": "a", "ms_per_step": 1.5, "calls_per_step": 1.0, "share": 0.6}
    assert second["kernel"] == "b" and second["share"] == pytest.approx(0.3)


def test_the_least_traffic_of_an_image():
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    # 12 numbers in, 16 out; 16 in, 16 out: 60, of two bytes, once forward and twice backward
    assert parts.bytes_per_image(net, 2) == 60 * 2 * 3


def test_rows_are_compared_with_the_ceilings_and_the_reference_of_their_card():
    def row(part, way, **values):
        return {"part": part, "way": way, "image_size": 128, "machine": MACHINE, **values}

    found = rows_of.measures(
        [
            row("ceilings", "bfloat16 product", tflops=800.0),
            row("ceilings", "memory, read and written", gb_per_second=3000.0),
            row("step", "ours", tflops=1.0, gb_per_second=1.0),
            {"part": "step", "item": "128 px", "status": "done", "machine": MACHINE},
            row("step", "ours", tflops=40.0, gb_per_second=1500.0),  # measured again
            row("reference", "reference-loading", images_per_second=3000.0),
            row("whole", "whole", images_per_second=9000.0),
            row("whole", "whole", image_size=300, images_per_second=2400.0) | {"image_size": 300},
            row("batch", "batch", batch_size=64, images_per_second=600.0),
            row("batch", "batch", batch_size=128, images_per_second=800.0),
            row("progressive", "staged", train_seconds=66.0, relative_cost=0.6),
            row("progressive", "fixed", train_seconds=100.0, relative_cost=1.0),
        ]
    )
    (ours,) = [row for row in found if row["part"] == "step"]
    assert (ours["share_of_product"], ours["share_of_memory"]) == (0.05, 0.5)
    small, large = (row for row in found if row["part"] == "whole")
    assert small["times_reference"] == 3 and large["times_reference"] is None
    assert [row["share_of_best"] for row in found if row["part"] == "batch"] == [0.75, 1]
    (staged,) = [row for row in found if row["way"] == "staged"]
    assert staged["time_ratio"] == pytest.approx(0.66) and staged["times_relative_cost"] == pytest.approx(1.1)
    by_card = rows_of.by_card([{"machine": MACHINE}, {"machine": MACHINE | {"gpu": None}}])
    assert list(by_card) == ["A card", "C"]


def test_the_page_shows_each_card_and_what_is_not_finished(tmp_path, capsys):
    origin = {"settings": {"model": "m", "batch_size": 8, "tiny": False}, "versions": {"torch": "2", "cuda": None}, "commit": None, "date": "2026-01-02T03"}  # fmt: skip
    rows = rows_of.Rows(tmp_path)
    rows.add(
        {"part": "ceilings", "item": "ceilings", "way": "bfloat16 product", "tflops": 801.4, "machine": MACHINE}
        | origin
    )
    rows.add({"part": "tests", "item": "x", "status": "failed", "reason": "<b>", "machine": MACHINE | {"gpu": "Other <card>"}} | origin)  # fmt: skip
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "race_means.csv").write_text(
        "column,condition,mean,sd,n,low,high\ntop1,one,87.654,,1,,\nauc,one,1,,1,,\n"
    )
    times = "train_seconds,one,30,,1,,\n"
    for study, at_once in (("race", "4"), ("alone", "1")):
        (tmp_path / "results" / f"{study}.csv").write_text(f"condition,at_once\none,{at_once}\n")
        with open(tmp_path / "results" / f"{study}_means.csv", "a") as file:
            file.write(times if study == "race" else "column,condition,mean,sd,n,low,high\n" + times)
    assert page.main([str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    assert "<h1>A card</h1>" in html and "<td>801</td>" in html
    assert "<h1>Other &lt;card&gt;</h1>" in html and "<td>&lt;b&gt;</td>" in html
    assert "<h2>Study: race</h2>" in html and "<td>87.65</td>" in html and "auc" not in html
    assert html.count("<td>train_seconds</td>") == 1 and "<h2>Study: alone</h2>" in html
    assert page.main([str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err.startswith("error: give one folder of gpu.py, with rows.jsonl in it; got ")


def test_the_performance_page_takes_a_card_s_rows(tmp_path, monkeypatch):
    origin = {"settings": {"model": "m", "batch_size": 8}, "machine": MACHINE, "versions": {"torch": "2.6"}, "commit": "ab" * 20, "date": "2026-01-02T03"}  # fmt: skip
    lines = [
        {"part": "whole", "item": "x", "way": "whole", "image_size": 128, "images_per_second": 9000.0, "share_of_ceiling": 0.957},
        {"part": "whole", "item": "x", "status": "done"},
        {"part": "reference", "item": "x", "way": "reference-loading", "image_size": 128, "images_per_second": 2000.0},
    ]  # fmt: skip
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(line | origin) + "\n" for line in lines))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.table("gpu_whole").splitlines() == [
        "| model | size, px | way | images/s | of the step alone | times the reference's loading |",
        "| --- | --- | --- | --- | --- | --- |",
        "| m | 128 | whole | 9,000 | 0.96 | 4.50 |",
        "",
        "*`benchmarks/gpu.py`: A card, torch 2.6, commit abababababab, 2026-01-02*",
    ]


# ---- the leaderboard's recipes ----


@pytest.mark.parametrize("epochs", [5, 20])
def test_recipes_keep_the_leaderboard_s_rules(epochs):
    config = resolve(["--config", f"configs/leaderboard/imagenette_128px_{epochs}.yaml"])
    assert (config.epochs, config.weights, max(config.train_crop_size)) == (epochs, None, 128)
    assert config.val_crop_size <= 128 and config.dataset == "imagenette-160px"


@pytest.mark.parametrize("study, runs", [("race", 9), ("race_20", 8), ("leaderboard", 10)])
def test_studies_of_the_leaderboard(study, runs):
    found = read_study(str(ROOT / f"configs/leaderboard/studies/{study}.yaml"), "runs", ["--dataset", "imagefolder"])
    assert len(found.runs) == runs
    for run in found.runs:
        assert run.config.val_crop_size <= max(run.config.train_crop_size) == 128 and run.config.weights is None
        assert run.config.epochs == (5 if run.condition == "5 epochs" or study == "race" else 20)
    if study == "leaderboard":
        assert [run.seed for run in found.runs if run.condition == "5 epochs"] == [0, 1, 2, 3, 4]
