"""A process that has imported train.py's modules once, and forks a child for each program that a test starts.

Importing takes seconds, a fork milliseconds. The child does what `python train.py ARGS` does: it runs the file as
`__main__`, with its own arguments, environment, working directory and output. ClearML, which
reads the environment when it is imported, is imported in the child. `programs.py` has the other side.

Usage: fork_server.py SOCKET, a file descriptor. A request is JSON and three descriptors: where to write the child's pid
and exit status, its output, its errors. The end of the socket ends the server, not what runs.
"""

import atexit
import faulthandler
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import sys
from pathlib import Path
from types import ModuleType

from programs import not_drawn

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 1 << 17  # bytes of a request


def serve(control):
    """Fork for each request; return it in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, whose end ends this
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no one waits for the minders
    while True:
        text, descriptors, _, _ = socket.recv_fds(control, LARGEST, 3)
        if not text:
            os._exit(0)
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"{threads} threads: their locks would stay locked in the child"
        if os.fork():
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        # The child's parent: it waits for its end, so that the server need not.
        control.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        status, output, errors = descriptors
        child = os.fork()
        if child == 0:
            os.close(status)
            os.dup2(output, 1)
            os.dup2(errors, 2)
            os.close(output)
            os.close(errors)
            return json.loads(text)
        os.close(output)
        os.close(errors)
        os.write(status, struct.pack("i", child))
        os.write(status, struct.pack("i", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
        os._exit(0)


def become(request):
    """Run the script of `request` as Python would have been started for it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["own_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    script = str(ROOT / request["script"])
    sys.argv = [script, *request["flags"]]
    main = ModuleType("__main__")
    main.__file__ = script
    sys.modules["__main__"] = main
    try:
        exec(compile(Path(script).read_text(), script, "exec"), main.__dict__)
    except SystemExit as end:
        leaving.status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


class Leaving:
    """The last of what is done at the end of a child, after its threads have ended and all other exit functions:
    without taking torch's modules down object by object, which takes a second."""

    status = 1  # of an exception that no one caught

    def __call__(self):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.status)


if __name__ == "__main__":
    leaving = Leaving()
    atexit.register(leaving)  # before all others, so that it is called after them
    sys.path[0] = str(ROOT)
    # Of what pandas brings, which scikit-learn imports where it is installed: a thread that would not be in the child.
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    runpy.run_path(str(ROOT / "train.py"), run_name="train")  # its imports
    # and what it imports when a run has begun and when it ends, in 1.6 s
    for later in ("filelock", "reporting.figures", "scipy.optimize", "sklearn.metrics"):
        importlib.import_module(later)
    sys.modules["reporting.figures"].as_svg = not_drawn  # as conftest.py does
    runpy.run_path(str(ROOT / "tests" / "tiny.py"))
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
