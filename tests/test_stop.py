"""The wish to stop: who is heard when, what all processes make of it, and how the program ends."""

import os
import signal
import threading
import weakref
from types import SimpleNamespace

import pytest
from small_models import CPU

import learning.stop
from learning.stop import Interrupted, Stop
from settings.errors import RunError


def test_nobody_asks_nothing_stops():
    with Stop(CPU) as stop:
        assert not any(stop(step) for step in range(20))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_seen_at_the_next_step_and_handlers_come_back(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop(CPU) as stop:
        assert not stop(1)
        os.kill(os.getpid(), number)
        assert stop(2) and stop(3)
        assert stop.reason == f"signal {number.name}"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_handlers_come_back_after_an_error_too():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), Stop(CPU):
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise KeyError
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_ctrl_c_twice_ends_it_at_once():
    with Stop(CPU) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            stop(2)


def test_sigterm_twice_still_saves():
    with Stop(CPU) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(1) and stop.reason == "signal SIGTERM"


@pytest.mark.parametrize(("budget", "lasts", "ends"), [("90s", 89.9, 90.0), ("1.5m", 89.9, 90.1), ("2h", 7199, 7200)])
def test_a_time_budget_counts_from_the_start(monkeypatch, budget, lasts, ends):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(learning.stop, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with Stop(CPU, budget) as stop:
        clock.now += lasts
        assert not stop(1)
        clock.now = 1000.0 + ends
        assert stop(2) and stop.reason == "time budget spent"


class TwoProcesses(SimpleNamespace):
    """The runtime of one of two processes; the other's number is `other`."""

    world_size, other = 2, 0

    def __init__(self, rank):
        super().__init__(rank=rank, is_main=rank == 0, asked=[])

    def largest(self, number):
        self.asked.append(number)
        return max(number, self.other)


def test_several_processes_agree_every_eight_steps():
    runtime = TwoProcesses(rank=1)
    with Stop(runtime) as stop:
        assert [stop(step) for step in range(1, 9)] == [False] * 8
        assert runtime.asked == [0]  # at step 8
        os.kill(os.getpid(), signal.SIGTERM)
        assert [stop(step) for step in range(9, 17)] == [False] * 7 + [True]
        assert stop(17) and runtime.asked == [0, 64 * 2 + 15]
        assert stop.reason == "signal SIGTERM to process 1"


@pytest.mark.parametrize(
    ("number", "reason"),
    [(1, "time budget spent"), (2, "asked to by another process"), (64 * 2 + 2, "signal SIGINT to process 1")],
)
def test_a_wish_of_another_process_counts_and_is_named(number, reason):
    runtime = TwoProcesses(rank=0)
    runtime.other = number
    with Stop(runtime) as stop:
        assert not stop(7) and stop(8)
        assert stop.reason == reason and stop.asked == (number > 1)


# ---- when it is heard ----


def test_before_training_a_signal_is_heard_at_once_and_a_second_sigterm_does_not_disturb_the_end():
    with Stop(CPU, patient=False) as stop:
        stop.resumable = True
        with pytest.raises(Interrupted, match="signal SIGTERM") as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.resumable
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="signal SIGINT"):  # who presses Ctrl-C means it
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_after_the_last_step_is_heard_when_training_ends():
    with Stop(CPU, patient=False) as stop, pytest.raises(Interrupted, match="signal SIGTERM"), stop.patiently():
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
    with Stop(CPU, patient=False) as stop, stop.patiently():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(1)  # the run is saved, and ends by itself


def test_a_time_budget_does_not_cut_an_evaluation_short():
    with Stop(CPU, "1s") as stop:
        stop.deadline = 0.0  # long ago
        assert not stop(1, budget=False) and not stop.asked
        assert stop(1) and stop.reason == "time budget spent" and not stop.asked


@pytest.mark.parametrize("world_size", [1, 2])
def test_workers_that_fail_end_the_steps_of_one_process_and_all_of_several(world_size):
    def batches():
        yield 1
        raise RunError("worker 7 was killed")

    stop = Stop(SimpleNamespace(world_size=world_size, is_main=True, rank=0))
    if world_size == 1:
        assert list(stop.while_they_come(batches())) == [1] and str(stop.failure) == "worker 7 was killed"
    else:
        with pytest.raises(RunError, match="worker 7"):
            list(stop.while_they_come(batches()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_callback_that_lets_no_error_out_is_heard_after_it(number, capfd):
    class Thing:
        pass

    def gone(reference):
        os.kill(os.getpid(), number)
        sum(range(1000))  # Python looks for signals between instructions

    thing = Thing()
    reference = weakref.ref(thing, gone)
    with pytest.raises(Interrupted, match=f"signal {number.name}"), Stop(CPU, patient=False):
        del thing
        assert reference() is None
        threading.Event().wait(60)  # the signal ends it
    assert "Traceback" not in capfd.readouterr().err
