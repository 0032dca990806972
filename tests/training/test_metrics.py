"""What is logged: ties, the log-ratio accuracy, evaluations in the middle of training, losses that are not finite."""

import json
import types

import pytest
import torch

from rmipo.objectives import build_objective
from rmipo.record import read_metrics
from rmipo.training.finite import NonFiniteLossError, raise_if_not_finite
from rmipo.training.metrics import step_metrics
from tests.helpers.small_models import make_model, make_pairs
from tests.helpers.trainers import make_trainer


def test_ties_are_no_wins_and_ratios_have_their_own_accuracy():
    columns = {
        "chosen_rewards": [1.0, 2.0, 3.0, 0.0],
        "rejected_rewards": [1.0, 2.0, 2.0, 1.0],  # two ties, one win
        "chosen_logps": [-4.0, -6.0, -2.0, -9.0],
        "rejected_logps": [-4.0, -3.0, -8.0, -9.5],  # a tie, a loss, two wins
        "chosen_lengths": [2.0, 6.0, 1.0, 3.0],  # means -2, -1, -2, -3
        "rejected_lengths": [2.0, 3.0, 4.0, 1.0],  # means -2, -1, -2, -9.5: three ties, one win
        "ref_chosen_logps": [-5.0, -7.0, -2.0, -9.0],  # ratios 1, 1, 0, 0
        "ref_rejected_logps": [-5.0, -5.0, -8.0, -10.5],  # ratios 1, 2, 0, 1: no win
    }
    found = step_metrics({name: torch.tensor(v) for name, v in columns.items()}, build_objective({"name": "dpo"}))
    expected = {"rewards/accuracies": 0.25, "common/acc_sum_logp": 0.5, "common/acc_avg_logp": 0.25}
    assert {name: found[name] for name in expected} == expected
    assert found["common/acc_logratio"] == 0.0
    columns["ref_chosen_logps"] = [-9.0, -9.0, -9.0, -9.0]  # ratios 5, 3, 7, 0 against 1, 2, 0, 1
    found = step_metrics({name: torch.tensor(v) for name, v in columns.items()}, build_objective({"name": "dpo"}))
    assert found["common/acc_logratio"] == 0.75


HARDWARE = ("tokens_per_second", "peak_memory_gib", "total_flos")


@pytest.mark.parametrize("objective", [{"name": "rmipo"}, {"name": "alpha-dpo"}], ids=lambda block: block["name"])
def test_an_evaluation_between_log_lines_changes_nothing(tmp_path, objective):
    """Neither the objective's statistics, nor the pairs of the log line that it falls into."""
    make_model("llama").save_pretrained(tmp_path / "initial")
    lines, states = [], []
    for name, options in {"plain": {}, "evaluated": {"eval_strategy": "steps", "eval_steps": 1}}.items():
        trainer = make_trainer(
            tmp_path / name, make_pairs(16, seed=3), objective, global_batch_size=4, logging_steps=2,
            model=make_model("llama").from_pretrained(tmp_path / "initial"), eval_pairs=make_pairs(5, seed=9),
            reference_cache_dir=str(tmp_path / "cache"), **options,
        )  # fmt: skip
        trainer.train()
        states.append(trainer.objective_state)
        lines.append([line for line in read_metrics(tmp_path / name) if "loss" in line])
    plain, evaluated = ([{k: v for k, v in line.items() if k not in HARDWARE} for line in run] for run in lines)
    assert [line["step"] for line in plain] == [2, 4] and evaluated == plain
    assert states[0] == states[1]
    assert bool(states[0]) == (objective["name"] == "alpha-dpo")


def test_an_infinite_loss_stops_the_run(tmp_path):
    micro_batches = [types.SimpleNamespace(rows=[7, 9]), types.SimpleNamespace(rows=[4])]
    alone = types.SimpleNamespace(gather=lambda values: values, rank=0)
    losses = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    raise_if_not_finite(losses, micro_batches, alone, tmp_path, step=3)
    losses[0][1] = float("inf")
    with pytest.raises(NonFiniteLossError, match=r"the loss of step 3 is not finite.*non_finite_rank0\.json"):
        raise_if_not_finite(losses, micro_batches, alone, tmp_path, step=3)
    report = json.loads((tmp_path / "non_finite_rank0.json").read_text())
    assert report == {"step": 3, "pairs": [{"row": 9, "loss": "inf"}], "rows": [[7, 9], [4]]}
