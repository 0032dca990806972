"""The tokenizer and the model of a recipe: no code from a hub or folder is run, no pickle read unless asked for."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import get_quantization_config

from rmipo.errors import UserError
from rmipo.recipe.schema import ModelConfig


class LoadingError(UserError, ValueError):
    """A model or tokenizer that isn't there, isn't complete, or wants code or pickles to be run."""


@contextlib.contextmanager
def explained(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise LoadingError(
            f"model_name_or_path: the {what} of {name} can't be loaded ({first}). Check the name or folder, the network "
            "(is HF_HUB_OFFLINE set?) and, for a gated model, the login (`.venv/bin/hf auth login`). Pickled weights need "
            "allow_pickled_weights: true; models that need trust_remote_code are not supported"
        ) from error


def load_tokenizer(model_config: ModelConfig, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `chat_template` in place of its own if one is given. Raises LoadingError.

    Of several named templates it keeps the one named "default".
    """
    name = model_config.model_name_or_path
    with explained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=model_config.model_revision, trust_remote_code=False)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        elif isinstance(tokenizer.chat_template, dict):
            tokenizer.chat_template = tokenizer.get_chat_template()
    return tokenizer


def read_generation_config(folder: str | Path) -> dict:
    """What a model's generation_config.json says; empty if it has none."""
    path = Path(folder) / "generation_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def check_limits(
    tokenizer: PreTrainedTokenizerBase, model: ModelConfig | PreTrainedModel | PeftModel, length: int | None
) -> None:
    """Raises LoadingError where the model has no embedding for one of the tokens, or no position for one of `length`.

    Without this, tokens end in an IndexError, and positions in one or, on rotary embeddings, in silence.
    """
    if isinstance(model, ModelConfig):
        name = model.model_name_or_path
        with explained(name, "configuration"):
            config = AutoConfig.from_pretrained(name, revision=model.model_revision, trust_remote_code=False)
    else:
        config = model.config
        name = config._name_or_path or type(model).__name__
    # Checkpoints with vision keep the decoder's sizes in a part of their configuration.
    config = config.get_text_config()
    # Compare ids, not their count: there may be gaps.
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= config.vocab_size]
    if beyond:
        raise LoadingError(
            f"model_name_or_path: {name}: its tokenizer has {len(beyond)} tokens more than the model has embeddings "
            f"({config.vocab_size}), such as {beyond[0]}. Enlarge the model once, by model.resize_token_embeddings"
        )
    positions = positions_of(config)
    if positions is not None and length is not None and length > positions:
        found = f"sequences have up to {length} tokens, and {name} has {positions} positions"
        raise LoadingError(f"max_length: {found}. Set it to {positions} or less")


def positions_of(config: PreTrainedConfig) -> int | None:
    """The longest sequence that a text model is made for, None if it doesn't say."""
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if positions is not None and rope.get("factor"):  # of scaled rotary embeddings
        positions = max(positions, int(rope["factor"] * rope.get("original_max_position_embeddings", positions)))
    return positions


def load_model(model_config: ModelConfig, **options) -> PreTrainedModel:
    """The model to train, in the recipe's `dtype`, quantized where it says so. Raises LoadingError.

    Where its generation configuration is one that transformers refuses to save, only special tokens are kept of it.
    """
    name = model_config.model_name_or_path
    with explained(name, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=model_config.model_revision,
            dtype=model_config.dtype,
            quantization_config=get_quantization_config(model_config),
            use_safetensors=not model_config.allow_pickled_weights,
            trust_remote_code=False,
            **options,
        )
    given = model.generation_config
    try:
        given.validate(strict=True)
    except ValueError as error:  # it would end the run at its first checkpoint
        PartialState().print(f"notice: of the generation_config.json of {name} only special tokens are kept: {error}")
        model.generation_config = GenerationConfig(bos_token_id=given.bos_token_id, eos_token_id=given.eos_token_id)
    return model


def check_adapters(model: PeftModel) -> None:
    """Raises LoadingError where adapters name a module that the model lacks: PEFT is content with one that it has.

    Also where they change one of two embeddings that are one: merged, the model would be another one.
    """
    # Adapters wrap what they match: lm_head.original_module, q_proj.base_layer.
    modules = [f".{name}." for name, _ in model.get_base_model().named_modules()]
    for key in ("target_modules", "modules_to_save"):
        asked = getattr(model.active_peft_config, key, None) or ()
        for name in () if isinstance(asked, str) else asked:  # a text is a pattern
            if not any(f".{name}." in module for module in modules):
                raise LoadingError(f"lora_{key}: the model has no {name}. Correct or remove it")
    base = model.get_base_model()
    tied = {key.rpartition(".")[0] for pair in base.all_tied_weights_keys.items() for key in pair}
    changed = {name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    changed |= {*getattr(model.base_model, "targeted_module_names", ())}
    if both := sorted(tied & changed):
        raise LoadingError(f"{both[0]}: its weights are those of both embeddings, and its adapter can't be merged")


def require_masters(model: PreTrainedModel | PeftModel, accelerator: Accelerator) -> None:
    """Raises LoadingError where an optimizer would update 16-bit weights in place, with no float32 copy to sum updates in."""
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):  # they keep such a copy
        return
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype in (torch.float16, torch.bfloat16):
            raise LoadingError(
                f"{name} is {weight.dtype}: trained without a float32 copy most updates round to zero. Load the model in "
                "float32 (dtype: float32; bf16: true keeps the arithmetic in bfloat16), or shard it with DeepSpeed or FSDP"
            )
