"""A double of ClearML's API on the loopback interface: the real SDK, agent and optimizer run online against it.

It proves what is sent, and keeps the rules of the real server (clearml-server 2.x) that decide what becomes of it:
which changes of status are allowed and what may be edited in which status, what publishing takes along and forbids,
names of projects, event ids (a repeated report replaces), last_iteration and last_metrics, the clock that a start sets
back, queues, tokens, what a clone or a reset keeps, that answers leave out nulls. It does not show what the dashboard
draws, has one user, and forgets everything when it ends. A call it does not know is answered with 404 and makes `check`
fail. Its parts lie in clearml_double/.

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
import contextlib
import json
import re
import shlex
import signal
import socket
import sys
import threading
import time
from datetime import datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from clearml_double.api import API
from clearml_double.http import Call, Handler
from clearml_double.rules import ACCESS_KEY, NO_ITERATION, SECRET_KEY, Refused, hash_name
from clearml_double.task import Image, Task

__all__ = [
    "ACCESS_KEY", "NO_ITERATION", "SECRET_KEY", "Call", "ClearMLServer", "Image", "Refused", "Task", "hash_name",
]  # fmt: skip


class ClearMLServer:
    """The double: `start`, give `env` to the processes under test, then look at `tasks` and the rest.

    tasks: {id: Task}
    models, projects, queues: {id: dict}
    files: {path: bytes}, what was uploaded; `file(url)` finds one by its address
    calls: [Call(endpoint, body, status, time)], in order
    unknown, broken: calls that the double has no answer for, or failed at; `check` raises on either
    refused: calls answered with an error as the real server would, "endpoint: message"
    failing: endpoints ("models.create", or "POST" for the file server) that fail: {endpoint: calls that are yet to be
        answered before}
    """

    def __init__(self, port=0, on_call=None):
        self.port, self.on_call = port, on_call
        self.api, self.files, self.calls = API(), {}, []
        self.unknown, self.broken, self.refused, self.failing = [], [], [], {}
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

    def fail(self, endpoint):
        """Refuse a call for a fault of the server's own, if `failing` says so."""
        if endpoint in self.failing:
            self.failing[endpoint] -= 1
            if self.failing[endpoint] < 0:
                raise Refused(0, "General server error: no room", status=500)

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

    def user_publish(self, task_id):
        """Publish a task, and with it its last model."""
        with self.lock:
            self.api.tasks_publish({"task": task_id})

    def user_publish_model(self, name):
        """Publish a model alone."""
        with self.lock:
            (model,) = (model for model in self.models.values() if model["name"] == name)
            self.api.models_set_ready({"model": model["id"], "publish_task": False})

    def user_rename(self, task_id, name):
        with self.lock:
            self.api.tasks_edit({"task": task_id, "name": name, "force": True})

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
