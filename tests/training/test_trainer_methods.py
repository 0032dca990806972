"""What baselines need beyond SimPO: references, mismatched pairs, perturbed policies, running statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from rmipo.errors import CheckpointError
from rmipo.objectives import PairScores, build_objective
from rmipo.record import read_metrics
from rmipo.training.packing import pack_pairs, split_pairs
from rmipo.training.scoring import label_logps, response_logits
from tests.helpers.small_models import CONTEXT, make_model, make_pairs, make_trainer, recorded_forwards, rows_per_step
from tests.references.padded import padded_pairs

BLOCKS = {
    "dpo": {"name": "dpo", "beta": 0.1},
    "ipo": {"name": "ipo", "tau": 0.5},
    "kto": {"name": "kto", "beta": 0.1},
    "alpha-dpo": {"name": "alpha-dpo", "beta": 2.5, "gamma_beta_ratio": 0.6, "alpha": 0.05},
    "beta-dpo": {"name": "beta-dpo", "beta": 0.1, "alpha": 0.6, "rho": 0.2},
    "epsilon-dpo": {"name": "epsilon-dpo", "beta": 0.1, "epsilon": 0.05},
    "slic": {"name": "slic", "delta": 1.0, "sft_weight": 0.1},
    "cpo": {"name": "cpo", "beta": 0.1},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
    "simper": {"name": "simper"},
    "rmipo-initial": {"name": "rmipo", "prior_model": "initial"},
}


@pytest.fixture
def pairs():
    return make_pairs(16, seed=11)


LORA = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture
def saved_model(tmp_path):
    """Loads the same weights anew, from a folder whose content the reference cache can identify."""
    make_model().save_pretrained(tmp_path / "initial")
    return lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "initial", attn_implementation="sdpa")


@pytest.fixture
def other_model():
    """A reference unlike the policy: where they are equal, rounding noise decides what some methods do first."""
    model = make_model()
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def cache_reference(trainer, initial, pairs, objective):
    """Put the sums of `initial` where the trainer looks for its reference."""
    everything = naive_scores(initial, initial, pairs, range(len(pairs)), objective)
    known = {"reference": "ref_", "mismatched": "ref_mismatched_", "initial_prior": "prior_"}
    prefixes = [prefix for need, prefix in known.items() if need in objective.needs]
    names = [f"{prefix}{side}_logps" for prefix in prefixes for side in ("chosen", "rejected")]
    if names:
        path = trainer.reference.cache(trainer.train_dataset)
        path.parent.mkdir(exist_ok=True)
        save_file({name: getattr(everything, name) for name in names}, path)


def naive_scores(model, initial, pairs, rows, objective):
    """Everything any objective may ask for, one pair at a time, from full logits of padded rows."""
    chosen_rows = [pairs[i] for i in rows]
    scores = padded_pairs(model, chosen_rows)
    with torch.no_grad():
        for name, values in padded_pairs(initial, chosen_rows, CONTEXT).items():
            if name.endswith("logps"):
                scores[name if name.startswith("prior_") else f"ref_{name}"] = values
        partners = [
            {**pairs[i], **{side: pairs[(i + 1) % len(pairs)][side] for side in ("chosen_ids", "rejected_ids")}}
            for i in rows
        ]
        for prefix, scorer in (("mismatched_", model), ("ref_mismatched_", initial)):
            for name, values in padded_pairs(scorer, partners).items():
                if name.endswith("logps"):
                    scores[prefix + name] = values
        if "reference_logits" in objective.needs:
            for name, step in (("plus", objective.epsilon), ("minus", -objective.epsilon)):
                sums = [
                    [perturbed_sum(model, initial, pair, side, step) for side in ("chosen_ids", "rejected_ids")]
                    for pair in chosen_rows
                ]
                scores[f"{name}_logratios"] = torch.stack([chosen - rejected for chosen, rejected in sums])
    return PairScores(**{name: values.float() for name, values in scores.items()})


def perturbed_sum(model, initial, pair, side, step):
    tokens = torch.tensor([pair["prompt_ids"] + pair[side]])
    policy, frozen = (m(input_ids=tokens).logits[0, len(pair["prompt_ids"]) - 1 : -1] for m in (model, initial))
    logps = F.log_softmax((1 + step) * policy - step * frozen, dim=-1)
    return logps.gather(1, torch.tensor(pair[side])[:, None]).double().sum()


@pytest.mark.parametrize("name", BLOCKS)
def test_trajectory_equals_a_naive_loop(tmp_path, pairs, saved_model, other_model, name):
    """Two epochs of two steps, a step being two micro-batches of four pairs."""
    objective = build_objective(BLOCKS[name])
    second_model = copy.deepcopy(other_model) if "reference_logits" in objective.needs else None
    trainer = make_trainer(
        tmp_path, pairs, BLOCKS[name], per_device_train_batch_size=4, num_train_epochs=2, model=saved_model(),
        reference_cache_dir=str(tmp_path / "cache"), ref_model=second_model,
    )  # fmt: skip
    cache_reference(trainer, other_model, pairs, objective)
    order, sampler = [], trainer.get_train_dataloader().batch_sampler
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order += [[batch.indices for batch in step] for step in sampler]

    model, initial = saved_model(), other_model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    state, losses = objective.init_state(), []
    for step in order:
        optimizer.zero_grad()
        total, ks = 0.0, []
        for rows in step:
            scores = naive_scores(model, initial, pairs, rows, objective)
            state = objective.observe(state, scores)
            output = objective(scores, state or None)
            (output.losses.sum() / 8).backward()
            total += output.losses.sum().item() / 8
            ks.append(output.diagnostics.get("k"))
        state = objective.end_step(state, {"k": torch.cat(ks)} if ks[0] is not None else {})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total)

    trainer.train()
    logged = [line["loss"] for line in read_metrics(tmp_path) if "loss" in line]
    assert logged == pytest.approx(losses, abs=2e-4, rel=1e-4)
    for key, value in state.items():
        assert trainer.objective_state[key].item() == pytest.approx(value.item(), abs=1e-4), key
    for (parameter, actual), expected in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=0, msg=parameter)
    assert len(rows_per_step(trainer)) == 2


def test_reference_is_scored_once(tmp_path, pairs, saved_model):
    def reference_columns():
        trainer = make_trainer(
            tmp_path / "run", pairs, BLOCKS["dpo"], model=saved_model(), max_steps=1,
            reference_cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        trainer.train()
        return trainer.train_dataset.scores

    with torch.no_grad():
        expected = padded_pairs(make_model(), pairs)["chosen_logps"].float()
    torch.testing.assert_close(reference_columns()["ref_chosen_logps"], expected, atol=1e-4, rtol=0)
    (file,) = (tmp_path / "cache").iterdir()
    written = file.stat().st_mtime_ns
    torch.testing.assert_close(reference_columns()["ref_chosen_logps"], expected, atol=1e-4, rtol=0)
    assert file.stat().st_mtime_ns == written


def test_a_cache_is_named_after_all_that_shapes_it(tmp_path, pairs, saved_model):
    def path(name="dpo", rows=pairs, change=lambda trainer: None):
        trainer = make_trainer(tmp_path, rows, BLOCKS[name], model=saved_model(), reference_cache_dir=str(tmp_path))
        change(trainer)
        return trainer.reference.cache(trainer.train_dataset).name

    other_rows = [*pairs[:-1], {**pairs[-1], "rejected_ids": [1, 2, 3]}]
    paths = [path(), path("kto"), path("rmipo-initial"), path(rows=other_rows)]
    paths += [path("rmipo-initial", change=lambda trainer: setattr(trainer, "prior_context", [3]))]
    paths += [path(change=lambda trainer: trainer.model.to(torch.bfloat16))]
    paths += [path(change=lambda trainer, kind=kind: setattr(trainer.args, kind, True)) for kind in ("bf16", "fp16")]
    quantized = {"load_in_4bit": True}
    paths += [path(change=lambda trainer: setattr(trainer.model.config, "quantization_config", quantized))]
    assert len(set(paths)) == len(paths)
    assert path() == path("ipo") == paths[0]
    trained = saved_model()
    trained.lm_head.weight.data += 1
    trained.save_pretrained(tmp_path / "initial")
    assert path() not in paths


@pytest.mark.parametrize(("name", "column"), [("dpo", "ref_chosen_logps"), ("rmipo-initial", "prior_chosen_logps")])
def test_with_adapters_the_base_model_is_the_reference(tmp_path, pairs, saved_model, name, column):
    model, cache = get_peft_model(saved_model(), LORA), str(tmp_path / "cache")
    trainer = make_trainer(tmp_path, pairs, BLOCKS[name], model=model, max_steps=1, reference_cache_dir=cache)
    trainer.train()
    columns = trainer.train_dataset.scores
    with torch.no_grad():
        expected = padded_pairs(make_model(), pairs, CONTEXT)[column.removeprefix("ref_")]
    torch.testing.assert_close(columns[column], expected.float(), atol=1e-4, rtol=0)
    trainer.reference.cache(trainer.train_dataset).unlink()  # it is still there to be scored again
    trainer.reference.add_scores(trainer.train_dataset, resuming=True)
    torch.testing.assert_close(trainer.train_dataset.scores[column], columns[column])


def test_with_adapters_the_reference_logits_are_the_base_models(tmp_path, pairs, saved_model):
    trainer = make_trainer(tmp_path, pairs, BLOCKS["epsilon-dpo"], model=get_peft_model(saved_model(), LORA))
    packed = pack_pairs(pairs[:2])
    with torch.no_grad():
        logits = trainer.reference.logits(packed)
        adapted = response_logits(trainer.model, packed, trainer.model.config)
        expected = padded_pairs(make_model(), pairs[:2])["chosen_logps"].float()
    assert (adapted - logits).abs().max() > 0.1
    sums = packed.sum_by_response(label_logps(logits, packed.labels))
    torch.testing.assert_close(split_pairs(sums)[0], expected, atol=1e-4, rtol=0)


def test_the_reference_has_neither_gradients_nor_dropout(tmp_path, pairs, saved_model):
    trainer = make_trainer(
        tmp_path, pairs, BLOCKS["epsilon-dpo"], model=saved_model(), ref_model=saved_model().train(),
        reference_cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert not any(parameter.requires_grad for parameter in trainer.reference.model.parameters())
    policy, reference = recorded_forwards(trainer.model), recorded_forwards(trainer.reference.model)
    trainer.model.train()
    trainer.reference.add_scores(trainer.train_dataset, resuming=False)
    assert [modes for _, *modes in policy] == [[False, False]] * 6  # sums of 16 pairs, three at a time
    policy.clear()
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert [modes for _, *modes in policy] == [[True, True]] * 4
    assert [modes for _, *modes in reference] == [[False, False]] * 4


def test_the_reference_computes_in_the_precision_of_the_policy(tmp_path, pairs, saved_model):
    trainer = make_trainer(
        tmp_path, pairs, BLOCKS["epsilon-dpo"], model=saved_model(), ref_model=saved_model(), bf16=True
    )
    packed = pack_pairs(pairs[:2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = response_logits(trainer.model, packed, trainer.model.config)
    assert torch.equal(trainer.reference.logits(packed).float(), expected.float())


@pytest.mark.parametrize("name", ["dpo", "rmipo-initial"])
def test_a_resumed_run_never_scores_its_reference_with_trained_weights(tmp_path, pairs, saved_model, name):
    trainer = make_trainer(
        tmp_path, pairs, BLOCKS[name], model=saved_model(), max_steps=1, reference_cache_dir=str(tmp_path / "cache")
    )
    trainer.train()
    before = trainer.train_dataset.scores
    trainer.reference.add_scores(trainer.train_dataset, resuming=True)
    assert all(torch.equal(trainer.train_dataset.scores[column], values) for column, values in before.items())
    trainer.reference.cache(trainer.train_dataset).unlink()
    trainer.save_model(tmp_path / "checkpoint-1")
    trainer.state.save_to_json(tmp_path / "checkpoint-1" / "trainer_state.json")
    with pytest.raises(CheckpointError, match=str(tmp_path / "cache")):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
