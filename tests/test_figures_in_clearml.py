"""The figures in ClearML: each page whole, in one task, by the real SDK against a double of the server's API."""

import copy

from programs import ROOT, Process, environment, finished, nowhere


def send(folder, env):
    return finished(Process("-m", ["tracking.figures", folder], environment(env)))


def test_figures_are_a_task_whose_pages_need_nothing_else(tmp_path, server):
    env = server.env(tmp_path / "cache")
    for _ in range(2):  # the second time they take the place of the first
        done = send(ROOT / "Graphs", env)
        assert done.returncode == 0, done.stdout + done.stderr
        task = server.only_task()
        assert task.status == "completed" and task.name == "figures"
    pages = {image.series: server.file(image.url).decode() for image in task.images}
    assert pages.keys() == {path.stem for path in (ROOT / "Graphs").glob("*.html")}
    page = pages["schedule"]
    assert "window.vegaEmbed=" in page and 'class="chart" id="schedule"' in page and "data-drawn" in page
    assert "<script src=" not in page and "<link" not in page


def test_a_published_task_stays_as_it_is(tmp_path, server):
    env = server.env(tmp_path / "cache")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "one.html").write_text("as published")
    assert send(tmp_path / "pages", env).returncode == 0
    published = server.only_task()
    server.user_publish(published.id)
    fields, files = copy.deepcopy(published.fields), dict(server.files)
    for text in ("anew", "once more"):  # the second time into the task that the first has made
        (tmp_path / "pages" / "one.html").write_text(text)
        done = send(tmp_path / "pages", env)
        assert done.returncode == 0, done.stdout + done.stderr
        (new,) = (task for task in server.tasks.values() if task is not published)
        assert new.status == "completed" and [server.file(image.url) for image in new.images] == [text.encode()]
    assert published.status == "published" and published.fields == fields and files.items() <= server.files.items()


def test_what_is_missing_is_one_line(tmp_path):
    env = nowhere(tmp_path / "cache")
    for folder, words in ((tmp_path, "holds no pages; `make graphs` draws them"), (ROOT / "Graphs", "no ClearML server is configured")):  # fmt: skip
        done = send(folder, env)
        assert done.returncode == 2 and done.stderr.startswith("error: figures: ") and words in done.stderr
        assert done.stderr.count("\n") == 1
