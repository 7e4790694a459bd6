"""Measurements that a process of gpu.py carries out in tests, by name; they end as real ones may."""

import os
import subprocess
import sys

from settings.errors import RunError


def well(setup, *values):
    for value in values:
        yield {"way": "well", "value": value, "process": os.getpid()}


def badly(setup):
    yield {"way": "badly", "process": os.getpid()}
    raise RuntimeError("no such luck\nin two lines")


def never(setup):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield {"way": "never", "process": os.getpid(), "child": child.pid}
    child.wait()


def broken(setup):
    yield {"way": "broken", "process": os.getpid()}
    raise RunError("cuda_graphs: the step of this model broke its capture")


def dying(setup):
    yield {"way": "dying"}
    os._exit(7)
