"""export.py: every target and way of preprocessing, the gate that refuses, and what is said of bad input."""

import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hub_double import Hub
from markdown_it import MarkdownIt
from pictures import noise
from PIL import Image
from programs import ROOT
from runs import make_tree, start, write_run
from safetensors import safe_open
from torchvision import transforms

import exports.make
import exports.options
from export import main
from exports.card import as_text
from exports.formats import arguments_of, trace
from exports.gate import Comparison, accepted_difference, ask, check_pair, compare
from exports.options import read_options
from exports.preprocessing import ResizedCrop, describe, prepare
from images.datasets import load_data
from inference.trained import open_run
from settings.errors import ConfigError, RunError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on images of several sizes."""
    place = tmp_path_factory.mktemp("export")
    tree = make_tree(place / "images")
    for number, size in enumerate([(57, 43), (43, 57), (40, 40)]):
        noise(*size).save(tree / "val" / "ant" / f"{number}.png")
    assert start(tree, place / "run", "--epochs", "2", "--val-resize-size", "40", "--val-crop-size", "32") == 0
    return place / "run"


@pytest.fixture(scope="module")
def data(run):
    trained = open_run(str(run), device="cpu")
    return load_data(trained.config, trained.runtime)


def example(place):
    """A photo beside an export, wider than the crop."""
    noise(70, 50).save(place / "photo.png")
    shutil.copy(place / "photo.png", place / "photo.jpg")  # PIL looks at what is in a file, not at its name
    return Image.open(place / "photo.jpg").convert("RGB")


def answer(run, image):
    """What the run's model says of an image, by its own transform: logits (K,)."""
    trained = open_run(str(run), device="cpu")
    with torch.inference_mode():
        return trained.model(trained.transform(image)[None])[0].numpy()


def execute(page, folder, monkeypatch):
    """Run the first Python snippet of a page as printed, in `folder`; return what it leaves."""
    monkeypatch.chdir(folder)
    code = re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1]
    left = {}
    exec(compile(code, "snippet", "exec"), left)
    return left


# ---- what is written ----


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Export once what several tests look at; where it lies and what was printed, by target and preprocessing."""
    done = {}

    def export(target, preprocessing, *flags):
        if target == "onnx" and torch.__version__.startswith("2.6."):
            pytest.skip("its exporter wants packages of its time, and some operations it does not know")
        if (target, preprocessing) not in done:
            own = shutil.copytree(run, tmp_path_factory.mktemp(target) / "runs" / "quickstart")
            printed = io.StringIO()
            with redirect_stdout(printed):
                assert main([str(own), "--to", target, "--preprocessing", preprocessing, *flags]) == 0
            done[target, preprocessing] = own / "exports" / target, printed.getvalue()
        return done[target, preprocessing]

    return export


# Those of ONNX take seconds; a way of 8 bits is tried with each.
WAYS = {
    ("onnx", "beside"): "--quantize dynamic --max-drop 100 --data-license CC0",
    ("onnx", "inside"): "--quantize static --max-drop 100 --calibration-images 5",
    ("torch", "beside"): "--data-license CC0",
    ("torch", "crops"): "",
    ("torch", "inside"): "",
    ("safetensors", "beside"): "--data-license CC0",
    ("hub", "beside"): "",
}


@pytest.mark.parametrize(("target", "preprocessing"), WAYS)
def test_an_export_answers_as_the_run_by_the_code_of_its_card(run, exported, monkeypatch, target, preprocessing):
    place, printed = exported(target, preprocessing, *WAYS[target, preprocessing].split())
    assert "the same class for 10 of 10 validation images" in printed
    image, card = example(place), (place / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: pytorch\n") and "the\nsame class for every image" in card
    left = execute(card, place, monkeypatch)
    assert np.abs(left["logits"][0] - answer(run, image)).max() < 1e-3
    assert left["how"]["classes"][left["best"]] in ("ant", "bee") and left["batch"].shape == {
        "beside": (1, 3, 32, 32), "crops": (1, 32, 32, 3), "inside": (1, 50, 70, 3),
    }[preprocessing]  # fmt: skip
    assert not list(place.parents[1].rglob(".export-*"))  # nothing is left aside


def ramp(place):
    """A grey image of 40 x 40 pixels of 16 bits; of row y the upper eight are 5y, the lower 17."""
    rows = np.repeat(np.arange(40, dtype=np.uint16)[:, None] * (5 * 256) + 17, 40, axis=1)
    Image.fromarray(rows).save(place / "photo.jpg", format="PNG")
    return rows


def test_the_code_of_the_card_keeps_the_upper_eight_of_sixteen_bits(run, exported, monkeypatch):
    place, _ = exported("safetensors", "beside", *WAYS["safetensors", "beside"].split())
    ramp(place)
    left = execute((place / "README.md").read_text(), place, monkeypatch)
    # The short side is 40 already, and the crop leaves 4 pixels out on each side
    assert left["pixels"].shape == (32, 32, 3) and (left["pixels"] == 5 * np.arange(4, 36)[:, None, None]).all()
    shown = np.repeat(5 * np.arange(40, dtype=np.uint8)[:, None, None], 40, axis=1).repeat(3, axis=2)
    assert np.abs(left["logits"][0] - answer(run, Image.fromarray(shown))).max() < 1e-3


@pytest.mark.parametrize(
    "name",
    ["- dash", "1. one", "+ plus", "12) twelve", "-", "--- line", "3.", "* star", "# head", "0.5 mm", "2-methyl"],
)
def test_a_name_of_a_class_is_shown_as_it_is(name):
    page = MarkdownIt().render(f"0. {as_text(name)}\n1. bee\n")
    assert page == f'<ol start="0">\n<li>{name}</li>\n<li>bee</li>\n</ol>\n'


def test_a_folder_for_the_hub(exported):
    place, _ = exported("hub", "beside")
    config, card = json.loads((place / "config.json").read_text()), (place / "README.md").read_text()
    assert config["id2label"] == {"0": "ant", "1": "bee"} and config["architecture"] == "efficientnet_v2_tiny"
    shown = re.findall(r"!\[.*\]\((.*)\)", card)
    assert len(shown) >= 4 and all((place / figure).read_text().startswith("<svg") for figure in shown)
    assert "| best |" in card and "| stage |" in card


def test_what_a_file_says_of_itself_is_the_same_in_each_format(run, exported):
    files = [exported(*way, *WAYS[way].split())[0] for way in [("onnx", "beside"), ("torch", "beside"), ("safetensors", "beside")]]  # fmt: skip
    model = onnx.load(files[0] / "model.onnx")
    told = {"about.json": ""}
    torch.export.load(files[1] / "model.pt2", extra_files=told)
    with safe_open(files[2] / "model.safetensors", framework="pt") as file:
        weights = file.metadata()
    about = {prop.key: prop.value for prop in model.metadata_props}
    assert about == json.loads(told["about.json"]) == weights
    assert json.loads(about["classes"]) == ["ant", "bee"] and about["image_size"] == "32"
    assert about["temperature"] == "1.0" and about["data_license"] == "CC0" and about["data"] == "images"
    assert json.loads(about["preprocessing"])["resize"]["short_side"] == 40
    assert json.loads(about["preprocessing"])["normalise"] == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert (
        about["top1_of_run"] == f"{summary['best_top1']:.3f} % at 32 px" and about["commit_of_run"] == summary["commit"]
    )
    assert about["gate"].endswith("for each of 10 validation images, logits within 0.001, or that part of the largest")
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_temperature_is_the_run_s_and_logits_stay(run, tmp_path, monkeypatch):
    own = shutil.copytree(run, tmp_path / "run")
    summary = json.loads((own / "summary.json").read_text())
    fit = {"temperature": 1.5, "ece_before": 0.2, "ece_after": 0.1, "fitted_on": 5, "measured_on": 5, "bins": 15}
    (own / "summary.json").write_text(json.dumps(summary | {"calibration": fit}))
    assert main([str(own), "--to", "safetensors"]) == 0
    place = own / "exports" / "safetensors"
    image = example(place)
    left = execute((place / "README.md").read_text(), place, monkeypatch)
    assert np.abs(left["logits"][0] - answer(run, image)).max() < 1e-3
    odds = np.log(left["probabilities"][1] / left["probabilities"][0])
    assert odds == pytest.approx((left["logits"][0][1] - left["logits"][0][0]) / 1.5, rel=1e-3)


def test_what_was_not_run_says_so(run, tmp_path):
    place = tmp_path / "out"
    own = shutil.copytree(run, tmp_path / "run")
    settings = re.sub(r"^data_path: .*$", "data_path: nowhere", (own / "config.yaml").read_text(), flags=re.M)
    (own / "config.yaml").write_text(settings)
    assert main([str(own), "--to", "safetensors", "--output", str(place), "--no-gate"]) == 0
    with safe_open(place / "model.safetensors", framework="pt") as file:
        assert file.metadata()["gate"] == "not checked (--no-gate)"
    assert "and never run" in (place / "README.md").read_text()


def test_a_run_that_is_not_finished_is_exported_and_said_to_be(run, tmp_path, capsys):
    own = shutil.copytree(run, tmp_path / "run")
    (own / "summary.json").unlink()
    assert main([str(own), "--to", "safetensors", "--weights", "last"]) == 0
    assert "of a run that is not finished" in capsys.readouterr().out
    card = (own / "exports" / "safetensors" / "README.md").read_text()
    last = json.loads((own / "metrics.jsonl").read_text().splitlines()[-1])
    assert "was not finished" in card and f"Top-1 of the run: {last['top1']:.3f} % at 32 px" in card


def test_no_autocast_is_left_in_what_is_exported(run):
    trained = open_run(str(run), device="cpu")
    assert type(trained.model.classifier[-1]).__name__ == "Classifier"  # which leaves autocast
    program = trace(trained, describe(trained, "beside"))
    assert "autocast" not in str(program.graph_module) and "linear" in str(program.graph)
    assert type(trained.model.classifier[-1]).__name__ == "Classifier"  # of the run's own model, still
    assert arguments_of(trained) == {}


# ---- the preprocessing ----


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_resize_inside_gives_pil_s_pixels(interpolation):
    mode = transforms.InterpolationMode(interpolation)
    for width, height, side, size in [(500, 375, 256, 224), (375, 500, 256, 224), (31, 90, 48, 47), (8, 8, 48, 48), (224, 301, 224, 96), (97, 33, 20, 17)]:  # fmt: skip
        image = noise(width, height)
        crop = transforms.Compose([transforms.Resize(side, mode, antialias=True), transforms.CenterCrop(size)])(image)
        how = {"resize": {"short_side": side, "interpolation": interpolation}, "crop": {"size": size}}
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        assert torch.equal(ResizedCrop(how)(pixels)[0].permute(1, 2, 0), torch.from_numpy(np.array(crop)).double())


@pytest.mark.parametrize("flags", ["", "--interpolation bicubic", "--interpolation nearest", "--backend tensor", "--backend tensor --use-v2", "--use-v2"])  # fmt: skip
def test_what_is_written_of_the_preprocessing_is_what_the_run_does(run, tmp_path, flags):
    own = tmp_path / "run"
    shutil.copytree(run, own)
    settings = (own / "config.yaml").read_text()
    for flag, value in re.findall(r"--([\w-]+) ?([a-z]*)(?: |$)", flags):
        settings = re.sub(rf"^{flag.replace('-', '_')}: .*$", f"{flag.replace('-', '_')}: {value or 'true'}", settings, flags=re.M)  # fmt: skip
    (own / "config.yaml").write_text(settings)
    trained = open_run(str(own), device="cpu", image_size=24)
    how = json.loads(json.dumps(describe(trained, "beside")))
    assert how["resize"]["short_side"] == 30  # in proportion
    for size in [(61, 47), (30, 55), (24, 24)]:
        difference = np.abs(prepare(noise(*size), how) - trained.transform(noise(*size)).numpy())
        assert difference.max() < 1e-5
    if "tensor" in flags or "nearest" in flags:
        with pytest.raises(ConfigError, match="resizes as PIL does"):
            describe(trained, "inside")


# ---- the gate ----


def wrong(name):
    """`describe`, with a mistake in it."""

    def described(trained, place):
        how = describe(trained, place)
        how["normalise"] = how["normalise"] | ({"std": [1.0, 1.0, 1.0]} if name == "std" else {"mean": [0.406, 0.456, 0.485]})  # fmt: skip
        return how

    return described


@pytest.mark.parametrize(("target", "preprocessing", "mistake"), [("safetensors", "beside", "std"), ("torch", "crops", "std"), ("torch", "inside", "mean")])  # fmt: skip
def test_a_wrong_normalisation_is_refused(run, tmp_path, monkeypatch, capsys, target, preprocessing, mistake):
    monkeypatch.setattr(exports.make, "describe", wrong(mistake))
    assert main([str(run), "--to", target, "--preprocessing", preprocessing, "--output", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"is refused, nothing was written: for \S+/val/(ant|bee)/\d\.png it answers", line)
    assert list(tmp_path.iterdir()) == []


def answering(trained, change):
    """An artifact that is the run's model, but for what `change` does to its logits of the images given so far."""
    seen = []

    def artifact(images):
        with torch.inference_mode():
            logits = trained.model(torch.from_numpy(images)).numpy().copy()
        for row in logits:
            change(row, len(seen))
            seen.append(row)
        return logits

    return artifact


def shift(row, number):
    if number == 6:
        row += 0.002


def swap(row, number):
    if number == 3:
        row[:] = row[::-1]


def blank(row, number):
    if number == 0:
        row[:] = np.nan


@pytest.mark.parametrize(("change", "first"), [(shift, "bee/1.png"), (swap, "ant/3.png"), (blank, "ant/0.png")])
def test_the_first_image_that_differs_is_named(run, data, change, first):
    trained = open_run(str(run), device="cpu")
    how = describe(trained, "beside")
    with pytest.raises(RunError, match=rf"for \S*{first} it answers"):
        compare(answering(trained, change), trained, how, data.val)


def test_a_file_that_takes_one_image_alone_rightly_is_refused(run, data):
    """Of photos of many sizes no two may be in a batch."""
    trained = open_run(str(run), device="cpu")

    def artifact(images):
        with torch.inference_mode():
            return trained.model(torch.from_numpy(images)).numpy() + (len(images) == 2)

    with pytest.raises(
        RunError, match=r"the file is refused, nothing was written: in a batch of two .* differ by 1 from"
    ):
        compare(artifact, trained, describe(trained, "beside"), data.val)


def test_large_images_are_given_to_the_file_a_few_at_a_time():
    shapes = []

    def artifact(images):
        shapes.append(images.shape)
        return images[:, 0, 0, :2].astype(float)

    large, small = np.zeros((2000, 3000, 3), np.uint8), np.ones((30, 40, 3), np.uint8)
    answers = ask(artifact, [large, small, large, small, large])  # 18 million numbers each: one at a time
    assert shapes == [(1, 2000, 3000, 3)] * 3 + [(2, 30, 40, 3)]
    assert answers[:, 0].tolist() == [0, 1, 0, 1, 0]


def test_what_is_counted_of_a_file_that_may_differ(run, data):
    trained = open_run(str(run), device="cpu")
    for change, same, difference in [(lambda *_: None, 10, 0.0), (shift, 10, 0.002), (swap, 9, None)]:
        found = compare(answering(trained, change), trained, describe(trained, "beside"), data.val, strict=False)
        assert (found.images, found.same) == (10, same) and abs(found.top1 - found.run_top1) == 10 * (10 - same)
        assert difference is None or found.difference == pytest.approx(difference, abs=1e-5)


# ---- 8 bits ----


@pytest.mark.parametrize(("way", "preprocessing"), [("static", "inside"), ("dynamic", "beside")])
def test_a_file_of_eight_bits_comes_with_its_accuracy(exported, way, preprocessing):
    place, printed = exported("onnx", preprocessing, *WAYS["onnx", preprocessing].split())
    model = onnx.load(place / "model_int8.onnx")
    about = {prop.key: prop.value for prop in model.metadata_props}
    told = re.search(r"model_int8.onnx: top-1 ([\d.]+) %.* for (\d+) of 10", printed)
    assert f"top-1 {told[1]} % on 10" in about["gate"] and about["quantization"].startswith(f"{way}, 8 bits")
    assert way == "dynamic" or "of 5 training images" in about["quantization"]
    assert f"| {float(told[1]):.2f} | {told[2]} of 10 |" in (place / "README.md").read_text()
    kinds = {node.op_type for node in model.graph.node}
    assert kinds & ({"QuantizeLinear"} if way == "static" else {"ConvInteger"})
    assert {tensor.data_type for tensor in model.graph.initializer} & {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}


def test_eight_bits_that_cost_too_much_are_refused(run, tmp_path, monkeypatch, capsys):
    def write(self, path, about):
        Path(path).touch()

    def lower(self, data, path, strict):
        return Comparison(10, 60.0 if strict else 55.0, 60.0, 10, 0.0)

    monkeypatch.setattr(exports.make.Export, "write_model", write)
    monkeypatch.setattr(exports.make.Export, "run_over", lower)
    monkeypatch.setattr(exports.make, "quantize", lambda source, target, calibration: Path(target).touch())
    monkeypatch.setattr(exports.formats, "rewrite_about_onnx", lambda path, about: None)
    flags = [str(run), "--to", "onnx", "--quantize", "dynamic", "--output", str(tmp_path / "out")]
    assert main([*flags, "--max-drop", "4.9"]) == 1
    assert (
        "is refused, nothing was written: its top-1 is 5.00 points lower, 4.9 are accepted" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []
    assert main([*flags, "--max-drop", "5"]) == 0 and (tmp_path / "out" / "model_int8.onnx").exists()


# ---- the Hub ----


@pytest.fixture
def hub(monkeypatch):
    with Hub() as double:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", double.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
        yield double


def test_a_folder_is_uploaded_by_those_who_are_logged_in(run, tmp_path, monkeypatch, capsys, hub):
    flags = [str(run), "--to", "hub", "--output", str(tmp_path / "out"), "--upload", "someone/digits"]
    assert main(flags) == 2
    assert "--upload: not logged in at http://127.0.0.1" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert main(flags) == 0, capsys.readouterr().err
    assert f"uploaded: {hub.address}/someone/digits" in capsys.readouterr().out
    (made,) = hub.created  # versions differ in how they ask for a private one
    assert (made["organization"], made["name"]) == ("someone", "digits")
    assert made.get("private") is True or made.get("visibility") == "private"
    written = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*.*")}
    assert hub.files.keys() == written.keys() and {"README.md", "config.json", "model.safetensors"} <= written.keys()
    assert all(hub.files[name] == path.read_bytes() for name, path in written.items())
    hub.refuse = True
    assert main([*flags, "--overwrite"]) == 1
    assert "the files are in" in capsys.readouterr().err and (tmp_path / "out" / "config.json").exists()


# ---- bad input ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("RUN", "required: --to"),
        ("RUN --to tflite", "invalid choice: 'tflite'"),
        ("RUN --to onnx --quant static", "unrecognized arguments"),
        ("nowhere --to onnx", "nowhere holds no run"),
        ("RUN --to torch --quantize static", "--quantize has no effect with --to torch"),
        ("RUN --to hub --preprocessing inside", "--preprocessing inside has no effect with --to hub"),
        ("RUN --to onnx --upload me/it", "--upload has no effect with --to onnx"),
        ("RUN --to hub --upload it", "--upload takes USER/NAME"),
        ("RUN --to onnx --max-drop 2", "--max-drop has no effect without --quantize"),
        ("RUN --to onnx --quantize dynamic --calibration-images 9", "no effect without --quantize static"),
        ("RUN --to onnx --quantize dynamic --no-gate", "not written without its accuracy"),
        ("RUN --to onnx --image-size 0", "--image-size must be in [1, 8192]"),
        ("RUN --to onnx --quantize static --max-drop nan", "--max-drop must be in [0, 100], got nan"),
        ("RUN --to onnx --output RUN/config.yaml/out", "is no folder that can be written to"),
        ("RUN --to onnx --data-path nowhere", "no folder nowhere/train"),
        ("RUN --to torch --no-gate --data-path images", "--data-path has no effect with --no-gate; leave it out"),
        ("RUN --to torch --no-gate --workers 0", "--workers has no effect with --no-gate; leave it out"),
        ("RUN --to onnx --max-drop 0", "--max-drop has no effect without --quantize"),
    ],
)
def test_bad_input_is_one_line(run, capsys, flags, message):
    assert main(flags.replace("RUN", str(run)).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (run / "exports").exists()


def test_a_place_of_images_that_lie_in_no_place_is_one_line(tmp_path, capsys):
    own = write_run(tmp_path / "run", [str(digit) for digit in range(10)], "--dataset", "digits")
    assert main([str(own), "--to", "safetensors", "--data-path", "images"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --data-path has no effect on a run with --dataset digits; leave it out"
    assert not (own / "exports").exists()


def test_bad_input_is_told_without_torch():
    code = (
        "import runpy, sys\ntry:\n    runpy.run_path('export.py', run_name='__main__')\n"
        "finally:\n    assert not {'torch', 'numpy', 'torchvision'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "nowhere", "--to", "onnx"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere holds no run"), done.stderr


def test_a_size_that_the_model_cannot_take_is_told_before_data_are_listed(run, monkeypatch, capsys):
    def odd(trained, images, count):
        raise AssertionError("Wrong image height! Expected 32 but got 64!")

    monkeypatch.setattr("inference.predictions.infer", odd)
    assert main([str(run), "--to", "safetensors", "--image-size", "64", "--no-gate"]) == 2
    told = capsys.readouterr()
    assert "images of 2 classes" not in told.out and told.err.startswith("error: --image-size 64: ")
    assert not (run / "exports").exists()


def test_a_package_that_is_not_there_is_named(run, monkeypatch, capsys):
    monkeypatch.setattr(exports.options, "find_spec", lambda name: None)
    assert main([str(run), "--to", "onnx"]) == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err
    assert main([str(run), "--to", "hub", "--upload", "me/it"]) == 2
    assert "pip install safetensors huggingface_hub" in capsys.readouterr().err


def test_other_images_than_the_run_s_are_refused(run, tmp_path, capsys):
    flags = [str(run), "--to", "safetensors", "--output", str(tmp_path / "out"), "--data-path"]
    assert main([*flags, str(make_tree(tmp_path / "others", classes=("ant", "wasp")))]) == 2
    assert "has other classes than the run: bee, wasp" in capsys.readouterr().err
    assert main([*flags, str(make_tree(tmp_path / "moved"))]) == 0  # the same classes, elsewhere


def test_what_is_there_is_replaced_only_when_asked(run, tmp_path, capsys):
    flags = [str(run), "--to", "safetensors", "--output", str(tmp_path)]
    (tmp_path / "README.md").write_text("someone's own")
    assert main(flags) == 2
    assert "README.md is there already; --overwrite replaces it" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "someone's own"
    (tmp_path / "notes.txt").touch()
    assert main([*flags, "--overwrite"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "preprocessing.json", "model.safetensors", "notes.txt"}  # fmt: skip


def interrupt_at(patch, function):
    """Have a Ctrl-C come at the second call of a function of os."""
    calls, real = [], getattr(os, function)

    def interrupted(*words):
        calls.append(words)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*words)

    patch.setattr(os, function, interrupted)


@pytest.mark.parametrize(("function", "whose"), [("fsync", "old"), ("remove", "new"), ("replace", "new")])
def test_an_export_that_is_interrupted_leaves_the_old_files_or_the_new(
    run, tmp_path, monkeypatch, capsys, function, whose
):
    flags = [str(run), "--to", "safetensors", "--output", str(tmp_path), "--no-gate"]
    names = ["README.md", "model.safetensors", "preprocessing.json"]
    for name in names:
        (tmp_path / name).write_text("old")
    interrupt_at(monkeypatch, function)
    assert main([*flags, "--overwrite"]) == 1
    assert capsys.readouterr().err.startswith("stopped: signal SIGINT")
    assert sorted(path.name for path in tmp_path.iterdir()) == names  # nothing is left aside either
    assert [(tmp_path / name).read_bytes() == b"old" for name in names] == 3 * [whose == "old"]


def test_the_files_of_an_export_can_be_read_by_whom_others_can(run, tmp_path):
    before = os.umask(0o027)
    try:
        assert main([str(run), "--to", "safetensors", "--output", str(tmp_path), "--no-gate"]) == 0
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_pictures_of_others_stay_in_a_folder_for_the_hub(run, tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("architecture.svg", "curve_of_growth.svg", "curve_7.svg"):
        (tmp_path / "figures" / name).write_text("<svg/>")
    assert (
        main([str(run), "--to", "hub", "--output", str(tmp_path), "--overwrite", "--no-gate", "--weights", "last"]) == 0
    )
    there = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"architecture.svg", "curve_of_growth.svg", "progress.svg"} <= there
    assert "curve_7.svg" not in there  # an earlier export's


def test_what_the_run_says_of_its_best_weights_is_not_said_of_the_last(run, tmp_path):
    for weights in ("best", "last"):
        assert (
            main([str(run), "--to", "hub", "--output", str(tmp_path / weights), "--no-gate", "--weights", weights]) == 0
        )
    of_best, of_last = (((tmp_path / weights) / "README.md").read_text() for weights in ("best", "last"))
    for what in ("recall", "Calibration: ", "figures/confusions.svg", "figures/curve_0.svg"):
        assert what in of_best and what not in of_last, what
    assert "figures/progress.svg" in of_last


def test_an_exporter_that_fails_is_one_line(run, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise ValueError("no such operation\nand much more")

    monkeypatch.setattr(torch.export, "export", fails)
    assert main([str(run), "--to", "onnx", "--output", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"torch.export of torch {torch.__version__} cannot export efficientnet_v2_tiny (no such operation); a newer torch may" in line  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# ---- the page on it ----

PAGE = ROOT / "docs" / "export.md"


def test_commands_of_the_pages_parse(monkeypatch):
    monkeypatch.setattr(exports.options, "check_places", lambda options: None)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = [line for page in pages for line in re.findall(r"^python export\.py (.*)$", page.read_text(), re.M)]
    assert len(found) >= 5
    for line in found:
        read_options(line.replace('"CC BY 4.0"', "free").split())


@pytest.mark.parametrize(("number", "target", "preprocessing"), [(0, "onnx", "inside"), (1, "hub", "beside")])
def test_snippets_of_the_page_run_as_printed(run, exported, monkeypatch, number, target, preprocessing):
    place, _ = exported(target, preprocessing, *WAYS[target, preprocessing].split())
    folder = place.parents[3]  # the page's paths begin with runs/quickstart
    page = "```python\n" + PAGE.read_text().split("```python\n")[number + 1]
    for photo in (example, lambda folder: Image.fromarray((ramp(folder) >> 8).astype(np.uint8)).convert("RGB")):
        image = photo(folder)
        left = execute(page, folder, monkeypatch)
        expected = torch.from_numpy(answer(run, image)).softmax(0)
        assert np.abs(np.asarray(left["probabilities"]) - expected.numpy()).max() < 1e-4


def test_logits_that_are_large_may_differ_by_a_part_of_themselves():
    """float32 rounds to a part; a thousandth of 4,000 is 4, of 0.5 a thousandth."""
    assert accepted_difference(np.array([[4000.0, -1.0], [0.5, -0.25]])).tolist() == [4.0, 0.001]
    alone = np.array([[4000.0, 1.0]])
    check_pair(lambda array: alone + 3, np.zeros(3), alone, "x")
    endless = np.array([[np.inf, 1.0]])
    with pytest.raises(RunError, match="in a batch of two its logits differ by inf from those of one"):
        check_pair(lambda array: np.array([[5.0, 1.0]]), np.zeros(3), endless, "x")
    with pytest.raises(RunError, match="in a batch of two its logits differ by 5 from those of one"):
        check_pair(lambda array: alone + 5, np.zeros(3), alone, "x")
