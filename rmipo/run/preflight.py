"""What can be built without the model is built before it is loaded: a missing package or key is found in seconds."""

import copy
import os
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import TorchDynamoPlugin
from peft import get_peft_model
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import is_liger_kernel_available
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from rmipo.objectives import build_objective
from rmipo.plan.compiler import compiler_problem
from rmipo.plan.shapes import empty_model, load_config
from rmipo.recipe.load import ConfigError, Recipe
from rmipo.recipe.schema import PreferenceRunConfig
from rmipo.run.export import HUB_ERRORS, make_repository
from rmipo.training.attention import resolve_kind
from rmipo.training.distributed import on_main_process
from rmipo.training.loading import check_adapters
from rmipo.training.metrics import check_logged, evaluation_metrics

TARGETED = ("galore", "apollo")  # optimizers that read optim_target_modules
BUILT_ON_THE_MODEL = (*TARGETED, "lomo")  # those that pick their parameters in it
SFT_METRICS = ("loss", "entropy", "mean_token_accuracy", "num_tokens")  # TRL's, without their prefix eval_
ANY_LENGTH = 1000  # steps of the schedule that is built, where the recipe counts epochs


def check_parts(recipe: Recipe, args: TrainingArguments, model_config: ModelConfig) -> None:
    """Build trackers, adapter, optimizer, schedule, quantizer, and what they need. Raises ConfigError with all that failed."""
    folders = ["output_dir"]
    if recipe.stage == "preference" and "reference" in build_objective(args.objective).needs:
        folders.append("reference_cache_dir")
    parts = {key: lambda key=key: _check_folder(getattr(args, key)) for key in folders}
    if recipe.stage == "preference":
        parts["attention"] = lambda: _check_attention(args)
    else:
        parts["activation_offloading"] = lambda: _check_offloading(args)
    parts |= {
        "report_to": lambda: _check_trackers(args.report_to),
        "push_to_hub, hub_model_id": lambda: _check_repository(args),
        "metric_for_best_model": lambda: _check_best_metric(args, model_config),
        "attn_implementation": lambda: model_config.attn_implementation and _empty_model(model_config),
        "lora_target_modules, lora_modules_to_save, lora_task_type": lambda: _build_adapter(model_config),
        "torch_compile, torch_compile_backend, torch_compile_mode": lambda: _check_compilation(args),
        "optim, optim_args, optim_target_modules": lambda: _build_optimizer(args, model_config),
        "lr_scheduler_type, lr_scheduler_kwargs": lambda: _build_schedule(args),
        "use_liger_kernel": lambda: _check_liger(args),
        "load_in_4bit, load_in_8bit": lambda: _build_quantizer(model_config),
    }
    problems = []
    for keys, build in parts.items():
        try:
            build()
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            given = ", ".join(f"{key}: {recipe.values[key]}" for key in keys.split(", ") if key in recipe.values)
            problems.append(f"{given or keys}: {str(error).strip()}")
    if problems:
        raise ConfigError("\n  ".join([f"{recipe.path}: this run can't start here:", *problems]))


def check_special_tokens(args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where `eos_token` or `pad_token` of an SFT recipe is no token of the model."""
    named = {key: token for key in ("eos_token", "pad_token") if (token := getattr(args, key)) is not None}
    if unknown := [f"{key}: {token}" for key, token in named.items() if token not in tokenizer.get_vocab()]:
        raise ConfigError(
            f"{', '.join(unknown)}: expected a token of {tokenizer.name_or_path}. Remove the key, or name one it has"
        )


def check_assistant_mask(args: TrainingArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where `assistant_only_loss` has a chat template that doesn't mark what the assistant says."""
    if args.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        try:
            get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ConfigError(
                "assistant_only_loss: the chat template has no {% generation %} ... {% endgeneration %} around assistant "
                "messages, and TRL knows no such version of it. Add them (chat_template: a .jinja file), or set "
                "assistant_only_loss: false"
            ) from error


def _check_folder(folder: str) -> None:
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise OSError(f"{existing} is a file; expected a folder, or the name of a new one")
    if not os.access(existing, os.W_OK):
        raise OSError(f"no permission to write in {existing}")


def _check_attention(args: PreferenceRunConfig) -> None:
    if args.attention == "flex" and args.device.type == "cpu":
        raise ValueError("flex_attention has no backward on the CPU: expected auto, segment or dense")
    if resolve_kind(args.attention, args.device) == "flex" and (problem := compiler_problem()):
        raise ValueError(f"flex attention is compiled at the first step, and {problem}. Or set attention: segment")


def _check_compilation(args: TrainingArguments) -> None:
    TorchDynamoPlugin(backend=args.torch_compile_backend)
    if not args.torch_compile or not isinstance(args, PreferenceRunConfig):
        return
    # The kernel takes where each response starts and ends as numbers, which torch makes part of what it compiles.
    if resolve_kind(args.attention, args.device) == "segment":
        raise ValueError(
            "attention: segment would be compiled again for each length of packed sequences, which takes longer than the "
            "steps. Remove it"
        )


def _check_offloading(args: SFTConfig) -> None:
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError("it moves activations from a GPU to the CPU's memory, and this run is on a CPU. Remove it")


def _check_trackers(names: list[str]) -> None:
    for name, callback in zip(names, get_reporting_integration_callbacks(names), strict=True):
        # Where __init__ raises, the __del__ of these prints a traceback about what is missing in the object.
        if hasattr(callback, "__del__") and name not in get_available_reporting_integrations():
            raise ImportError(f"{name} is not installed: .venv/bin/python -m pip install {name}")
        callback()
    if "wandb" in names:
        import wandb

        settings = wandb.setup().settings
        if settings.mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
            raise ValueError(
                "W&B has no key. Run `.venv/bin/wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline, or report_to: none"
            )


def _check_repository(args: TrainingArguments) -> None:
    """Make the upload's repository, which the Trainer would make when the model is loaded."""
    if not args.push_to_hub:
        return
    try:
        on_main_process(lambda: make_repository(args))
    except HUB_ERRORS as error:
        raise ValueError(
            f"the repository can't be made ({str(error).splitlines()[0]}). Check hub_model_id and the network (is "
            "HF_HUB_OFFLINE set?), and log in with `.venv/bin/hf auth login` or set HF_TOKEN"
        ) from error


def _build_adapter(model_config: ModelConfig) -> None:
    adapter = get_peft_config(model_config)
    if adapter is None:
        return
    model = _empty_model(model_config)
    with init_empty_weights():
        check_adapters(get_peft_model(model, adapter))


def _build_optimizer(args: TrainingArguments, model_config: ModelConfig) -> None:
    built_on_it = any(name in args.optim for name in BUILT_ON_THE_MODEL)
    model = _empty_model(model_config) if built_on_it else None
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not built_on_it:
        optimizer([torch.nn.Parameter(torch.zeros(1))], **options)
    unread = [f"optim_args {key}" for key in _unread_options(args, model)]
    if args.optim_target_modules and not any(name in args.optim for name in TARGETED):
        unread.append("optim_target_modules")
    if unread:
        raise ValueError(f"{', '.join(unread)}: no effect on {args.optim.value}. Remove it")


def _unread_options(args: TrainingArguments, model: PreTrainedModel | None) -> list[str]:
    """The keys of `optim_args` that the optimizer doesn't read: a value without sense makes no difference to it."""

    def made(**optim_args: str) -> str:
        probe = copy.copy(args)
        probe.optim_args = ",".join(f"{key}={value}" for key, value in optim_args.items())
        try:
            return repr(Trainer.get_optimizer_cls_and_kwargs(probe, model))
        except (AttributeError, ValueError) as error:
            return repr(error)

    given = dict(text.split("=") for text in (args.optim_args or "").replace(" ", "").split(",") if text)
    return [key for key in given if made(**{key: "?"}) == made()]


def _check_best_metric(args: TrainingArguments, model_config: ModelConfig) -> None:
    """The Trainer would find a metric that isn't logged at the first evaluation."""
    if args.metric_for_best_model is None:
        return
    if isinstance(args, PreferenceRunConfig):
        known = evaluation_metrics(build_objective(args.objective))
    else:
        config = load_config(model_config.model_name_or_path, model_config.model_revision).get_text_config()
        known = [*SFT_METRICS, *["aux_loss"] * hasattr(config, "output_router_logits")]  # of a mixture of experts
    check_logged(args.metric_for_best_model, known)


def _empty_model(model_config: ModelConfig) -> PreTrainedModel:
    """The model's modules without weights."""
    config = load_config(model_config.model_name_or_path, model_config.model_revision)
    config._attn_implementation = model_config.attn_implementation
    return empty_model(config)


def _build_schedule(args: TrainingArguments) -> None:
    steps = args.max_steps if args.max_steps > 0 else ANY_LENGTH
    get_scheduler(
        args.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
        num_warmup_steps=0,  # the first rate is then computed as those after the warm-up
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def _check_liger(args: TrainingArguments) -> None:
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("liger-kernel is not installed: .venv/bin/python -m pip install liger-kernel")


def _build_quantizer(model_config: ModelConfig) -> None:
    configuration = get_quantization_config(model_config)
    if configuration is not None:
        AutoHfQuantizer.from_config(configuration).validate_environment()
