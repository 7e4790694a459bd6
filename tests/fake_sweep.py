"""sweep.py, its runs by fake_train.py."""

import sys
from pathlib import Path

import studies.launch
import studies.runner
from sweep import run

studies.launch.PROGRAM = str(Path(__file__).with_name("fake_train.py"))
studies.runner.POLL_SECONDS = 0.02
sys.exit(run(sys.argv[1:]))
