"""Settings: their sources and order, and a clear line for everything that cannot be."""

import gc
import re
import subprocess
import sys

import pytest
import torch
import yaml
from programs import ROOT, honest_program

from images.workers import closing_loader
from learning.models import check_model
from settings import early
from settings import resolve as resolving
from settings.errors import ConfigError
from settings.table import SETTINGS
from settings.values import seconds
from train import run


def resolve(argv, *changes):
    """Settings as a run takes them: merged, and checked by everyone who has a say."""
    config = resolving.resolve(argv, *changes)
    check_model(config)
    return config


def file_with(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


# Of torchvision's references/classification/train.py: every flag with its default there.
REFERENCE = {
    "model": "resnet18", "batch-size": 32, "epochs": 90, "workers": 16, "opt": "sgd", "lr": 0.1, "momentum": 0.9, "weight-decay": 1e-4,
    "norm-weight-decay": None, "bias-weight-decay": None, "transformer-embedding-decay": None, "label-smoothing": 0, "mixup-alpha": 0,
    "cutmix-alpha": 0, "lr-scheduler": "steplr", "lr-warmup-epochs": 0, "lr-warmup-method": "constant", "lr-warmup-decay": 0.01,
    "lr-step-size": 30, "lr-gamma": 0.1, "lr-min": 0, "print-freq": 10, "output-dir": ".", "resume": "", "start-epoch": 0,
    "cache-dataset": False, "sync-bn": False, "test-only": False, "auto-augment": None, "ra-magnitude": 9, "augmix-severity": 3,
    "random-erase": 0, "amp": False, "world-size": 1, "dist-url": "env://", "model-ema": False, "model-ema-steps": 32,
    "model-ema-decay": 0.99998, "use-deterministic-algorithms": False, "interpolation": "bilinear", "val-resize-size": 256,
    "val-crop-size": 224, "train-crop-size": 224, "clip-grad-norm": None, "ra-sampler": False, "ra-reps": 3, "weights": None,
    "backend": "pil", "use-v2": False,
}  # fmt: skip


def test_every_flag_of_the_reference_has_its_default():
    settings = resolve([]).as_dict()
    assert {name: settings[name.replace("-", "_")] for name in REFERENCE} == REFERENCE
    assert {"data_path", "device"} <= settings.keys()  # theirs: a folder of a cluster, and cuda


def test_the_published_command_of_efficientnet_v2_s_is_accepted():
    line = (
        "--batch-size 128 --lr 0.5 --lr-scheduler cosineannealinglr --lr-warmup-epochs 5 --lr-warmup-method linear "
        "--auto-augment ta_wide --epochs 600 --random-erase 0.1 --label-smoothing 0.1 --mixup-alpha 0.2 --cutmix-alpha 1.0 "
        "--weight-decay 0.00002 --norm-weight-decay 0.0 --train-crop-size 300 --model-ema --val-crop-size 384 "
        "--val-resize-size 384 --ra-sampler --ra-reps 4"
    )
    settings = resolve(["--model", "efficientnet_v2_s", *line.split()]).as_dict()
    file = resolve(["--config", "configs/torchvision_s.yaml"]).as_dict()
    assert {name for name in settings if settings[name] != file[name]} == {"config", "data_path", "output_dir"}


def test_command_line_over_file_over_defaults_and_a_dashboard_over_all(tmp_path):
    path = file_with(tmp_path, "lr: 0.3\nmomentum: 0.5\nepochs: 7\n")
    config = resolve(["--config", path, "--lr", "0.2", "--epochs", "5"], {"epochs": 3})
    assert (config.lr, config.momentum, config.epochs, config.weight_decay) == (0.2, 0.5, 3, 1e-4)


def test_short_flags_and_negated_switches(tmp_path):
    config = resolve(["--config", file_with(tmp_path, "amp: true\n"), "--no-amp", "-b", "7", "-j", "0", "--wd", "0.5"])
    assert (config.amp, config.batch_size, config.workers, config.weight_decay) == (False, (7.0,), 0, 0.5)


def test_what_is_written_down_reads_back_the_same(tmp_path):
    flags = [
        "--stages",
        "3",
        "--epochs",
        "9",
        "--dropout",
        "0.1",
        "0.3",
        "--model",
        "efficientnet_v2_s",
        "--lr",
        "1e-5",
    ]
    before = resolve([*flags, "--auto-augment", "ra", "--ra-magnitude", "1", "2", "3.5"])
    kept = {name: value for name, value in before.as_dict().items() if name not in ("config", "plan")}
    assert resolve(["--config", file_with(tmp_path, yaml.safe_dump(kept))]).as_dict() == {
        **before.as_dict(),
        "config": str(tmp_path / "mine.yaml"),
    }


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_says_what_to_expect(path):
    config = resolve(["--config", str(path)])
    assert config.output_dir == f"runs/{path.stem}"
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(head) >= 2
    assert "QUICKSTART" not in path.read_text()


@pytest.mark.parametrize("argv", [["--help"], ["--lr", "fast"], ["--droput", "0.1"], ["--config", "none.yaml"], []])
def test_help_and_mistakes_are_told_without_torch(argv):
    """Importing it takes seconds."""
    code = (
        "import sys\nfrom settings import early\n"
        "try:\n    early.answer(sys.argv[1:])\n"
        "finally:\n    assert not {'torch', 'numpy', 'torchvision'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (2 if argv and argv != ["--help"] else 0) and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == (done.returncode == 2)


WRONG_YAML = [
    ("dropuot: 0.1", "unknown setting dropuot; did you mean dropout?"),
    ("lr: fast", "lr must be a number, got 'fast'"),
    ("lr: '0.1'", "lr must be a number, got '0.1'; write it without quotes"),
    ("auto_augment: xyz", ", got 'xyz'; none unsets it"),
    ("<<: {lr: 0.2}\nlr: 0.1\nepochs: 2.5", "epochs must be a whole number, got 2.5"),
    ("weight_decay: 1e-5", "weight_decay must be a number, got '1e-5' (YAML reads that as text; write 1.0e-5)"),
    ("epochs: 2.5", "epochs must be a whole number, got 2.5"),
    ("amp: 1", "amp must be true or false, got 1"),
    ("lr: true", "lr must be a number, got True"),
    ("lr: .nan", "lr must be a number, got nan"),
    ("lr:", "lr must be a number, got nothing"),
    ("batch_size: []", "batch_size needs at least one value"),
    ("dropout: 1.0", "dropout must be in [0, 1), got 1"),
    ("label_smoothing: -0.1", "label_smoothing must be in [0, 1], got -0.1"),
    ("opt: adam", "opt must be one of sgd, sgd_nesterov, rmsprop, adamw, got 'adam'; did you mean adamw?"),
    ("lr_scheduler: cosine", "did you mean cosineannealinglr?"),
    ("auto_augment: randaugment", "auto_augment must be one of ra, ta_wide"),
    ("model: efficientnet_v2_t", "unknown model 'efficientnet_v2_t'; nearest: efficientnet_v2_"),
    ("model: !!python/object/apply:os.system [ls]", "is not plain YAML in line 1"),
    ("- lr\n- 0.1", "must hold lines of `setting: value`"),
    ("lr: [0.1", "is not plain YAML"),
    ("config: other.yaml", "config belongs on the command line"),
    ("1: 2", "unknown setting 1"),
    ("lr: 0.1\nlr: 0.2", "lr stands there twice"),
    ("lr: \0", "is not plain YAML"),
    ("epochs: 1" + 400 * "0", "epochs must be a whole number of usual size"),
    ("epochs: 10000000000", "epochs must be in [1, 1000000000]"),
    ("a: " + 3000 * "[", "is not plain YAML"),
    ("amp: !!bool foo", "is not plain YAML: a value does not fit its tag"),
    ('epochs: !!int ""', "is not plain YAML: a value does not fit its tag"),
    ("epochs: !!timestamp x", "is not plain YAML: a value does not fit its tag"),
    ("opt: !!set [a]", "is not plain YAML: a value does not fit its tag"),
    ("epochs: 010", "epochs must be a whole number, got '010'"),
    ("epochs: 0x10", "epochs must be a whole number, got '0x10'"),
    ("epochs: 1_0", "epochs must be a whole number, got '1_0'"),
    ("lr: 1:30", "lr must be a number, got '1:30'"),
    ("lr: 1:30.5", "lr must be a number, got '1:30.5'"),
    ("time_budget: 1:30", "time_budget must be a time such as 90s, 25m or 1.5h, got '1:30'"),
    ("epochs: ٣", "epochs must be a whole number, got '٣'"),
    ("lr: 5.0e-324", "lr must be a number of usual size, got 5e-324"),
    ('output_dir: "a\\0b"', "output_dir must be UTF-8 text without NUL"),
    (f"output_dir: a/{256 * 'x'}/b", "output_dir must be at most 4000 bytes long, 255 between two slashes"),
    ("lr: &a [*a, *a]", "lr must be a number, got [[[...], [...]], [[...], [...]]]"),
    ("a: &a [1, 1]\nlr: [*a, *a]\n" + 90 * "x" + ": 1", "unknown setting a"),
    (90 * "x" + ": 1", "unknown setting 'xxxxx"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_YAML, ids=[text[:30].strip("\0") for text, _ in WRONG_YAML])
def test_wrong_yaml(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        resolve(["--config", file_with(tmp_path, text)])
    assert "\n" not in str(caught.value)


WRONG_FLAGS = [
    ("--mixup 0.2", "unknown setting --mixup; did you mean --mixup-alpha?"),  # argparse would complete it
    ("--droput 0.1", "did you mean --dropout?"),
    ("--lr", "expected one argument"),
    ("--lr fast", "lr must be a number, got 'fast'"),
    ("file.yaml", "cannot make sense of 'file.yaml'"),
    ("--config nowhere.yaml", "config: cannot read nowhere.yaml: No such file"),
    ("--stages 4 --epochs 8 --train-crop-size 1 2 3", "train_crop_size takes one value, first and last, or one per stage (4); got 3 values"),
    ("--train-crop-size 128 300", "train_crop_size takes one value (stages is 1); got 2 values"),
    ("--stages 5 --epochs 4", "5 stages need at least 5 epochs, epochs is 4"),
    ("--stages 2 --stage-epochs 1 2 3", "stage_epochs takes one value per stage (2); got 3"),
    ("--stages 2 --stage-epochs 1 2 --epochs 4", "stage_epochs adds up to 3, epochs is 4"),
    ("--stages 2 --stage-rule released", "stage_rule released goes from a first to a last train_crop_size"),
    ("--stage-rule released", "stage_rule released has no effect with stages 1"),
    ("--image-size-multiple 500", "rounds down to 0"),
    ("--ra-magnitude 5", "ra_magnitude 5 has no effect with auto_augment unset; set auto_augment to ra"),
    ("--auto-augment ra --ra-magnitude 31", "ra_magnitude must be in [0, 30], got 31"),
    ("--augmix-severity 5", "augmix_severity 5 has no effect"),
    ("--ra-reps 4", "ra_reps 4 has no effect with ra_sampler false"),
    ("--model-ema-decay 0.9", "has no effect with model_ema false"),
    ("--amp-dtype float16", "has no effect with amp false"),
    ("--lr-warmup-method linear", "has no effect with lr_warmup_epochs 0"),
    ("--opt adamw --momentum 0.8", "momentum 0.8 has no effect with opt adamw"),
    ("--lr-min 0.01", "lr_min 0.01 has no effect with lr_scheduler steplr"),
    ("--start-epoch 90", "start_epoch 90 is not below epochs 90"),
    ("--opt sgd_nesterov --momentum 0", "needs a momentum above 0"),
    ("--val-crop-size 300", "val_crop_size 300 is larger than val_resize_size 256"),
    ("--train-crop-scale 0.5 0.2", "train_crop_scale takes smallest and largest share"),
    ("--train-crop-scale 0.5", "train_crop_scale takes smallest and largest share"),
    ("--dataset digits --download", "download true has no effect with dataset digits"),
    ("--dataset digits --train-split x", "train_split x has no effect with dataset digits"),
    ("--backend tensor --interpolation bicubic --auto-augment ra", "backend tensor has no bicubic warps"),
    ("--augment-size 127 --train-crop-size 128", "augment_size 127 is below train_crop_size 128"),
    ("--interpolation nearest --decode-cache cache", "decode_cache has no effect with interpolation nearest"),
    ("--resume gone.pth", "resume: no file gone.pth"),
    ("--resume auto --overwrite", "resume continues a run, overwrite starts again"),
    ("--test-only", "test_only needs something to evaluate"),
    ("--time-budget soon", "time_budget must be a time such as 90s, 25m or 1.5h, got 'soon'"),
    ("--weights IMAGENET1K_V9", "is neither a file nor weights of resnet18"),
    ("--seed -1", "seed must be in [0, 4294967295], got -1"),
    ("--epochs 0x10", "epochs must be a whole number, got '0x10'"),
    ("--epochs 010", "epochs must be a whole number, got '010'"),
    ("--epochs 1_0", "epochs must be a whole number, got '1_0'"),
    ("--epochs ٣", "epochs must be a whole number, got '٣'"),
    ("--time-budget ٣s", "time_budget must be a time such as"),
    ("--lr inf", "lr must be a number, got 'inf'"),
    ("--mixup-alpha 5e-324", "mixup_alpha must be a number or a list of numbers of usual size, got 5e-324"),
    ("--cutmix-alpha 0.001", "cutmix_alpha must be 0 or at least 0.01, got 0.001"),
    ("--time-budget 0.000001", "time_budget must be a time such as"),
    ("--time-budget 1e9h", "time_budget must be a time such as"),
    ("--data-path a\0b", "data_path must be UTF-8 text without NUL, got 'a\\x00b'"),
    ("--data-path a\udcffb", "data_path must be UTF-8 text without NUL, got 'a\\udcffb'"),
    (f"--data-path {300 * 'x'}/y", "data_path must be at most 4000 bytes long, 255 between two slashes"),
    ("--dataset digits --on-bad-image skip", "on_bad_image skip has no effect with dataset digits"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), WRONG_FLAGS, ids=[flags for flags, _ in WRONG_FLAGS])
def test_wrong_flags(flags, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        resolve(flags.split())
    assert "\n" not in str(caught.value)


LATE = [  # found when the run starts, still before data is read
    ("--device cuda:7", "device cuda:7 is not on this machine"),
    ("--device tpu", "is no device"),
    ("--dropout 0.2", "dropout 0.2 has no effect: ResNet has no Dropout layer"),
    ("--stochastic-depth-prob 0.2", "has no effect: ResNet has no stochastic depth"),
    ("--model vit_b_16 --train-crop-size 128", "cannot take images of 128 px"),
    ("--model vit_b_16 --val-crop-size 384 --val-resize-size 384", "cannot take images of 384 px"),
    ("--model vit_h_14 --weights DEFAULT", "are for images of 518 px alone, and vit_h_14 is built for 224 here"),
    ("--model squeezenet1_1 --train-crop-size 32 --val-crop-size 8", "cannot take images of 8 px"),
    (
        "--model vit_b_16 --weights IMAGENET1K_SWAG_E2E_V1",
        "are for images of 384 px alone, and vit_b_16 is built for 224 here",
    ),
    ("--world-size 4", "4, but 1 process(es) were started"),
    ("--weights README.md --dataset digits", "is not a file of weights"),
    ("--data-path nowhere", "no folder nowhere/train"),
    ("--data-path nowhere --dataset imagenette", "holds no imagenette2; --download fetches it"),
    ("--output-dir README.md", "is a file; give a folder"),
]


@pytest.mark.parametrize(("flags", "message"), LATE, ids=[flags for flags, _ in LATE])
def test_wrong_flags_end_with_one_line_and_status_2(capsys, tmp_path, flags, message):
    if "--output-dir" not in flags:
        flags += f" --output-dir {tmp_path}/run"
    assert run(flags.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()  # nothing is left behind


def test_a_later_source_that_switches_a_policy_off_takes_its_strength_along(tmp_path):
    path = file_with(tmp_path, "auto_augment: ra\nra_magnitude: 5\nra_scale: paper\n")
    config = resolve(["--config", path, "--auto-augment", "ta_wide"])
    assert (config.auto_augment, config.ra_magnitude, config.ra_scale) == ("ta_wide", (9.0,), "torchvision")


def test_epochs_follow_from_stage_epochs_unless_given():
    assert resolve(["--stages", "2", "--stage-epochs", "3", "4"]).epochs == 7


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("25m", 1500), ("1.5h", 5400), ("30", 30)])
def test_durations(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["5", "+5", "5.", "5.0", "5e0", ".5e1", "500E-2", "0.5e+1"])
def test_numbers_that_people_write(text):
    assert resolve(["--lr", text]).lr == 5


def test_a_learning_rate_that_never_falls_is_doubted():
    """The reference's default steps are for 90 epochs."""
    assert resolving.doubts(resolve([]), 90, several=False) == []
    assert resolving.doubts(resolve(["--epochs", "31"]), 31, several=False) == []
    (told,) = resolving.doubts(resolve(["--epochs", "30"]), 30, several=False)
    assert told == "lr_step_size 30 of 30 epochs: the learning rate never falls"


def test_batch_norm_of_one_process_has_nobody_to_agree_with():
    (told,) = resolving.doubts(resolve(["--sync-bn"]), 90, several=False)
    assert told == "sync_bn has no effect in one process, whose batch norm sees the whole batch"
    assert resolving.doubts(resolve(["--sync-bn"]), 90, several=True) == []


def test_a_checkpoint_knows_where_its_run_stands(tmp_path):
    (tmp_path / "checkpoint.pth").touch()
    with pytest.raises(ConfigError, match="start_epoch 3 has no effect with resume, whose checkpoint knows its own"):
        resolve(["--start-epoch", "3", "--resume", str(tmp_path / "checkpoint.pth")])
    assert resolve(["--start-epoch", "3", "--resume", "auto"]).start_epoch == 3  # as the run began, by its config.yaml


def test_on_and_off_are_words_though_yaml_reads_them_as_truth(tmp_path):
    config = resolve(["--config", file_with(tmp_path, "clearml: off\ncuda_graphs: Off\ndecode_cache: off\n")])
    assert (config.clearml, config.cuda_graphs, config.decode_cache) == ("off", "off", "off")
    with pytest.raises(ConfigError, match="opt must be one of"):
        resolve(["--config", file_with(tmp_path, "opt: off\n")])
    assert resolve(["--config", file_with(tmp_path, "cuda_graphs: on\n")]).cuda_graphs == "on"
    with pytest.raises(ConfigError, match="clearml must be one of"):
        resolve(["--config", file_with(tmp_path, "clearml: on\n")])


def test_a_warm_up_without_end_is_doubted_not_refused(capsys, tmp_path):
    cosine = ["--lr-scheduler", "cosineannealinglr"]
    assert resolving.doubts(resolve(["--epochs", "5", "--lr-warmup-epochs", "4", *cosine]), 5, several=False) == []
    (told,) = resolving.doubts(resolve(["--epochs", "5", "--lr-warmup-epochs", "5", *cosine]), 5, several=False)
    assert told == "lr_warmup_epochs 5 of 5 epochs: warm-up never ends, and lr_scheduler cosineannealinglr does nothing"


def test_an_error_is_one_line_that_shows_every_character():
    assert str(ConfigError("no a\nb\x1b[0m\udcff.jpg\u2028")) == r"no a\nb\x1b[0m\xff.jpg\u2028"
    assert str(ConfigError("no Zoë/猫.jpg, 'a' or \\n")) == "no Zoë/猫.jpg, 'a' or \\n"


def test_no_garbage_is_looked_for_among_imports(monkeypatch):
    monkeypatch.setattr(early.signal, "signal", lambda *_: None)
    try:
        early.answer(["--lr", "0.1"])
        assert not gc.isenabled()
        early.imported()
        assert gc.isenabled() and gc.get_freeze_count() > 10_000  # numpy alone has as many objects
    finally:
        gc.unfreeze()
        gc.enable()


def test_help_names_every_setting_once():
    done = honest_program("--help")
    assert done.returncode == 0
    for name in SETTINGS:
        assert (
            len(re.findall(rf"^ +(?:-\w(?: [A-Z ]+)?, )?--{name.replace('_', '-')}(?![\w-])", done.stdout, re.M)) == 1
        ), name
    assert "SUPPRESS" not in done.stdout


def test_a_mistake_in_a_process_of_its_own_is_one_line():
    done = honest_program("--config", "configs/quickstart.yaml", "--dropuot", "0.1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown setting --dropuot; did you mean --dropout?\n"


class Refused(ConfigError):
    """Another type than its base, as the loader's worker names it."""


class Faulty(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize("kind", [ConfigError, Refused])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_loader_s_worker_keeps_its_type_and_its_one_line(kind, workers):
    faulty = Faulty(kind("a.png: no image; remove it"))
    loader = torch.utils.data.DataLoader(faulty, num_workers=workers, persistent_workers=workers > 0)
    with pytest.raises(ConfigError) as caught, closing_loader(loader):
        list(loader)
    assert type(caught.value) is kind and str(caught.value) == "a.png: no image; remove it"


def test_none_in_any_case_unsets_what_may_be_unset():
    assert resolve(["--auto-augment", "None", "--dropout", "none"]).dropout is None
    assert resolve(["--auto-augment", "NONE"]).auto_augment is None
