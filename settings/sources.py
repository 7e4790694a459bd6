"""Where settings come from: YAML files and the command line."""

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import yaml

from settings.errors import ConfigError
from settings.table import DEFAULTS, SETTINGS, show
from settings.values import LISTS, brief, convert, nearest, parse_text


class UniqueKeys(yaml.SafeLoader):
    """A YAML loader of the safe types alone, which refuses a key that stands twice: the second would silently win.

    Numbers in forms that people do not mean (`010`, which YAML 1.1 reads as 8) stay text.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, and refuse it if a key stands in it twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        """Build a number, or text if it is written in octal, hexadecimal, binary, base 60 or with underscores."""
        if re.match(r"[-+]?0[\dxbo_]|.*[:_]", node.value):
            return node.value
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)


for kind in ("int", "float"):
    UniqueKeys.add_constructor(f"tag:yaml.org,2002:{kind}", UniqueKeys.construct_number)


def read_yaml(path: str) -> dict[str, Any]:
    """Read the settings in file `path`, converted to their types; refuse keys that no setting has.

    Raises:
        ConfigError: no such file, not YAML, not plain settings (Python objects included).
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, UniqueKeys)
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config: {path} is not a text file") from error
    except Exception as error:  # what PyYAML raises for a tag that does not fit varies with the tag
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        told = isinstance(error, yaml.YAMLError | ValueError | RecursionError)
        reason = getattr(error, "problem", None) or (str(error) if told else "a value does not fit its tag")
        reason = " ".join(reason.split())
        raise ConfigError(f"config: {path} is not plain YAML{line}: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config: {path} must hold lines of `setting: value`, it holds a {type(content).__name__}")
    return convert_all(content, f"{path}: ")


def convert_all(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert settings by name to their types; `where` begins the message of an error.

    Raises:
        ConfigError: an unknown name, a wrong value, or one of `config` and `plan`, which belong on the command line.
    """
    reject_unknown(given, SETTINGS, where)
    for name in ("config", "plan"):
        if name in given:
            raise ConfigError(f"{where}{name} belongs on the command line")
    return {name: convert(name, value, where) for name, value in given.items()}


def reject_unknown(names: Collection[Any], known: Collection[str], where: str, dashes: str = "") -> None:
    """Raise ConfigError for the first of `names` that is not in `known`, and suggest the nearest that is.

    where: begins the message
    dashes: stand before each name in it
    """
    for name in names:
        if name not in known:
            name = name if isinstance(name, str) and len(name) < 80 else brief(name)
            near = nearest(str(name), known)
            hint = f"did you mean {dashes}{near}?" if near else "python train.py --help lists all"
            raise ConfigError(f"{where}unknown setting {dashes}{name}; {hint}")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a ConfigError, where argparse would end the program."""
        raise ConfigError(message)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line: every setting as --name-with-dashes, its value as text."""
    parser = Parser(
        prog="train.py",
        description="Train an image classifier through the stages of EfficientNetV2's progressive learning.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    names = dict.fromkeys(row["group"] for row in SETTINGS.values())  # in the table's order
    groups = {name: parser.add_argument_group(name) for name in names}
    for name, row in SETTINGS.items():
        default = "" if DEFAULTS[name] in (None, "") else f" (default: {show(DEFAULTS[name])})"
        text = (row["help"] + default).replace("%", "%%")
        options: dict[str, Any] = {"dest": name, "help": text}
        if row["kind"] == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif name == "plan":
            options.update(nargs="?", const="table", metavar="json")
        else:
            one = {"s": "TEXT", "i": "N", "f": "X"}[row["kind"][0]]
            words = [*(row["choices"] or ()), *([one] if row["kind"] in LISTS or not row["choices"] else ())]
            options["metavar"] = "|".join(words)
            if row["kind"] in LISTS:
                options["nargs"] = "+"
        groups[row["group"]].add_argument("--" + name.replace("_", "-"), *row["flags"], **options)
    return parser


def read_command_line(argv: Sequence[str]) -> dict[str, Any]:
    """Read the settings given on the command line, converted to their types.

    Raises:
        ConfigError: unknown flag (abbreviations are unknown), missing or wrong value.
    """
    parser = build_parser()
    given, rest = parser.parse_known_args(list(argv))
    unknown = [word for word in rest if word.startswith("-")] or rest
    flags = [word.split("=")[0].lstrip("-") for word in unknown if word.startswith("--")]
    reject_unknown(flags, [name.replace("_", "-") for name in SETTINGS], "", dashes="--")
    if unknown:
        raise ConfigError(f"cannot make sense of {unknown[0]!r} on the command line; flags begin with --, see --help")
    return {name: convert(name, parse_text(name, value)) for name, value in vars(given).items()}
