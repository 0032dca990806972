"""What is checked before a GPU hour is spent: does the run fit, is there a disk for it, may the model be read."""

import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import TrainingArguments
from trl import ModelConfig, get_peft_config

from rmipo.errors import UserError
from rmipo.objectives import build_objective
from rmipo.plan.memory import GIB, Hardware, Sharding, Workload, checkpoint_bytes, plan_memory
from rmipo.plan.shapes import Shape, load_config
from rmipo.recipe.load import Recipe
from rmipo.recipe.schema import PreferenceRunConfig, of_recipe

# What an objective needs of the initial policy -> how `Workload` calls it.
REFERENCES = {"reference_logits": "logits", "reference": "cached", "initial_prior": "cached prior"}


class PreflightError(UserError, ValueError):
    """The run can't work as it is: what was found, what was expected, what to change."""


def workload_of(recipe: Recipe) -> Workload:
    """What of a recipe decides memory and time."""
    values = recipe.values
    needs = build_objective(values["objective"]).needs if recipe.stage == "preference" else frozenset()
    weight_bytes = 4 if values.get("dtype", ModelConfig.dtype) == "float32" else 2
    kwargs = values.get("activation_checkpointing_kwargs") or {}
    flex = values.get("attention", "auto") in ("auto", "flex") and not values.get("use_cpu", False)
    return Workload(
        stage=recipe.stage,
        micro_batch=values.get("per_device_train_batch_size", PreferenceRunConfig.per_device_train_batch_size),
        evaluation_batch=values.get("per_device_eval_batch_size", PreferenceRunConfig.per_device_eval_batch_size),
        global_batch=recipe.batch(world_size=1)[0],
        max_length=values.get("max_length", PreferenceRunConfig.max_length),
        max_tokens=values.get("max_tokens_per_micro_batch"),
        checkpoint_every=kwargs.get("every_n_layers", 1) if values.get("activation_checkpointing") else 0,
        packing=values.get("packing", False),
        weight_bytes=weight_bytes,
        autocast=weight_bytes == 4 and bool(values.get("bf16", False)),
        fused_head=recipe.stage == "sft" or (flex and "reference_logits" not in needs),
        prior=bool(needs & {"prior", "mismatched"}),
        reference=next((kind for need, kind in REFERENCES.items() if need in needs), "none"),
        adapters=values.get("use_peft", False),
        quantized=values.get("load_in_4bit", False),
    )


def shape_of(recipe: Recipe) -> Shape:
    """Sizes of the recipe's model, with its adapters. Raises ConfigError if its configuration can't be read."""
    model = of_recipe(ModelConfig, recipe.values)
    return Shape.of(load_config(model.model_name_or_path, model.model_revision), get_peft_config(model))


def check_run(recipe: Recipe, args: TrainingArguments) -> None:
    """In a training process, however it was launched. Where it trains on the CPU nothing is checked."""
    here = Hardware.here()
    if here is None or args.use_cpu:
        return
    if args.n_gpu > 1:  # transformers would copy the model to all of them in every step
        raise PreflightError(f"one process sees {args.n_gpu} GPUs: start one for each (make train, accelerate launch)")
    world_size, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    check_launch(recipe, replace(here, nodes=world_size // local, gpus_per_node=local), sharding_of(args))


def check_launch(recipe: Recipe, hardware: Hardware, sharding: Sharding) -> None:
    """Raises PreflightError where a run on GPUs can't work; warns where memory is likely too small.

    Memory is an estimate, for AdamW: `memory_check: false` leaves it out.
    """
    check_masters(recipe, sharding)
    if recipe.values.get("memory_check", True) and "adamw_torch" in recipe.values.get("optim", "adamw_torch"):
        check_memory(recipe, hardware, sharding)
    check_disk(recipe.values["output_dir"], disk_needed(recipe, shape_of(recipe), sharding))


def check_masters(recipe: Recipe, sharding: Sharding) -> None:
    """Raises PreflightError where AdamW would update bfloat16 weights in place, with no float32 copy to sum updates in."""
    work = workload_of(recipe)
    if sharding.kind == "none" and not work.adapters and work.weight_bytes < 4:
        dtype = recipe.values.get("dtype", ModelConfig.dtype)
        fix = "Set dtype: float32 (with bf16: true), or use SHARDING=zero3, zero2 or fsdp2, which keep float32 copies"
        raise PreflightError(f"{recipe.path}: dtype: {dtype}: most updates would round to zero. {fix}")


def check_memory(recipe: Recipe, hardware: Hardware, sharding: Sharding) -> None:
    """Warns if the estimate of the longest micro-batch exceeds the memory.

    Raises PreflightError if weights and optimizer states alone exceed it, which is no estimate.
    """
    memory = plan_memory(shape_of(recipe), workload_of(recipe), sharding, hardware)
    # What to save on first.
    largest = sorted(memory.parts.items(), key=lambda part: -part[1])[:3]
    found = (
        f"{recipe.path}: needs {memory.needed / GIB:.0f} GiB per GPU with {sharding.kind} on {hardware.gpus} GPUs, found "
        f"{hardware.gib:.0f} ({', '.join(f'{name} {size / GIB:.0f}' for name, size in largest)}). "
        "Use more GPUs, SHARDING=zero3-offload, or an overlay of recipes/adapters"
    )
    # That is certain, where the rest is an estimate.
    if memory.parts["parameters"] + memory.parts["gradients and optimizer"] > memory.capacity:
        raise PreflightError(found)
    # A warning and no error: the longest micro-batch may never come.
    if not memory.fits and os.environ.get("RANK", "0") == "0":
        print(f"warning: by an estimate, {found}", file=sys.stderr)


def disk_needed(recipe: Recipe, shape: Shape, sharding: Sharding) -> int:
    """Bytes that the run's folder grows to: checkpoints, one more while the newest is written, and the final model."""
    work = workload_of(recipe)
    final = checkpoint_bytes(shape, work, sharding, only_model=True)
    one = checkpoint_bytes(shape, work, sharding, only_model=recipe.values.get("save_only_model", False))
    # Shares of a run say how many checkpoints it makes; numbers of steps don't, without the number of rows.
    every, limit = recipe.values.get("save_steps", 500), recipe.values.get("save_total_limit")
    made = math.ceil(1 / every) if 0 < every < 1 else None
    return final + one * min(count for count in (made, limit and limit + 1, None if made or limit else 2) if count)


def check_disk(folder: str | Path, needed: int) -> int:
    """Free bytes where `folder` is, or will be. Raises PreflightError if it can't grow to `needed` bytes there."""
    existing = Path(folder).absolute()  # the folder may not be there yet
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    there = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())  # of a run that goes on
    if free + there < needed:
        found = f"{there / GIB:.0f} are written, {free / GIB:.0f} are free. Free some, or lower save_total_limit"
        raise PreflightError(f"output_dir: {folder} needs {needed / GIB:.0f} GiB: {found}")
    return free


def sharding_of(args: TrainingArguments) -> Sharding:
    """How the launcher, or the recipe itself, has this process spread its model."""
    if args.deepspeed_plugin is not None:
        return Sharding.of_deepspeed(args.deepspeed_plugin.deepspeed_config)
    fsdp = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return Sharding("fsdp2" if fsdp else "none")


def check_access(name: str, kind: str) -> str:
    """Whether a model or dataset (`kind`) can be read, in words: a local file or folder, or a hub repository.

    Raises PreflightError with the hub's reason: it doesn't exist, is gated, or can't be reached.
    """
    if Path(name).exists():
        return f"{name} is here"
    try:
        HfApi().auth_check(name, repo_type=kind)
        return f"{name} can be read"
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, httpx2.TransportError) as error:
        file = {"model": "config.json", "dataset": "README.md"}[kind]
        if isinstance(try_to_load_from_cache(name, file, repo_type=kind), str):
            return f"{name} is in the cache"
        fix = "check the name and the network; accept the licence of a gated one, then `.venv/bin/hf auth login`"
        raise PreflightError(f"{name} can't be read on the hub ({type(error).__name__}). Fix: {fix}") from error
