"""Export what a run has trained, as a file that other programs run.

    python export.py runs/quickstart --to onnx
    python export.py runs/quickstart --to onnx --preprocessing inside --quantize static
    python export.py runs/quickstart --to hub --upload USER/NAME

The file is run over the run's whole validation set, beside the run's own model. It appears if both give every image the
same class and the same logits to a thousandth; else nothing is written, and the first image they differ on is named.

Exit status: 0 written; 2 wrong input; 1 the rest, a refused file among it.
"""

import sys
from functools import partial

from exports.options import read_options
from settings import early

read = partial(read_options, description=__doc__)
if __name__ == "__main__":
    early.answer(sys.argv[1:], read)  # help and mistakes, before torch is imported

import traceback
from collections.abc import Sequence

from exports.make import export
from settings.errors import ConfigError, RunError, first_line, outside_training, tell


def main(argv: Sequence[str]) -> int:
    """Export; return the exit status. What a user can mend is told in one line, without a traceback."""
    options = None
    try:
        options = read(argv)
        export(options)
        return 0
    except ConfigError as error:
        tell(error)
        return 2
    except KeyboardInterrupt as error:
        tell(f"stopped: {str(error) or 'Ctrl-C'}; an export appears only when it is whole")
        return 1
    except Exception as error:
        if options is not None and options.debug:
            traceback.print_exc()
        if isinstance(error, RunError):
            tell(f"error: {outside_training(error)}")
        else:
            tell(f"error: {type(error).__name__}: {first_line(error)}; --debug shows where")
        return 1


if __name__ == "__main__":
    early.imported()
    sys.exit(main(sys.argv[1:]))
