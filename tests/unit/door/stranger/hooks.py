import os
import signal
import time


class Die:
    def __init__(self, at, kept):
        self.at, self.kept = at, kept

    def on_update(self, step, metrics):
        print(f"saw {step}: {metrics['user/data']}")
        if step == self.at:
            while not os.path.exists(self.kept):  # another thread writes the checkpoint
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
