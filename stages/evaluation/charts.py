"""Axes of the report's charts."""

import numpy as np


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers from `low` to `high`, about as many as wanted, steps of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
    return [round(float(value), 10) for value in np.arange(np.ceil(low / step) * step, high + step / 1e6, step)]
