"""The pictures that every run leaves: curves of its metrics, and the histogram of its margins."""

from pathlib import Path

import pandas as pd
import torch

from rmipo.plots import BLUE, GREEN, ORANGE, house_style, panels, save
from rmipo.record import read_metrics
from rmipo.training.trainer import PreferenceTrainer

WINDOW = 9  # log lines around each point of a smoothed curve


def plot_run(run_dir: str | Path, trainer: PreferenceTrainer) -> dict[str, Path]:
    """The pictures of a finished run, by name: those for which something was logged or evaluated."""
    pictures = {"curves": plot_curves(run_dir)}
    if trainer.objective.name == "rmipo" and trainer.eval_columns is not None:
        bounds = (trainer.objective.gamma_min, trainer.objective.gamma_max)
        pictures["gamma"] = plot_gamma_histogram(trainer.eval_columns["gamma"], bounds, Path(run_dir) / "gamma.png")
    return {name: path for name, path in pictures.items() if path is not None}


@house_style
def plot_curves(run_dir: str | Path) -> Path | None:
    """Margin, win rate, log-prob. of chosen responses and gamma over steps, as `curves.png`; None if none was logged."""
    shown = {
        "reward margin": "rewards/margins",
        "win rate": "rewards/accuracies",
        "log-prob. of chosen (nats/token)": "common/chosen_avg_logp",
        "gamma": "rmipo/gamma_mean",
    }
    # From the file and not from memory: a resumed run's picture shows all of it.
    lines = pd.DataFrame(read_metrics(run_dir))
    shown = {title: key for title, key in shown.items() if key in lines}
    if not shown:
        return None
    figure, axes = panels(min(2, len(shown)), rows=(len(shown) + 1) // 2)
    for axis, (title, key) in zip(axes, shown.items(), strict=False):
        training = lines.dropna(subset=key)  # a line has the metrics of training or of an evaluation
        smooth = training[key].rolling(WINDOW, center=True, min_periods=1).mean()
        axis.plot(training["step"], training[key], color=BLUE, alpha=0.3, label="training")
        axis.plot(training["step"], smooth, color=BLUE, label=f"training, mean of {WINDOW} lines")
        if f"eval_{key}" in lines:
            held_out = lines.dropna(subset=f"eval_{key}")
            axis.plot(held_out["step"], held_out[f"eval_{key}"], "o--", color=ORANGE, label="held out", markersize=4)
        if key == "rmipo/gamma_mean":
            std = training["rmipo/gamma_std"]
            band = (training[key] - std, training[key] + std)
            axis.fill_between(training["step"], *band, color=BLUE, alpha=0.1, label="± 1 std over pairs")
        axis.set(title=title, xlabel="optimizer step")
        axis.legend()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    return save(figure, Path(run_dir) / "curves.png", (".png",))[0]


@house_style
def plot_gamma_histogram(gamma: torch.Tensor, bounds: tuple[float, float], path: Path) -> Path:
    """Histogram of the margin over pairs, the atoms at the two bounds drawn apart.

    Args:
        gamma: `(pairs,)`.
        bounds: `(gamma_min, gamma_max)`.
    """
    low, high = bounds
    at_low, at_high = (gamma <= low + 1e-2), (gamma >= high - 1e-6)
    inner = gamma[~at_low & ~at_high]
    figure, (axis,) = panels(1, height=3.0)
    weights = torch.full_like(inner, 1 / len(gamma))
    between, edges, _ = axis.hist(
        inner.numpy(), bins=30, range=(low, high), weights=weights.numpy(), label="between the bounds"
    )
    # The atoms stand on the outermost bins, within the bounds.
    for bin_, share, side, colour in ((0, at_low, "lower", GREEN), (-1, at_high, "upper", ORANGE)):
        fraction, place = share.double().mean().item(), {"align": "edge", "bottom": between[bin_]}
        label = f"{side} bound: {fraction:.0%}"
        axis.bar(edges[:-1][bin_], fraction, width=edges[1] - edges[0], color=colour, label=label, **place)
    axis.set(xlabel="gamma", ylabel="share of pairs", title=f"margin of {len(gamma)} held-out pairs")
    figure.legend(ncols=3, loc="outside lower center")
    return save(figure, path, (".png",))[0]
