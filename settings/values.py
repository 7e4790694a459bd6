"""The conversion of one setting's value: from text or YAML to its type, and back to text."""

import difflib
import json
import os
import re
import reprlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from settings.errors import ConfigError
from settings.table import DEFAULTS, SETTINGS

# A number as people write it. Python and YAML 1.1 also read 010 as 8, 0x10 as 16, 1:30 as 90, 1_0 as 10 and digits of
# other scripts; whoever writes those means something else, or would be misread by the next reader.
NUMBER = r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
LISTS = ("ints", "floats", "strs")
USUAL = 1e30  # the largest size of a number, and its inverse the smallest but 0; float32 ends at 1e38 and 1e-38


def seconds(duration: str, name: str = "time_budget") -> float:
    """Convert a duration, `90s`, `25m`, `1.5h` or plain seconds, to seconds.

    name: of the setting, for the message of an error

    Raises:
        ConfigError: anything else, less than a millisecond, more than 31 years.
    """
    match = re.fullmatch(r"((?:0|[1-9][0-9]*)(?:\.[0-9]+)?)([smh]?)", duration.strip())
    value = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    # A shorter one is a slip: the run would set all up, take one step and stop, and so again at every resume.
    if not 0.001 <= value <= 1e9:
        raise ConfigError(f"{name} must be a time such as 90s, 25m or 1.5h, got {brief(duration)}")
    return value


def brief(value: Any) -> str:
    """Format a value that was refused, shortened: one of YAML may be a tree of any size."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 2, 80, 80, 80
    return short.repr(value)


def check_text(name: str, value: str, where: str) -> None:
    """Raise ConfigError for text that no file, folder or name can be called."""
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise ConfigError(f"{where}{name} must be UTF-8 text without NUL, got {brief(value)}")
    if len(os.fsencode(value)) > 4000 or any(len(os.fsencode(part)) > 255 for part in value.split("/")):
        raise ConfigError(f"{where}{name} must be at most 4000 bytes long, 255 between two slashes, got {brief(value)}")


def every(period: str) -> tuple[int | None, float | None]:
    """Convert how often something is done, epochs (`5e`, `5`) or a time (`90s`, `25m`, `1.5h`), to epochs and seconds.

    One of the two is None.

    Raises:
        ConfigError: anything else, and 0.
    """
    epochs = re.fullmatch(r"([1-9]\d{0,8})e?", period.strip(), re.ASCII)
    if epochs:
        return int(epochs[1]), None
    with suppress(ConfigError):
        if period.strip()[-1:] in ("s", "m", "h"):
            return None, seconds(period)
    raise ConfigError(
        f"checkpoint_every must be epochs such as 5e, or a time such as 90s, 25m or 1.5h, got {brief(period)}"
    )


def convert(name: str, value: Any, where: str = "") -> Any:
    """Convert `value`, as YAML or the command line gave it, to the type of setting `name`.

    where: begins the message of an error

    Raises:
        ConfigError: it has another type, or is not one of the accepted values.
    """
    row = SETTINGS[name]
    word = value[0] if isinstance(value, list) and len(value) == 1 else value  # a flag with several values gives a list
    if value is None or (row["optional"] and isinstance(word, str) and word.lower() == "none"):
        if not row["optional"]:
            raise ConfigError(f"{where}{name} must be {describe(row)}, got nothing")
        return None
    kind = row["kind"]
    if kind in LISTS:
        items = value if isinstance(value, list | tuple) else [value]
        if not items:
            raise ConfigError(f"{where}{name} needs at least one value, got an empty list")
        word = items[0].lower() if len(items) == 1 and isinstance(items[0], str) else None
        if row["choices"] and word in row["choices"]:
            return word
        return tuple(convert_one(name, item, kind[:-1], where) for item in items)
    return convert_one(name, value, kind, where)


def convert_one(name: str, value: Any, kind: str, where: str) -> Any:
    """Convert one value to `kind` and check it; of a setting with several values, each in turn.

    Raises:
        ConfigError: as `convert`.
    """
    row = SETTINGS[name]
    wrong = ConfigError(f"{where}{name} must be {describe(row)}, got {brief(value)}")
    if kind == "bool":
        if not isinstance(value, bool):
            raise wrong
        return value
    if kind == "str":
        if (
            name in ("time_budget", "fit_time", "checkpoint_every")
            and isinstance(value, int | float)
            and not isinstance(value, bool)
        ):
            value = str(value)  # seconds or epochs, which YAML reads as a number
        if value is False and (name == "decode_cache" or "off" in (row["choices"] or ())):
            value = "off"  # which YAML 1.1 reads so
        if value is True and "on" in (row["choices"] or ()):
            value = "on"
        if not isinstance(value, str):
            raise wrong
        check_text(name, value, where)
        if row["choices"] is None:
            return value
        if value.lower() not in row["choices"]:
            near = nearest(value.lower(), row["choices"])
            hint = f"; did you mean {near}?" if near else "; none unsets it" if row["optional"] else ""
            raise ConfigError(f"{where}{name} must be one of {', '.join(row['choices'])}, got {value!r}{hint}")
        return value.lower()
    if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text, a trap worth its own words
        if re.fullmatch(NUMBER, value) and "e" in value.lower():
            proper = re.sub(r"[eE]\+?", "e+", value, count=1).replace("e+-", "e-")
            proper = proper if "." in proper else proper.replace("e", ".0e")
            raise ConfigError(
                f"{where}{name} must be {describe(row)}, got {value!r} (YAML reads that as text; write {proper})"
            )
        if re.fullmatch(NUMBER, value):
            raise ConfigError(f"{wrong}; write it without quotes")
        raise wrong
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong
    if abs(value) > USUAL or 0 < abs(value) < 1 / USUAL:
        raise ConfigError(f"{where}{name} must be {describe(row)} of usual size, got {brief(value)}")
    if value != value or (kind == "int" and value != int(value)):
        raise wrong
    if row["scheduled"] and row["scheduled"].whole and value != int(value):
        raise ConfigError(f"{where}{name} must be whole numbers, got {value:g}")
    if not within(value, row["interval"]):
        raise ConfigError(f"{where}{name} must be in {row['interval']}, got {value:g}")
    return int(value) if kind == "int" else float(value)


def within(value: float, interval: str) -> bool:
    """Check whether `value` lies in an interval written as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    return (value >= low if interval[0] == "[" else value > low) and (
        value <= high if interval[-1] == "]" else value < high
    )


def describe(row: Mapping[str, Any]) -> str:
    """Describe what a setting accepts, for the message of an error."""
    noun = {
        "int": "a whole number", "float": "a number", "str": "text", "bool": "true or false",
        "ints": "whole numbers", "floats": "a number or a list of numbers", "strs": "words",
    }[row["kind"]]  # fmt: skip
    words = ", ".join(row["choices"] or ())
    if row["kind"] in LISTS:
        return f"{words}, or {noun}" if words else noun
    return f"one of {words}" if words else noun


def as_text(value: Any) -> str:
    """Format a plain value as a dashboard shows it in a field; None as an empty field."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def from_text(name: str, text: str) -> Any:
    """Convert what was written into a dashboard's field of setting `name` to a value for `convert`.

    An empty field is None, or "" where that is the default. Text that stands for no value of the setting is returned
    as text: `convert` says what is wrong with it.
    """
    row, text = SETTINGS[name], text.strip()
    if not text:
        return "" if DEFAULTS[name] == "" else None
    if row["kind"] == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    if row["kind"] in LISTS:
        return [parse_text(name, item.strip("'\"")) for item in re.split(r"[\s,]+", text.strip("[]() ")) if item]
    return parse_text(name, text)


def nearest(name: str, known: Collection[str]) -> str | None:
    """Find the one of `known` that `name` is short for or misspells; None if there is none."""
    longer = [word for word in known if name and word.startswith(name)]
    return next(iter(longer or difflib.get_close_matches(name, known, n=1)), None)


def parse_text(name: str, value: Any) -> Any:
    """Convert text of the command line to the number it stands for.

    Text that is no number stays text: `convert` knows what to say about it.
    """
    if isinstance(value, list):
        return [parse_text(name, item) for item in value]
    if isinstance(value, str) and SETTINGS[name]["kind"] not in ("str", "strs", "bool") and re.fullmatch(NUMBER, value):
        for number in (int, float):
            with suppress(ValueError):  # a fraction; a whole number of more than 4,300 digits
                return number(value)
    return value
