"""The trainer against a naive training loop on the padded reference, and the invariants of its step."""

import json

import pytest
import torch

from rmipo.record import read_metrics
from rmipo.training.metrics import NonFiniteLossError
from rmipo.training.parity import ParityError
from tests.helpers.small_models import make_model, make_pairs
from tests.helpers.trainers import CONTEXT, make_trainer, recorded_forwards, rows_per_step
from tests.references.padded import padded_pairs, rmipo_loss

HARDWARE = ("tokens_per_second", "peak_memory_gib", "total_flos")  # these may follow the cut into micro-batches


def naive_training(pairs, steps, lr=1e-3, max_grad_norm=1.0):
    """AdamW on the padded reference, one optimizer step per list of row numbers; returns (model, losses)."""
    model = make_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for rows in steps:
        loss = rmipo_loss(padded_pairs(model, [pairs[i] for i in rows], CONTEXT))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.fixture
def pairs():
    return make_pairs(21, seed=11)  # two full steps of 8 and one of 5


def test_trajectory_equals_a_naive_loop(tmp_path, pairs):
    trainer = make_trainer(tmp_path, pairs)
    model, losses = naive_training(pairs, rows_per_step(trainer))
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
        "rewards/chosen": 2 * chosen.mean(),
        "rewards/rejected": 2 * rejected.mean(),
        "rewards/margins": 2 * (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "logps/chosen": scores["chosen_logps"].mean(),
        "logps/rejected": scores["rejected_logps"].mean(),
        "common/margin_avg_logp": (chosen - rejected).mean(),
        "common/acc_avg_logp": (chosen > rejected).double().mean(),
        "common/acc_sum_logp": (scores["chosen_logps"] > scores["rejected_logps"]).double().mean(),
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


def test_evaluation_equals_the_reference_and_leaves_training_alone(tmp_path, pairs):
    trainer = make_trainer(tmp_path, pairs, eval_pairs=pairs[:7])
    with torch.no_grad():
        expected = rmipo_loss(padded_pairs(make_model("llama"), pairs[:7], CONTEXT)).item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=2e-5)
    assert len(trainer.eval_columns["losses"]) == 7
    trainer.train()
    undisturbed = make_trainer(tmp_path / "plain", pairs)
    undisturbed.train()
    for actual, wanted in zip(trainer.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(actual, wanted)


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
    assert not any(
        value.requires_grad for value in kept
    )  # they would keep the activations of all steps up to a log line
    trainer.evaluate()  # the first one also checks parity
    forwards.clear()
    trainer.evaluate()
    assert [modes for _, *modes in forwards] == [[False, False]] * 6


def model_without_a_finite_score(pairs, number):
    """Of the pair at `number`: token 60, which no other pair has, is embedded as NaN."""
    for row, pair in enumerate(pairs):
        for side in ("prompt_ids", "chosen_ids", "rejected_ids"):
            pair[side] = [token % 60 for token in pair[side]]
        pair["row"] = 100 + row
    pairs[number]["prompt_ids"][0] = 60
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    return model


def test_the_check_at_the_start_takes_eight_pairs(tmp_path, pairs):
    trainer = make_trainer(tmp_path, pairs, model=model_without_a_finite_score(pairs, 7))
    with pytest.raises(ParityError, match="The plain scores are not finite either"):
        trainer.train()


def test_a_non_finite_loss_stops_and_names_the_rows(tmp_path, pairs):
    model = model_without_a_finite_score(pairs, 8)  # the first that the check at the start leaves out
    trainer = make_trainer(tmp_path, pairs, model=model, global_batch_size=21, per_device_train_batch_size=7)
    with pytest.raises(NonFiniteLossError, match=r"non_finite_rank0\.json"):
        trainer.train()
    report = json.loads((tmp_path / "non_finite_rank0.json").read_text())
    assert report["step"] == 1
    assert [pair["row"] for pair in report["pairs"]] == [108]
    assert sorted(row for rows in report["rows"] for row in rows) == list(range(100, 121))


def test_a_run_that_is_all_warm_up_says_so(tmp_path, capsys):
    """Three pairs are one step, nine are two."""
    for count, warmup, changes in ((3, 0.1, False), (3, 0, True), (9, 0.1, True)):
        trainer = make_trainer(tmp_path, make_pairs(count), lr_scheduler_type="cosine", warmup_steps=warmup)
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer.train()
        changed = any(not torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
        said = capsys.readouterr().out
        assert changed == changes and ("are warm-up" in said) == (not changes)
        assert changes or "all 1 optimizer step(s) are warm-up, and the first has a learning rate of 0" in said


# ---------------------------------------------------------------------------------------------------- compiled layers


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
