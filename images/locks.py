"""One program at a time: what several runs would otherwise fetch or decode each for itself."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def locked(path: str, waiting: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file within the block; yield whether no other program is within.

    Where files cannot be locked (some network disks) the block is entered all the same, and nothing keeps others out.

    waiting: said before it waits for another program
    wait: else the block is entered without the lock where another program has it, and False yielded
    """
    from filelock import FileLock, Timeout  # brings asyncio: a plan or a mistake need not wait for it

    lock = FileLock(path)
    alone = True
    try:
        lock.acquire(timeout=0)
    except Timeout:
        alone = wait
        if wait:
            print(waiting, flush=True)
            with suppress(OSError):  # of a network disk that goes away
                lock.acquire()
    except (OSError, NotImplementedError):
        pass
    try:
        yield alone
    finally:
        lock.release()
