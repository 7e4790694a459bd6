"""A double of ClearML's API on the loopback interface: the real SDK, agent and optimizer run online against it.

It proves what is sent, and keeps the rules of the real server (clearml-server 2.x) that decide what becomes of it:
which changes of status are allowed and what may be edited in which status, event ids (a repeated report replaces),
last_iteration and last_metrics, what a clone or a reset keeps. It does not show what the dashboard draws, has one
user, and forgets everything when it ends. A call it does not know is answered with an error and makes `check` fail.

In a test:

    server = ClearMLServer().start()
    subprocess.run([...], env={**os.environ, **server.env(tmp_path)})
    (task,) = server.tasks.values()
    assert task.scalars["loss", "train"] == {0: 2.3, 1: 1.9}
    server.check()
    server.stop()

By hand, to see what a run sends: `python tests/clearml_server.py`, and in another shell paste what it prints.
"""

import argparse
import base64
import contextlib
import copy
import hashlib
import io
import json
import math
import operator
import re
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from datetime import datetime, timezone
from email.parser import BytesHeaderParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

ACCESS_KEY, SECRET_KEY = "LOOPBACK0ACCESS0KEY0OF0THE0DOUBLE", "loopback0secret0key0of0the0double"
API_VERSION, SERVER_VERSION = "2.31", "2.0.0"
COMPANY, USER, USER_NAME = "d1bd92a3b039400cbafc60a7a5b1e52b", "f2a3d5e6c7b8490aa1b2c3d4e5f60718", "tester"

NO_ITERATION = -(2**31)  # what the SDK gives to a single value
SKIPPED_METRICS = (":monitor:machine", ":monitor:gpu")  # do not count in last_iteration
EVENT_TYPES = ("training_stats_scalar", "training_stats_vector", "training_debug_image", "plot", "log")

# status -> what it may become without force
STATUS_CHANGES = {
    "created": {"queued", "in_progress"},
    "queued": {"created", "in_progress", "stopped"},
    "in_progress": {"stopped", "failed", "created", "completed"},
    "stopped": {"closed", "created", "failed", "queued", "in_progress", "published", "publishing", "completed"},
    "closed": {"created", "failed", "published", "publishing", "stopped"},
    "failed": {"created", "stopped", "published", "queued"},
    "publishing": {"published"},
    "published": set(),
    "completed": {"published", "in_progress", "created"},
}

# What tasks.create and tasks.edit take, and which of them an edit merges into what is there (the others it replaces).
TASK_FIELDS = {
    "name", "tags", "system_tags", "type", "comment", "parent", "project", "models", "container", "output_dest",
    "execution", "hyperparams", "configuration", "script", "runtime",
}  # fmt: skip
MERGED_FIELDS = {"execution", "script", "models"}
MODEL_FIELDS = {
    "name", "tags", "system_tags", "task", "comment", "uri", "project", "parent", "framework", "design", "labels",
    "ready", "metadata",
}  # fmt: skip


class Refused(Exception):
    """An error the real server would answer too: HTTP status, subcode, message."""

    def __init__(self, subcode, message, status=400, unknown=False):
        super().__init__(message)
        self.status, self.subcode, self.unknown = status, subcode, unknown


class Call(NamedTuple):
    endpoint: str  # "tasks.create", or "POST", "GET", "HEAD" for the file server
    body: object  # dict; list of events for events.add_batch; the path for the file server
    status: int  # of HTTP; 0 where no answer was given
    time: float  # seconds since the epoch


class Image(NamedTuple):
    title: str
    series: str
    iteration: int
    url: str


def new_id():
    return uuid.uuid4().hex


def now():
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def checked_name(name):
    """Of a project, task or model."""
    if len(name.strip()) < 3:
        raise Refused(800, f"Data validation error: string value is too short, name={name!r}")
    return name.strip()


def hash_name(text):
    """The key of a title or series in last_metrics."""
    return hashlib.md5(str(text).encode()).hexdigest()


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


def project_fields(document, only_fields):
    """The parts of a document named by dotted paths, and its id."""
    if not only_fields:
        return copy.deepcopy(document)
    picked = {"id": document["id"]}
    for path in [only_fields] if isinstance(only_fields, str) else only_fields:
        value, place, keys = document, picked, path.split(".")
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            continue
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = copy.deepcopy(value)
    return picked


def look_up(document, path):
    for key in path.split("."):
        document = document.get(key) if isinstance(document, dict) else None
    return document


COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
DATES = {"created", "started", "completed", "last_update", "status_changed"}
PATTERNS = {"name", "comment", "uri"}


def matches(value, wanted, field):
    """Whether a document's value passes a filter of get_all: a pattern, a date range, or a list with operators."""
    if field in PATTERNS and isinstance(wanted, str):
        return re.search(wanted, value or "") is not None
    wanted = wanted if isinstance(wanted, list) else [wanted]
    if field in DATES:
        for item in wanted:
            sign = next((s for s in COMPARE if item.startswith(s)), "")
            compare = COMPARE.get(sign, operator.eq)
            if value is None or not compare(value[:19], item[len(sign) :].replace(" ", "T")[:19]):
                return False
        return True
    held = set(value) if isinstance(value, list) else {value}
    included, excluded, every, reverse = set(), set(), False, False
    for item in wanted:
        if item in ("__$and", "__$all"):
            every = True
        elif item in ("__$or", "__$any"):
            every = False
        elif item == "__$not":
            reverse = True
        elif str(item).startswith("__$"):
            raise ValueError(f"operator {item} in a filter")
        elif reverse or (field in ("tags", "system_tags") and isinstance(item, str) and item.startswith("-")):
            excluded.add(item if reverse else item[1:])
            reverse = False
        else:
            included.add(item)
    if held & excluded:
        return False
    return not included or (included <= held if every else bool(included & held))


OPTIONS = {
    "only_fields", "order_by", "page", "page_size", "search_hidden", "search_text", "_any_", "_all_", "method",
    "allow_public", "scroll_id", "size", "refresh_scroll", "shallow_search", "include_subprojects",
}  # fmt: skip


class API:
    """The endpoints, over dictionaries: `tasks.get_by_id` is the method `tasks_get_by_id`."""

    def __init__(self):
        self.tasks, self.projects, self.models, self.queues, self.workers = {}, {}, {}, {}, {}
        self.tokens = set()
        self.ignored = set()  # filters of get_all that are not known: their answer would be wrong
        self.queues_create({"name": "default"}, system_tags=["default"])

    def call(self, endpoint, body):
        method = getattr(self, endpoint.replace(".", "_"), None)
        if method is None:
            raise Refused(0, f"Invalid endpoint {endpoint}: not in this double", unknown=True)
        return method(body)

    def find(self, documents, body, known, endpoint):
        """What get_all answers: filters, then order, then page, then only_fields."""
        for field in set(body) - known - OPTIONS:
            self.ignored.add(f"{endpoint}: {field}")
        found = [
            document
            for document in documents
            if all(
                matches(look_up(document, field), body[field], field)
                for field in known & set(body)
                if body[field] not in (None, [], "")
            )
        ]
        for option, combine in (("_any_", any), ("_all_", all)):
            if search := body.get(option):
                pattern, fields = re.compile(search["pattern"]), search["fields"]
                found = [d for d in found if combine(pattern.search(str(look_up(d, f) or "")) for f in fields)]
        order = body.get("order_by") or []
        for path in reversed([order] if isinstance(order, str) else order):
            name, reverse = path.lstrip("-"), path.startswith("-")
            found.sort(key=lambda d, n=name: ((v := look_up(d, n)) is not None, v), reverse=reverse)
        if body.get("page_size"):
            start = (body.get("page") or 0) * body["page_size"]
            found = found[start : start + body["page_size"]]
        return [project_fields(document, body.get("only_fields")) for document in found]

    # auth, and what needs no login

    def auth_login(self, body):
        payload = {
            "exp": int(time.time()) + 30 * 24 * 3600, "api_version": API_VERSION, "server_version": SERVER_VERSION,
            "feature_set": "basic", "env": "<unknown>", "auth_type": "Bearer",
            "identity": {"user": USER, "company": COMPANY, "user_name": USER_NAME, "role": "admin"},
        }  # fmt: skip
        parts = [{"alg": "HS256", "typ": "JWT"}, payload, {"signature": new_id()}]
        token = ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts)
        self.tokens.add(token)
        return {"token": token}

    def debug_ping(self, body):
        return {"msg": "ClearML loopback double"}

    # projects

    PROJECT_FILTERS = frozenset({"id", "name", "system_tags", "tags", "description"})

    def projects_create(self, body):
        name = checked_name(body["name"])
        if any(project["name"] == name for project in self.projects.values()):
            raise Refused(801, f"Value combination already exists (unique field already contains this value): name={name}")  # fmt: skip
        project = {
            "id": new_id(), "name": name, "basename": name.split("/")[-1], "company": COMPANY,
            "user": USER, "description": body.get("description") or "", "created": now(), "last_update": now(),
            "tags": body.get("tags") or [], "system_tags": body.get("system_tags") or [],
            "default_output_destination": body.get("default_output_destination"),
        }  # fmt: skip
        self.projects[project["id"]] = project
        return {"id": project["id"]}

    def projects_get_all(self, body):
        return {"projects": self.find(self.projects.values(), body, self.PROJECT_FILTERS, "projects.get_all")}

    def projects_get_by_id(self, body):
        return {"project": copy.deepcopy(self.project(body["project"]))}

    def project(self, project_id):
        if project_id not in self.projects:
            raise Refused(401, f"Invalid project id: id={project_id}")
        return self.projects[project_id]

    # tasks

    TASK_FILTERS = frozenset({
        "id", "name", "user", "project", "parent", "type", "status", "tags", "system_tags", "comment", "created",
        "started", "completed", "last_update", "status_changed",
    })  # fmt: skip

    def task(self, body):
        if body.get("task") not in self.tasks:
            raise Refused(101, f"Invalid task id: id={body.get('task')}, company={COMPANY}")
        return self.tasks[body["task"]]

    def task_to_update(self, body, force=True):
        """Parts of a task may be edited while it is a draft; by force while it runs."""
        task = self.task(body)
        if task.status not in (("created", "in_progress") if force else ("created",)):
            raise Refused(110, f"Invalid task status: expected=created, status={task.status}")
        return task

    def touch(self, task):
        task.fields["last_update"] = task.fields["last_change"] = now()

    def change_status(self, task, status, body, force=None, allow_same=True, **fields):
        current = task.status
        if not (body.get("force") if force is None else force):
            if status != current and status not in STATUS_CHANGES[current]:
                raise Refused(110, f"Invalid task status (Invalid status change): current_status={current}, new_status={status}")  # fmt: skip
            if status == current and not allow_same:
                raise Refused(110, f"Invalid task status (Task already in requested status): current_status={current}, new_status={status}")  # fmt: skip
        fields = {
            "status": status, "status_reason": body.get("status_reason") or "",
            "status_message": body.get("status_message") or "", "status_changed": now(), "last_update": now(),
            "last_change": now(), **fields,
        }  # fmt: skip
        task.fields.update(fields)
        if status == "queued":  # from now on an agent's
            task.fields["system_tags"] = [tag for tag in task.fields["system_tags"] if tag != "development"]
        return {"updated": 1, "fields": fields}

    def task_fields(self, body):
        fields = {key: copy.deepcopy(body[key]) for key in TASK_FIELDS & set(body) if body[key] is not None}
        if "output_dest" in fields:
            fields["output"] = {"destination": fields.pop("output_dest")}
        if "name" in fields:
            fields["name"] = checked_name(fields["name"])
        for section, items in fields.get("hyperparams", {}).items():
            for name, item in items.items():
                item.update(section=section, name=name, value=str(item.get("value", "")))
        for key, value in fields.get("script", {}).items():
            if isinstance(value, str) and key != "diff":
                fields["script"][key] = value.strip()
        return fields

    def add_task(self, task):
        task.model_documents = self.models
        self.tasks[task.id] = task
        return task

    def tasks_create(self, body):
        fields = self.task_fields(body)
        if fields.get("project"):
            self.project(fields["project"])
        return {"id": self.add_task(Task(**fields)).id}

    def tasks_get_by_id(self, body):
        return {"task": copy.deepcopy(self.task(body).fields)}

    def tasks_get_all(self, body):
        documents = [task.fields for task in self.tasks.values()]
        if not (body.get("search_hidden") or body.get("id")):
            documents = [fields for fields in documents if "hidden" not in fields["system_tags"]]
        return {"tasks": self.find(documents, body, self.TASK_FILTERS, "tasks.get_all")}

    def tasks_edit(self, body):
        task = self.task(body)
        if not body.get("force") and task.status != "created":
            raise Refused(110, f"Invalid task status: expected=created, status={task.status}")
        fields = self.task_fields(body)
        if fields.get("project"):
            self.project(fields["project"])
        if body.get("status"):
            fields["status"] = body["status"]
        for key in MERGED_FIELDS & set(fields):
            fields[key] = {**task.fields[key], **fields[key]}
        task.fields.update(fields)
        self.touch(task)
        return {"updated": 1, "fields": fields} if fields else {"updated": 0}

    def tasks_started(self, body):
        task = self.task(body)
        changed = self.change_status(task, "in_progress", body, started=task.fields["started"] or now())
        return {**changed, "started": 1}

    def tasks_stopped(self, body):
        return self.change_status(self.task(body), "stopped", body, completed=now())

    def tasks_failed(self, body):
        return self.change_status(self.task(body), "failed", body)

    def tasks_completed(self, body):
        return self.change_status(self.task(body), "completed", body, completed=now())

    def tasks_publish(self, body):
        return self.change_status(self.task(body), "published", body, published=now())

    def tasks_stop(self, body, user_name=USER_NAME):
        """A run of an agent is asked to stop through its status message; one without a worker is stopped at once."""
        task = self.task(body)
        by_worker = task.fields["last_worker"] and "development" not in task.fields["system_tags"]
        if by_worker and task.status != "queued":
            return self.change_status(task, task.status, {**body, "status_message": "stopping"})
        self.remove_from_queues(task)
        return self.change_status(task, "stopped", {**body, "status_message": f"Stopped by {user_name}"})

    def tasks_reset(self, body):
        task = self.task(body)
        if not body.get("force") and task.status == "published":
            raise Refused(110, f"Invalid task status: task_id={task.id}, status={task.status}")
        self.remove_from_queues(task)
        drafts = [m["id"] for m in self.models.values() if m.get("task") == task.id and not m.get("ready")]
        artifacts = [a for a in task.fields["execution"].get("artifacts", []) if a.get("mode") == "input"]
        execution = {k: v for k, v in task.fields["execution"].items() if k != "queue"}
        if body.get("clear_all"):
            execution, artifacts = {}, []
        result = self.change_status(
            task, "created", {**body, "status_reason": "reset", "status_message": "reset"},
            started=None, completed=None, published=None, last_iteration=0, last_metrics={}, runtime={},
            last_worker=None, models={**task.fields["models"], "output": []},
            execution={**execution, "artifacts": artifacts},
        )  # fmt: skip
        if body.get("clear_all"):
            task.fields["script"] = {}
        for model in drafts:
            del self.models[model]
        task.events.clear()
        task.log.clear()
        return {**result, "deleted_models": len(drafts)}

    def tasks_delete(self, body):
        task = self.task(body)
        if task.status != "created" and "archived" not in task.fields["system_tags"] and not body.get("force"):
            raise Refused(123, f"Task cannot be deleted (due to status, use force=True): task={task.id}, expected=created, current={task.status}")  # fmt: skip
        self.remove_from_queues(task)
        del self.tasks[task.id]
        return {"deleted": True}

    def tasks_ping(self, body):
        self.touch(self.task(body))
        return {}

    def tasks_set_requirements(self, body):
        task = self.task(body)
        task.fields["script"]["requirements"] = body["requirements"]
        self.touch(task)
        return {"updated": 1, "fields": {"script.requirements": body["requirements"]}}

    def tasks_add_or_update_artifacts(self, body):
        task = self.task_to_update(body)
        held = {(a["key"], a.get("mode", "output")): a for a in task.fields["execution"].get("artifacts", [])}
        for artifact in body["artifacts"]:
            held[artifact["key"], artifact.get("mode", "output")] = copy.deepcopy(artifact)
        task.fields["execution"]["artifacts"] = list(held.values())
        self.touch(task)
        return {"updated": 1}

    def tasks_add_or_update_model(self, body):
        task = self.task_to_update(body)
        item = {"name": body["name"], "model": body["model"], "updated": now()}
        items = task.fields["models"].setdefault(body["type"], [])
        same = [i for i, other in enumerate(items) if other["name"] == body["name"]]
        if same:
            items[same[0]] = item
        else:
            items.append(item)
        self.raise_last_iteration(task, body.get("iteration"))
        return {"updated": 1}

    def tasks_get_hyper_params(self, body):
        params = []
        for task_id in body["tasks"]:
            sections = self.task({"task": task_id}).fields["hyperparams"].values()
            params.append({"task": task_id, "hyperparams": [item for items in sections for item in items.values()]})
        return {"params": params}

    def tasks_edit_hyper_params(self, body):
        sections = {item["section"] for item in body["hyperparams"]}
        task = self.task(body) if sections == {"properties"} else self.task_to_update(body, bool(body.get("force")))
        held = task.fields["hyperparams"]
        replace = body.get("replace_hyperparams") or "none"
        if replace == "all":
            held.clear()
        for section in sections if replace == "section" else ():
            held.pop(section, None)
        for item in body["hyperparams"]:
            held.setdefault(item["section"], {})[item["name"]] = {**item, "value": str(item.get("value", ""))}
        self.touch(task)
        return {"updated": 1}

    def tasks_edit_configuration(self, body):
        task = self.task_to_update(body, bool(body.get("force")))
        if body.get("replace_configuration"):
            task.fields["configuration"].clear()
        task.fields["configuration"].update({item["name"]: dict(item) for item in body["configuration"]})
        self.touch(task)
        return {"updated": 1}

    def tasks_clone(self, body):
        source = self.task(body).fields
        kept = ("project", "type", "tags", "script", "container", "configuration", "hyperparams", "output", "comment")
        fields = {key: source[key] for key in kept}
        execution = {**source["execution"], **(body.get("execution_overrides") or {})}
        execution.pop("queue", None)
        execution["artifacts"] = [a for a in execution.get("artifacts", []) if a.get("mode") == "input"]
        system_tags = [tag for tag in source["system_tags"] if tag not in ("development", "archived")]
        fields.update(
            name=body.get("new_task_name") or source["name"],
            parent=body.get("new_task_parent") or source["parent"] or source["id"],
            system_tags=body.get("new_task_system_tags") or system_tags,
            execution=execution,
            models={"input": body.get("new_task_input_models") or source["models"]["input"], "output": []},
        )
        for key in ("comment", "project", "tags", "hyperparams", "configuration", "container"):
            if body.get(f"new_task_{key}"):
                fields[key] = body[f"new_task_{key}"]
        if fields["project"]:
            self.project(fields["project"])
        return {"id": self.add_task(Task(**self.task_fields(fields), output=dict(fields["output"]))).id}

    # queues and workers

    def queue(self, queue_id):
        if queue_id not in self.queues:
            raise Refused(701, f"Invalid queue id: id={queue_id}")
        return self.queues[queue_id]

    def remove_from_queues(self, task):
        for queue in self.queues.values():
            queue["entries"] = [entry for entry in queue["entries"] if entry["task"] != task.id]

    def tasks_enqueue(self, body):
        queue_id, name = body.get("queue"), body.get("queue_name")
        if name:
            found = [queue["id"] for queue in self.queues.values() if queue["name"] == name]
            queue_id = found[0] if found else self.queues_create({"name": name})["id"]
        queue_id = queue_id or self.queues_get_default({})["id"]
        task, queue = self.task(body), self.queue(queue_id)
        before = task.status
        changed = self.change_status(task, "queued", body, allow_same=False)
        task.enqueue_status = before
        queue["entries"].append({"task": task.id, "added": now()})
        task.fields["execution"]["queue"] = queue_id
        return {**changed, "fields": {**changed["fields"], "execution.queue": queue_id}, "queued": 1}

    def tasks_dequeue(self, body):
        task = self.task(body)
        self.remove_from_queues(task)
        if task.status not in ("queued", "in_progress"):
            return {"updated": 0, "dequeued": 1}
        status = body.get("new_status") or task.enqueue_status or "created"
        task.enqueue_status = None
        return {**self.change_status(task, status, body, force=True), "dequeued": 1}

    def queues_create(self, body, system_tags=()):
        queue = {
            "id": new_id(), "name": body["name"], "company": COMPANY, "user": USER, "created": now(), "entries": [],
            "tags": body.get("tags") or [], "system_tags": body.get("system_tags") or list(system_tags),
        }  # fmt: skip
        self.queues[queue["id"]] = queue
        return {"id": queue["id"]}

    def queues_get_all(self, body):
        known = frozenset({"id", "name", "tags", "system_tags"})
        return {"queues": self.find(self.queues.values(), body, known, "queues.get_all")}

    def queues_get_by_id(self, body):
        return {"queue": copy.deepcopy(self.queue(body["queue"]))}

    def queues_get_default(self, body):
        return next({"id": q["id"], "name": q["name"]} for q in self.queues.values() if "default" in q["system_tags"])

    def queues_get_num_entries(self, body):
        return {"num": len(self.queue(body["queue"])["entries"])}

    def queues_get_next_task(self, body):
        entries = self.queue(body["queue"])["entries"]
        return {"entry": entries.pop(0)} if entries else {}

    def workers_register(self, body):
        self.workers[body["worker"]] = {"id": body["worker"], "queues": body.get("queues") or [], "tags": []}
        return {}

    def workers_unregister(self, body):
        self.workers.pop(body["worker"], None)
        return {}

    def workers_status_report(self, body):
        if body.get("task") in self.tasks:
            self.tasks[body["task"]].fields["last_worker"] = body["worker"]
            self.touch(self.tasks[body["task"]])
        return {}

    def workers_get_all(self, body):
        return {"workers": copy.deepcopy(list(self.workers.values()))}

    def workers_get_runtime_properties(self, body):
        return {"runtime_properties": []}

    # models

    MODEL_FILTERS = frozenset({"id", "name", "task", "project", "tags", "system_tags", "uri", "framework", "ready", "parent", "comment"})  # fmt: skip

    def model(self, body):
        if body.get("model") not in self.models:
            raise Refused(201, f"Invalid model id (no such public or company model): id={body.get('model')}")
        return self.models[body["model"]]

    def model_fields(self, body):
        fields = {key: copy.deepcopy(body[key]) for key in MODEL_FIELDS & set(body) if body[key] is not None}
        if "name" in fields:
            fields["name"] = checked_name(fields["name"])
        if any(not isinstance(value, int) for value in fields.get("labels", {}).values()):
            raise Refused(12, "Validation error (labels values must be integers)")
        if isinstance(fields.get("metadata"), list):
            fields["metadata"] = {item["key"]: item for item in fields["metadata"]}
        return fields

    def models_create(self, body):
        model = {
            "id": new_id(), "company": COMPANY, "user": USER, "created": now(), "last_update": now(), "name": "",
            "uri": "", "framework": "", "labels": {}, "design": {}, "tags": [], "system_tags": [], "comment": "",
            "ready": True, "metadata": {}, "parent": None, "project": None, "task": None,
        }  # fmt: skip
        model.update(self.model_fields(body))
        self.models[model["id"]] = model
        return {"id": model["id"], "created": True}

    def models_get_by_id(self, body):
        return {"model": project_fields(self.model(body), body.get("only_fields"))}

    def models_get_all(self, body):
        return {"models": self.find(self.models.values(), body, self.MODEL_FILTERS, "models.get_all")}

    def models_edit(self, body):
        model, fields = self.model(body), self.model_fields(body)
        task = self.tasks.get(model["task"] or fields.get("task"))
        if task is not None:
            self.raise_last_iteration(task, body.get("iteration"))
        model.update(fields, last_update=now())
        return {"updated": 1, "fields": fields} if fields else {"updated": 0}

    def models_delete(self, body):
        del self.models[self.model(body)["id"]]
        return {"deleted": True}

    def models_add_or_update_metadata(self, body):
        model = self.model(body)
        items = {item["key"]: item for item in body["metadata"]}
        model["metadata"] = items if body.get("replace_metadata") else {**model["metadata"], **items}
        return {"updated": 1}

    # events

    def raise_last_iteration(self, task, iteration):
        if iteration is not None:
            task.fields["last_iteration"] = max(task.fields["last_iteration"], iteration)

    def events_add_batch(self, events):
        added, errors, touched = 0, {}, {}
        for event in events:
            event = dict(event)
            task, kind = self.tasks.get(event.get("task")), str(event.get("type")).replace(" ", "_")
            problem = None
            if kind not in EVENT_TYPES:
                problem = f"Invalid event type {kind}"
            elif task is None or task.status in ("publishing", "published"):
                problem = f"Invalid task id {event.get('task')}"
            elif "value" in event and not math.isfinite(event["value"]):
                problem = "Error when indexing events batch"
            if problem:
                errors[problem] = errors.get(problem, 0) + 1
                continue
            added += 1
            event["type"] = kind
            event.setdefault("timestamp", int(time.time() * 1000))
            event["metric"], event["variant"] = event.get("metric") or "", event.get("variant") or ""
            if event.get("iter") is not None:
                event["iter"] = int(event["iter"])
            if kind == "log":
                task.log.append(event)
            else:
                parts = [str(event[field]) for field in ("task", "iter", "metric", "variant", "key") if field in event]
                task.events[hashlib.md5("-".join(parts).encode()).hexdigest()] = event
            if event["metric"] not in SKIPPED_METRICS:
                self.raise_last_iteration(task, event.get("iter"))  # starts at 0: NO_ITERATION never counts
            if kind == "training_stats_scalar":
                self.update_last_metrics(task, event, touched)
            self.touch(task)
        if not added:
            raise Refused(131, "Events not added: " + ", ".join(f"{k}={v}" for k, v in errors.items()))
        return {"added": added, "errors": sum(errors.values()), "errors_info": errors}

    def update_last_metrics(self, task, event, touched):
        """The last value of the latest batch; the least and greatest of all, also of those a later report replaced."""
        title, series = hash_name(event["metric"]), hash_name(event["variant"])
        held = task.fields["last_metrics"].setdefault(title, {}).setdefault(series, {})
        held.update(metric=event["metric"], variant=event["variant"])
        value, iteration = event["value"], event.get("iter", 0)
        position = (iteration, event["timestamp"])
        if position >= touched.get((task.id, title, series), position):
            touched[task.id, title, series] = position
            held["value"] = value
        for name, better in (("min", operator.lt), ("max", operator.gt)):
            if held.get(f"{name}_value") is None or better(value, held[f"{name}_value"]):
                held.update({f"{name}_value": value, f"{name}_value_iteration": iteration})
        held.setdefault("first_value", value)
        held.setdefault("first_value_iteration", iteration)

    def events_scalar_metrics_iter_histogram(self, body):
        found = {}
        for (title, series), points in self.task(body).scalars.items():
            found.setdefault(title, {})[series] = {"name": series, "x": list(points), "y": list(points.values())}
        return found

    def events_get_task_single_value_metrics(self, body):
        found = []
        for task_id in body["tasks"]:
            task = self.task({"task": task_id})
            single = [e for e in task.kind("training_stats_scalar") if e.get("iter") == NO_ITERATION]
            values = [{key: e[key] for key in ("metric", "variant", "value", "timestamp")} for e in single]
            found.append({"task": task_id, "task_name": task.name, "values": values})
        return {"tasks": found}

    def events_get_task_log(self, body):
        log = sorted(self.task(body).log, key=lambda event: event["timestamp"], reverse=body.get("order") != "asc")
        return self.page("events", log[: body.get("batch_size") or 500])

    def events_get_task_plots(self, body):
        return self.page("plots", self.task(body).kind("plot"))

    def events_get_task_events(self, body):
        return self.page("events", [event for kind in EVENT_TYPES for event in self.task(body).kind(kind)])

    def page(self, name, found):
        return {name: found, "returned": len(found), "total": len(found), "scroll_id": None}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.double.connections.add(self.connection)

    def finish(self):
        self.double.connections.discard(self.connection)
        super().finish()

    def handle(self):
        with contextlib.suppress(OSError):  # the other side, or stop(), closed the connection
            super().handle()

    def log_message(self, *args):
        pass

    def answer(self, status, body, kind="application/json"):
        body = json.dumps(body).encode() if kind == "application/json" else body
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        if self.double.hanging.is_set():
            self.double.record(Call(path.strip("/"), None, 0, time.time()))
            self.double.hanging_over.wait()
            self.close_connection = True
            return
        call = re.fullmatch(r"/(?:v[\d.]+/)?([a-z]+\.[a-z_]+)", path)
        if call:
            self.api_call(call[1], body)
        else:
            self.file_call(unquote(path).strip("/"), body)

    do_GET = do_POST = do_HEAD = do_DELETE = do_any

    def api_call(self, endpoint, raw):
        double = self.double
        if "json-lines" in self.headers.get("Content-Type", ""):
            body = [json.loads(line) for line in raw.splitlines() if line.strip()]
        else:
            body = json.loads(raw or b"{}") or {}
        status, subcode, message, data = 200, 0, "OK", {}
        try:
            self.authorize(endpoint)
            with double.lock:
                data = double.api.call(endpoint, body)
        except Refused as refused:
            status, subcode, message = refused.status, refused.subcode, str(refused)
            (double.unknown if refused.unknown else double.refused).append(f"{endpoint}: {message}")
        except Exception:
            double.broken.append(f"{endpoint}: {traceback.format_exc()}")
            status, subcode, message = 400, 0, "error in the double"
        double.record(Call(endpoint, body, status, time.time()), message if status != 200 else None)
        meta = {
            "id": new_id(), "trx": new_id(),
            "endpoint": {"name": endpoint, "requested_version": API_VERSION, "actual_version": "1.0"},
            "result_code": status, "result_subcode": subcode, "result_msg": message, "error_stack": "",
            "error_data": {},
        }  # fmt: skip
        self.answer(status, {"meta": meta, "data": data})

    def authorize(self, endpoint):
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        if endpoint == "debug.ping" or (kind == "Bearer" and given in self.double.api.tokens):
            return
        if not given:
            raise Refused(20, "Unauthorized (missing credentials)", status=401)
        if kind == "Bearer":
            raise Refused(30, "Invalid token", status=401)
        keys = base64.b64decode(given).decode()
        if endpoint != "auth.login" or keys != f"{ACCESS_KEY}:{SECRET_KEY}":
            raise Refused(22, "Unauthorized (invalid credentials) (failed to locate provided credentials)", status=401)

    def file_call(self, path, body):
        double = self.double
        status, content = 200, b""
        if self.command == "POST":
            parts = list(multipart(self.headers.get("Content-Type", ""), body))
            for name, part in parts:
                path = unquote(name).strip("/")
                double.files[path] = part
            if not parts:
                double.broken.append(f"POST {path}: no file in it, headers {dict(self.headers)}")
        elif self.command in ("GET", "HEAD"):
            status, content = (200, double.files[path]) if path in double.files else (404, b"")
        else:
            double.files.pop(path, None)
        double.record(Call(self.command, path, status, time.time()))
        self.answer(status, content, "application/octet-stream")


def multipart(content_type, body):
    """The parts of an upload: (field name, bytes). The SDK gives the path on the file server as the field's name."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    if not boundary:
        return
    for part in body.split(b"--" + boundary[1].encode())[1:-1]:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        headers = BytesHeaderParser().parse(io.BytesIO(head + b"\r\n\r\n"))
        yield headers.get_param("name", header="content-disposition"), content.removesuffix(b"\r\n")


class ClearMLServer:
    """The double: `start`, give `env` to the processes under test, then look at `tasks` and the rest.

    tasks: {id: Task}
    models, projects, queues: {id: dict}
    files: {path: bytes}, what was uploaded; `file(url)` finds one by its address
    calls: [Call(endpoint, body, status, time)], in order
    unknown, broken: calls that the double has no answer for, or failed at; `check` raises on either
    refused: calls answered with an error as the real server would, "endpoint: message"
    """

    def __init__(self, port=0, on_call=None):
        self.port, self.on_call = port, on_call
        self.api, self.files, self.calls = API(), {}, []
        self.unknown, self.broken, self.refused = [], [], []
        self.lock, self.connections = threading.RLock(), set()
        self.hanging, self.hanging_over = threading.Event(), threading.Event()
        self.httpd = None

    tasks = property(lambda self: dict(self.api.tasks))
    models = property(lambda self: dict(self.api.models))
    projects = property(lambda self: dict(self.api.projects))
    queues = property(lambda self: dict(self.api.queues))
    url = property(lambda self: f"http://127.0.0.1:{self.port}")

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def start(self):
        """Serve, on the same port and with the same state after a `stop`."""
        handler = type("Handler", (Handler,), {"double": self})
        self.httpd = ThreadingHTTPServer(("127.0.0.1", self.port), handler, bind_and_activate=False)
        self.httpd.daemon_threads, self.httpd.block_on_close, self.httpd.request_queue_size = True, False, 64
        self.httpd.server_bind()
        self.httpd.server_activate()
        self.port = self.httpd.server_address[1]
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self):
        """Vanish: open connections break, new ones are refused. `start` brings it back."""
        if self.httpd is None:
            return
        self.resume()
        self.httpd.shutdown()
        self.httpd.server_close()
        self.httpd = None
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # closed by the other side
                connection.shutdown(socket.SHUT_RDWR)

    def hang(self):
        """From now on accept connections and never answer."""
        self.hanging_over.clear()
        self.hanging.set()

    def resume(self):
        """Answer again; the calls that hung lose their connection."""
        self.hanging.clear()
        self.hanging_over.set()

    def env(self, cache_dir):
        """Environment variables for a process that is to use this server, and none of the user's own settings."""
        cache_dir = Path(cache_dir)
        cache_dir.mkdir(parents=True, exist_ok=True)
        settings = cache_dir / "clearml.conf"
        settings.touch()
        return {
            "CLEARML_API_HOST": self.url, "CLEARML_FILES_HOST": self.url, "CLEARML_WEB_HOST": self.url,
            "CLEARML_API_ACCESS_KEY": ACCESS_KEY, "CLEARML_API_SECRET_KEY": SECRET_KEY,
            "CLEARML_CACHE_DIR": str(cache_dir), "CLEARML_CONFIG_FILE": str(settings), "NO_PROXY": "127.0.0.1",
        }  # fmt: skip

    def record(self, call, message=None):
        self.calls.append(call)
        if self.on_call is not None:
            self.on_call(call, message)

    def check(self):
        """Raise AssertionError if a call was unknown, used an unknown filter, or broke the double."""
        problems = [*self.unknown, *sorted(self.api.ignored), *self.broken]
        assert not problems, "the double of ClearML's API cannot answer:\n" + "\n".join(problems)

    def count(self, endpoint):
        return sum(call.endpoint == endpoint for call in list(self.calls))

    def file(self, url):
        """The bytes behind an address on this server, of a model, artifact or image."""
        return self.files[unquote(urlsplit(url).path).strip("/")]

    def only_task(self):
        (task,) = self.tasks.values()
        return task

    def wait_for(self, condition, timeout=30.0):
        """The first true value of `condition()`; AssertionError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while not (value := condition()):
            assert time.monotonic() < end, f"nothing after {timeout} s"
            time.sleep(0.02)
        return value

    # What a user does in the browser

    def user_clone(self, task_id, changes=None, name=None):
        """Clone a task as a draft, with hyperparameters changed: {"Hyperparameters/lr": "0.1"}. The new Task."""
        with self.lock:
            cloned = self.api.tasks_clone({"task": task_id, "new_task_name": name})["id"]
            self.edit_hyperparams(cloned, changes or {})
            return self.tasks[cloned]

    def edit_hyperparams(self, task_id, changes):
        """Change or add hyperparameters of a draft; Refused in any other status, as in the browser."""
        items = []
        for path, value in changes.items():
            section, name = path.split("/", 1)
            held = self.tasks[task_id].fields["hyperparams"].get(section, {}).get(name, {})
            items.append({**held, "section": section, "name": name, "value": str(value)})
        with self.lock:
            self.api.tasks_edit_hyper_params({"task": task_id, "hyperparams": items})

    def edit_configuration(self, task_id, name, text):
        """Change the text of a configuration object of a draft."""
        with self.lock:
            held = self.tasks[task_id].fields["configuration"].get(name, {"name": name})
            self.api.tasks_edit_configuration({"task": task_id, "configuration": [{**held, "value": text}]})

    def user_enqueue(self, task_id, queue="default"):
        with self.lock:
            self.api.tasks_enqueue({"task": task_id, "queue_name": queue})

    def user_abort(self, task_id):
        """Abort: a run of an agent is asked to stop, any other is `stopped` at once."""
        with self.lock:
            self.api.tasks_stop({"task": task_id}, user_name="a user")

    def user_reset(self, task_id):
        with self.lock:
            self.api.tasks_reset({"task": task_id})

    def summary(self):
        lines = []
        for task in self.tasks.values():
            points = sum(len(series) for series in task.scalars.values())
            lines.append(
                f"{task.id} {task.name}: {task.status}, {len(task.scalars)} scalar series ({points} points), "
                f"{len(task.single_values)} single values, {len(task.plots)} plots, {len(task.images)} images, "
                f"{len(task.artifacts)} artifacts, {len(task.models['output'])} models, last iteration {task.last_iteration}"
            )
        size = sum(map(len, self.files.values()))
        lines.append(f"{len(self.calls)} calls, {len(self.files)} files of {size / 1e6:.1f} MB")
        lines += [f"unknown: {line}" for line in self.unknown] + [f"refused: {line}" for line in self.refused]
        return "\n".join(lines)


QUIET = re.compile(r"\w+\.(get_\w+|ping|status_report|login)|GET|HEAD")  # not worth a line


def brief(call):
    """One line about a call, or None."""
    if QUIET.fullmatch(call.endpoint) and call.status == 200:
        return None
    body = call.body
    if isinstance(body, list):
        shown = {f"{e.get('metric')}/{e.get('variant')}[{e.get('iter')}]={e.get('value', e.get('type'))}": 0 for e in body if e.get("type") != "log"}  # fmt: skip
        logged = sum(event.get("type") == "log" for event in body)
        body = " ".join([*shown, *([f"{logged} lines of console"] if logged else [])])
    elif isinstance(body, dict):
        body = " ".join(f"{k}={json.dumps(v, default=str)}" for k, v in body.items() if v not in (None, [], {}))
    body = str(body)
    return f"{call.endpoint} {body[:200]}{'…' if len(body) > 200 else ''}"


def main():
    parser = argparse.ArgumentParser(description="A double of ClearML's API on the loopback interface, to see what a run sends.")  # fmt: skip
    parser.add_argument("--port", type=int, default=8008)
    parser.add_argument("--cache-dir", default="/tmp/clearml-double", help="of the SDK, for its environment variables")
    parser.add_argument("--keep", metavar="FILE", help="append every call to it, a line of JSON each")
    args = parser.parse_args()

    def on_call(call, message):
        if args.keep:
            with open(args.keep, "a") as file:
                print(json.dumps({**call._asdict(), "message": message}, default=str), file=file)
        line = brief(call)
        if line:
            answer = f" -> {call.status} {message}" if message else ""
            print(f"{datetime.now():%H:%M:%S} {line}{answer}", flush=True)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started to ignore it
    with ClearMLServer(args.port, on_call) as server:
        for name, value in server.env(args.cache_dir).items():
            print(f"export {name}={shlex.quote(value)}")
        print("# it shows what is sent, not what the dashboard draws; Ctrl-C ends it with a summary", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"\n{server.summary()}")
    return 1 if server.unknown or server.broken else 0


if __name__ == "__main__":
    sys.exit(main())
