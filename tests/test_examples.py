"""The programs of examples/, as their users start them, give our trainer's losses."""

import sys

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from trl import DPOConfig

from rmipo import OBJECTIVES, PreferenceConfig, PreferenceTrainer, RMiPOConfig, RMiPOTrainer
from tests.helpers.launched import launch
from tests.helpers.paths import ROOT
from tests.helpers.rows import assistant, pair, user, write
from tests.helpers.tiny_model import write_model

sys.path.insert(0, str(ROOT / "examples"))

PAIRS = [
    pair(
        i,
        [user(f"w{i} w{(i * 7) % 20}")],
        [assistant(" ".join(f"w{(i + j) % 20}" for j in range(1 + i % 4)))],
        [assistant(" ".join(f"w{(3 * i + j + 5) % 20}" for j in range(2 + i % 3)))],
    )
    for i in range(16)
]
SAME = {
    "max_steps": 4, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "logging_steps": 1, "bf16": False,
    "max_length": 64, "use_cpu": True, "report_to": "none", "save_strategy": "no", "seed": 1,
    "lr_scheduler_type": "linear", "warmup_steps": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write(tmp_path_factory.mktemp("data") / "train.jsonl", PAIRS))


def rows(path):
    return load_dataset("json", data_files=path, split="train")


def train(model, data, **options) -> list[str]:
    options = SAME | {"max_prompt_length": 32} | options
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["examples/train.py", "--model_name_or_path", model, "--dataset_name", data, *words]


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_trls_trainer_with_our_loss_gives_our_losses(model, data, tmp_path):
    from trl_dpo_trainer import RMiPOinDPOTrainer

    args = DPOConfig(output_dir=str(tmp_path / "trl"), precompute_ref_log_probs=True, **SAME)
    theirs = RMiPOinDPOTrainer(model, args=args, train_dataset=rows(data))
    args = RMiPOConfig(output_dir=str(tmp_path / "ours"), max_prompt_length=32, prior_model="initial", **SAME)
    ours = RMiPOTrainer(model, args, train_dataset=rows(data))
    theirs.train()
    ours.train()
    assert losses(theirs) == pytest.approx(losses(ours), rel=1e-4) and len(losses(ours)) == 4
    gammas = [line["rmipo/gamma_mean"] for line in ours.state.log_history if "loss" in line]
    assert [line["gamma"] for line in theirs.state.log_history if "loss" in line] == pytest.approx(gammas, rel=1e-4)
    assert max(gammas) - min(gammas) > 1e-3  # so that a constant would not do


@pytest.fixture
def hinge():
    from own_loss import Hinge

    yield Hinge
    del OBJECTIVES["hinge"]  # other tests go through them


def test_a_loss_of_ones_own_trains(model, data, tmp_path, hinge):
    objective = {"name": "hinge", "delta": 0.5}
    args = PreferenceConfig(output_dir=str(tmp_path), max_prompt_length=32, objective=objective, **SAME)
    trainer = PreferenceTrainer(model, args, rows(data), eval_dataset=rows(data))
    metrics = trainer.evaluate()
    margins = trainer.eval_columns["chosen_rewards"] - trainer.eval_columns["rejected_rewards"]
    assert metrics["eval_loss"] == pytest.approx((0.5 - margins).clamp(min=0).mean().item(), rel=1e-5)
    assert OBJECTIVES["hinge"] is hinge
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < metrics["eval_loss"]


def test_the_script_trains_what_the_trainer_trains_and_goes_on_after_it_ended(model, data, tmp_path):
    run = launch(train(model, data, save_strategy="steps", save_steps=2, output_dir=tmp_path / "out"))
    assert run.wait() == 0, run.output[-3000:]
    args = RMiPOConfig(output_dir=str(tmp_path / "api"), max_prompt_length=32, **SAME)
    trainer = RMiPOTrainer(model, args, train_dataset=rows(data))
    trainer.train()
    expected = trainer.model.state_dict()
    for name, value in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("program", ["own_loss.py", "trl_dpo_trainer.py"])
def test_the_programs_start_as_their_first_lines_say(model, data, program):
    run = launch([f"examples/{program}", model, data])
    assert run.wait() == 0, run.output[-3000:]
    assert "train_loss" in run.output
