"""The endpoints of models."""

import copy

from clearml_double.query import project_fields
from clearml_double.rules import COMPANY, USER, Refused, checked_name, new_id, now, without_nulls

MODEL_FIELDS = {
    "name", "tags", "system_tags", "task", "comment", "uri", "project", "parent", "framework", "design", "labels",
    "ready", "metadata",
}  # fmt: skip


class Models:
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
        return {"model": without_nulls(project_fields(self.model(body), body.get("only_fields")))}

    def models_get_all(self, body):
        return {"models": self.find(self.models.values(), body, self.MODEL_FILTERS, "models.get_all")}

    def models_edit(self, body):
        model, fields = self.model(body), self.model_fields(body)
        task = self.tasks.get(model["task"] or fields.get("task"))
        if task is not None:
            self.raise_last_iteration(task, body.get("iteration"))
        model.update(fields, last_update=now())
        return {"updated": 1, "fields": fields} if fields else {"updated": 0}

    def models_set_ready(self, body):
        """Publish a model, and its task with it unless asked not to; never twice."""
        model = self.model(body)
        if model["ready"]:
            raise Refused(203, f"Model is ready: company={COMPANY}, model={model['id']}")
        task = self.tasks.get(model["task"])
        if task is not None and task.status != "published" and body.get("publish_task", True):
            self.tasks_publish({"task": task.id, "force": body.get("force_publish_task"), "publish_model": False})
        model["ready"] = True
        return {"updated": 1}

    def models_delete(self, body):
        del self.models[self.model(body)["id"]]
        return {"deleted": True}

    def models_add_or_update_metadata(self, body):
        model = self.model(body)
        items = {item["key"]: item for item in body["metadata"]}
        model["metadata"] = items if body.get("replace_metadata") else {**model["metadata"], **items}
        return {"updated": 1}
