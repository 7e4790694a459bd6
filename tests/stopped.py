"""train.py, in one process of several, which on rank STOP_RANK is asked to stop at the call of number STOP_CALL."""

import os
import sys

import train
from learning.stop import Stop
from tracking.deadline import exit_now

Stop.AGREE_EVERY = 2  # steps; an epoch of a test has few


def main(argv):
    calls, ask = [0], Stop.__call__

    def counting(self, step=0, budget=True):
        calls[0] += budget  # evaluations are not counted
        if os.environ["RANK"] == os.environ["STOP_RANK"] and calls[0] == int(os.environ["STOP_CALL"]):
            self.ask("the test")
        return ask(self, step, budget)

    Stop.__call__ = counting
    return train.run(argv)


if __name__ == "__main__":
    exit_now(main(sys.argv[1:]))
