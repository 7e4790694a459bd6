"""Export what a run has trained, as a file that other programs run.

    python export.py runs/quickstart --to onnx
    python export.py runs/quickstart --to onnx --preprocessing inside --quantize static
    python export.py runs/quickstart --to hub --upload USER/NAME

The file is run over the run's whole validation set, beside the run's own model. It appears if both give every image the
same class and the same logits to a thousandth; else nothing is written, and the first image they differ on is named.

Exit status: 0 written; 2 wrong input; 1 the rest, a refused file among it.
"""

import sys
import traceback
from collections.abc import Sequence

from exports.options import read_options
from settings.errors import ConfigError, RunError, first_line, tell


def main(argv: Sequence[str]) -> int:
    """Export; return the exit status."""
    debug = "--debug" in argv
    try:
        options = read_options(argv, __doc__)
        from exports.make import export  # brings torch, which takes seconds: mistakes are told before

        export(options)
        return 0
    except ConfigError as error:
        tell(error)
        return 2
    except KeyboardInterrupt as error:
        tell(f"stopped: {str(error) or 'Ctrl-C'}; an export appears only when it is whole")
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = isinstance(error, RunError)
        tell(f"error: {error if known else f'{type(error).__name__}: {first_line(error)}; --debug shows where'}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
