"""The endpoints, over dictionaries: `tasks.get_by_id` is the method `tasks_get_by_id`."""

import base64
import json
import time

from clearml_double.events import Events
from clearml_double.models import Models
from clearml_double.projects import Projects
from clearml_double.query import Queries
from clearml_double.queues import Queues
from clearml_double.rules import API_VERSION, COMPANY, SERVER_VERSION, USER, USER_NAME, Refused, new_id
from clearml_double.tasks import Tasks


class API(Projects, Tasks, Queues, Models, Events, Queries):
    def __init__(self):
        self.tasks, self.projects, self.models, self.queues, self.workers = {}, {}, {}, {}, {}
        self.tokens = set()
        self.ignored = set()
        self.queues_create({"name": "default"}, system_tags=["default"])

    def call(self, endpoint, body):
        method = getattr(self, endpoint.replace(".", "_"), None)
        if method is None:
            raise Refused(
                0, f"Unable to find endpoint for name {endpoint} and version {API_VERSION}", 404, unknown=True
            )
        return method(body)

    # What needs no login

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
