"""A callback of your own: some of on_update, on_evaluation, on_checkpoint and on_end."""


class StopWhenFlat:
    """Stops the run once the energy gap has stayed small for a while."""

    def __init__(self, below: float = 0.05, updates: int = 50) -> None:
        self.below, self.updates, self.flat = below, updates, 0

    def on_update(self, step, metrics):
        self.flat = self.flat + 1 if abs(metrics["energy/gap"]) < self.below else 0
        return self.flat >= self.updates  # True asks the run to stop

    def on_end(self, result):
        print(f"{result.step} updates; finished: {result.finished}")
