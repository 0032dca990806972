"""What can be checked before a GPU hour is spent: does the run fit, is there a disk for it, may the model be read."""

import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import httpx2
import psutil
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import TrainingArguments
from trl import ModelConfig, get_peft_config

from rmipo.errors import UserError
from rmipo.objectives import build_objective
from rmipo.plan import lengths
from rmipo.plan.memory import (
    GIB,
    Hardware,
    MemoryPlan,
    Run,
    Shape,
    Sharding,
    checkpoint_bytes,
    largest_micro_batch,
    plan_memory,
)
from rmipo.plan.shapes import load_config
from rmipo.recipe.load import Recipe
from rmipo.recipe.schema import PreferenceConfig

CACHED_FILE = {"model": "config.json", "dataset": "README.md"}
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


class PreflightError(UserError, ValueError):
    """The run can't work as it is: what was found, what was expected, what to change."""


def run_of(recipe: Recipe) -> Run:
    """What of a recipe decides memory and time."""
    values = recipe.values
    needs = build_objective(values["objective"]).needs if recipe.stage == "preference" else frozenset()
    weight_bytes = WEIGHT_BYTES[values.get("dtype", ModelConfig.dtype)]
    return Run(
        stage=recipe.stage,
        micro_batch=values.get("per_device_train_batch_size", PreferenceConfig.per_device_train_batch_size),
        evaluation_batch=values.get("per_device_eval_batch_size", PreferenceConfig.per_device_eval_batch_size),
        global_batch=recipe.batch(world_size=1)[0],
        max_length=values.get("max_length", PreferenceConfig.max_length),
        max_tokens=values.get("max_tokens_per_micro_batch"),
        checkpointing=bool(values.get("activation_checkpointing", values.get("gradient_checkpointing", False))),
        packing=values.get("packing", False),
        weight_bytes=weight_bytes,
        autocast=weight_bytes == 4 and bool(values.get("bf16", False)),
        prior="prior" in needs,
        reference_model="reference_logits" in needs and not values.get("use_peft", False),
        adapters=values.get("use_peft", False),
        quantized=values.get("load_in_4bit", False),
        nested_quantization=values.get("use_bnb_nested_quant", False),
    )


def shape_of(recipe: Recipe) -> Shape:
    """Sizes of the recipe's model, with its adapters. Raises PreflightError if its configuration can't be read."""
    names = {f.name for f in fields(ModelConfig)}
    model_config = ModelConfig(**{key: value for key, value in recipe.values.items() if key in names})
    try:
        config = load_config(model_config.model_name_or_path, model_config.model_revision)
    except ValueError as error:
        raise PreflightError(f"{recipe.path}: {error}") from error
    return Shape.of(config, get_peft_config(model_config))


def check_fit(recipe: Recipe, hardware: Hardware, sharding: Sharding) -> MemoryPlan:
    """The memory plan of a run. Raises PreflightError if its longest micro-batch can't fit, naming what would help."""
    shape, run = shape_of(recipe), run_of(recipe)
    memory = plan_memory(shape, run, sharding, hardware)
    if memory.fits:
        return memory
    if not memory.host_fits and memory.needed <= memory.capacity:
        raise PreflightError(
            f"{recipe.path}: offloading with {sharding.kind} on {hardware.gpus} GPUs needs {memory.host / GIB:.0f} GiB of "
            f"each machine's memory, found {hardware.host_gib:.0f}. Use more machines, or GPUs that hold it all (zero3), "
            "or an overlay of recipes/adapters. `make plan` shows the whole estimate."
        )
    largest = sorted(memory.parts.items(), key=lambda part: -part[1])[:3]
    raise PreflightError(
        f"{recipe.path}: needs {memory.needed / GIB:.0f} GiB per GPU with {sharding.kind} on {hardware.gpus} GPUs, "
        f"found {hardware.gib:.0f} ({', '.join(f'{name} {size / GIB:.0f}' for name, size in largest)}). To fit, "
        f"{_remedy(shape, run, sharding, hardware)}. "
        "`make plan` shows the whole estimate, memory_check: false starts the run without it."
    )


def _remedy(shape: Shape, run: Run, sharding: Sharding, hardware: Hardware) -> str:
    """The smallest change of the recipe that makes the run fit, or what else could."""
    for checkpointing, evaluation_batch in (
        (run.checkpointing, run.evaluation_batch),
        (run.checkpointing, 1),
        (True, 1),
    ):
        candidate = replace(run, checkpointing=checkpointing, evaluation_batch=evaluation_batch)
        size = largest_micro_batch(shape, candidate, sharding, hardware)
        if size is not None:
            candidate = replace(candidate, micro_batch=min(size, run.micro_batch))
            if run.max_tokens is not None:
                tokens = min(run.full_length(size), run.max_tokens)
                candidate = replace(candidate, micro_batch=run.micro_batch, max_tokens=tokens)
            keys = {
                "micro_batch": "per_device_train_batch_size",
                "max_tokens": "max_tokens_per_micro_batch",
                "evaluation_batch": "per_device_eval_batch_size",
                "checkpointing": "activation_checkpointing",
            }
            changed = [
                f"{key}: {str(getattr(candidate, name)).lower()}"
                for name, key in keys.items()
                if getattr(candidate, name) != getattr(run, name)
            ]
            return f"set {', '.join(changed)}"
    return "use more GPUs, zero3-offload, a shorter max_length, or an overlay of recipes/adapters"


def disk_needed(recipe: Recipe, shape: Shape, sharding: Sharding) -> int:
    """Bytes that the run's folder grows to: checkpoints, one more while the newest is written, and the final model."""
    run = run_of(recipe)
    final = checkpoint_bytes(shape, run, sharding, only_model=True)
    one = checkpoint_bytes(shape, run, sharding, only_model=recipe.values.get("save_only_model", False))
    return final + one * lengths.kept_checkpoints(recipe, run)


def check_disk(folder: str | Path, needed: int) -> int:
    """Free bytes where `folder` is, or will be. Raises PreflightError if it can't grow to `needed` bytes there."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    there = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())  # of a run that goes on
    if free + there < needed:
        raise PreflightError(
            f"output_dir: {folder} needs {needed / GIB:.0f} GiB, {there / GIB:.0f} of them are there and {free / GIB:.0f} "
            "GiB are free. Free some, set a lower save_total_limit or save_only_model: true (such a run can't be resumed), "
            "or name another output_dir"
        )
    return free


def check_launch(recipe: Recipe, hardware: Hardware, sharding: Sharding) -> None:
    """Before a run starts; raises PreflightError where memory or disk are too small.

    Memory is an estimate, for AdamW: `memory_check: false` leaves it out.
    """
    if recipe.values.get("memory_check", True) and "adamw_torch" in recipe.values.get("optim", "adamw_torch"):
        check_fit(recipe, hardware, sharding)
    check_disk(recipe.values["output_dir"], disk_needed(recipe, shape_of(recipe), sharding))


def check_run(recipe: Recipe, args: TrainingArguments) -> None:
    """The same in a training process, however it was launched. Where it trains on the CPU nothing is checked."""
    here = local_hardware()
    if here is None or args.use_cpu:
        return
    world_size, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    check_launch(recipe, replace(here, nodes=world_size // local, gpus_per_node=local), sharding_of(args))


def sharding_of(args: TrainingArguments) -> Sharding:
    """How the launcher, or the recipe itself, has this process spread its model."""
    if args.deepspeed_plugin is not None:
        return Sharding.of_deepspeed(args.deepspeed_plugin.deepspeed_config)
    fsdp = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return Sharding("fsdp2" if fsdp else "none")


def local_hardware(use_cpu: bool = False) -> Hardware | None:
    """The GPUs of this machine, None without any; or, with `use_cpu`, the machine as one device with its memory."""
    memory = psutil.virtual_memory().total / GIB
    if use_cpu:
        return Hardware(1, 1, memory)
    count = torch.cuda.device_count()
    if count == 0:
        return None
    smallest = min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    return Hardware(1, count, smallest / GIB, memory)


def check_access(name: str, kind: str) -> str:
    """Whether a model or dataset (`kind`) can be read, in words: a local file or folder, or a hub repository.

    Raises PreflightError where it doesn't exist, is gated, or the hub can't be reached.
    """
    if Path(name).exists():
        return f"{name} is here"
    try:
        HfApi().auth_check(name, repo_type=kind)
    except GatedRepoError as error:
        raise PreflightError(
            f"{name} is gated. Fix: accept its licence on its hub page, then `hf auth login` or set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise PreflightError(
            f"{name} is neither a local path nor a {kind} on the hub that this login sees. Fix: check the recipe's name"
        ) from error
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx2.TransportError) as error:
        if isinstance(try_to_load_from_cache(name, CACHED_FILE[kind], repo_type=kind), str):
            return f"{name} is in the cache"
        raise PreflightError(
            f"{name}: hub unreachable ({type(error).__name__}). Fix: download it where there is a network, or name a "
            "local folder"
        ) from error
    return f"{name} can be read"
