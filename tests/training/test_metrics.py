"""What is logged: ties, the log-ratio accuracy, evaluations in the middle of training, losses that are not finite."""

import json
import types

import pytest
import torch
from datasets import Dataset

from rmipo.objectives import build_objective
from rmipo.record import read_metrics
from rmipo.training.metrics import NonFiniteLossError, evaluation_metrics, raise_if_not_finite, step_metrics
from tests.helpers.small_models import make_model, make_pairs, make_trainer, rows_per_step


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
    means = {"rewards/chosen": 1.5, "rewards/rejected": 1.5, "rewards/margins": 0.0, "logps/chosen": -5.25}
    means |= {"logps/rejected": -6.125, "common/chosen_avg_logp": -2.0, "common/margin_avg_logp": 1.625}
    assert {name: found[name] for name in means} == means
    assert found["common/acc_logratio"] == 0.0
    columns["ref_chosen_logps"] = [-9.0, -9.0, -9.0, -9.0]  # ratios 5, 3, 7, 0 against 1, 2, 0, 1
    columns["chosen_logps"][0] = -(2.0**24)  # with which float32 could not add the other numbers up
    found = step_metrics({name: torch.tensor(v) for name, v in columns.items()}, build_objective({"name": "dpo"}))
    assert found["common/acc_logratio"] == 0.5 and found["logps/chosen"] == -(2**24 + 17) / 4


@pytest.mark.parametrize("name", ["rmipo", "dpo", "kto", "beta-dpo", "epsilon-dpo", "cpo"])
def test_what_an_evaluation_logs_is_known_before_it(tmp_path, name):
    reference = make_model("llama") if name == "epsilon-dpo" else None
    pairs = make_pairs(6, seed=3)
    trainer = make_trainer(tmp_path, pairs, {"name": name}, eval_pairs=pairs, ref_model=reference)
    if "reference" in trainer.objective.needs:
        fields = [f"{kind}_logps" for kind in ("ref_chosen", "ref_rejected")]
        fields += [f"ref_mismatched_{side}_logps" for side in ("chosen", "rejected")] * (name == "kto")
        trainer.eval_dataset.scores = {field: torch.rand(6) for field in fields}
    logged = [metric.removeprefix("eval_") for metric in trainer.evaluate() if metric.startswith("eval_")]
    speed = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    assert [metric for metric in logged if metric not in speed] == evaluation_metrics(trainer.objective)


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
        states.append(trainer.objective_state | {"head": trainer.model.lm_head.weight.detach()})
        lines.append([line for line in read_metrics(tmp_path / name) if "loss" in line])
    plain, evaluated = ([{k: v for k, v in line.items() if k not in HARDWARE} for line in run] for run in lines)
    assert [line["step"] for line in plain] == [2, 4] and evaluated == plain
    assert states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )
    assert (len(states[0]) > 1) == (objective["name"] == "alpha-dpo")


def test_the_order_of_pairs_follows_the_seed_of_the_data(tmp_path):
    def order(**seeds):
        return rows_per_step(make_trainer(tmp_path, make_pairs(16, seed=3), **seeds))

    assert order(seed=5) == order(seed=6, data_seed=5) != order(seed=5, data_seed=6)


def test_held_out_pairs_are_scored_in_their_order(tmp_path):
    pairs = make_pairs(7, seed=3)
    trainer = make_trainer(tmp_path, pairs, eval_pairs=pairs)
    metrics = trainer.evaluate()
    assert metrics["eval_samples_per_second"] * metrics["eval_runtime"] == pytest.approx(7, rel=0.05)
    for metric, column in (("logps/chosen", "chosen_logps"), ("rmipo/gamma_mean", "gamma")):
        mean = trainer.eval_columns[column].double().mean().item()
        assert metrics[f"eval_{metric}"] == pytest.approx(mean, abs=1e-6)  # over all seven, in batches of three
    lengths = trainer.eval_columns["chosen_lengths"].tolist()
    assert lengths == [len(pair["chosen_ids"]) for pair in pairs]
    others = trainer.evaluate(Dataset.from_list(pairs[:2]), metric_key_prefix="other")
    assert trainer.eval_columns["chosen_lengths"].tolist() == lengths[:2]
    assert others["other_loss"] == pytest.approx(trainer.eval_columns["losses"].mean().item())
    assert not any(name.startswith("eval_") for name in others)


def test_an_infinite_loss_stops_the_run(tmp_path):
    rows = ([7, 9], [4])
    micro_batches = [types.SimpleNamespace(rows=own, cut=types.SimpleNamespace(real=len(own))) for own in rows]
    finite = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    raise_if_not_finite(finite, micro_batches, tmp_path, step=3)
    path = tmp_path / "non_finite_rank0.json"
    for number, place, value in ((0, 1, "inf"), (1, 0, "-inf"), (1, 0, "nan")):
        losses = [values.clone() for values in finite]
        losses[number][place] = float(value)
        with pytest.raises(NonFiniteLossError) as error:
            raise_if_not_finite(losses, micro_batches, tmp_path, step=3)
        assert "step 3" in str(error.value) and str(path) in str(error.value)
        report = json.loads(path.read_text())
        assert report["step"] == 3 and [pair["row"] for pair in report["pairs"]] == [7, 9, 4]
        assert report["pairs"][2 * number + place]["loss"] == value
