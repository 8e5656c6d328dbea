"""Every schedule is a polyline over steps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Straight lines between (step, value) points of ascending steps; constant before the first and behind the last."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, step: float) -> float:
        (first, value), *rest = self.points
        if step <= first:
            return value
        for (a, start), (b, stop) in zip(self.points, rest, strict=False):
            if step < b:
                return start + (stop - start) * (step - a) / (b - a)
        return self.points[-1][1]


def constant(value: float) -> Schedule:
    return Schedule(((0, value),))


def ramp(start: float, stop: float, steps: float) -> Schedule:
    """From `start` at step 0 to `stop` at step `steps`."""
    return Schedule(((0, start), (steps, stop))) if steps > 0 else constant(stop)


def learning_rate(peak: float, steps: int, warmup: int, decay: int) -> Schedule:
    """Up over the first `warmup` steps (the first of which already learns), level, and down to 0 over the last `decay`.

    The last step, number steps - 1, still has peak / decay. A longer warm-up than steps - decay shortens the decay.
    """
    points: list[tuple[float, float]] = [(-1, 0.0), (warmup - 1, peak)] if warmup > 0 else []
    if decay > 0 and warmup < steps:
        points += [(max(steps - decay, warmup), peak), (steps, 0.0)]
    return Schedule(tuple(points or [(0, peak)]))
