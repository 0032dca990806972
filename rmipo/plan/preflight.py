"""What is checked before a GPU hour is spent: does the run fit, how long does it take, is there a disk for it?"""

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

from rmipo.data.sources import load_rows, mixture_entries
from rmipo.errors import UserError
from rmipo.objectives import build_objective
from rmipo.plan.memory import GIB, Hardware, Shape, Sharding, Workload, load_config, plan_memory
from rmipo.recipe.load import Recipe
from rmipo.recipe.schema import ARGUMENTS, DataConfig, PreferenceRunConfig, of_recipe

# Tokens, UltraFeedback-like and UltraChat-like: they set the expected hours, never the fit.
TYPICAL_PROMPT, TYPICAL_RESPONSE, TYPICAL_DIALOGUE = 220, 320, 1_100

A100 = 312  # TFLOP/s
# Share of a GPU's peak that a training's matrix products reach: torchtitan has 33% to 39% for an 8B model on 8 H100.
REACHED = (0.25, 0.5)
ASSUMED_ROWS = {"preference": 61_135, "sft": 207_865}  # of UltraFeedback and UltraChat


def training_examples(recipe: Recipe) -> tuple[int, bool]:
    """Rows of the training data, and whether they were counted: of data that is not here they are assumed."""
    config = of_recipe(DataConfig, recipe.values)
    if all(Path(entry["path"]).exists() for entry in mixture_entries(config)):
        return len(load_rows(config, "train", lambda rows, _: rows.select_columns(["row"]))), True
    rows = ASSUMED_ROWS[recipe.stage]
    return min(rows, config.max_train_samples or rows), False


def steps(recipe: Recipe, work: Workload, examples: int) -> int:
    """Optimizer steps; `max_steps` takes the place of the epochs."""
    if recipe.values.get("max_steps", -1) > 0:
        return recipe.values["max_steps"]
    rows = math.ceil(examples * TYPICAL_DIALOGUE / work.packed_length) if work.packed_length else examples
    epochs = recipe.values.get("num_train_epochs", ARGUMENTS[recipe.stage].num_train_epochs)
    return math.ceil(math.ceil(rows / work.global_batch) * epochs)


def hours(shape: Shape, work: Workload, gpus: int, steps: int, tflops: float) -> tuple[float, float]:
    """Expected hours (from, to) of a run of typical lengths; evaluations and checkpoints apart.

    FLOPs per weight and token: 2 forward, 4 backward (2 where weights are frozen), 2 for a layer that is computed again,
    2 for each score without gradient. Embeddings are counted too, which makes up for attention. `tflops`: dense bfloat16
    peak of one GPU.
    """
    responses = 2 * TYPICAL_RESPONSE
    tokens = TYPICAL_DIALOGUE if work.stage == "sft" else TYPICAL_PROMPT + responses
    gradient = 2 + (2 if work.adapters else 4) + (2 / work.checkpoint_every if work.checkpoint_every else 0)
    scored = tokens * work.scores_pairs + responses * work.scores_responses
    # A packed row holds several dialogues. The smaller last step of an epoch counts as a whole one.
    per_step = work.global_batch * (work.packed_length / TYPICAL_DIALOGUE if work.packed_length else 1)
    flops = shape.parameters * steps * per_step * (gradient * tokens + 2 * scored)
    return tuple(flops / (gpus * tflops * 1e12 * share) / 3600 for share in reversed(REACHED))


class PreflightError(UserError, ValueError):
    """The run can't work as it is: what was found, what was expected, what to change."""


def workload_of(recipe: Recipe) -> Workload:
    """What of a recipe decides memory and time."""
    values = recipe.values
    needs = build_objective(values["objective"]).needs if recipe.stage == "preference" else frozenset()
    weight_bytes = 4 if values.get("dtype", ModelConfig.dtype) == "float32" else 2
    kwargs = values.get("activation_checkpointing_kwargs") or {}
    whole_logits = "reference_logits" in needs or values.get("attention", "auto") not in ("auto", "flex")
    max_length = values.get("max_length", PreferenceRunConfig.max_length)
    # A pair is longest with a short prompt and two responses that are cut at max_length.
    row = max_length * (1 if recipe.stage == "sft" else 2)
    rows = values.get("per_device_train_batch_size", PreferenceRunConfig.per_device_train_batch_size)
    return Workload(
        stage=recipe.stage,
        longest=max(values.get("max_tokens_per_micro_batch") or rows * row, row),
        global_batch=recipe.batch(world_size=1)[0],
        packed_length=max_length if values.get("packing") else None,
        checkpoint_every=kwargs.get("every_n_layers", 1) if values.get("activation_checkpointing") else 0,
        weight_bytes=weight_bytes,
        compute_bytes=2 if values.get("bf16", False) else weight_bytes,
        fused_head=recipe.stage == "sft" or not whole_logits,
        reference_logits="reference_logits" in needs,
        scores_pairs=bool(needs & {"reference", "reference_logits"}),
        scores_responses=bool(needs & {"prior", "mismatched", "initial_prior"}),
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
    check_launch(recipe, replace(here, gpus=int(os.environ.get("WORLD_SIZE", "1"))), sharding_of(args))


def check_launch(recipe: Recipe, hardware: Hardware, sharding: Sharding) -> None:
    """Raises PreflightError where a run on GPUs can't work; warns where an estimate, for AdamW, exceeds the memory."""
    check_masters(recipe, sharding)
    shape = shape_of(recipe)
    memory = plan_memory(shape, workload_of(recipe), sharding, hardware)
    needed, found = sum(memory.values()) / GIB, f"{sharding.kind} on {hardware.gpus} GPUs, found {hardware.gib:.0f}"
    said = f"{recipe.path}: needs {needed:.0f} GiB per GPU with {found} (make plan shows the parts)"
    if recipe.values.get("memory_check", True) and "adamw_torch" in recipe.values.get("optim", "adamw_torch"):
        # This is certain, where the rest is an estimate: the longest micro-batch may never come.
        if memory["parameters"] + memory["gradients and optimizer"] > hardware.gib * GIB:
            raise PreflightError(f"{said}. Use more GPUs, SHARDING=zero3-offload, or an overlay of recipes/adapters")
        if needed > hardware.gib and os.environ.get("RANK", "0") == "0":
            print(f"warning: by an estimate, {said}", file=sys.stderr)
    check_disk(recipe.values["output_dir"], disk_needed(recipe, shape, sharding))


def check_masters(recipe: Recipe, sharding: Sharding) -> None:
    """Raises PreflightError where AdamW would update bfloat16 weights in place, with no float32 copy to sum updates in."""
    work = workload_of(recipe)
    if sharding.kind == "none" and not work.adapters and work.weight_bytes < 4:
        found = (
            f"{recipe.path}: dtype: {recipe.values.get('dtype', ModelConfig.dtype)}: most updates would round to zero"
        )
        raise PreflightError(f"{found}. Set dtype: float32 (with bf16: true), or use SHARDING=zero3, zero2 or fsdp2")


def disk_needed(recipe: Recipe, shape: Shape, sharding: Sharding) -> int:
    """Bytes that the run's folder grows to: checkpoints, one more while the newest is written, and the final model."""
    work, values = workload_of(recipe), recipe.values
    # FSDP2 saves its float32 masters as the model.
    size = 4 if work.adapters or sharding.kind == "fsdp2" else work.weight_bytes
    model = size * (shape.trained if work.adapters else shape.parameters)
    # To resume: float32 masters and Adam's moments.
    checkpoint = model + (0 if values.get("save_only_model") else 12 * shape.trained)
    counts = [values["save_total_limit"] + 1] if values.get("save_total_limit") else []
    if 0 < values.get("save_steps", 500) < 1:  # a share of the run says how many it makes
        counts.append(math.ceil(1 / values["save_steps"]))
    return model + checkpoint * min(counts, default=2)


def check_disk(folder: str | Path, needed: int) -> int:
    """Free bytes where `folder` is, or will be. Raises PreflightError if it can't grow to `needed` bytes there."""
    folder = Path(folder).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # of a run that goes on
    if free + there < needed:
        raise PreflightError(f"output_dir: {folder} needs {needed / GIB:.0f} GiB, {free / GIB:.0f} are free. Free some")
    return free


def sharding_of(args: TrainingArguments) -> Sharding:
    """How the launcher, or the recipe itself, has this process spread its model."""
    if args.deepspeed_plugin is not None:
        return Sharding.of_deepspeed(args.deepspeed_plugin.deepspeed_config)
    fsdp = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return Sharding("fsdp2" if fsdp else "none")


def check_access(name: str, kind: str) -> str:
    """In words, how a model or dataset (`kind`) can be read, here or on the hub. Raises PreflightError if it can't."""
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
