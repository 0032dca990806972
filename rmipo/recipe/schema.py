"""The dataclasses that recipes and trainers fill: what a run can be told, with the paper's defaults."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, Required

import pydantic
import torch
import trl
from pydantic import Field, NonNegativeInt, PositiveInt
from transformers import SchedulerType, TrainingArguments
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig
from typing_extensions import TypedDict

from rmipo.errors import ConfigError
from rmipo.objectives import build_objective
from rmipo.objectives.rmipo import RMiPO
from rmipo.record import cpu_has_bf16


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


# Arguments of `TrainingArguments` that would be ignored in silence here, or round the weights before they are saved.
FULL_EVAL = ("bf16_full_eval", "fp16_full_eval")
UNUSABLE = ("label_smoothing_factor", "dataloader_drop_last", "train_sampling_strategy", *FULL_EVAL)
# What use_liger_kernel stands for: norms, rotary embeddings and MLPs. Liger's own default also replaces the forward of
# the model, to compute its linear cross-entropy, and would undo the fused LM head.
LIGER = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
LIGER |= {"cross_entropy": False, "fused_linear_cross_entropy": False}


@dataclass
class PairConfig(TrainingArguments):
    """What training on pairs takes besides its objective. Raises ConfigError for values that contradict each other."""

    learning_rate: float = option(1e-6, "The paper's; adapters and small models need 10 to 100 times as much.")
    lr_scheduler_type: SchedulerType | str = option("cosine", "The paper's.")
    warmup_steps: float = option(0.1, "Steps of rising learning rate; below 1 a share of all.")
    num_train_epochs: float = option(1.0, "The paper's.")
    logging_steps: float = option(10, "Steps between two log lines.")
    bf16: bool | None = option(None, "bfloat16 arithmetic; null: where the device has it and fp16 is off.")
    use_liger_kernel: bool | None = option(None, "Liger's norms, rotary embeddings, MLPs; null: on CUDA, if installed.")

    global_batch_size: PositiveInt | None = option(None, "Pairs per optimizer step, over all processes.")
    max_length: PositiveInt = option(2048, "Tokens of prompt and response; the response is cut to what fits.")
    max_prompt_length: PositiveInt = option(1800, "Tokens kept from the end of prompts where both do not fit.")
    max_dropped_fraction: float = option(0.02, "Share of unusable rows above which a run stops.")
    max_truncated_fraction: float = option(1.0, "Share of cut rows above which a run stops.")
    dataset_num_proc: int | None = option(None, "Processes that tokenise.")
    attention: Literal["auto", "segment", "dense", "flex"] = option("auto", "Kernel; auto: the fastest on the device.")
    max_tokens_per_micro_batch: PositiveInt | None = option(None, "Micro-batches of longer pairs are split.")
    reference_cache_dir: str | None = option(None, "Of the initial policy's log-probs; null: in output_dir.")

    def __post_init__(self) -> None:
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        # transformers takes bfloat16 on a CPU from those who ask for the CPU.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:  # decided here: transformers takes it wherever torch can imitate it
            self.bf16 = not self.fp16 and _has_bf16(self.use_cpu)
        if self.torch_compile:
            # Layer by layer: one graph serves all of them, and compiling takes a fraction of the time.
            os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"
        if self.use_liger_kernel is None:
            self.use_liger_kernel = is_liger_kernel_available() and not self.use_cpu and torch.cuda.is_available()
        if self.use_liger_kernel:
            self.liger_kernel_config = LIGER | (self.liger_kernel_config or {})
        if changed := [key for key in UNUSABLE if getattr(self, key) != getattr(TrainingArguments, key)]:
            raise ConfigError(f"{', '.join(changed)}: can't be set for training on pairs")
        # It connects the processes, so errors are reported first.
        super().__post_init__()
        # ACCELERATE_MIXED_PRECISION, which accelerate launch sets, would win over `bf16: false`.
        self.mixed_precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        self.pairs_per_step()

    def pairs_per_step(self) -> int:
        """Pairs per optimizer step. Raises ConfigError where the objective can't have such micro-batches."""
        per_forward = self.per_device_train_batch_size * self.world_size
        objective = build_objective(self.objective)
        if per_forward < objective.min_pairs:
            raise ConfigError(
                f"per_device_train_batch_size: {objective.name} needs {objective.min_pairs} pairs at a time"
            )
        if self.max_tokens_per_micro_batch and objective.micro_batch_matters:
            raise ConfigError(f"max_tokens_per_micro_batch: a loss of {objective.name} depends on its micro-batch")
        if self.global_batch_size is None:
            return per_forward * self.gradient_accumulation_steps
        if self.gradient_accumulation_steps != 1:
            raise ConfigError("gradient_accumulation_steps follows from global_batch_size: set one of them")
        return self.global_batch_size


def _has_bf16(use_cpu: bool) -> bool:
    """Whether the device computes in bfloat16, and does not imitate it."""
    if use_cpu:
        return cpu_has_bf16()
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass
class PreferenceConfig(PairConfig):
    """`PairConfig` with any objective: `PreferenceConfig(output_dir, objective={"name": "simpo", "gamma": 1.0})`."""

    objective: dict = field(default_factory=dict, metadata={"help": "The block of `rmipo.objectives.build_objective`."})


@dataclass
class RMiPOConfig(PairConfig):
    """`PairConfig` with RMiPO's hyperparameters as fields of their own; `RMiPO` says what they are."""

    beta: float = RMiPO.beta
    gamma_min: float = RMiPO.gamma_min
    gamma_max: float = RMiPO.gamma_max
    schedule: str = RMiPO.schedule
    span: float = RMiPO.span
    pmi_normalization: str = RMiPO.pmi_normalization
    prior_context: str = RMiPO.prior_context
    prior_model: str = RMiPO.prior_model
    length_normalization: bool = RMiPO.length_normalization
    fidelity: str = RMiPO.fidelity
    label_smoothing: float = RMiPO.label_smoothing
    sft_weight: float = RMiPO.sft_weight

    @property
    def objective(self) -> dict:
        """The block of these fields, always up to date: there is nothing else that decides the objective."""
        return {"name": RMiPO.name} | {name: getattr(self, name) for name in RMiPOConfig.__annotations__}


Share = Annotated[float, Field(ge=0, le=1)]


@dataclass
class PreferenceRunConfig(PreferenceConfig):
    """What a recipe's run adds to the trainer's arguments."""

    reference_cache_dir: str = option("outputs/reference_cache", "Of the reference's log-probs, between runs.")
    generation_samples: NonNegativeInt = option(4, "Held-out prompts that are answered at each evaluation.")
    # On several machines each token of an answer gathers all weights.
    generation_max_new_tokens: PositiveInt | None = option(None, "null: 128, or 32 on several machines.")


@pydantic.with_config({"extra": "forbid"})
class Source(TypedDict, total=False):
    """An entry of the mixture `datasets`: TRL's keys, `revision`, `test_split`, and the handbook's `weight`."""

    path: Required[Annotated[str, Field(min_length=1)]]
    name: str | None  # configuration of a dataset on the hub
    data_dir: str | None
    data_files: str | list | dict | None
    revision: str | None
    split: str | None  # dataset_train_split if null
    test_split: str | None  # dataset_test_split if null
    columns: list[str] | None  # all others are left out
    fraction: Annotated[float, Field(gt=0)] | None  # share of the mixture
    weight: Annotated[float, Field(gt=0, le=1)] | None  # share of this dataset's rows that is taken


@dataclass
class DataConfig:
    """Which data, and how much of it may be unusable. Either `dataset_name` or the mixture `datasets`."""

    dataset_name: str | None = option(None, "Hub id, local folder, or file: JSON, Parquet.")
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    dataset_revision: str | None = option(None, "Commit, tag or branch of `dataset_name` on the hub.")
    datasets: list[Source] = field(default_factory=list)
    test_split_size: int | float | None = option(None, "Rows (or share, below 1) set aside if there is no test split.")
    mixture_seed: int = option(0, "Seed of that division, and of the draw from weighted datasets.")
    dataset_num_proc: int | None = None
    max_train_samples: PositiveInt | None = option(None, "Keep only the first rows of the training split.")
    max_eval_samples: PositiveInt | None = None
    max_dropped_fraction: Share = PairConfig.max_dropped_fraction
    max_truncated_fraction: Share = PairConfig.max_truncated_fraction
    chat_template: str | None = option(None, "Template text, or path of a .jinja file; the tokenizer's own if null.")


@dataclass
class ModelConfig(trl.ModelConfig):
    """`trl.ModelConfig` and what may be loaded."""

    allow_pickled_weights: bool = option(False, "Also load weights that are no safetensors: pickles can run code.")


def of_recipe(cls: type, values: Mapping[str, Any]) -> Any:
    """A `cls` from those of a recipe's values that are its fields."""
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


ARGUMENTS = {"sft": SFTConfig, "preference": PreferenceRunConfig}
# Used up in the recipe: no fields of the dataclasses.
RECIPE_ONLY = {"global_batch_size": PositiveInt, "memory_check": bool}
