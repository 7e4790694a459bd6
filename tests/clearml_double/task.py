"""A task as the double keeps it, and what tests ask about it."""

import json
from typing import NamedTuple

from clearml_double.rules import COMPANY, NO_ITERATION, USER, hash_name, new_id, now


class Image(NamedTuple):
    title: str
    series: str
    iteration: int
    url: str


class Task:
    """A task as the server keeps it (`fields`, `events`, `log`), and what tests ask about it."""

    def __init__(self, **fields):
        self.fields = {
            "id": new_id(), "company": COMPANY, "user": USER, "name": "", "type": "training", "comment": "",
            "status": "created", "status_reason": "", "status_message": "", "status_changed": now(),
            "created": now(), "last_update": now(), "last_change": now(), "started": None, "completed": None,
            "project": None, "parent": None, "tags": [], "system_tags": [], "hyperparams": {}, "configuration": {},
            "execution": {}, "script": {}, "models": {"input": [], "output": []}, "container": {}, "output": {},
            "runtime": {}, "last_iteration": 0, "last_metrics": {}, "last_worker": None, **fields,
        }  # fmt: skip
        self.events = {}  # event id -> event; a later one of the same id replaces
        self.log = []
        self.enqueue_status = None
        self.model_documents = {}  # the server's, set when the task is added

    def __repr__(self):
        return f"<Task {self.id[:8]} {self.name!r} {self.status}>"

    id = property(lambda self: self.fields["id"])
    name = property(lambda self: self.fields["name"])
    status = property(lambda self: self.fields["status"])
    status_reason = property(lambda self: self.fields["status_reason"])
    status_message = property(lambda self: self.fields["status_message"])
    started = property(lambda self: self.fields["started"])
    completed = property(lambda self: self.fields["completed"])
    tags = property(lambda self: self.fields["tags"])
    parent = property(lambda self: self.fields["parent"])
    script = property(lambda self: self.fields["script"])
    last_iteration = property(lambda self: self.fields["last_iteration"])

    def kind(self, kind):
        """Events of a type, by iteration."""
        return sorted((e for e in list(self.events.values()) if e["type"] == kind), key=lambda e: e.get("iter") or 0)

    @property
    def scalars(self):
        """{(title, series): {iteration: value}}; the machine's monitoring too, under ":monitor:machine"."""
        found = {}
        for event in self.kind("training_stats_scalar"):
            if event.get("iter") != NO_ITERATION:
                found.setdefault((event["metric"], event["variant"]), {})[event.get("iter")] = event["value"]
        return found

    @property
    def times(self):
        """{(title, series): {iteration: milliseconds since 1970}}"""
        found = {}
        for event in self.kind("training_stats_scalar"):
            found.setdefault((event["metric"], event["variant"]), {})[event.get("iter")] = event["timestamp"]
        return found

    def summary_of(self, title, series):
        """What last_metrics says of a series: value, min_value, max_value, count, mean_value and so on."""
        return self.fields["last_metrics"][hash_name(title)][hash_name(series)]

    @property
    def single_values(self):
        """{name: value}"""
        return {e["variant"]: e["value"] for e in self.kind("training_stats_scalar") if e.get("iter") == NO_ITERATION}

    @property
    def plots(self):
        """{(title, series): {iteration: the plotly figure as a dict}}"""
        found = {}
        for event in self.kind("plot"):
            figure = json.loads(event["plot_str"])
            found.setdefault((event["metric"], event["variant"]), {})[event.get("iter")] = figure
        return found

    @property
    def images(self):
        """[Image(title, series, iteration, url)] by iteration; `server.file(url)` gives the bytes."""
        return [Image(e["metric"], e["variant"], e["iter"], e.get("url")) for e in self.kind("training_debug_image")]

    @property
    def hyperparams(self):
        """{section: {name: value}}, values as the strings that are stored"""
        return {
            section: {name: item["value"] for name, item in items.items()}
            for section, items in self.fields["hyperparams"].items()
        }

    @property
    def configuration(self):
        """{name: text}"""
        return {name: item["value"] for name, item in self.fields["configuration"].items()}

    @property
    def artifacts(self):
        """{key: {"type", "uri", "hash", "type_data", ...}}"""
        return {item["key"]: item for item in self.fields["execution"].get("artifacts", [])}

    @property
    def models(self):
        """{"input" and "output": {name in the task: model document (id, name, uri, labels, framework, ...)}}"""
        return {
            kind: {item["name"]: self.model_documents.get(item["model"]) for item in self.fields["models"][kind]}
            for kind in ("input", "output")
        }

    @property
    def output_models(self):
        """{name of the model: its document}"""
        return {model["name"]: model for model in self.models["output"].values()}

    @property
    def console(self):
        """What the run printed, with the SDK's own lines."""
        return "\n".join(str(event.get("msg", "")) for event in list(self.log))
