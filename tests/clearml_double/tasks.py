"""The endpoints of tasks."""

import copy

from clearml_double.rules import COMPANY, USER_NAME, Refused, check_change, checked_name, now, without_nulls
from clearml_double.task import Task

# What tasks.create and tasks.edit take, and which of them an edit merges into what is there (the others it replaces).
TASK_FIELDS = {
    "name", "tags", "system_tags", "type", "comment", "parent", "project", "models", "container", "output_dest",
    "execution", "hyperparams", "configuration", "script", "runtime",
}  # fmt: skip
MERGED_FIELDS = {"execution", "script", "models"}


class Tasks:
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

    def change_status(self, task, status, body, force=None, **fields):
        if not (body.get("force") if force is None else force) and status != task.status:
            check_change(task.status, status)
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
        return {"task": without_nulls(copy.deepcopy(self.task(body).fields))}

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
        """Start the clock, anew where the task did not run."""
        task = self.task(body)
        times = {}
        if task.status != "in_progress" or not task.fields["started"]:
            times = {"started": now(), "completed": None}
        changed = self.change_status(task, "in_progress", body, **times)
        return {**changed, "started": 1}

    def tasks_stopped(self, body):
        return self.change_status(self.task(body), "stopped", body, completed=now())

    def tasks_failed(self, body):
        return self.change_status(self.task(body), "failed", body, completed=now())

    def tasks_completed(self, body):
        changed = self.change_status(self.task(body), "completed", body, completed=now())
        if not body.get("publish"):
            return changed
        self.tasks_publish(body)
        return {**changed, "published": 1}

    def tasks_publish(self, body):
        """Publish a task, and its last model with it; never twice."""
        task = self.task(body)
        if not body.get("force"):
            check_change(task.status, "published")
        if body.get("publish_model", True):
            for item in task.fields["models"]["output"][-1:]:
                self.models[item["model"]]["ready"] = True
        return self.change_status(task, "published", body, published=now())

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
        models = [model for model in self.models.values() if model.get("task") == task.id]
        if any(model["ready"] for model in models) and not body.get("force"):
            raise Refused(123, f"Task cannot be deleted (has output models, use force=True): task={task.id}")
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
        for model in models:
            if model["ready"]:
                model["task"] = None
            else:
                del self.models[model["id"]]
        task.events.clear()
        task.log.clear()
        return {**result, "deleted_models": sum(not model["ready"] for model in models)}

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
