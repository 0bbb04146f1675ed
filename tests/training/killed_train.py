"""Train, and die of SIGKILL while writing a checkpoint: `python -m tests.training.killed_train RECIPE STEP`."""

import os
import signal
import sys

from training import train


class Killed(train.KeyeTrainer):
    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


if __name__ == "__main__":
    train.KeyeTrainer = Killed
    train.main(sys.argv[1:2])
