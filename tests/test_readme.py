"""The README's examples run as printed; the values of the loss follow from Eq. 8 by hand."""

import json
import math
import re
from pathlib import Path

import pytest

from tests.helpers.families import save
from tests.helpers.launched import launch
from tests.helpers.rows import assistant, user

README = Path(__file__).parents[1] / "README.md"
FIVE_LINES, OTHER_METHOD, LOSS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """What the hub names of the examples stand for: a small model and pairs in the form of that dataset."""
    folder = tmp_path_factory.mktemp("readme")
    save("llama3", folder / "model", max_position_embeddings=2048)
    rows = [
        {"chosen": [user(f"q{i}"), assistant(f"yes {i}")], "rejected": [user(f"q{i}"), assistant("no")]}
        for i in range(20)
    ]
    (folder / "pairs").mkdir()
    (folder / "pairs/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "HuggingFaceTB/SmolLM2-135M-Instruct": folder / "model",
        "trl-lib/ultrafeedback_binarized": folder / "pairs",
    }


@pytest.mark.parametrize("code", [FIVE_LINES, OTHER_METHOD], ids=["five lines", "another method"])
def test_the_trainers_of_the_examples_train(code, local, tmp_path):
    for name, path in local.items():
        code = code.replace(f'"{name}"', f'"{path}"')
    before = f"import os; os.chdir({str(tmp_path)!r})\nfrom datasets import load_dataset\n"
    before += f"pairs = load_dataset({str(local['trl-lib/ultrafeedback_binarized'])!r}, split='train')\n"
    run = launch(["-c", f"{before}{code}\ntrainer.save_model(); print(trainer.train())"])
    assert run.wait() == 0, run.output[-3000:]
    folder = "smollm2-rmipo" if code.startswith("from datasets") else "simpo"
    assert (tmp_path / folder / "model.safetensors").exists() and "20 of 20 rows used" in run.output


def test_the_loss_example_runs_and_is_right():
    names: dict = {}
    exec(LOSS, names)
    expected = []
    for chosen, rejected, prior_chosen, prior_rejected, n, m in (
        (-42, -55, -90, -80, 30, 32),
        (-310, -290, -420, -405, 210, 200),
    ):
        delta_pmi = (chosen - prior_chosen) / n - (rejected - prior_rejected) / m
        gamma = 0.3 + 1.3 * math.exp(-max(0, delta_pmi))
        expected.append((math.log1p(math.exp(-(2 * chosen / n - 2 * rejected / m - gamma))), gamma))
    assert names["losses"].tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert names["gamma"].tolist() == pytest.approx([gamma for _, gamma in expected], rel=1e-5)
