"""The tokenizer and the model of a recipe: no code from a hub or folder is run, no pickle read unless asked for."""

import json
import re
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

# These keep float32 masters of their own, and optimizers over shards.
SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP)


class LoadingError(UserError, ValueError):
    """A model or tokenizer that isn't there, isn't complete, or wants code or pickles to be run."""


def load_tokenizer(model_config: ModelConfig, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `chat_template` in place of its own if one is given. Raises LoadingError.

    Of several named templates it keeps the one named "default", which is saved with the model.
    """
    name = model_config.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=model_config.model_revision, trust_remote_code=False)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        # Cohere's and a few others have one template for tools, one for RAG, and a default.
        elif isinstance(tokenizer.chat_template, dict):
            tokenizer.chat_template = tokenizer.get_chat_template()
    except (OSError, ValueError) as error:
        raise LoadingError(_explained(name, "tokenizer", error)) from error
    return tokenizer


def read_generation_config(folder: str | Path) -> dict:
    """What a model's generation_config.json says; empty if it has none. Raises LoadingError for one that isn't JSON."""
    path = Path(folder) / "generation_config.json"
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise LoadingError(f"{path} can't be read ({error}). Correct the file, or remove it") from error


def check_limits(
    tokenizer: PreTrainedTokenizerBase,
    model: ModelConfig | PreTrainedModel | PeftModel,
    length: int | None,
    of: str = "max_length",
) -> None:
    """Raises LoadingError where the model has no embedding for one of the tokens, or no position for one of `length`.

    Without this, tokens end in an IndexError, and positions in one or, on rotary embeddings, in silence. An adapter's
    folder is refused, too: it is no model.

    Args:
        of: what has that length.
    """
    if isinstance(model, ModelConfig):
        name = model.model_name_or_path
        if (Path(name) / "adapter_config.json").is_file():
            merge = f".venv/bin/python scripts/merge_adapter.py {name}"
            raise LoadingError(f"model_name_or_path: {name} holds an adapter. Merge it first: {merge}")
        try:
            config = AutoConfig.from_pretrained(name, revision=model.model_revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise LoadingError(_explained(name, "configuration", error)) from error
    else:
        config = model.config
        name = config._name_or_path or type(model).__name__
    # Checkpoints with vision keep the decoder's sizes in a part of their configuration.
    config = config.get_text_config()
    problems = []
    # Compare ids, not their count: there may be gaps.
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= config.vocab_size]
    if beyond:
        problems.append(
            f"its tokenizer has {len(beyond)} tokens more than the model has embeddings ({config.vocab_size}), such as "
            f"{', '.join(sorted(beyond)[:3])}. Remove them, or enlarge the model once and train from the copy: "
            "model.resize_token_embeddings(len(tokenizer)); model.save_pretrained(...)"
        )
    positions = positions_of(config)
    if positions is not None and length is not None and length > positions:
        problems.append(f"{of} is {length}, and it has {positions} positions: set max_length to {positions} or less")
    if problems:
        raise LoadingError("\n".join([f"model_name_or_path: {name}", *(f"- {problem}" for problem in problems)]))


def positions_of(config: PreTrainedConfig) -> int | None:
    """The longest sequence that a text model is made for, None if it doesn't say."""
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if positions is not None and rope.get("factor"):  # of scaled rotary embeddings
        positions = max(positions, int(rope["factor"] * rope.get("original_max_position_embeddings", positions)))
    return positions


def load_model(model_config: ModelConfig, **options) -> PreTrainedModel:
    """The model to train, in the recipe's `dtype`, quantized where it says so. Raises LoadingError."""
    name = model_config.model_name_or_path
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=model_config.model_revision,
            dtype=model_config.dtype,
            quantization_config=get_quantization_config(model_config),
            use_safetensors=not model_config.allow_pickled_weights,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError) as error:
        raise LoadingError(_explained(name, "model", error)) from error
    _repair_generation_config(model, name)
    # Tied weights are saved once. The Trainer is told so, or it would call the other name missing in each resume.
    model._keys_to_ignore_on_save = list(model.all_tied_weights_keys) or None
    return model


def check_adapters(model: PeftModel) -> None:
    """Raises LoadingError where adapters would not train, or not give, what their configuration says.

    PEFT wants one name of `target_modules` to match. An adapter of one of two embeddings whose weights are one can't be
    merged.
    """
    if any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
        raise LoadingError("the adapters are switched off (disable_adapter_layers): they would not be trained")
    config, base, tuner = model.active_peft_config, model.get_base_model(), model.base_model
    modules = [name for name, _ in base.named_modules()]
    parameters = [name for name, _ in base.named_parameters()]
    problems = []
    if getattr(config, "lora_alpha", 1) <= 0:
        problems.append(f"lora_alpha is {config.lora_alpha}: adapters are scaled by it. Expected more than 0")
    # PEFT raises only if no layer of the list is there.
    layers = getattr(config, "layers_to_transform", None) or []
    count = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    if count and (missing := [layer for layer in ([layers] if isinstance(layers, int) else layers) if layer >= count]):
        problems.append(f"layers_to_transform: the model has {count} layers, and no layer {missing[0]}")
    for key, known in (("target_modules", modules), ("modules_to_save", modules), ("target_parameters", parameters)):
        asked = getattr(config, key, None)
        asked = [] if isinstance(asked, str | None) else asked  # a text is a pattern
        # Adapters wrap what they match: lm_head.original_module, q_proj.base_layer.weight.
        bare = [re.sub(r"\.(base_layer|original_module)\b", "", name) for name in known]
        unknown = sorted(name for name in asked if not any(f".{part}".endswith(f".{name}") for part in bare))
        problems += [f"lora_{key}: the model has no {name}. Correct or remove it" for name in unknown]
    tied = {key.rpartition(".")[0] for pair in base.all_tied_weights_keys.items() for key in pair}
    saved = [name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    targets = {*getattr(tuner, "targeted_module_names", ()), *saved}
    targets |= {name.rpartition(".")[0] for name in getattr(tuner, "targeted_parameter_names", ())}
    problems += [
        f"{name}: the model's input and output embeddings are one (tie_word_embeddings), and an adapter of one of them can't "
        "be merged. Leave it out, or untie them in a copy of the model"
        for name in sorted(tied & targets)
    ]
    if problems:
        raise LoadingError("\n  ".join(problems))


def require_trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, accelerator: Accelerator) -> None:
    """Raises LoadingError where a training would change nothing: all is frozen, or a user's optimizer holds other weights."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trained:
        raise LoadingError("no parameter of the model has requires_grad (PeftModel.from_pretrained: is_trainable=True)")
    if optimizer is None or accelerator.distributed_type in SHARDED:  # whose optimizers hold shards
        return
    if not trained & {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}:
        raise LoadingError("optimizers: the optimizer holds no parameter of the model that is trained")


def require_masters(model: PreTrainedModel | PeftModel, accelerator: Accelerator) -> None:
    """Raises LoadingError where an optimizer would update 16-bit weights in place, with no float32 copy to sum updates in.

    DeepSpeed and FSDP keep such a copy.
    """
    if accelerator.distributed_type in SHARDED:
        return
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.is_floating_point() and weight.element_size() < 4:
            raise LoadingError(
                f"{name} is {weight.dtype}: trained without a float32 copy most updates round to zero. Load the model in "
                "float32 (dtype: float32; bf16: true keeps the arithmetic in bfloat16), or shard it with DeepSpeed or FSDP"
            )


def _repair_generation_config(model: PreTrainedModel, name: str) -> None:
    """A checkpoint's generation configuration has to be valid, or it can't be saved; some that are published are not."""
    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError as error:
        repair = "do_sample: true is added, which its sampling settings ask for"
        config.do_sample = True
        try:
            config.validate(strict=True)
        except ValueError:
            repair = "only its special tokens are kept"
            tokens = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            # Some say with -1 that there is none.
            model.generation_config = GenerationConfig(**{key: id for key, id in tokens.items() if id != -1})
        reason = " ".join(str(error).split())
        PartialState().print(
            f"notice: the generation_config.json of {name} is not valid and could not be saved ({reason}): {repair}"
        )


def _explained(name: str, what: str, error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return (
        f"model_name_or_path: the {what} of {name} can't be loaded ({first}). Check the name or folder. On the hub: "
        "check the network (is HF_HUB_OFFLINE set?), and log in with `.venv/bin/hf auth login` if the model is gated. Weights "
        "have to be safetensors (allow_pickled_weights: true also takes pickles, which can run code); models that need "
        "trust_remote_code are not supported"
    )
