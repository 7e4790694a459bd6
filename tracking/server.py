"""The ClearML server: is it there, does it take the keys, does it know a task."""

import os
import threading
from typing import Any, NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PROBE_SECONDS = 3.0


def on_agent() -> bool:
    """Check whether this process runs a task that exists already.

    A clearml-agent or an optimizer has started it then.
    """
    return bool(os.environ.get("CLEARML_TASK_ID"))


LOADING = threading.Lock()


def load_sdk() -> Any:
    """Import and return the module `clearml`, with the settings that make it close at once.

    It reads its configuration when that is first asked for, with a parser that two threads confuse.
    """
    os.environ.setdefault("CLEARML_CONFIG_PATH", os.path.join(ROOT, "configs", "clearml"))
    with LOADING:
        import clearml
        from clearml.config import config_obj

        config_obj.get("api", None)
    return clearml


def find_task(task_id: str) -> Any:
    """Find a task of the server by its id; None if the server has none."""
    try:
        return load_sdk().Task.get_task(task_id=task_id)
    except ValueError:
        return None


def is_published(task: Any) -> bool:
    """Check whether a task was published: it takes nothing more, and starting it by force would un-publish it."""
    return task.get_status() in ("publishing", "published")


class Ending(NamedTuple):
    """How a run ended, or a task that is not completed: status, "stopped" or "failed", with its reason and message."""

    status: str
    reason: str
    message: str

    def tell(self, task: Any) -> None:
        """Mark a task as ended so.

        Raises:
            an error of the SDK: the server does not take it.
        """
        mark = task.mark_failed if self.status == "failed" else task.stopped
        mark(ignore_errors=False, force=True, status_reason=self.reason or None, status_message=self.message)


def fail(task: Any, message: str) -> None:
    """Mark a task as failed, for the reason that the terminal shows too."""
    task.mark_failed(force=True, status_reason="wrong settings", status_message=message)


def why_no_server(timeout: float = PROBE_SECONDS) -> str | None:
    """Find out why the configured server cannot be used, in a few words.

    Returns: None if it answers in time and takes the keys.
    """
    load_sdk()
    from clearml.backend_api import Session
    from clearml.backend_api.session.defs import ENV_ACCESS_KEY, ENV_AUTH_TOKEN, ENV_SECRET_KEY
    from clearml.config import config_obj

    key = ENV_ACCESS_KEY.get(default=config_obj.get("api.credentials.access_key", None))
    secret = ENV_SECRET_KEY.get(default=config_obj.get("api.credentials.secret_key", None))
    token = ENV_AUTH_TOKEN.get()
    if not token and not (key and secret):
        return "no ClearML server is configured here"
    host = Session.get_api_server_host()
    status = (
        ask(f"{host}/debug.ping", None, timeout)
        if token
        else ask(f"{host}/auth.login", (str(key), str(secret)), timeout)
    )
    if status == 200:
        return None
    if isinstance(status, str):
        return f"{host} {status}"
    return f"{host} refuses the keys" if status in (401, 403) else f"{host} says {status}"


def why_no_files(timeout: float = PROBE_SECONDS) -> str | None:
    """Find out what is wrong with the server's store of files.

    Returns: None if it answers, with whatever status.
    """
    load_sdk()
    from clearml.backend_api import Session

    host = Session.get_files_server_host()
    status = ask(host, None, timeout)
    return f"{host} {status}" if isinstance(status, str) else None


def ask(address: str, keys: tuple[str, str] | None, timeout: float) -> int | str:
    """Request `address`; return the HTTP status it answers with in time, or why there is none."""
    from clearml.config import config_obj

    answer: list[int | str] = [f"did not answer within {timeout:g} s"]
    verify = config_obj.get("api.verify_certificate", True)

    def request() -> None:
        import requests

        try:
            answer[0] = requests.get(address, auth=keys, timeout=timeout, verify=verify).status_code
        except requests.Timeout:
            pass
        except requests.ConnectionError as error:
            unknown = any(word in str(error) for word in ("resolve", "getaddrinfo", "Name or service"))
            answer[0] = "is no known host" if unknown else "cannot be reached"
        except (requests.RequestException, ValueError) as error:
            answer[0] = f"cannot be asked ({type(error).__name__})"

    # In a thread of its own: looking up a host's name heeds no timeout.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(timeout)
    return answer[0]
