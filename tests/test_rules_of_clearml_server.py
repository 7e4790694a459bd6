"""The rules of ClearML's server, as the double keeps them: asked by plain requests."""

import base64
import json
import socket
import urllib.error
import urllib.request

import pytest
from clearml_server import ACCESS_KEY, NO_ITERATION, SECRET_KEY, Refused, hash_name


@pytest.fixture
def post(server):
    """Send a call as the SDK does; its data, or Refused."""

    def request(endpoint, body, authorization):
        headers = {"Content-Type": "application/json", **({"Authorization": authorization} if authorization else {})}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if isinstance(body, bytes):
            headers["Content-Type"] = "application/json-lines"
        url = f"{server.url}/v2.23/{endpoint}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers, method="GET"), timeout=5) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            meta = json.load(error)["meta"]
            raise Refused(meta["result_subcode"], meta["result_msg"], error.code) from None

    basic = "Basic " + base64.b64encode(f"{ACCESS_KEY}:{SECRET_KEY}".encode()).decode()
    bearer = "Bearer " + request("auth.login", {}, basic)["token"]
    return lambda endpoint, authorization=bearer, **body: request(endpoint, body.get("lines", body), authorization)


def point(task, iteration, value, title="acc1", series="val", **more):
    """A scalar as the SDK sends it."""
    return {"type": "training_stats_scalar", "task": task, "iter": iteration, "metric": title, "variant": series, "value": value, **more}  # fmt: skip


def lines(*events):
    return "\n".join(json.dumps(event) for event in events).encode()


def refusal(call, *words, **more):
    """The HTTP status and subcode of a call that must be refused."""
    with pytest.raises(Refused) as refused:
        call(*words, **more)
    return refused.value.status, refused.value.subcode


def test_unknown_calls_and_filters_fail_check(server, post):
    with pytest.raises(Refused, match=r"Unable to find endpoint for name tasks\.nonsense") as refused:
        post("tasks.nonsense")
    assert refused.value.status == 404
    with pytest.raises(AssertionError, match=r"tasks\.nonsense"):
        server.check()
    server.unknown.clear()
    post("tasks.get_all", shoe_size=43)
    with pytest.raises(AssertionError, match=r"tasks\.get_all: shoe_size"):
        server.check()
    server.api.ignored.clear()
    assert [call.endpoint for call in server.calls[-2:]] == ["tasks.nonsense", "tasks.get_all"]


def test_keys_and_ping(server, post):
    assert post("debug.ping", authorization=None)
    for authorization, subcode in ((None, 20), ("Bearer stale", 30), ("Basic YTpi", 22)):
        with pytest.raises(Refused) as refused:
            post("tasks.get_all", authorization=authorization)
        assert (refused.value.status, refused.value.subcode) == (401, subcode)
    with pytest.raises(Refused, match="invalid credentials"):
        post("auth.login", authorization="Basic YTpi")


@pytest.mark.parametrize(
    "calls, refused",
    [
        (["started", "completed", "started"], None),  # continued
        (["started", "failed", "started"], "started"),
        (["started", "failed", "reset", "started"], None),
        (["started", "stopped", "completed"], None),
        (["started", "completed", "stopped"], "stopped"),
        (["completed"], "completed"),
        (["enqueue", "dequeue", "enqueue"], None),
        (["started", "enqueue"], "enqueue"),
        (["enqueue", "completed"], "completed"),
        (["started", "completed", "enqueue"], "enqueue"),
        (["started", "completed", "publish", "reset"], "reset"),
        (["started", "completed", "publish", "publish"], "publish"),
        (["started", "completed", "publish", "started"], "started"),
        (["started", "publish"], "publish"),
        (["edit", "started", "edit"], "edit"),
        (["started", "started"], None),
    ],
)
def test_changes_of_status(post, calls, refused):
    task = post("tasks.create", name="a run", type="training")["id"]
    *before, last = calls
    for call in before:
        post(f"tasks.{call}", task=task)
    if refused is None:
        post(f"tasks.{last}", task=task)
    else:
        with pytest.raises(Refused) as error:
            post(f"tasks.{last}", task=task)
        assert error.value.subcode == 110
        if "publish" not in calls:
            post(f"tasks.{last}", task=task, force=True)


def test_names_have_three_characters(post):
    for endpoint, more in (("tasks.create", {"type": "training"}), ("models.create", {}), ("queues.create", {})):
        assert refusal(post, endpoint, name=" ab ", **more) == (400, 800)
        assert post(endpoint, name="abc", **more)["id"]


def test_every_part_of_a_project_s_name_has_three_characters(server, post):
    for short in (" ab ", "ab/cde", "abc/de", "abc/ /def"):
        assert refusal(post, "projects.create", name=short) == (400, 12)
    assert refusal(post, "projects.create", name="/".join(["abc"] * 11)) == (400, 409)
    assert refusal(post, "projects.create", name="//") == (400, 407)
    assert post("projects.create", name="/".join(["abc"] * 10))["id"]


def test_names_of_projects_are_normalised(server, post):
    made = post("projects.create", name=" abc / def//ghi/")["id"]
    made = server.projects[made]
    assert made["name"] == "abc/def/ghi" and made["basename"] == "ghi"
    assert {project["name"] for project in server.projects.values()} == {"abc", "abc/def", "abc/def/ghi"}
    # the SDK looks for what was typed, finds nothing, and cannot make it either
    assert post("projects.get_all", name="^abc / def//ghi/$")["projects"] == []
    assert refusal(post, "projects.create", name="abc / def//ghi/") == (400, 801)


def test_publishing_takes_the_last_model_along_and_happens_once(server, post):
    task = post("tasks.create", name="a run", type="training")["id"]
    post("tasks.started", task=task)
    models = {}
    for name in ("best", "last"):
        models[name] = post("models.create", name=name, uri="http://x/y", task=task, ready=False)["id"]
        post("tasks.add_or_update_model", task=task, name=name, model=models[name], type="output")
    assert refusal(post, "tasks.publish", task=task) == (400, 110)  # it runs
    post("tasks.completed", task=task)
    post("tasks.publish", task=task)
    assert {name: server.models[id]["ready"] for name, id in models.items()} == {"best": False, "last": True}
    assert refusal(post, "tasks.publish", task=task) == (400, 110)
    assert refusal(post, "models.set_ready", model=models["last"]) == (400, 203)
    post("models.set_ready", model=models["best"])
    assert server.models[models["best"]]["ready"]
    # it takes nothing more, until it is un-published by force
    assert refusal(post, "events.add_batch", lines=lines(point(task, 0, 0.5))) == (400, 131)
    assert refusal(post, "tasks.add_or_update_model", task=task, name="x", model=models["best"], type="output") == (400, 110)  # fmt: skip
    post("tasks.started", task=task, force=True)
    assert server.tasks[task].status == "in_progress"


def test_publishing_a_model_publishes_its_task(server, post):
    task = post("tasks.create", name="a run", type="training")["id"]
    post("tasks.started", task=task)
    model = post("models.create", name="best", uri="http://x/y", task=task, ready=False)["id"]
    assert refusal(post, "models.set_ready", model=model) == (400, 110)  # the task runs
    post("tasks.completed", task=task)
    post("models.set_ready", model=model)
    assert server.tasks[task].status == "published" and server.models[model]["ready"]


def test_starting_again_resets_the_clock(server, post):
    task = post("tasks.create", name="a run", type="training")["id"]
    held = server.tasks[task]
    assert "started" not in post("tasks.get_by_id", task=task)["task"]
    post("tasks.started", task=task)
    first = held.started
    post("tasks.started", task=task)  # it runs: its clock goes on
    assert held.started == first and held.completed is None
    for end in ("stopped", "failed", "completed"):
        post(f"tasks.{end}", task=task, force=True)
        assert held.completed > held.started
        before = held.started
        post("tasks.started", task=task, force=True)
        assert held.started > before and held.completed is None


def test_answers_leave_out_what_is_null(post):
    task = post("tasks.create", name="a run", type="training")["id"]
    (found,) = post("tasks.get_all", id=[task])["tasks"]
    for document in (post("tasks.get_by_id", task=task)["task"], found):
        assert not {"started", "completed", "project", "parent", "last_worker"} & set(document)
        assert document["status"] == "created" and document["tags"] == []
    model = post("models.create", name="best", uri="http://x/y")["id"]
    assert "task" not in post("models.get_by_id", model=model)["model"]


def test_a_queue_holds_a_task_once_and_one_queue_holds_it(server, post):
    task = post("tasks.create", name="a run", type="training")["id"]
    (first,) = server.queues
    second = post("queues.create", name="second")["id"]
    held = server.tasks[task]

    def entries(queue):
        return [entry["task"] for entry in server.queues[queue]["entries"]]

    post("tasks.enqueue", task=task)
    assert entries(first) == [task] and held.status == "queued" and held.fields["execution"]["queue"] == first
    assert refusal(post, "tasks.enqueue", task=task) == (400, 706)
    assert entries(first) == [task] and held.status == "queued" and held.status_reason == "failed enqueueing"
    assert refusal(post, "tasks.enqueue", task=task, queue=second, queue_name="second") == (400, 12)
    post("tasks.enqueue", task=task, queue=second)
    assert entries(first) == [] and entries(second) == [task]


def test_a_queued_task_is_not_edited_and_leaves_its_queue(server, post):
    task = post("tasks.create", name="a run", type="training")["id"]
    held, (queue,) = server.tasks[task], server.queues.values()
    post("tasks.started", task=task)
    post("tasks.stopped", task=task)
    post("tasks.enqueue", task=task)
    assert refusal(post, "tasks.edit", task=task, comment="x") == (400, 110)
    assert refusal(post, "tasks.add_or_update_artifacts", task=task, artifacts=[{"key": "a", "type": "custom"}]) == (400, 110)  # fmt: skip
    post("tasks.dequeue", task=task)
    assert held.status == "stopped" and queue["entries"] == []  # what it was before
    post("tasks.enqueue", task=task)
    post("tasks.stop", task=task)
    assert held.status == "stopped" and queue["entries"] == []
    post("tasks.enqueue", task=task)
    post("tasks.stopped", task=task)  # by the agent that ran it before, late
    assert post("queues.get_next_task", queue=queue["id"])["entry"]["task"] == task and held.status == "queued"
    assert post("queues.get_next_task", queue=queue["id"]) == {}


def test_a_number_that_is_none_fails_its_batch(server, post):
    task = post("tasks.create", name="a run", type="training")["id"]
    assert refusal(post, "events.add_batch", lines=lines(point(task, 0, 0.5), point(task, 1, float("nan")))) == (500, 100)  # fmt: skip
    assert server.tasks[task].scalars == {}
    assert refusal(post, "events.add_batch", lines=b"") == (400, 17)


def test_files_need_a_token(server, post):
    def ask(method, path, authorization=None, data=None):
        headers = {"Authorization": authorization} if authorization else {}
        if data is not None:
            headers["Content-Type"] = "multipart/form-data; boundary=b"
        request = urllib.request.Request(f"{server.url}/{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, b""

    token = "Bearer " + next(iter(server.api.tokens))
    part = b'--b\r\nContent-Disposition: form-data; name="/a/best.pth"; filename="x"\r\n\r\nweights\r\n--b--\r\n'
    assert ask("GET", "") == (200, b"OK")  # is it there: that anyone may ask
    assert ask("GET", "", "Bearer stale")[0] == 401
    for wrong in (None, "Bearer stale", "Basic YTpi"):
        assert ask("POST", "", wrong, part)[0] == 401
    assert not server.files
    assert ask("POST", "", token, part)[0] == 200 and server.files == {"a/best.pth": b"weights"}
    assert [ask(method, "a/best.pth")[0] for method in ("GET", "HEAD", "DELETE")] == [401, 401, 401]
    assert ask("GET", "a/best.pth", token) == (200, b"weights")
    assert [ask("DELETE", "a/best.pth", token)[0] for _ in range(2)] == [200, 404]


def test_scalars_are_told_as_they_are_kept_in_single_precision(server, post):
    task = post("tasks.create", name="a run", type="training")["id"]
    post("events.add_batch", lines=lines(*(point(task, epoch, 0.1 + epoch) for epoch in range(4))))
    series = post("events.scalar_metrics_iter_histogram", task=task)["acc1"]["val"]
    assert series["x"] == [0, 1, 2, 3] and series["y"][0] == 0.10000000149011612  # 0.1 as a float of 32 bits
    fewer = post("events.scalar_metrics_iter_histogram", task=task, samples=2)["acc1"]["val"]
    assert fewer["x"] == [0, 2] and fewer["y"] == pytest.approx([0.6, 2.6])


def test_finished_tasks_take_no_artifact(post):
    task = post("tasks.create", name="a run", type="training")["id"]
    artifact = {"key": "summary", "type": "custom", "uri": "http://x/y"}
    post("tasks.started", task=task)
    post("tasks.add_or_update_artifacts", task=task, artifacts=[artifact])
    post("tasks.completed", task=task)
    with pytest.raises(Refused, match="status=completed"):
        post("tasks.add_or_update_artifacts", task=task, artifacts=[artifact])


def test_events_replace_by_task_iteration_title_and_series(server, post):
    task = post("tasks.create", name="a run", type="training")["id"]
    answer = post("events.add_batch", lines=lines(
        point(task, 0, 0.5), point(task, 1, 0.75), point(task, 1, 0.25), point(task, 1, 0.1, series="train"),
        point("nobody", 1, 1.0), point(task, NO_ITERATION, 0.9, "Summary", "best"),
        point(task, 1000, 5.0, ":monitor:machine", "cpu_usage"),
    ))  # fmt: skip
    assert (answer["added"], answer["errors"]) == (6, 1)
    held = server.tasks[task]
    assert held.scalars["acc1", "val"] == {0: 0.5, 1: 0.25}
    assert held.scalars["acc1", "train"] == {1: 0.1}
    assert held.single_values == {"best": 0.9}
    assert held.last_iteration == 1  # neither the monitor's nor the single value's
    summary = held.fields["last_metrics"][hash_name("acc1")][hash_name("val")]
    assert (summary["value"], summary["min_value"], summary["max_value"]) == (0.25, 0.25, 0.75)
    assert (summary["max_value_iteration"], summary["first_value"]) == (1, 0.5)
    assert (summary["count"], summary["mean_value"]) == (3, 0.5)  # what was replaced counts
    post("events.add_batch", lines=lines(point(task, 1, 0.8, timestamp=7)))
    assert held.scalars["acc1", "val"] == {0: 0.5, 1: 0.8} and held.times["acc1", "val"][1] == 7
    with pytest.raises(Refused, match="Events not added"):
        post("events.add_batch", lines=lines(point("nobody", 0, 1.0)))


def test_reset_and_clone_keep_what_the_server_keeps(server, post):
    task = post("tasks.create", name="a run", type="training", system_tags=["development"], tags=["small"])["id"]
    item = {"section": "Hyperparameters", "name": "lr", "value": "0.1", "type": "float"}
    post("tasks.edit", task=task, hyperparams={"Hyperparameters": {"lr": item}}, execution={"queue": "q"})
    post("tasks.started", task=task)
    model = post("models.create", name="best", uri="http://x/y", task=task, ready=False)["id"]
    post("tasks.add_or_update_model", task=task, name="best", model=model, type="output", iteration=7)
    post("tasks.add_or_update_artifacts", task=task, artifacts=[{"key": "a", "type": "custom", "uri": "http://x/z"}])
    post("events.add_batch", lines=lines(point(task, 0, 0.5)))
    held = server.tasks[task]
    assert (held.last_iteration, list(held.models["output"]), list(held.artifacts)) == (7, ["best"], ["a"])

    clone = server.user_clone(task, {"Hyperparameters/lr": 0.3, "Hyperparameters/epochs": 5})
    assert clone.hyperparams == {"Hyperparameters": {"lr": "0.3", "epochs": "5"}}
    assert held.hyperparams == {"Hyperparameters": {"lr": "0.1"}}
    assert (clone.parent, clone.tags, clone.fields["system_tags"]) == (task, ["small"], [])
    assert not (clone.scalars or clone.artifacts or clone.models["output"] or clone.fields["execution"].get("queue"))
    with pytest.raises(Refused, match="status=in_progress"):
        server.edit_hyperparams(task, {"Hyperparameters/lr": "0.3"})

    server.user_reset(task)
    assert (held.status, held.last_iteration, held.scalars, held.models["output"]) == ("created", 0, {}, {})
    assert not (held.artifacts or server.models or held.fields["last_metrics"])
    assert held.hyperparams == {"Hyperparameters": {"lr": "0.1"}}


def test_get_all_filters_orders_and_projects(post):
    tasks = {}
    for name, value, tags in (("run 9", 0.9, ["a"]), ("run 2", 0.2, ["a", "b"]), ("other", 0.5, ["b"])):
        tasks[name] = post("tasks.create", name=name, type="training", tags=tags)["id"]
        post("events.add_batch", lines=lines(point(tasks[name], 0, value), point(tasks[name], 1, value / 2)))
    best = f"last_metrics.{hash_name('acc1')}.{hash_name('val')}.max_value"

    def names(**body):
        return [task["name"] for task in post("tasks.get_all", **body)["tasks"]]

    assert names(order_by=[f"-{best}"]) == ["run 9", "other", "run 2"]
    assert names(order_by=[best], name="^run") == ["run 2", "run 9"]
    assert names(tags=["a"], order_by=["name"]) == ["run 2", "run 9"]
    assert names(tags=["__$all", "a", "b"]) == ["run 2"]
    assert names(tags=["-a"]) == ["other"]
    assert names(order_by=["name"], page=1, page_size=2) == ["run 9"]
    (task,) = post("tasks.get_all", id=[tasks["other"]], only_fields=["status", best])["tasks"]
    title, series = hash_name("acc1"), hash_name("val")
    assert task == {"id": tasks["other"], "status": "created", "last_metrics": {title: {series: {"max_value": 0.5}}}}


def test_stop_refuses_and_hang_never_answers(server, post):
    server.hang()
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.3) as client:
        client.sendall(b"GET /debug.ping HTTP/1.1\r\n\r\n")
        with pytest.raises(TimeoutError):
            client.recv(1)
        server.resume()
        client.settimeout(5)
        assert client.recv(1) == b""  # closed, not answered
    assert post("debug.ping")
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)
    server.start()
    assert post("debug.ping")  # the same port, and the token still holds
