"""The pictures that every run leaves: curves of its metrics, and the distribution of its margins."""

from pathlib import Path

import pandas as pd
import torch

from rmipo.plots import BLUE, ORANGE, draw_gamma, house_style, panels, save
from rmipo.record import read_metrics
from rmipo.training.trainer import PreferenceTrainer

WINDOW = 9  # log lines around each point of a smoothed curve


def plot_run(run_dir: str | Path, trainer: PreferenceTrainer) -> dict[str, Path]:
    """The pictures of a finished run, by name: those for which something was logged or evaluated."""
    pictures = {"curves": plot_curves(run_dir)}
    if trainer.objective.name == "rmipo" and trainer.eval_columns is not None:
        bounds = (trainer.objective.gamma_min, trainer.objective.gamma_max)
        pictures["gamma"] = plot_gamma(trainer.eval_columns["gamma"], bounds, Path(run_dir) / "gamma.png")
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
        axis.set(title=title, xlabel="optimizer step")
        axis.legend()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    return save(figure, Path(run_dir) / "curves.png", (".png",))[0]


@house_style
def plot_gamma(gamma: torch.Tensor, bounds: tuple[float, float], path: Path) -> Path:
    """Distribution of the margin over pairs. `gamma`: (pairs,); `bounds`: (gamma_min, gamma_max)."""
    figure, (axis,) = panels(1, height=3.0)
    draw_gamma(axis, gamma.double().numpy(), bounds)
    axis.set(xlabel="gamma", title=f"margin of {len(gamma)} held-out pairs")
    return save(figure, path, (".png",))[0]
