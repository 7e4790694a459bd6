"""The order of what a pretended device does, and what it costs: notes, streams, events, copies under way."""

import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

ROOT = str(Path(__file__).resolve().parent.parent)
OWN = str(Path(__file__).with_name("pretended_"))


class Notes:
    """What was asked of the device since the last `clear`: each a count by name and by the line that asked."""

    def __init__(self):
        self.kernels, self.copies, self.waits = Counter(), Counter(), Counter()

    def clear(self):
        for counts in (self.kernels, self.copies, self.waits):
            counts.clear()


notes = Notes()


def asker():
    """The line of the project that is being carried out."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and "site-packages" not in name and not name.startswith(OWN):
            return f"{name[len(ROOT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class Race(AssertionError):
    """Memory was used in one stream while another may still be at work on it."""


class Clock:
    """How far a stream, or the host, knows the streams to have come: number of operations of each."""

    def __init__(self, known=None):
        self.known = Counter(known or {})

    def learn(self, other):
        self.known |= other.known  # the larger of each

    def has_seen(self, stream, time):
        return self.known[stream] >= time


class Stream(Clock):
    current: ClassVar[list["Stream"]] = []

    def __init__(self, device=None, priority=0):
        super().__init__()

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def wait_stream(self, other):
        self.learn(other)

    def wait_event(self, event):
        self.learn(event)

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self):
        wait_for(self, "Stream.synchronize")

    def query(self):
        return True


class Event(Clock):
    def __init__(self, *args, **kwargs):
        super().__init__()

    def record(self, stream=None):
        self.known = Counter((stream or Stream.current[-1]).known)

    def wait(self, stream=None):
        (stream or Stream.current[-1]).learn(self)

    def synchronize(self):
        arrive(self)  # not noted as a wait: what one waits for behind an event may be long done

    def query(self):
        arrive(self)
        return True


host = Clock()
Stream.current.append(Stream())
memory = {}  # by address: [stream and time of the last write, those of reads since]
under_way = []  # copies to the host: (destination, numbers, stream, time)


def arrive(clock):
    """Have the host know what `clock` does; copies that are done by then arrive."""
    host.learn(clock)
    for copy in [copy for copy in under_way if host.has_seen(*copy[2:])]:
        under_way.remove(copy)
        copy[0].copy_(copy[1])


def wait_for(clock, what):
    notes.waits[what, asker()] += 1
    arrive(clock)


def place(inner):
    return inner.untyped_storage().data_ptr()


def in_order(name, read, written, new):
    """Note an operation of the current stream; raise Race where another may not be done with the memory."""
    stream = Stream.current[-1]
    stream.learn(host)
    stream.known[stream] += 1
    now, changed = (stream, stream.known[stream]), {id(inner) for inner in written}
    for inner in (*read, *written):
        write, reads = memory.setdefault(place(inner), [now, []])
        for other in [write, *(reads if id(inner) in changed else [])]:
            if not stream.has_seen(*other):
                raise Race(f"{name} at {asker()} uses memory of another stream, which was not waited for")
    for inner in read:
        reads = memory[place(inner)][1]
        reads[:] = [other for other in reads if other[0] is not stream] + [now]
    for inner in (*written, *new):
        memory[place(inner)] = [now, []]
