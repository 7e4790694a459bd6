"""`python -m tracking upload OUTPUT_DIR`: send a run to a ClearML server."""

import math
import signal
import sys
from collections.abc import Callable, Sequence

from settings.errors import ConfigError, tell
from tracking.deadline import abandon, brief, exit_now, watched
from tracking.server import why_no_files, why_no_server
from tracking.upload import Upload

PUT_BACK_SECONDS = 10.0  # for the status of a task whose upload was interrupted


def main(argv: Sequence[str]) -> int:
    """Carry out the command line; return the exit status: 0 sent, 1 failed, 2 what the user can mend."""
    if len(argv) != 2 or argv[0] != "upload":
        print("usage: python -m tracking upload OUTPUT_DIR", file=sys.stderr)
        return 2
    failed: list[Exception] = []
    uploads: list[Upload] = []

    def in_time(work: Callable[[], None], limit: float) -> bool:
        def caught() -> None:
            try:
                work()
            except Exception as error:  # of the SDK, the network, the server: anything
                failed.append(error)

        return watched(caught, limit, lambda: why_no_server() or why_no_files())

    def upload() -> None:
        uploads.append(Upload(argv[1]))
        uploads[0].send()

    try:
        if not in_time(upload, math.inf):  # as long as the server answers
            abandon("ClearML: the server stopped answering; the same command sends the rest")
            if uploads:
                in_time(uploads[0].put_back, PUT_BACK_SECONDS)
            return 1
    except KeyboardInterrupt:
        abandon("ClearML: interrupted; the same command sends the rest")
        if uploads:
            in_time(uploads[0].put_back, PUT_BACK_SECONDS)
        return 1
    for error in failed:
        if isinstance(error, ConfigError):
            tell(error)
            return 2
        print(f"error: upload: {brief(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, gives the task its status back
    exit_now(main(sys.argv[1:]))
