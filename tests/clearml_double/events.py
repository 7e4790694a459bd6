"""The endpoints of events: scalars, plots, pictures, the console."""

import hashlib
import math
import operator
import struct
import time

from clearml_double.rules import EVENT_TYPES, NO_ITERATION, SKIPPED_METRICS, Refused, hash_name


class Events:
    def raise_last_iteration(self, task, iteration):
        if iteration is not None:
            task.fields["last_iteration"] = max(task.fields["last_iteration"], iteration)

    def events_add_batch(self, events):
        if not events:
            raise Refused(17, "Batch request contains no items")
        taken, errors = [], {}
        for event in events:
            event = dict(event)
            task, kind = self.tasks.get(event.get("task")), str(event.get("type")).replace(" ", "_")
            problem = None
            if kind not in EVENT_TYPES:
                problem = f"Invalid event type {kind}"
            elif task is None or task.status in ("publishing", "published"):
                problem = f"Invalid task id {event.get('task')}"
            if problem:
                errors[problem] = errors.get(problem, 0) + 1
            else:
                taken.append((task, {**event, "type": kind}))
        if any(not math.isfinite(event.get("value", 0)) for _, event in taken):
            raise Refused(100, "General data error: err=1 document(s) failed to index., extra_info=failed to parse field [value]", status=500)  # fmt: skip
        touched = {}
        for task, event in taken:
            self.add_event(task, event, touched)
        if not taken:
            raise Refused(131, "Events not added: " + ", ".join(f"{k}={v}" for k, v in errors.items()))
        return {"added": len(taken), "errors": sum(errors.values()), "errors_info": errors}

    def add_event(self, task, event, touched):
        event.setdefault("timestamp", int(time.time() * 1000))
        event["metric"], event["variant"] = event.get("metric") or "", event.get("variant") or ""
        if event.get("iter") is not None:
            event["iter"] = int(event["iter"])
        if event["type"] == "log":
            task.log.append(event)
        else:
            parts = [str(event[field]) for field in ("task", "iter", "metric", "variant", "key") if field in event]
            task.events[hashlib.md5("-".join(parts).encode()).hexdigest()] = event
        if event["metric"] not in SKIPPED_METRICS:
            self.raise_last_iteration(task, event.get("iter"))  # starts at 0: NO_ITERATION never counts
        if event["type"] == "training_stats_scalar":
            self.update_last_metrics(task, event, touched)
        self.touch(task)

    def update_last_metrics(self, task, event, touched):
        """The last value of the latest batch; the least, greatest, mean and count of all, also of those a later report
        replaced."""
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
        count = held.get("count", 0)
        held.update(count=count + 1, mean_value=(held.get("mean_value", 0) * count + value) / (count + 1))
        held.setdefault("first_value", value)
        held.setdefault("first_value_iteration", iteration)

    def events_scalar_metrics_iter_histogram(self, body):
        """Every point up to `samples` of a series, else means over equal intervals; in single precision, as kept."""
        found, samples = {}, body.get("samples") or 6000
        for (title, series), points in self.task(body).scalars.items():
            width = 1
            if len(points) >= samples:
                width = max(1, math.ceil((max(points) - min(points) + 1) / samples))
            bins = {}
            for iteration, value in points.items():
                bins.setdefault(iteration // width * width, []).append(struct.unpack("f", struct.pack("f", value))[0])
            means = [sum(values) / len(values) for values in bins.values()]
            found.setdefault(title, {})[series] = {"name": series, "x": list(bins), "y": means}
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
