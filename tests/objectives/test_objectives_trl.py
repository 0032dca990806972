"""The same model and the same pairs give the same loss as TRL's own trainers.

Our scores come from the plain logits of the token ids that the TRL trainer collated, so neither our data path nor our
packing has a part in this.
"""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from rmipo.objectives import PairScores, build_objective
from tests.helpers.tiny_model import write_model

PAIRS = [  # prompt, chosen, rejected; lengths differ on purpose
    ("w1 w2 w3", "w4 w5 w6 w7", "w8 w9"),
    ("w4 w5", "w1", "w2 w3 w4 w5 w6"),
    ("w6 w7 w8 w9 w10", "w11 w12 w13", "w14 w15"),
    ("w16", "w15 w14 w13 w12 w11", "w1 w2 w3 w4"),
]


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(write_model(tmp_path / "0"))


@pytest.fixture
def models(tmp_path):
    found = [AutoModelForCausalLM.from_pretrained(write_model(tmp_path / str(n), n)).eval() for n in (0, 1)]
    for parameter in (parameter for model in found for parameter in model.parameters() if parameter.ndim == 2):
        parameter.data *= 15  # far from uniform, so that log-probs differ
    return found


def arguments(tmp_path, **options) -> dict:
    base = {"output_dir": str(tmp_path), "per_device_train_batch_size": len(PAIRS), "report_to": "none"}
    return {**base, "use_cpu": True, "bf16": False, "max_length": 64, "gradient_checkpointing": False, **options}


PAIRED = Dataset.from_list([{"prompt": p, "chosen": f" {w}", "rejected": f" {r}"} for p, w, r in PAIRS])


@torch.no_grad()
def response_logps(model, input_ids, attention_mask, response_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probs and numbers of the response tokens, from the full logits in float64."""
    logps = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].double().log_softmax(-1)
    picked = logps.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    mask = response_mask[:, 1:].bool()
    return (picked * mask).sum(-1), mask.sum(-1)


def trl_loss(trainer, batch) -> float:
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch).item()


@pytest.mark.parametrize(
    ("loss_type", "block"), [("sigmoid", {"name": "dpo", "beta": 0.3}), ("ipo", {"name": "ipo", "tau": 0.3})]
)
def test_dpo_trainer(tmp_path, tokenizer, models, loss_type, block):
    policy, reference = models
    args = DPOConfig(**arguments(tmp_path, loss_type=[loss_type], beta=0.3))
    trainer = DPOTrainer(policy, reference, args, train_dataset=PAIRED, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    logps, lengths = response_logps(policy, *inputs)
    ref_logps, _ = response_logps(reference, *inputs)
    scores = PairScores(*logps.chunk(2), *lengths.chunk(2), None, None, *ref_logps.chunk(2))
    assert sorted(scores.chosen_lengths.tolist()) == [2, 4, 5, 6]  # the words and one end token
    assert build_objective(block)(scores).losses.mean().item() == pytest.approx(trl_loss(trainer, batch), rel=1e-5)


def test_kto_trainer(tmp_path, tokenizer, models):
    policy, reference = models  # this way round the KL estimate is positive
    # TRL samples in order; both labels in one batch.
    examples = [{"prompt": p, "completion": f" {w}", "label": True} for p, w, _ in PAIRS]
    examples += [{"prompt": p, "completion": f" {r}", "label": False} for p, _, r in PAIRS]
    options = {"beta": 0.3, "desirable_weight": 1.5, "per_device_train_batch_size": 2 * len(PAIRS)}
    args, rows = KTOConfig(**arguments(tmp_path, **options)), Dataset.from_list(examples)
    trainer = KTOTrainer(policy, reference, args, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert list(batch["label"]) == [True] * len(PAIRS) + [False] * len(PAIRS)
    columns = []
    for prefix in ("", "KL_"):
        inputs = [batch[prefix + key] for key in ("input_ids", "attention_mask", "completion_mask")]
        for model in (policy, reference):
            logps, lengths = response_logps(model, *inputs)
            columns.append((logps.chunk(2), lengths.chunk(2)))
    (logps, lengths), (ref, _), (mismatched, _), (ref_mismatched, _) = columns
    scores = PairScores(*logps, *lengths, None, None, *ref, *mismatched, *ref_mismatched)
    objective = build_objective({"name": "kto", "beta": 0.3, "desirable_weight": 1.5})
    out = objective(scores)
    assert out.diagnostics["z_ref"][0] > 0  # otherwise the KL term would go untested
    assert out.losses.mean().item() == pytest.approx(trl_loss(trainer, batch), rel=1e-5)


CPO = {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.7}, {"name": "cpo", "beta": 0.3, "sft_weight": 0.7}
WITHOUT_SFT = {"simpo_gamma": 1.25, "cpo_alpha": 0.0}
SIMPO = {"loss_type": "simpo", "beta": 2.5, **WITHOUT_SFT}, {"name": "simpo", "beta": 2.5, "gamma": 1.25}


@pytest.mark.parametrize(("options", "block"), [CPO, SIMPO])
def test_cpo_trainer(tmp_path, tokenizer, models, options, block):
    policy = models[0]
    args = CPOConfig(**arguments(tmp_path, **options))
    trainer = CPOTrainer(model=policy, args=args, train_dataset=PAIRED, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    sides = []
    for side in ("chosen", "rejected"):
        mask = batch[f"{side}_labels"] != -100
        sides.append(response_logps(policy, batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], mask))
    (chosen, chosen_lengths), (rejected, rejected_lengths) = sides
    scores = PairScores(chosen, rejected, chosen_lengths, rejected_lengths)
    assert build_objective(block)(scores).losses.mean().item() == pytest.approx(trl_loss(trainer, batch), rel=1e-5)
