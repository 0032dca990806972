"""The training steps that are compared. Each is built on its own modules around the same weights.

A step takes tokenised pairs, does all that a trainer does from collating to gradients, and returns the loss.
"""

import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from rmipo.recipe.schema import PreferenceConfig
from rmipo.training.batching import MicroBatch, PairDataset
from rmipo.training.trainer import PreferenceTrainer

Step = Callable[[list[dict]], float]

PRIOR_CONTEXT = [1, 4, 5, 6, 7]  # a BOS and a generation header
RMIPO = {"beta": 2.0, "gamma_min": 0.3, "gamma_max": 1.6}
SIMPO = {"beta": 2.0, "gamma": 1.0}
DPO = {"beta": 0.01}


@dataclass(frozen=True)
class Setup:
    """A Llama with the proportions of the 8B: MLP 3.5 x width, a quarter as many key-value heads as heads."""

    hidden: int = 512
    layers: int = 2
    head_dim: int = 64
    vocabulary: int = 1024
    checkpointing: bool = True
    device: str = "cpu"
    dtype: str = "float32"
    attention: str = "auto"  # of our steps
    liger: bool = False  # in our steps; its rotary embeddings then replace those of every Llama in the program

    @property
    def clock(self) -> str:
        """Which of a round's times counts: on a CPU that of the thread, whatever else the machine does."""
        return "cpu" if self.device == "cpu" else "wall"

    def config(self) -> LlamaConfig:
        heads = self.hidden // self.head_dim
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=7 * self.hidden // 2,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            head_dim=self.head_dim,
            max_position_embeddings=4096,
        )

    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        with torch.device(self.device):
            dtype = getattr(torch, self.dtype)
            return LlamaForCausalLM._from_config(self.config(), attn_implementation="sdpa", dtype=dtype).train()


class Contender(NamedTuple):
    """A step and the model it trains, as its own trainer has prepared it."""

    step: Step
    model: LlamaForCausalLM


def build(name: str, setup: Setup, weights: LlamaForCausalLM) -> Contender:
    """The contender `name`. Several can train the same `weights`, each through modules of its own."""
    # Trainers replace forwards and heads: only the parameters are shared.
    model = copy.deepcopy(weights, {id(parameter): parameter for parameter in weights.parameters()})
    step = BUILDERS[name](model, setup)
    if setup.checkpointing:  # here and not by the trainers, so that it is the same for all
        model.activation_checkpointing_enable({"use_reentrant": False})
    return Contender(step, model)


def _arguments(cls: type[TrainingArguments], setup: Setup, **values) -> TrainingArguments:
    return cls(
        output_dir=tempfile.mkdtemp(prefix="bench-"),
        use_cpu=setup.device == "cpu",
        bf16=False,  # bfloat16 is the weights' type, as under DeepSpeed, with no autocast
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **values,
    )


def _ours(model: LlamaForCausalLM, setup: Setup, **objective) -> Step:
    options = {"objective": objective, "attention": setup.attention, "use_liger_kernel": setup.liger}
    args = _arguments(PreferenceConfig, setup, **options)
    dataset = Dataset.from_list([{"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5], "row": 0}])
    trainer = PreferenceTrainer(model, args, dataset, prior_context=PRIOR_CONTEXT)

    def step(pairs: list[dict]) -> float:
        count = len(pairs)
        dataset = PairDataset(pairs, trainer.objective.needs, PRIOR_CONTEXT)
        scored = [name for name in pairs[0] if name.endswith("_logps")]  # of the initial policy
        dataset.scores = {name: torch.tensor([pair[name] for pair in pairs]) for name in scored}
        batch = dataset[MicroBatch(tuple(range(count)), count, count)]
        return trainer.training_step(model, [batch]).item()

    return step


# Padded RMiPO and SimPO, as published code runs them: no code of rmipo, and float32 logits of every position.
def _average(model: LlamaForCausalLM, contexts: list[list[int]], pairs: list[dict]) -> torch.Tensor:
    """Mean log-probability per token of chosen and rejected, `(2, pairs)`, after a context for each pair: one forward."""

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=value).to(model.device)

    responses = [pair[f"{side}_ids"] for side in ("chosen", "rejected") for pair in pairs]
    both = list(zip(contexts * 2, responses, strict=True))
    input_ids = padded([context + response for context, response in both], 0)
    mask = padded([[1] * len(context + response) for context, response in both], 0)
    labels = padded([[-100] * len(context) + response for context, response in both], -100)[:, 1:]
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.float()[:, :-1]
    scored = labels != -100
    per_token = logits.log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return ((per_token * scored).sum(1) / scored.sum(1)).view(2, -1)


def _padded_simpo(model: LlamaForCausalLM, pairs: list[dict]) -> torch.Tensor:
    chosen, rejected = _average(model, [pair["prompt_ids"] for pair in pairs], pairs)
    return -F.logsigmoid(SIMPO["beta"] * (chosen - rejected) - SIMPO["gamma"]).mean()


def _padded_rmipo(model: LlamaForCausalLM, pairs: list[dict]) -> torch.Tensor:
    """Eq. 8 with per-token PMI, in the authors' two padded passes: the second scores the responses without prompts."""
    chosen, rejected = _average(model, [pair["prompt_ids"] for pair in pairs], pairs)
    with torch.no_grad():
        prior_chosen, prior_rejected = _average(model, [PRIOR_CONTEXT] * len(pairs), pairs)
        delta_pmi = (chosen - prior_chosen) - (rejected - prior_rejected)
        low, high = RMIPO["gamma_min"], RMIPO["gamma_max"]
        gamma = low + (high - low) * torch.exp(-delta_pmi.clamp(min=0))
    return -F.logsigmoid(RMIPO["beta"] * (chosen - rejected) - gamma).mean()


def _padded(model: LlamaForCausalLM, setup: Setup, loss: Callable[..., torch.Tensor]) -> Step:
    def step(pairs: list[dict]) -> float:
        value = loss(model, pairs)
        value.backward()
        return value.item()

    return step


def _trl(model: LlamaForCausalLM, setup: Setup, trainer: type[Trainer], config: type, rows: Callable, **values) -> Step:
    """`rows`: from pairs to what the trainer's collator takes."""
    # TRL's trainers ask for text and a tokenizer; the pairs that are timed are token ids already.
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(setup.vocabulary)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2")
    text = Dataset.from_list([{"prompt": "t3 t4", "chosen": " t5 t6", "rejected": " t7"}])
    built = trainer(model, args=_arguments(config, setup, **values), train_dataset=text, processing_class=tokenizer)
    built.current_gradient_accumulation_steps = 1  # what `train()` would set

    def step(pairs: list[dict]) -> float:
        return built.training_step(model, built.data_collator(rows(pairs))).item()

    return step


def _labelled(pairs: list[dict]) -> list[dict]:
    rows = []
    for pair in pairs:
        row, prompt = {}, pair["prompt_ids"]
        for side in ("chosen", "rejected"):
            row[f"{side}_input_ids"] = prompt + pair[f"{side}_ids"]
            row[f"{side}_attention_mask"] = [1] * len(row[f"{side}_input_ids"])
            row[f"{side}_labels"] = [-100] * len(prompt) + pair[f"{side}_ids"]
        rows.append(row)
    return rows


_with = functools.partial
_TRL_SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": SIMPO["beta"], "simpo_gamma": SIMPO["gamma"]}
# With a cached reference, as in ours; else the step would have one more forward.
_TRL_DPO = {"precompute_ref_log_probs": True, "max_length": None, **DPO}
BUILDERS = {
    "padded-rmipo": _with(_padded, loss=_padded_rmipo),
    "padded-simpo": _with(_padded, loss=_padded_simpo),
    "trl-simpo": _with(_trl, trainer=CPOTrainer, config=CPOConfig, rows=_labelled, **_TRL_SIMPO),
    "trl-dpo": _with(_trl, trainer=DPOTrainer, config=DPOConfig, rows=list, **_TRL_DPO),
    "rmipo": _with(_ours, name="rmipo", **RMIPO),
    "simpo": _with(_ours, name="simpo", **SIMPO),
    "dpo": _with(_ours, name="dpo", **DPO),
}
# The same loss in two or three ways: their values must agree.
SAME_LOSS = [("padded-rmipo", "rmipo"), ("padded-simpo", "trl-simpo", "simpo"), ("trl-dpo", "dpo")]
