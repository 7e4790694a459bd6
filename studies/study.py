"""A study file: conditions, seeds, and the runs they make.

    title: Does dropout act?
    base: ../imagenette_s.yaml          # from the folder of this file
    settings: {epochs: 80}              # of all runs, over the base
    conditions:                         # or `grid`, of which every combination is a condition
      none: {dropout: 0.0}
      0.1 → 0.3: {dropout: [0.1, 0.3]}
    seeds: [0, 1, 2]
    metric: top1                        # which column of the rows the conclusions are drawn from
    control: none                       # what the others are compared with; unset: the first condition

A condition may have a `base`, `metric` and `control` of its own, start from the best weights of another one's run with
the same seed (`weights: {of: NAME}`), and name a folder of images, beside those it trains on, that its best weights are
evaluated on at the end (`held_out: test`).
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from learning.models import check_model
from reporting.folder import BEST
from settings.errors import ConfigError
from settings.resolve import resolve
from settings.sources import UniqueKeys, read_command_line, reject_unknown
from settings.table import BEFORE, LAUNCH, OWN_SPLITS, PLACE, SETTINGS, Config, plain, show
from settings.values import nearest
from stages import Plan, Stage, make_plan, plan_of, plan_stages

KEYS = ("title", "base", "settings", "conditions", "grid", "seeds", "metric", "control")
OWN = ("config", "plan", "seed", "output_dir", "resume", "overwrite", "test_only", "time_budget")  # the sweep's own
VARIABLE = (
    "fit_time gives every run other epochs, as fast as its machine happens to be; a study needs epochs or stage_epochs"
)
ASIDE = ("base", "held_out", "metric", "control")  # of a condition, besides settings
# Columns of the rows that are better when higher
METRICS = (
    "top1", "top1_ema", "best_top1", "balanced_accuracy", "macro_f1", "held_out_top1", "held_out_balanced_accuracy", "auc",
)  # fmt: skip
NEEDS = {"top1_ema": "model_ema"} | dict.fromkeys(("held_out_top1", "held_out_balanced_accuracy", "auc"), "held_out")


@dataclass(frozen=True, eq=False)
class Run:
    """One training: a condition with a seed.

    flags: of train.py, which repeat it
    config, plan: what they come to; `config.weights` is None where they come from another run of the study
    source: the run whose best weights it starts from
    held_out: folder of images, beside those it trains on, that its best weights are evaluated on
    """

    condition: str
    seed: int
    folder: str
    flags: tuple[str, ...]
    config: Config
    plan: Plan
    source: "Run | None" = None
    held_out: str | None = None

    @property
    def name(self) -> str:
        return f"{self.condition}, seed {self.seed}"

    @property
    def gflops(self) -> float:
        """Billions of multiply-adds of a forward pass, for an image in every epoch together."""
        return sum(len(stage.epochs) * cost for stage, cost in zip(self.plan.stages, self.plan.gflops_per_image))

    @property
    def settings_digest(self) -> str:
        """Hash what shapes the run, seed and place left out, to 12 digits: rows with another one are of other runs.

        Settings that are what runs did before there were such settings are left out, so that a new one does not make
        old rows another study's.
        """
        left_out = (*LAUNCH, *PLACE, "seed")
        values = {
            name: value
            for name, value in self.config.as_dict().items()
            if name not in left_out and value != plain(BEFORE[name])
        }
        if self.source is not None:
            values["weights"] = f"of {self.source.settings_digest}"
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Study:
    """A study as its file says it.

    control: the condition that costs are told against
    metrics, controls: of each condition, the column that counts and the condition it is compared with
    varying: names of the settings that are not the same in all runs
    """

    name: str
    title: str
    control: str
    runs: list[Run]
    metrics: dict[str, str]
    controls: dict[str, str]
    varying: list[str]

    @property
    def conditions(self) -> list[str]:
        return list(dict.fromkeys(run.condition for run in self.runs))


def read_study(path: str, folder: str, extra: Sequence[str] = ()) -> Study:
    """Read a study file, and resolve and check all of its runs.

    folder: below which each run gets a folder
    extra: flags of train.py for all runs

    Raises:
        ConfigError: naming the file, and the condition if it lies there.
    """
    content = read_mapping(path)
    for key in content:
        if key not in KEYS:
            near = nearest(str(key), KEYS)
            raise ConfigError(
                f"{path}: unknown key {key}; {f'did you mean {near}?' if near else 'known are ' + ', '.join(KEYS)}"
            )
    name = os.path.splitext(os.path.basename(path))[0]
    conditions = read_conditions(content, path)
    given = read_command_line(extra)
    varying = {setting for condition in conditions.values() for setting in condition} - set(ASIDE)
    for setting in given:
        if setting == "fit_time":
            raise ConfigError(VARIABLE)
        if setting in OWN or setting in varying:
            why = "the study says itself" if setting in varying else "the sweep says itself"
            raise ConfigError(f"--{setting.replace('_', '-')} after -- is what {why}; leave it out")
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise ConfigError(f"{path}: seeds must be a list of whole numbers, got {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{path}: a seed stands twice in {seeds}")
    control = str(content.get("control", next(iter(conditions))))
    metrics, controls = comparisons(conditions, str(content.get("metric", "top1")), control, path)
    slugs = [slug(condition) for condition in conditions]
    for one in conditions:
        if slugs.count(slug(one)) > 1:
            raise ConfigError(f"{path}: condition {one!r} has the same folder name as another ({slug(one)}); rename it")
    common = content.get("settings") or {}
    if not isinstance(common, dict):
        raise ConfigError(f"{path}: settings must map names to values, got {common!r}")
    conditions = {condition: {**common, **settings} for condition, settings in conditions.items()}
    runs: dict[tuple[str, int], Run] = {}
    for seed in seeds:  # seed by seed, so that a study cut short has all conditions
        for condition in in_order(conditions, path):
            settings = dict(conditions[condition])
            runs[condition, seed] = make_run(path, folder, content, condition, seed, settings, extra, runs)
    for run in runs.values():
        need = NEEDS.get(metrics[run.condition])
        if need and not (run.held_out if need == "held_out" else run.config.model_ema):
            raise ConfigError(f"{path}: condition {run.condition}: metric {metrics[run.condition]} needs {need}")
    title = str(content.get("title", name))
    return Study(name, title, control, list(runs.values()), metrics, controls, differing(runs.values()))


def read_mapping(path: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, UniqueKeys)
    except OSError as error:
        raise ConfigError(f"cannot read the study {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"study {path} is not plain YAML{line}: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"study {path} must hold {', '.join(KEYS)}; it holds no such lines")
    return content


def read_conditions(content: Mapping[str, Any], path: str) -> dict[str, dict[str, Any]]:
    """Read `conditions`, or build them from `grid`: settings by the condition's name."""
    if ("conditions" in content) == ("grid" in content):
        raise ConfigError(f"{path}: give either conditions or grid")
    kind = "conditions" if "conditions" in content else "grid"
    given = content[kind]
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"{path}: {kind} must map names to settings, it is {type(given).__name__}")
    if kind == "grid":
        for name, values in given.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"{path}: grid: {name} must be a list of values, got {values!r}")
        combinations = [dict(zip(given, values)) for values in itertools.product(*given.values())]
        return {
            ", ".join(f"{name} {values_text(value)}" for name, value in combination.items()): combination
            for combination in combinations
        }
    for name, settings in given.items():
        if not isinstance(settings, dict | None):
            raise ConfigError(f"{path}: condition {name} must hold settings, got {settings!r}")
    return {str(name): dict(settings or {}) for name, settings in given.items()}


def comparisons(
    conditions: Mapping[str, dict[str, Any]], metric: str, control: str, path: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Find what each condition is judged by, and which one it is compared with: its own, else those of the study.

    Both are taken out of the conditions' settings.
    """
    metrics = {name: str(settings.pop("metric", metric)) for name, settings in conditions.items()}
    controls = {name: str(settings.pop("control", control)) for name, settings in conditions.items()}
    for found in metrics.values():
        if found not in METRICS:
            raise ConfigError(f"{path}: metric must be one of {', '.join(METRICS)}, got {found!r}")
    for found in (control, *controls.values()):
        if found not in conditions:
            raise ConfigError(f"{path}: control {found!r} is none of the conditions: {', '.join(conditions)}")
    return metrics, controls


def values_text(value: Any) -> str:
    """Format the value of a setting as the name of a condition has it: `0.1 → 0.3`."""
    return " → ".join(map(str, value)) if isinstance(value, list) else show(value)


def in_order(conditions: Mapping[str, Mapping[str, Any]], path: str) -> list[str]:
    """Order conditions so that one whose weights others start from comes before them."""
    ordered: list[str] = []

    def visit(name: str, chain: tuple[str, ...]) -> None:
        if chain == (name,):
            raise ConfigError(f"{path}: condition {name} starts from its own weights; give it others, or none")
        if name in chain:
            raise ConfigError(f"{path}: {' and '.join(chain)} start from each other's weights")
        source = source_of(conditions[name])
        if source is not None:
            if source not in conditions:
                raise ConfigError(f"{path}: condition {name}: weights of {source!r}, which is none of the conditions")
            visit(source, (*chain, name))
        if name not in ordered:
            ordered.append(name)

    for name in conditions:
        visit(name, ())
    return ordered


def source_of(settings: Mapping[str, Any]) -> str | None:
    """Find the condition whose weights another one starts from."""
    weights = settings.get("weights")
    return str(weights["of"]) if isinstance(weights, dict) and list(weights) == ["of"] else None


def make_run(
    path: str,
    folder: str,
    content: Mapping[str, Any],
    condition: str,
    seed: int,
    settings: dict[str, Any],
    extra: Sequence[str],
    others: Mapping[tuple[str, int], Run],
) -> Run:
    """Resolve and check one run of a study."""
    where = f"{path}: condition {condition}: "
    base, held_out = settings.pop("base", content.get("base")), settings.pop("held_out", None)
    if not isinstance(held_out, str | None):
        raise ConfigError(f"{where}held_out must name a folder, got {held_out!r}")
    source_name = source_of(settings)
    source = None
    if source_name is not None:
        source = others[source_name, seed]
        del settings["weights"]
    reject_unknown(settings, SETTINGS, where)
    for name in settings:
        if name in OWN:
            raise ConfigError(f"{where}{name} is what the sweep says itself; leave it out")
        if name == "fit_time":
            raise ConfigError(f"{where}{VARIABLE}")
    flags = [] if base is None else ["--config", os.path.normpath(os.path.join(os.path.dirname(path), str(base)))]
    flags += [*as_flags(settings), "--seed", str(seed), *extra]
    flags += ["--output-dir", os.path.join(folder, f"{slug(condition)}_seed{seed}")]
    try:
        config = resolve(flags)
        if held_out is not None:
            with_held_out(config, held_out)
        check_model(config)
        plan = plan_like(config, others.values())
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error
    if source is not None:
        if source.config.model != config.model:
            raise ConfigError(
                f"{where}weights of {source_name} are of {source.config.model}, the model is {config.model}"
            )
        flags += ["--weights", os.path.join(source.folder, BEST)]
    return Run(condition, seed, config.output_dir, tuple(flags), config, plan, source, held_out)


def with_held_out(config: Config, split: str) -> Config:
    """Put a split of held-out images in the place of the validation images.

    Raises:
        ConfigError: the splits of the data set cannot be chosen.
    """
    if config.dataset not in OWN_SPLITS:
        raise ConfigError(
            f"held_out {split} has no effect with dataset {config.dataset}; set dataset to {' or '.join(OWN_SPLITS)}, or "
            "leave held_out out"
        )
    return replace(config, val_split=split, val_list=None)


def plan_like(config: Config, others: Iterable[Run]) -> Plan:
    """Plan the stages of a run; what they cost, a second's work to count, is taken from a run with the same sizes.

    Raises:
        ConfigError: as `stages.make_plan`.
    """

    def key(config: Config, stages: Sequence[Stage]) -> tuple:
        rates = (config.dropout is None, config.stochastic_depth_prob is None)  # which a model may lack the layers for
        return config.model, rates, [stage.image_size for stage in stages]

    stages = plan_stages(config)
    for run in others:
        if key(run.config, run.plan.stages) == key(config, stages):
            return plan_of(config, stages, run.plan.gflops_per_image)
    return make_plan(config)


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as flags of train.py."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool) and SETTINGS[name]["kind"] == "bool":
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else ["none" if value is None else value]
            flags += [f"--{flag}", *map(str, values)]
    return flags


def slug(name: str) -> str:
    """Convert a condition's name to one that any file system takes; names that differ stay different."""
    plain = re.sub(r"[^0-9A-Za-z.]+", "_", name.replace("→", "to")).strip("_.") or "condition"
    odd = re.sub(r"[0-9A-Za-z., →_-]", "", name)
    return f"{plain}_{hashlib.sha256(name.encode()).hexdigest()[:4]}" if odd else plain


def differing(runs: Sequence[Run] | Any) -> list[str]:
    """List the settings that are not the same in all runs, in the table's order."""
    runs = list(runs)
    left_out = (*LAUNCH, *PLACE, "seed")
    return [
        name
        for name in SETTINGS
        if name not in left_out and len({json.dumps(run.config.as_dict()[name]) for run in runs}) > 1
    ]
