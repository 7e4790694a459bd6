"""train.py, which gives processes that hang IMPATIENCE seconds, not minutes."""

import os
import sys

import images.workers
import train
import utils
from tracking.deadline import exit_now

if __name__ == "__main__":
    images.workers.LOOK_EVERY = 0.5
    images.workers.PATIENCE = utils.RANK_SECONDS = float(os.environ["IMPATIENCE"])
    exit_now(train.run(sys.argv[1:]))
