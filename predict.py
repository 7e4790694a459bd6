"""Say what the model of a run sees in images.

    python predict.py runs/imagenette_s photos                        # a folder and all below it, as CSV
    python predict.py runs/imagenette_s a.jpg b.png --format jsonl --top 3
    find photos -name '*.jpg' | python predict.py runs/imagenette_s - --output predictions.csv
    python predict.py runs/imagenette_s photos --sort sorted --gallery gallery.html --gradcam

Images are prepared as the run's own validation images are, at its test size. Rows come in the order of the images, one
for each, also for one that cannot be read; memory does not limit how many.

Exit status: 0 done; 1 some images could not be read, or something failed; 2 wrong input, or no image could be read;
3 stopped early, what was written is valid.
"""

import sys

from inference.options import read_options
from settings import early

if __name__ == "__main__":
    early.answer(sys.argv[1:], read_options)  # help and mistakes, before torch is imported

import traceback
from collections.abc import Sequence

from inference.program import carry_out
from learning.rehearse import is_out_of_memory
from learning.stop import interruptible
from settings.errors import ConfigError, RunError, first_line, outside_training, tell
from tracking.deadline import exit_now


def run(argv: Sequence[str]) -> int:
    """Run the program; return the exit status. What a user can mend is told in one line, without a traceback."""
    options = None
    try:
        with interruptible():
            options = read_options(argv)
            return carry_out(options)
    except ConfigError as error:
        tell(error)
        return 2
    except KeyboardInterrupt as error:
        to_file = options is not None and options.output is not None
        tell(f"stopped: {error}" + ("" if to_file else "; the rows written so far are whole"))
        return 3
    except BrokenPipeError:  # of `| head`, which has what it wanted
        return 3
    except Exception as error:
        if options is not None and options.debug:
            traceback.print_exc()
        tell(f"error: {told(error)}")
        return 1


def told(error: Exception) -> str:
    """Say in one line what an error was and what helps."""
    if isinstance(error, RunError):
        return outside_training(error)
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return f"out of memory ({first_line(error)}); lower --batch-size or --workers"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {first_line(error)}; --debug shows where"


if __name__ == "__main__":
    early.imported()
    exit_now(run(sys.argv[1:]))
