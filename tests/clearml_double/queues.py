"""The endpoints of queues and workers."""

import copy

from clearml_double.rules import COMPANY, USER, Refused, checked_name, new_id, now


class Queues:
    def queue(self, queue_id):
        if queue_id is None:  # an agent may ask so while it ends
            raise Refused(12, "Validation error (Field is required: queue)")
        if queue_id not in self.queues:
            raise Refused(701, f"Invalid queue id: id={queue_id}")
        return self.queues[queue_id]

    def remove_from_queues(self, task):
        for queue in self.queues.values():
            queue["entries"] = [entry for entry in queue["entries"] if entry["task"] != task.id]

    def tasks_enqueue(self, body):
        queue_id, name = body.get("queue"), body.get("queue_name")
        if queue_id and name:
            raise Refused(12, "Validation error (Either queue id or queue name should be provided)")
        if name:
            found = [queue["id"] for queue in self.queues.values() if queue["name"] == name]
            queue_id = found[0] if found else self.queues_create({"name": name})["id"]
        queue_id = queue_id or self.queues_get_default({})["id"]
        task, queue = self.task(body), self.queue(queue_id)
        before = task.status
        changed = self.change_status(task, "queued", body)
        if any(entry["task"] == task.id for entry in queue["entries"]):
            self.change_status(task, before, {"status_reason": "failed enqueueing"}, force=True)
            task.enqueue_status = None
            raise Refused(706, f"Failed adding task to queue since task is already queued: task={task.id}")
        if before != "queued" or task.enqueue_status is None:
            task.enqueue_status = before
        self.remove_from_queues(task)  # of another queue
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
        name = checked_name(body["name"])
        if any(queue["name"] == name for queue in self.queues.values()):
            raise Refused(801, f"Value combination already exists (unique field already contains this value): name={name}")  # fmt: skip
        queue = {
            "id": new_id(), "name": name, "company": COMPANY, "user": USER, "created": now(), "entries": [],
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
        entries = self.queue(body.get("queue"))["entries"]
        if not entries:
            return {}
        task = self.tasks.get(entries[0]["task"])
        if task is not None and task.status == "stopped":  # by an agent, when it lay in the queue already
            task.fields["status"] = "queued"
        return {"entry": entries.pop(0)}

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
