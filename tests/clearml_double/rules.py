"""What the rules of the server need everywhere: names, statuses, refusals, constants."""

import hashlib
import uuid
from datetime import datetime, timezone

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
SHORTEST_NAME, DEEPEST_PROJECT = 3, 10


class Refused(Exception):
    """An error the real server would answer too: HTTP status, subcode, message."""

    def __init__(self, subcode, message, status=400, unknown=False):
        super().__init__(message)
        self.status, self.subcode, self.unknown = status, subcode, unknown


def new_id():
    return uuid.uuid4().hex


def now():
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def checked_name(name):
    """Of a task, model or queue."""
    if len(name.strip()) < SHORTEST_NAME:
        raise Refused(800, f"Data validation error: string value is too short, name={name!r}")
    return name.strip()


def project_name(name):
    """The name that a project gets: without empty parts, and without blanks around the others."""
    parts = [part.strip() for part in name.split("/") if part]
    if len(parts) > DEEPEST_PROJECT:
        raise Refused(409, f"Project path exceed the maximum allowed depth: max_depth={DEEPEST_PROJECT}")
    if not parts:
        raise Refused(407, f"Invalid project name: name={name}")
    for part in parts:
        if len(part) < SHORTEST_NAME:
            raise Refused(12, f"Validation error (project name is too short): name={part!r}")
    return "/".join(parts)


def check_change(current, status):
    if status not in STATUS_CHANGES[current]:
        raise Refused(110, f"Invalid task status (Invalid status change): current_status={current}, new_status={status}")  # fmt: skip


def hash_name(text):
    """The key of a title or series in last_metrics."""
    return hashlib.md5(str(text).encode()).hexdigest()


def without_nulls(document):
    """What an answer holds of a document: fields that are null are not there."""
    if isinstance(document, dict):
        return {key: without_nulls(value) for key, value in document.items() if value is not None}
    return [without_nulls(item) for item in document] if isinstance(document, list) else document
