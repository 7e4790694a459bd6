"""Settings to a task, and from one that an agent was given."""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from settings.errors import ConfigError
from settings.resolve import resolve
from settings.table import CLEARML, SETTINGS, Config
from settings.values import as_text, from_text
from tracking.server import fail, find_task, on_agent, why_no_server

SECTION = "Hyperparameters"  # of the task's settings
NOT_SETTINGS = ("config", "plan", *CLEARML)  # how this very process was started
SHORTEST_NAME, DEEPEST_PROJECT = 3, 10  # characters and levels, that a server takes


def project_name(config: Config) -> str:
    """Name the project as a server does: no blanks around the parts between slashes, no empty parts.

    The SDK looks for a project as it is typed, so that one typed otherwise would be made again, and refused.

    Raises:
        ConfigError: no server takes such a name.
    """
    typed = config.clearml_project
    parts = [part.strip() for part in typed.split("/") if part.strip()]
    if not parts or any(len(part) < SHORTEST_NAME for part in parts):
        raise ConfigError(
            f"clearml_project {typed!r} has a part that is too short for ClearML; give {SHORTEST_NAME} or more "
            "characters between slashes"
        )
    if len(parts) > DEEPEST_PROJECT:
        raise ConfigError(
            f"clearml_project {typed!r} has {len(parts)} parts between slashes; ClearML takes up to {DEEPEST_PROJECT}"
        )
    return "/".join(parts)


def task_name(config: Config) -> str:
    """Name the task: `clearml_task`, else the run's folder, with the model in front where that is too short.

    Raises:
        ConfigError: no server takes such a name.
    """
    if config.clearml_task is not None:
        if len(config.clearml_task.strip()) < SHORTEST_NAME:
            raise ConfigError(
                f"clearml_task {config.clearml_task!r} is too short for ClearML; give {SHORTEST_NAME} or more characters"
            )
        return config.clearml_task.strip()
    name = os.path.basename(os.path.abspath(config.output_dir)).strip()
    return name if len(name) >= SHORTEST_NAME else f"{config.model} {name}".strip()


def find_settings(argv: Sequence[str], check: Callable[[Config], None]) -> Config:
    """Resolve the settings of a run, on an agent from its task.

    A task on an agent takes the settings that it was cloned with, and what was changed in it.

    check: raises ConfigError for what the table of settings cannot know

    Raises:
        ConfigError: as `settings.resolve.resolve`. The task fails with the same line.
    """
    if not on_agent() or any(word.startswith("--plan") for word in argv):
        config = resolve(argv)
        check(config)
        return config
    reason = why_no_server()
    if reason is not None:
        raise ConfigError(f"clearml: the settings of CLEARML_TASK_ID cannot be read: {reason}")
    task = find_task(os.environ["CLEARML_TASK_ID"])
    if task is None:
        raise ConfigError(
            f"clearml: the server does not know task {os.environ['CLEARML_TASK_ID']}; unset CLEARML_TASK_ID to start a new one"
        )
    try:
        base, changed = settings_of(task)
        config = resolve(argv, changed, base)
        check(config)
        return config
    except ConfigError as error:
        fail(task, str(error))
        raise


def settings_of(task: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Read the settings that a task was made with, and those of its fields that say something else.

    The first are None if the task was not made by a run.

    Raises:
        ConfigError: the record of the settings was changed, instead of the fields.
    """
    record = task.get_configuration_object("config")
    base: dict[str, Any] | None = None
    if record:
        head, _, body = record.partition("\n")
        if hashlib.sha1(body.encode()).hexdigest() not in head:
            raise ConfigError(
                f"clearml: the configuration object `config` is a record and was changed; change {SECTION} instead"
            )
        base = yaml.safe_load(body)
    changed = {}
    for name, text in ((task.get_parameters_as_dict() or {}).get(SECTION) or {}).items():
        made_with = {} if base is None else base
        known = name in made_with
        if name not in SETTINGS or name in NOT_SETTINGS:
            changed[name] = text  # `settings.resolve` says what is wrong with it
        elif not known or text != as_text(made_with[name]):
            changed[name] = from_text(name, str(text))
            if known and changed[name] == made_with[name]:  # the same in other words
                del changed[name]
    return base, changed


def send_settings(task: Any, config: Config) -> None:
    """Send the settings to a task: whole, as a record, and as fields that can be changed in a clone."""
    values = {name: value for name, value in config.as_dict().items() if name not in NOT_SETTINGS}
    body = yaml.safe_dump(values, sort_keys=False)
    source = config.config or "the command line"
    head = (
        f"# {source}, resolved. A record: a clone is changed in {SECTION} ({hashlib.sha1(body.encode()).hexdigest()})"
    )
    task.set_configuration_object("config", f"{head}\n{body}", config_type="YAML")
    task.update_parameters({f"{SECTION}/{name}": as_text(value) for name, value in values.items()})
