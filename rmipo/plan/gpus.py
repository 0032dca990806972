"""GPUs by their data sheets: what they report as memory, their peak, and the share of it that trainings reach."""

from typing import NamedTuple

# GB that a card is sold with -> GiB that CUDA reports of it; of several cards the least. Others: the number as GiB.
REPORTED_GIB = {24: 22.0, 40: 39.4, 48: 44.4, 80: 79.1, 94: 93.1, 96: 94.5, 141: 139.8}
# Part of the name that a GPU reports -> dense bfloat16 peak in TFLOP/s; the first that fits.
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
}
A100 = 312.0


class Speed(NamedTuple):
    """`tflops`: the peak. `reached`: share of it (from, to) of a training's matrix products, recomputed ones too."""

    tflops: float
    reached: tuple[float, float]


def speed_with(tflops: float) -> Speed:
    """Of a GPU with this peak."""
    # An A100 is slow enough to be kept busy; torchtitan has 33% (eager) to 39% (compiled) for an 8B model on 8 H100.
    return Speed(tflops, (0.35, 0.5) if tflops <= A100 else (0.2, 0.4))


def speed_of(name: str) -> Speed | None:
    """Of the GPU that reports `name`, None for one that isn't known."""
    return next((speed_with(peak) for part, peak in PEAKS.items() if part in name), None)
