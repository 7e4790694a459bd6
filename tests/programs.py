"""The program in processes of its own, as tests start it: forked from one that has imported it, or honestly.

Importing torch and the rest takes seconds and is the same each time, so that most tests fork (`program`, `popen`,
`upload`; see fork_server.py). Honest starts, by which the forks are judged: `honest_program`, `torchrun`, `run_agent`.
They are the runs of the signals, of a whole sweep, of a bad flag and of --help, what shows which modules are imported,
the upload that says what it needs, what torchrun starts, and all of an agent.
"""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 240  # seconds: a guard against waiting for ever, which no test comes near; below that of pytest-timeout

# Flags of a small run. Tracked, where the test says nothing else; and untracked.
RUN = (
    "--model efficientnet_v2_tiny --device cpu --workers 0 --lr 0.01 --batch-size 8 --train-crop-size 32 "
    "--val-resize-size 32 --val-crop-size 32 --print-freq 100"
).split()
SMALL = [*RUN, "--clearml", "off"]
LARGER = ["--model", "mobilenet_v3_small"]  # where the process is started honestly and does not know the tiny model


def environment(changes=None):
    """Of a program under test: this one's, without what a user's ClearML or a launcher put there."""
    foreign = ("CLEARML_", "TRAINS_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "OMP_NUM_THREADS": "1", **(changes or {})}  # small models: a second thread waits more than it works


def wait_until(condition, what, limit=LIMIT):
    """The first true value of `condition()`; it may raise to end the wait."""
    end = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not after {limit} s"
        time.sleep(0.02)
    return value


def not_drawn(figure):
    """Instead of reporting.figures.as_svg."""
    figure.clear()
    sys.modules["matplotlib.pyplot"].close(figure)
    return "<svg></svg>"


# ---- processes ----


started = []  # processes not known to have ended


class Process:
    """A program that a test started; of subprocess.Popen, what tests use. Its output goes to files: no pipe fills up,
    and `printed` can be read at any time."""

    def __init__(self, script, flags, env, cwd=ROOT, own_session=False):
        self.files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115, closed with this
        self.returncode = None
        self.args = [script, *map(str, flags)]
        self.start(env, str(cwd), own_session)
        started.append(self)

    def start(self, env, cwd, own_session):
        command = [sys.executable, *self.args]
        output, errors = self.files
        self.process = subprocess.Popen(
            command, env=env, cwd=cwd, start_new_session=own_session, stdout=output, stderr=errors
        )
        self.pid = self.process.pid

    def end_within(self, seconds):
        """The exit status, None if it still runs then."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)

    def wait(self, timeout=LIMIT):
        if self.returncode is None:
            self.returncode = self.end_within(timeout)
            if self.returncode is None:
                raise subprocess.TimeoutExpired(self.args, timeout, *map(str.encode, self.printed()))
            started.remove(self)
        return self.returncode

    def poll(self):
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def printed(self):
        """Output and errors so far."""
        return [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in self.files]

    def communicate(self, timeout=LIMIT):
        self.wait(timeout)
        return self.printed()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait_for_epochs(self, folder, count):
        """Wait until the run has written `count` epochs to its folder."""

        def written():
            assert self.poll() is None, self.printed()
            file = Path(folder) / "metrics.jsonl"
            return file.exists() and file.read_text().count("\n") >= count

        wait_until(written, f"{count} epochs in {folder}")


class Forked(Process):
    """One that the fork server started."""

    server = control = None

    def start(self, env, cwd, own_session):
        if Forked.server is None:
            Forked.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, str(ROOT / "tests" / "fork_server.py"), str(theirs.fileno())]
            Forked.server = subprocess.Popen(
                command, env=environment(), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )  # fmt: skip
            theirs.close()
        script, *flags = self.args
        request = {"script": script, "flags": flags, "env": env, "cwd": cwd, "own_session": own_session}
        self.status, theirs = os.pipe()
        socket.send_fds(self.control, [json.dumps(request).encode()], [theirs, *(f.fileno() for f in self.files)])
        os.close(theirs)
        self.pid = self.told()

    def told(self):
        number = os.read(self.status, struct.calcsize("i"))
        assert number, "the fork server ended"
        return struct.unpack("i", number)[0]

    def end_within(self, seconds):
        if select.select([self.status], [], [], seconds)[0]:
            code = self.told()
            os.close(self.status)
            return code


# There is no fork server where a fork of torch is not safe: Python is started each time then, and the tiny model with it.
FORKS = sys.platform == "linux"


class Started(Process):
    def start(self, env, cwd, own_session):
        script, *flags = self.args
        code = f"import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'tests' / 'tiny.py')!r}); runpy.run_path(sys.argv[0], run_name='__main__')"  # fmt: skip
        self.args = ["-c", code, str(ROOT / script), *flags]
        super().start(env, cwd, own_session)


def end_all():
    """Kill what still runs, as after a test that failed half way: it would take the time of the tests to come."""
    for process in list(started):
        process.kill()
        process.wait()


def finished(process, timeout=LIMIT):
    return subprocess.CompletedProcess(process.args, process.wait(timeout), *process.printed())


def popen(*flags, env=None, own_session=False):
    """Start train.py; what a test did not wait for is killed when it ends."""
    return (Forked if FORKS else Started)("train.py", flags, environment(env), own_session=own_session)


def program(*flags, env=None):
    """Run train.py to its end."""
    return finished(popen(*flags, env=env))


def upload_popen(folder, env, honest=False):
    """Start `python -m tracking upload`."""
    if honest or not FORKS:
        return Process("-m", ["tracking", "upload", folder], environment(env))
    return Forked("tracking/__main__.py", ["upload", folder], environment(env))


def upload(folder, env, honest=False):
    """Run `python -m tracking upload`."""
    return finished(upload_popen(folder, env, honest))


def sweep_popen(*flags):
    """Start sweep.py, its runs by fake_train.py."""
    return (Forked if FORKS else Started)("tests/fake_sweep.py", flags, environment())


def ranks(count, folder, *flags, script="train.py", env=None):
    """Run a script in `count` processes that meet through a file, which no one else can have taken as a port."""
    meeting = ["--dist-url", f"file://{tempfile.mkdtemp(dir=folder)}/meeting"]
    kind = Forked if FORKS else Started
    processes = [
        kind(script, [*flags, *meeting], environment({**(env or {}), "RANK": str(rank), "WORLD_SIZE": str(count)}))
        for rank in range(count)
    ]
    return [finished(process) for process in processes]


# ---- honest starts ----


def honest_popen(*flags, env=None, cwd=ROOT, own_session=False):
    return Process("train.py", flags, environment(env), cwd, own_session)


def honest_program(*flags, env=None, cwd=ROOT):
    """Run `python train.py`, as a user starts it."""
    return finished(honest_popen(*flags, env=env, cwd=cwd))


def torchrun(*flags, env=None, script="train.py"):
    """Run train.py in two processes; the launcher finds a free port."""
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    return finished(Process("-m", [*words, *flags], environment(env)))


def run_agent(task_id, env, home):
    """Let a real clearml-agent run one task, with the Python of these tests."""
    apart = {"CLEARML_AGENT_SKIP_PYTHON_ENV_INSTALL": "1", "HOME": str(home)}
    return finished(Process("-m", ["clearml_agent", "execute", "--id", task_id], environment({**env, **apart})))


# ---- servers that are not there ----


def nowhere(cache_dir):
    """An environment in which no ClearML server is configured, whatever this machine's user has."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    (cache_dir / "empty.conf").touch()
    keys = ("API_HOST", "WEB_HOST", "FILES_HOST", "API_ACCESS_KEY", "API_SECRET_KEY", "TASK_ID")
    return {f"CLEARML_{key}": "" for key in keys} | {"CLEARML_CONFIG_FILE": str(cache_dir / "empty.conf")}


@contextmanager
def refusing_address():
    """An address at which no one answers; held meanwhile, so that no one comes to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
