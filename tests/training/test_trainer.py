"""The trainer against a naive training loop on the padded reference, and the invariants of its step."""

import pytest
import torch

from rmipo.record import read_metrics
from tests.helpers.small_models import CONTEXT, make_model, make_pairs, make_trainer, recorded_forwards, rows_per_step
from tests.references.padded import padded_pairs, rmipo_loss, train

HARDWARE = ("tokens_per_second", "peak_memory_gib", "total_flos")  # these may follow the cut into micro-batches


@pytest.fixture
def pairs():
    return make_pairs(21, seed=11)  # two full steps of 8 and one of 5


def test_trajectory_equals_a_naive_loop(tmp_path, pairs):
    trainer = make_trainer(tmp_path, pairs)
    model = make_model("llama")
    losses = train(model, pairs, rows_per_step(trainer), CONTEXT)
    trainer.train()
    assert [line["loss"] for line in read_metrics(tmp_path) if "loss" in line] == pytest.approx(losses, abs=2e-5)
    assert losses[2] != pytest.approx(losses[0], abs=1e-2)
    for (name, actual), expected in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0, msg=name)
    assert trainer.parity < 1e-5


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_accumulation_does_not_change_the_result(tmp_path, pairs, micro_batch_size):
    one, other = (
        make_trainer(tmp_path / str(size), pairs, per_device_train_batch_size=size) for size in (2, micro_batch_size)
    )
    one.train()
    other.train()
    for (name, expected), actual in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0, msg=name)
    first, second = (read_metrics(tmp_path / str(size)) for size in (2, micro_batch_size))
    for line, wanted in zip(second, first, strict=True):
        for name, value in wanted.items():
            if name not in HARDWARE and not name.startswith("train_"):
                assert line[name] == pytest.approx(value, abs=1e-3), name


def test_logged_metrics_equal_hand_computed_ones(tmp_path, pairs):
    trainer = make_trainer(tmp_path, pairs[:8], max_steps=1)
    with torch.no_grad():
        scores = padded_pairs(make_model("llama"), pairs[:8], CONTEXT)
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
        expected = rmipo_loss(padded_pairs(make_model("llama"), pairs[:7], CONTEXT)).item()
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
            tmp_path / str(compiled), make_pairs(4, seed=4), model=make_model("llama"), global_batch_size=2, max_steps=2,
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
    model = make_model("llama")
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
