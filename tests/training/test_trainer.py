"""The trainer against a naive loop on the padded reference, the invariants of its step, and what it logs."""

import json
import types

import pytest
import torch
from datasets import Dataset

from rmipo.objectives import build_objective
from rmipo.record import read_metrics
from rmipo.training.metrics import NonFiniteLossError, evaluation_metrics, raise_if_not_finite, step_metrics
from tests.helpers.small_models import CONTEXT, make_model, make_pairs, make_trainer, recorded_forwards, rows_per_step
from tests.references.padded import padded_pairs, rmipo_loss, train

HARDWARE = ("tokens_per_second", "peak_memory_gib", "total_flos")  # these may follow the cut into micro-batches


@pytest.fixture
def pairs():
    return make_pairs(21, seed=11)  # two full steps of 8 and one of 5


def test_trajectory_equals_a_naive_loop(tmp_path, pairs):
    trainer = make_trainer(tmp_path, pairs)
    model = make_model()
    losses = train(model, pairs, rows_per_step(trainer), CONTEXT)
    trainer.train()
    assert [line["loss"] for line in read_metrics(tmp_path) if "loss" in line] == pytest.approx(losses, abs=2e-5)
    assert losses[2] != pytest.approx(losses[0], abs=1e-2)
    for (name, actual), expected in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0, msg=name)
    assert trainer.parity < 1e-5


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_accumulation_does_not_change_the_result(tmp_path, pairs, micro_batch_size):
    sizes = (2, micro_batch_size)
    one, other = (make_trainer(tmp_path / str(n), pairs, per_device_train_batch_size=n) for n in sizes)
    one.train()
    other.train()
    for (name, expected), actual in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0, msg=name)
    first, second = (read_metrics(tmp_path / str(n)) for n in sizes)
    for line, wanted in zip(second, first, strict=True):
        for name, value in wanted.items():
            if name not in HARDWARE and not name.startswith("train_"):
                assert line[name] == pytest.approx(value, abs=1e-3), name


def test_logged_metrics_equal_hand_computed_ones(tmp_path, pairs):
    trainer = make_trainer(tmp_path, pairs[:8], max_steps=1)
    with torch.no_grad():
        scores = padded_pairs(make_model(), pairs[:8], CONTEXT)
    trainer.window.start -= 1e4  # as if loading and the check at the start had taken hours
    speed = trainer.train().metrics
    assert speed["train_samples_per_second"] * speed["train_runtime"] == pytest.approx(8, rel=0.01)
    line = read_metrics(tmp_path)[0]

    chosen = scores["chosen_logps"] / scores["chosen_lengths"]
    rejected = scores["rejected_logps"] / scores["rejected_lengths"]
    pmi_gap = (chosen - scores["prior_chosen_logps"] / scores["chosen_lengths"]) - (
        rejected - scores["prior_rejected_logps"] / scores["rejected_lengths"]
    )
    gamma = 0.3 + 1.3 * torch.exp(-pmi_gap.clamp(min=0))
    gap = scores["chosen_lengths"] - scores["rejected_lengths"]
    expected = {
        "rewards/margins": 2 * (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "logps/chosen": scores["chosen_logps"].mean(),
        "rmipo/gamma_mean": gamma.mean(),
        "rmipo/gamma_at_max": (pmi_gap <= 0).double().mean(),
        "rmipo/delta_pmi_mean": pmi_gap.mean(),
        "rmipo/corr_delta_pmi_length": torch.corrcoef(torch.stack([pmi_gap, gap]))[0, 1],
        "learning_rate": torch.tensor(1e-3),
    }
    for name, value in expected.items():
        assert line[name] == pytest.approx(value.item(), abs=1e-4), name
    assert 0 < line["rmipo/gamma_at_max"] < 1
    assert line["tokens_per_second"] > 1 and line["peak_memory_gib"] > 0.05


def test_evaluation_equals_the_reference(tmp_path, pairs):
    trainer = make_trainer(tmp_path, pairs, eval_pairs=pairs[:7])
    with torch.no_grad():
        expected = rmipo_loss(padded_pairs(make_model(), pairs[:7], CONTEXT)).item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("attention", ["segment", "dense"])
def test_a_step_scores_priors_together_without_gradient_and_then_pairs_with_it(tmp_path, pairs, attention):
    """Four micro-batches share a forward of priors. An evaluation, its last batch of one pair, has no gradients."""
    trainer = make_trainer(tmp_path, pairs[:12], eval_pairs=pairs[:7], global_batch_size=12, attention=attention)
    assert (trainer.attention_kind, len(recorded_forwards(trainer.model))) == (attention, 0)
    (step,) = trainer.get_train_dataloader()
    forwards = recorded_forwards(trainer.model)
    assert not trainer.training_step(trainer.model, step).requires_grad
    priors = [micro_batch.prior.length for micro_batch in step]
    assert forwards[:2] == [(sum(priors[:4]), False, False), (sum(priors[4:]), False, False)]
    assert forwards[2:] == [(micro_batch.pairs.length, True, True) for micro_batch in step] and len(step) == 6
    kept = [value for columns in trainer.window.columns for value in columns.values()]
    assert not any(value.requires_grad for value in kept)  # they would keep the activations up to a log line
    trainer.evaluate()  # the first one also checks parity
    forwards.clear()
    trainer.evaluate()
    assert [modes for _, *modes in forwards] == [[False, False]] * 6


@pytest.mark.slow
def test_compiled_layers_train_as_uncompiled_ones(tmp_path):
    weights = {}
    for compiled in (False, True):
        trainer = make_trainer(
            tmp_path / str(compiled), make_pairs(4, seed=4), model=make_model(), global_batch_size=2, max_steps=2,
            learning_rate=1e-3, attention="dense", torch_compile=compiled,
        )  # fmt: skip
        trainer.train()
        layers = trainer.model_wrapped.model.layers
        assert [isinstance(layer, torch._dynamo.OptimizedModule) for layer in layers] == [compiled] * len(layers)
        weights[compiled] = {name: weight.detach() for name, weight in trainer.model.named_parameters()}
    for name, weight in weights[True].items():
        torch.testing.assert_close(weight, weights[False][name], atol=1e-5, rtol=0, msg=name)


def gradients(folder, recomputed: list[bool], **arguments) -> dict[str, torch.Tensor]:
    """One SGD step with a learning rate of 1: the change of the weights is the gradient."""
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1}
    make_trainer(folder, make_pairs(8, seed=4), model=model, **settings, **arguments).train()
    assert [layer.gradient_checkpointing for layer in model.model.layers] == recomputed
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ["segment", "dense"])
@pytest.mark.parametrize(("every", "recomputed"), [(1, [True, True]), (2, [True, False])])
def test_recomputing_layers_changes_no_gradient(tmp_path, attention, every, recomputed):
    kwargs = {"use_reentrant": False, "every_n_layers": every}
    expected = gradients(tmp_path / "none", [False, False], attention=attention, activation_checkpointing=False)
    found = gradients(
        tmp_path / "some", recomputed, attention=attention, activation_checkpointing=True,
        activation_checkpointing_kwargs=kwargs,
    )  # fmt: skip
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=name)


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
    reference = make_model() if name == "epsilon-dpo" else None
    pairs = make_pairs(6, seed=3)
    trainer = make_trainer(tmp_path, pairs, {"name": name}, eval_pairs=pairs, ref_model=reference)
    if "reference" in trainer.objective.needs:
        fields = [f"{kind}_logps" for kind in ("ref_chosen", "ref_rejected")]
        fields += [f"ref_mismatched_{side}_logps" for side in ("chosen", "rejected")] * (name == "kto")
        trainer.eval_dataset.scores = {field: torch.rand(6) for field in fields}
    logged = [metric.removeprefix("eval_") for metric in trainer.evaluate() if metric.startswith("eval_")]
    speed = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    assert [metric for metric in logged if metric not in speed] == evaluation_metrics(trainer.objective)


@pytest.mark.parametrize("objective", [{"name": "rmipo"}, {"name": "alpha-dpo"}], ids=lambda block: block["name"])
def test_an_evaluation_between_log_lines_changes_nothing(tmp_path, objective):
    """Neither the objective's statistics, nor the pairs of the log line that it falls into."""
    make_model().save_pretrained(tmp_path / "initial")
    lines, states = [], []
    for name, options in {"plain": {}, "evaluated": {"eval_strategy": "steps", "eval_steps": 1}}.items():
        trainer = make_trainer(
            tmp_path / name, make_pairs(16, seed=3), objective, global_batch_size=4, logging_steps=2,
            model=make_model().from_pretrained(tmp_path / "initial"), eval_pairs=make_pairs(5, seed=9),
            reference_cache_dir=str(tmp_path / "cache"), **options,
        )  # fmt: skip
        trainer.train()
        states.append(trainer.objective_state | {"head": trainer.model.lm_head.weight.detach()})
        lines.append([line for line in read_metrics(tmp_path / name) if "loss" in line])
    plain, evaluated = ([{k: v for k, v in line.items() if k not in HARDWARE} for line in run] for run in lines)
    assert [line["step"] for line in plain] == [2, 4] and evaluated == plain
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
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
