"""GPUs by their data sheets: what they report as memory, their peak, and the share of it that trainings reach."""

from typing import NamedTuple

# GB that a card is sold with -> GiB that CUDA reports of it; of several cards the least. Others: the number as GiB.
REPORTED_GIB = {24: 22.0, 40: 39.4, 48: 44.4, 80: 79.1, 94: 93.1, 96: 94.5, 141: 139.8}


class Speed(NamedTuple):
    """`tflops`: dense bfloat16 peak. `reached`: share of it (from, to) of a training's matrix products, recomputed ones too."""

    tflops: float
    reached: tuple[float, float]


# An A100 is slow enough to be kept busy; torchtitan's table has 33% (eager) to 39% (compiled) for an 8B model on 8 H100.
AMPERE, HOPPER = (0.35, 0.5), (0.2, 0.4)
A100 = Speed(312.0, AMPERE)
# Part of the name that a GPU reports -> its speed; the first that fits.
SPEEDS = {
    "H100 PCIe": Speed(756.0, HOPPER),
    "H100 NVL": Speed(835.0, HOPPER),
    "H100": Speed(989.0, HOPPER),
    "H200": Speed(989.0, HOPPER),
    "H800": Speed(989.0, HOPPER),
    "A100": A100,
    "A800": A100,
}


def speed_of(name: str) -> Speed | None:
    """Of the GPU that reports `name`, None for one that isn't known."""
    return next((speed for part, speed in SPEEDS.items() if part in name), None)


def speed_with(tflops: float) -> Speed:
    """Of a GPU of which the peak alone is known."""
    return Speed(tflops, AMPERE if tflops <= A100.tflops else HOPPER)
