"""sweep.py, its runs by fake_train.py."""

import sys
from pathlib import Path

import studies.launch
import studies.runner
from settings.errors import ConfigError, tell
from sweep import main, read_options

studies.launch.PROGRAM = str(Path(__file__).with_name("fake_train.py"))
studies.runner.POLL_SECONDS = 0.02
try:
    sys.exit(main(*read_options(sys.argv[1:])))
except ConfigError as error:
    tell(error)
    sys.exit(2)
