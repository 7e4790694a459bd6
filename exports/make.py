"""An export from start to end: opened, written aside, run, and put in its place."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from exports import formats
from exports.about import describe_file
from exports.card import figures_of, render_card
from exports.gate import Comparison, compare
from exports.hub import check_login, config_of, upload
from exports.options import CARD, CONFIG, PREPROCESSING, QUANTIZED, Options
from exports.preprocessing import describe
from exports.quantize import Calibration, quantize
from images.datasets import Data, load_data
from images.workers import signals_held
from inference.options import nearest_there
from inference.predictions import check_size
from inference.trained import Trained, open_run
from learning.checkpoint import sync_folder
from learning.stop import interruptible
from settings.errors import ConfigError, RunError, printable
from settings.table import ENCODED


def export(options: Options) -> None:
    """Export a run as `options` say; print what was written, and what it was compared with.

    Raises:
        ConfigError: no such run, no validation images.
        RunError: the exporter fails, the file is refused, the disk or the upload fails.
    """
    with interruptible():
        trained = open_run(options.run, weights=options.weights, image_size=options.image_size, device="cpu")
        say(str(trained))
        check_size(trained)
        how = describe(trained, options.preprocessing)
        if options.upload:
            check_login()
        data = find_data(trained, options.data_path) if options.check else None
        files = Export(options, trained, how, data).make()
        sizes = ", ".join(f"{name} ({os.path.getsize(os.path.join(options.output, name)):,} bytes)" for name in files)
        say(f"{options.output}: {sizes}")
        if options.upload:
            say(f"uploaded: {upload(options.output, files, options.upload)}")


def say(line: str) -> None:
    print(printable(line), flush=True)


def find_data(trained: Trained, data_path: str | None) -> Data:
    """Find the images that the run was trained and validated on; `data_path` is where they lie now, if elsewhere.

    Raises:
        ConfigError: they are not there, or are others, or lie nowhere.
    """
    if data_path is not None and trained.config.dataset not in ENCODED:
        raise ConfigError(f"--data-path has no effect on a run with --dataset {trained.config.dataset}; leave it out")
    config = trained.config if data_path is None else replace(trained.config, data_path=data_path)
    try:
        data = load_data(config, trained.runtime)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; the exported file is run over the run's validation images: --data-path says where they lie now"
        ) from error
    if data.classes != trained.classes:
        odd = sorted(set(data.classes) ^ set(trained.classes)) or ["in another order"]
        raise ConfigError(f"{config.data_path} has other classes than the run: {', '.join(odd[:5])}; give --data-path")
    say(str(data))
    return data


@dataclass(frozen=True)
class Export:
    """What is exported, and how.

    how: what happens to an image before the model, as `describe` has it
    data: what the files are run over; None: they are not run
    """

    options: Options
    trained: Trained
    how: Mapping[str, Any]
    data: Data | None

    def make(self) -> list[str]:
        """Write the files aside, have them pass the gate, and put them in their place; return their names.

        Raises:
            RunError: the model cannot be exported, a file is refused, or cannot be written.
        """
        output = self.options.output
        try:  # aside, but on the same disk: in the folder itself where there is one
            with tempfile.TemporaryDirectory(dir=nearest_there(output), prefix=".export-") as aside:
                files = self.write(aside)
                self.put_in_place(aside, files)
        except OSError as error:
            raise RunError(f"{error.filename or output}: {error.strerror or type(error).__name__}") from error
        return files

    def write(self, folder: str) -> list[str]:
        """Write the files to `folder` and run them; return their names, the model's last.

        Raises:
            RunError: they are refused.
        """
        options, trained, data = self.options, self.trained, self.data
        about = describe_file(trained, self.how, options.data_license, None if data is None else len(data.val))
        path = os.path.join(folder, options.model_file)
        self.write_model(path, about)
        contents = {PREPROCESSING: as_json(self.how)}
        compared = quantized = None
        models = [options.model_file]
        if data is not None:
            compared = self.run_over(data, path, strict=True)
            if options.quantize is not None:
                quantized = self.write_quantized(data, path, compared, about)
                models.insert(0, QUANTIZED)
        figures = figures_of(trained) if options.to == "hub" else {}
        if options.to == "hub":
            contents |= {CONFIG: as_json(config_of(trained)), **figures}
        contents[CARD] = render_card(options, trained, self.how, about, compared, quantized, list(figures))
        for name, text in contents.items():
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(text)
        return [*contents, *models]

    def write_model(self, path: str, about: Mapping[str, str]) -> None:
        """Write the model to `path`, in the format of the target, with its metadata."""
        if self.options.to == "onnx":
            formats.write_onnx(self.trained, self.how, path, about)
        elif self.options.to == "torch":
            formats.write_torch(self.trained, self.how, path, about)
        else:
            formats.write_safetensors(self.trained, path, about)

    def run_over(self, data: Data, path: str, strict: bool) -> Comparison:
        """Run a file over the validation images, as one who reads its preprocessing.json would; say what came of it."""
        name, readers = os.path.basename(path), {"onnx": formats.open_onnx, "torch": formats.open_torch}
        opened = readers.get(self.options.to, formats.open_safetensors)(path)
        workers = self.trained.config.workers if self.options.workers is None else self.options.workers
        how = json.loads(as_json(self.how))
        compared = compare(opened, self.trained, how, data.val, workers=workers, name=name, strict=strict)
        say(
            f"{name}: top-1 {compared.top1:.3f} %, the run's model {compared.run_top1:.3f} %; the same class for "
            f"{compared.same} of {compared.images} validation images, logits within {compared.difference:.2g}"
        )
        return compared

    def write_quantized(self, data: Data, path: str, compared: Comparison, about: Mapping[str, str]) -> Comparison:
        """Write the 8-bit form of the ONNX file in `path` beside it, with its accuracy in its metadata.

        compared: what came of the file in `path`

        Raises:
            RunError: its accuracy is too low.
        """
        way, most = self.options.quantize, self.options.max_drop
        static = way == "static"
        target = os.path.join(os.path.dirname(path), QUANTIZED)
        calibration = Calibration(data.train, self.how, self.options.calibration_images) if static else None
        quantize(path, target, calibration)
        quantized = self.run_over(data, target, strict=False)
        drop = compared.top1 - quantized.top1
        if not drop <= most:
            raise RunError(
                f"{QUANTIZED} is refused, nothing was written: its top-1 is {drop:.2f} points lower, {most:g} are accepted; "
                f"--max-drop accepts more{'' if static else ', --quantize static may lose less'}"
            )
        ranges = "found as it runs" if calibration is None else f"of {calibration.count} training images"
        told = {
            "quantization": f"{way}, 8 bits; ranges of activations {ranges}",
            "gate": f"top-1 {quantized.top1:.3f} % on {quantized.images} validation images, {compared.top1:.3f} % before; "
            f"the same class for {quantized.same}",
        }
        formats.rewrite_about_onnx(target, {**about, **told})
        return quantized

    def put_in_place(self, aside: str, files: list[str]) -> None:
        """Move the files to their folder; an older model goes first, the new one comes last: beside it is its own.

        All of them are on the disk before anything of an earlier export goes, and a signal does not part the two.
        """
        options = self.options
        places = [(os.path.join(aside, name), os.path.join(options.output, name)) for name in files]
        for source, target in places:
            with open(source, "rb") as file:
                os.fsync(file.fileno())
            os.makedirs(os.path.dirname(target), exist_ok=True)
        with signals_held():
            for path in sorted(options.outdated(), key=lambda path: not path.endswith(options.model_file)):
                if not options.overwrite:  # it was not there at the start
                    raise RunError(f"{path} has come meanwhile; --overwrite replaces it")
                os.remove(path)
            for source, target in places:
                os.replace(source, target)
            sync_folder(options.output)


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
