"""Every figure by its script, from runs that were trained and evaluated by theirs: on a world of few facts."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from rmipo.reporting.figures_pairs import gamma_readings, hh_signals
from rmipo.reporting.results import load_run
from rmipo.tiny.files import write_world
from rmipo.tiny.world import load_world_config
from tests.helpers.launched import launch
from tests.helpers.paths import ROOT

SMALL = {"names": 4, "values_per_attribute": 4, "sft_train": 60, "sft_test": 8, "pairs_train": 64, "pairs_test": 48}
SMALL |= {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 32}
METRIC = "eval_common/acc_avg_logp"
# run -> overlay and overrides; those of Figure 2 lie where `make sweep` puts its points
RUNS = {
    "rmipo": ("", []),
    "simper": ("simper", []),
    "dpo": ("dpo", ["--objective.beta=0.1"]),
    "simpo": ("simpo", ["--objective.beta=2", "--objective.gamma=1"]),
    "sweep-dpo/beta-1": ("dpo", ["--objective.beta=1"]),
    "sweep-simpo/beta-8": ("simpo", ["--objective.beta=8", "--objective.gamma=1"]),
    "sweep-simpo/gamma-1.6": ("simpo", ["--objective.beta=2", "--objective.gamma=1.6"]),
}
SHORT = ["--max_steps", "6", "--warmup_steps", "0", "--learning_rate", "2e-2"]
SHORT += ["--save_strategy", "no", "--generation_samples", "1", "--generation_max_new_tokens", "2"]


def train(run: str, overlay: str, overrides: list[str]) -> list[str]:
    laid_over = ["--overlay", str(ROOT / f"recipes/methods/{overlay}.yaml")] if overlay else []
    command = ["preference.py", "--config", str(ROOT / "recipes/tiny/rmipo.yaml"), *laid_over, *SHORT, *overrides]
    return [*command, "--eval_steps", "3", "--output_dir", f"outputs/tiny/{run}"]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "recipes").symlink_to(ROOT / "recipes")  # programs run where recipes/ and outputs/ are
    config = dataclasses.replace(load_world_config(ROOT / "recipes/tiny/world.yaml"), **SMALL)
    write_world(folder / "outputs/tiny/world", config)
    (folder / "outputs/tiny/sft").symlink_to(folder / "outputs/tiny/world/model")  # untrained: nothing here needs more
    steps = [train(run, *how) for run, how in RUNS.items()]
    for method in ("initial", "dpo", "simpo", "simper", "rmipo"):
        steps.append(["evaluate.py", "--model", "tiny", "--method", method, "--bench", "hh"])
    for number in (2, 3, 5, 6, 7, 8):
        metric = ["--metric", METRIC] if number == 2 else []
        steps.append(["figure.py", "--number", str(number), "--model", "tiny", *metric])
    for script, *arguments in steps:
        run = launch([str(ROOT / "scripts" / script), *arguments], root=folder)
        assert run.wait() == 0, run.output[-3000:]
    return folder / "outputs"


@pytest.mark.parametrize("number", [2, 3, 5, 6, 7, 8])
def test_every_figure_is_drawn(outputs, number):
    name = f"figure{number}-tiny" + (f"-{METRIC.replace('/', '-')}" if number == 2 else "")  # a file for each metric
    pixels = imread(outputs / f"reports/{name}.png")
    assert pixels.shape[1] == 1350 and pixels[..., :3].std() > 0.02  # 6.75 inches at 200 dpi, not blank
    assert (outputs / f"reports/{name}.pdf").read_bytes().startswith(b"%PDF")


def test_figures_and_the_page_show_what_trainings_and_evaluations_found(outputs, monkeypatch):
    signals, _ = hh_signals(outputs, "tiny", "initial")
    scores = torch.load(outputs / "tiny/initial/eval/hh_harmless.pt", weights_only=True)
    sides = [scores[f"{side}_logps"] / scores[f"{side}_lengths"] for side in ("chosen", "rejected")]
    assert np.allclose(signals["harmless"]["loglik"], sides[0] - sides[1]) and len(sides[0]) == SMALL["pairs_test"]
    monkeypatch.chdir(outputs.parent)  # where the recipe's paths lead
    readings = gamma_readings(load_run(outputs, "tiny", "rmipo"), "test", 4000)
    logged = json.loads((outputs / "tiny/rmipo/run.json").read_text())["results"]["eval_rmipo/gamma_mean"]
    assert readings["per token, as in the recipe"].gamma.mean() == pytest.approx(logged, abs=1e-5)
    script, env = str(ROOT / "scripts/look.py"), {"MODEL": "tiny", "AFTER": "rmipo"}
    command = [sys.executable, script, "--split", "test"]
    subprocess.run(command, cwd=outputs.parent, env=os.environ | env, check=True)
    page = (outputs / "reports/look-tiny.html").read_text("utf-8")
    summary = json.loads(re.search(r'id="summary">(.*?)</script>', page, re.DOTALL)[1])
    logged = json.loads((outputs / "tiny/rmipo/run.json").read_text())
    assert {"name": "rmipo"} | summary["objective"] == logged["objective"]
    assert len(summary["pairs"]) == logged["data"]["test"]["kept"]
    chosen, rejected = np.array([pair["after"] for pair in summary["pairs"]]).swapaxes(0, 1)
    delta = (chosen[:, 0] - chosen[:, 1]) / chosen[:, 2] - (rejected[:, 0] - rejected[:, 1]) / rejected[:, 2]
    mean = logged["results"]["eval_rmipo/delta_pmi_mean"]  # in float32
    assert delta.mean() == pytest.approx(mean, abs=0.02)
    assert [pair["sides"] for pair in summary["pairs"]] != [pair["after"] for pair in summary["pairs"]]
