"""What is logged: ties, the log-ratio accuracy, evaluations in the middle of training, losses that are not finite."""

import json
import time
import types
from unittest import mock

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from rmipo.objectives import build_objective
from rmipo.record import read_metrics
from rmipo.training.batching import PairDataset
from rmipo.training.metrics import NonFiniteLossError, evaluation_metrics, raise_if_not_finite, step_metrics
from tests.helpers.small_models import make_model, make_pairs
from tests.helpers.trainers import make_trainer, rows_per_step


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
        states.append(trainer.objective_state)
        lines.append([line for line in read_metrics(tmp_path / name) if "loss" in line])
    plain, evaluated = ([{k: v for k, v in line.items() if k not in HARDWARE} for line in run] for run in lines)
    assert [line["step"] for line in plain] == [2, 4] and evaluated == plain
    assert states[0] == states[1]
    assert bool(states[0]) == (objective["name"] == "alpha-dpo")


def test_tokens_and_operations_are_those_of_all_micro_batches(tmp_path):
    """6 operations per weight and token with gradient, 2 for log pi(y); the input embedding is looked up."""
    trainer = make_trainer(tmp_path, make_pairs(8, seed=3))
    (step,) = trainer.get_train_dataloader()
    positions = [micro_batch.pairs.length for micro_batch in step]
    assert len(positions) == 4
    trainer.training_step(trainer.model, step)
    assert trainer.window.tokens == sum(positions)
    assert sum(len(columns["losses"]) for columns in trainer.window.columns) == 8
    weights = sum(p.numel() for p in trainer.model.parameters()) - trainer.model.model.embed_tokens.weight.numel()
    prior = sum(micro_batch.prior.length for micro_batch in step)
    assert trainer.floating_point_ops(step) == weights * (6 * sum(positions) + 2 * prior)
    trainer.window.start = time.perf_counter() - 100
    line = {"loss": 1.0}
    trainer.log(line)
    assert line["tokens_per_second"] == pytest.approx(sum(positions) / 100, rel=0.1)
    assert (trainer.window.tokens, trainer.window.columns) == (0, [])  # the next line is of the pairs after this one
    line = {"loss": 1.0}
    trainer.log(line)
    assert "tokens_per_second" not in line


def test_the_order_of_pairs_follows_the_seed_of_the_data(tmp_path):
    def order(**seeds):
        return rows_per_step(make_trainer(tmp_path, make_pairs(16, seed=3), **seeds))

    assert order(seed=5) == order(seed=6, data_seed=5) != order(seed=5, data_seed=6)
    assert order(seed=0) == order(seed=5, data_seed=0)


def test_held_out_pairs_are_scored_in_their_order_with_the_statistics_of_training(tmp_path):
    pairs = make_pairs(7, seed=3)
    trainer = make_trainer(tmp_path, pairs, eval_pairs=pairs)
    counted = mock.Mock(wraps=TrainerCallback())
    trainer.add_callback(counted)
    metrics = trainer.evaluate()
    assert counted.on_prediction_step.call_count == 3  # a progress bar has one step each
    assert metrics["eval_samples_per_second"] * metrics["eval_runtime"] == pytest.approx(7, rel=0.05)
    for metric, column in (("logps/chosen", "chosen_logps"), ("rmipo/gamma_mean", "gamma")):
        mean = trainer.eval_columns[column].double().mean().item()
        assert metrics[f"eval_{metric}"] == pytest.approx(mean, abs=1e-6)  # over all seven, in batches of three
    lengths = trainer.eval_columns["chosen_lengths"].tolist()
    assert lengths == [len(pair["chosen_ids"]) for pair in pairs]
    assert len(set(lengths)) > 3
    others = trainer.evaluate(PairDataset(Dataset.from_list(pairs[:2])), metric_key_prefix="other")
    assert trainer.eval_columns["chosen_lengths"].tolist() == lengths[:2]
    assert others["other_loss"] == pytest.approx(trainer.eval_columns["losses"].mean().item())
    assert not any(name.startswith("eval_") for name in others)
    pairs = make_pairs(5, seed=3)
    trainer = make_trainer(tmp_path, pairs, {"name": "alpha-dpo"}, eval_pairs=pairs)
    trainer.eval_dataset.scores = {f"ref_{side}_logps": torch.zeros(5) for side in ("chosen", "rejected")}
    values = {"gap_mean": 0.25, "gap_std": 0.5, "steps": 1e6}  # so many that the bias correction is 1
    trainer.objective_state = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    metrics = trainer.evaluate()
    assert metrics["eval_alpha-dpo/gap_mean"] == pytest.approx(0.25)
    assert metrics["eval_alpha-dpo/gap_std"] == pytest.approx(0.5)


def test_an_infinite_loss_stops_the_run(tmp_path):
    micro_batches = [types.SimpleNamespace(rows=[7, 9]), types.SimpleNamespace(rows=[4])]
    finite = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    raise_if_not_finite(finite, micro_batches, tmp_path, step=3)
    path = tmp_path / "non_finite_rank0.json"
    for number, place, value in ((0, 1, "inf"), (1, 0, "-inf"), (1, 0, "nan")):
        losses = [values.clone() for values in finite]
        losses[number][place] = float(value)
        with pytest.raises(NonFiniteLossError) as error:
            raise_if_not_finite(losses, micro_batches, tmp_path, step=3)
        assert "step 3" in str(error.value) and str(path) in str(error.value)
        row = micro_batches[number].rows[place]
        report = json.loads(path.read_text())
        assert report == {"step": 3, "pairs": [{"row": row, "loss": value}], "rows": [[7, 9], [4]]}
