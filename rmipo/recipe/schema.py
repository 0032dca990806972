"""The dataclasses that recipes fill: what a run can be told, with defaults."""

from dataclasses import dataclass, field
from typing import Any

import trl
from transformers import TrainingArguments
from trl import SFTConfig

__all__ = ["ARGUMENTS", "RECIPE_ONLY", "DataConfig", "ModelConfig", "PreferenceConfig", "SFTConfig"]


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class PreferenceConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what preference training adds."""

    objective: dict = field(default_factory=dict, metadata={"help": "The block of `rmipo.objectives.build_objective`."})
    global_batch_size: int = _option(128, "Pairs per optimizer step, over all processes. Accumulation follows from it.")
    max_length: int = _option(2048, "Tokens of prompt and response; the response is cut to what fits.")
    max_prompt_length: int = _option(1800, "Tokens kept from the prompt's end where prompt and response do not fit.")
    attention: str = _option(
        "auto",
        "Kernel for packed pairs; auto: the fastest on the device.",
        choices=["auto", "segment", "dense", "flex"],
    )
    max_tokens_per_micro_batch: int | None = _option(None, "Micro-batches of longer pairs are split.")
    generation_samples: int = _option(4, "Held-out prompts that are answered and saved at each evaluation.")
    generation_max_new_tokens: int = _option(128, "Tokens of each such answer.")
    reference_cache_dir: str = _option(
        "outputs/reference_cache", "Where the reference's log-probs are kept between runs."
    )
    warn_chosen_logp_drop: float = _option(1.0, "Nats per token that chosen responses may lose before a warning.")
    warn_repetition: float = _option(0.5, "Share of repeated n-grams in the sample generations before a warning.")
    warn_grad_norm_ratio: float = _option(10.0, "Gradient norm over its running median before a warning.")


@dataclass
class DataConfig:
    """Which data, and how much of it may be unusable. Either `dataset_name` or the mixture `datasets`."""

    dataset_name: str | None = _option(None, "Hub id, local folder, or JSONL file (plain or gzip).")
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    dataset_revision: str | None = _option(None, "Commit, tag or branch of `dataset_name` on the hub.")
    datasets: list[dict] = field(
        default_factory=list, metadata={"help": "Entries: see `rmipo.data.sources.load_rows`."}
    )
    test_split_size: int | float | None = _option(None, "Rows (or share, below 1) set aside if there is no test split.")
    mixture_seed: int = _option(0, "Seed of that division, and of the draw from weighted datasets.")
    dataset_num_proc: int | None = None
    max_train_samples: int | None = _option(None, "Keep only the first rows of the training split.")
    max_eval_samples: int | None = None
    max_dropped_fraction: float = _option(0.02, "Share of unusable rows above which a run stops.")
    max_truncated_fraction: float = _option(1.0, "Share of cut rows above which a run stops.")
    chat_template: str | None = _option(None, "Template text, or path of a .jinja file; the tokenizer's own if null.")


@dataclass
class ModelConfig(trl.ModelConfig):
    """`trl.ModelConfig` and what may be loaded."""

    allow_pickled_weights: bool = _option(False, "Also load weights that are no safetensors: pickles can run code.")


ARGUMENTS = {"sft": SFTConfig, "preference": PreferenceConfig}
RECIPE_ONLY = {
    "global_batch_size": int,
    "prefer_local": str,
    "memory_check": bool,
}  # used up here: no fields of SFTConfig
