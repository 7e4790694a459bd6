"""What several test files use, and the order of the tests. Small runs are in runs.py, the program in processes of its
own in programs.py."""

import multiprocessing
import os
import random

# cuBLAS looks at it once, in a process's first product of matrices; some tests ask for the same bits later in it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import programs
import pytest
import tiny  # noqa: F401, makes its model known
import torch
from clearml_server import ClearMLServer
from runs import make_tree

import reporting.figures

torch.set_num_threads(1)  # small models: a second thread waits more than it works


# The files whose tests take seconds, in the order in which they begin; all others are milliseconds, which fill up the
# end, so that no process of the tests waits long for the other. Tests of a file stay together (pyproject.toml): they
# share runs.
FIRST = """tracking upload benchmarks gpu_benchmark cuda_without_gpu processes predict queue agents docs faults sweep dashboard export resume run
stage_effects fit store config""".split()


@pytest.hookimpl(optionalhook=True)  # unknown without xdist
def pytest_xdist_auto_num_workers():
    """Half as many again as cores: a third of the time tests wait, for servers that are silent, and signals."""
    return (os.cpu_count() or 1) * 3 // 2


def pytest_collection_modifyitems(items):
    ranks = {f"test_{name}": rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(FIRST)))


# The files that look at a run's report with its figures. Elsewhere they are left out of it, as by the fork server: their
# drawing takes more than half of the time of a small run.
DRAWN = {f"test_{name}" for name in "reporting run export gpu_benchmark".split()}


@pytest.fixture(autouse=True, scope="module")
def figures(request):
    if request.path.stem in DRAWN:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting.figures, "as_svg", programs.not_drawn)
        yield


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "images")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A tree that is only read."""
    return make_tree(tmp_path_factory.mktemp("tracked") / "images")


@pytest.fixture
def server():
    """A double of ClearML's server, which must have known all that it was asked."""
    with ClearMLServer() as double:
        yield double
        double.check()


@pytest.fixture
def refusing_address():
    with programs.refusing_address() as address:
        yield address


@pytest.fixture(autouse=True)
def same_draws():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left():
    """A test leaves no process that it started, and the environment as it was."""
    before = dict(os.environ)
    yield
    programs.end_all()
    assert multiprocessing.active_children() == []  # of a loader left open: others count theirs
    torch.use_deterministic_algorithms(False)  # as a run may have asked: it has torch fill all new memory
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)
