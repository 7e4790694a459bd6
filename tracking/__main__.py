"""`python -m tracking upload OUTPUT_DIR`: send a run to a ClearML server."""

import sys

from tracking.run import leave, main

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
