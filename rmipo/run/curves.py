"""The pictures that every run leaves: curves of its metrics, and the histogram of its margins."""

from pathlib import Path

import matplotlib
import pandas as pd
import torch

from rmipo.record import read_metrics
from rmipo.training.trainer import PreferenceTrainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW = 9  # log lines of a point of a smoothed curve
PANELS = {
    "rewards/margins": "reward margin",
    "rewards/accuracies": "win rate",
    "common/chosen_avg_logp": "log-prob. of chosen (nats/token)",
    "rmipo/gamma_mean": "gamma",
}


def plot_run(run_dir: str | Path, trainer: PreferenceTrainer) -> dict[str, Path]:
    """The pictures of a finished run, by name: those for which something was logged or evaluated."""
    pictures = {"curves": plot_curves(run_dir)}
    if trainer.objective.name == "rmipo" and trainer.eval_columns is not None:
        bounds = (trainer.objective.gamma_min, trainer.objective.gamma_max)
        pictures["gamma"] = plot_gamma_histogram(trainer.eval_columns["gamma"], bounds, Path(run_dir) / "gamma.png")
    return {name: path for name, path in pictures.items() if path is not None}


def plot_curves(run_dir: str | Path) -> Path | None:
    """`PANELS` over training steps, as `curves.png` in the run's folder; None if nothing of them was logged."""
    frame = pd.DataFrame(read_metrics(run_dir))
    panels = {key: title for key, title in PANELS.items() if key in frame}
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    for axis, (key, title) in zip(axes[0], panels.items(), strict=True):
        training = frame.dropna(subset=key)
        axis.plot(training["step"], training[key], color="C0", alpha=0.3, label="training")
        smooth = training[key].rolling(WINDOW, center=True, min_periods=1).mean()
        axis.plot(training["step"], smooth, color="C0", label=f"training, mean of {WINDOW} lines")
        if f"eval_{key}" in frame:
            held_out = frame.dropna(subset=f"eval_{key}")
            axis.plot(held_out["step"], held_out[f"eval_{key}"], "o--", color="C1", label="held out", markersize=4)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    return _saved(figure, Path(run_dir) / "curves.png")


def plot_gamma_histogram(gamma: torch.Tensor, bounds: tuple[float, float], path: Path) -> Path:
    """Histogram of the margin over pairs, `(pairs,)`, the atoms at the two bounds (gamma_min, gamma_max) drawn apart."""
    low, high = bounds
    at_low, at_high = (gamma <= low + 1e-2), (gamma >= high - 1e-6)
    inner = gamma[~at_low & ~at_high]
    figure, axis = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    weights = torch.full_like(inner, 1 / len(gamma))
    between, edges, _ = axis.hist(
        inner.numpy(), bins=30, range=(low, high), weights=weights.numpy(), label="between the bounds"
    )
    # The atoms stand on the outermost bins, within the bounds.
    for bin_, share, side, colour in ((0, at_low, "lower", "C2"), (-1, at_high, "upper", "C1")):
        fraction, place = share.double().mean().item(), {"align": "edge", "bottom": between[bin_]}
        label = f"{side} bound: {fraction:.0%}"
        axis.bar(edges[:-1][bin_], fraction, width=edges[1] - edges[0], color=colour, label=label, **place)
    axis.set(xlabel="gamma", ylabel="share of pairs", title=f"margin of {len(gamma)} held-out pairs")
    figure.legend(fontsize=7.5, ncols=3, loc="outside lower center")
    return _saved(figure, path)


def _saved(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
