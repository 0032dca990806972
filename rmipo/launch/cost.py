"""What a run will cost: memory per GPU, steps, hours, disk. Needs no GPU and downloads no model."""

from collections.abc import Mapping
from pathlib import Path

from rmipo.cli import choose
from rmipo.errors import ConfigError
from rmipo.launch.choices import choose_sharding, choose_stages, node_count, positive_number
from rmipo.launch.pipeline import launch_configuration, load_steps, maker
from rmipo.plan import duration, gpus, lengths, preflight
from rmipo.plan.memory import (
    GIB,
    Hardware,
    MemoryPlan,
    Run,
    Sharding,
    largest_micro_batch,
    plan_memory,
)
from rmipo.recipe.load import Recipe

# Where the number of examples is not known: UltraFeedback's (the on-policy sets have about as many), UltraChat's.
ASSUMED_EXAMPLES = {
    "preference": lengths.ROWS["HuggingFaceH4/ultrafeedback_binarized", "train_prefs"],
    "sft": lengths.ROWS["HuggingFaceH4/ultrachat_200k", "train_sft"],
}


def hardware_of(env: Mapping[str, str], recipe: Recipe) -> Hardware:
    nodes = node_count(env)
    if env.get("GPUS"):
        return Hardware.parse(env["GPUS"], nodes)
    if nodes > 1:
        raise preflight.PreflightError(f"NODES={nodes}: name the GPUs of each and the GiB of one too, e.g. GPUS=8x80")
    hardware = preflight.local_hardware(use_cpu=recipe.values.get("use_cpu", False))
    if hardware is None:
        raise preflight.PreflightError("no GPU is visible here: name what to plan for, e.g. GPUS=4x80")
    return hardware


def examples_of(env: Mapping[str, str], recipe: Recipe) -> tuple[int, str]:
    """(training examples, where the number is from)."""
    if env.get("EXAMPLES"):
        if not env["EXAMPLES"].isdecimal() or int(env["EXAMPLES"]) < 1:
            raise ConfigError(f"EXAMPLES={env['EXAMPLES']}: expected a whole number, 1 or more")
        return int(env["EXAMPLES"]), "as EXAMPLES says"
    known = lengths.training_examples(recipe)
    if known is not None:
        return known, "in the training data"
    assumed = ASSUMED_EXAMPLES[recipe.stage]
    return min(assumed, recipe.values.get("max_train_samples") or assumed), "assumed; EXAMPLES= says otherwise"


def require_earlier_stage(model: str, recipe: Recipe, env: Mapping[str, str]) -> None:
    """Raises PreflightError if the recipe starts from, or trains on, what an earlier stage has not made yet."""
    for key in ("model_name_or_path", "dataset_name"):
        value = recipe.values.get(key) or ""
        command = maker(value, model, env)
        if command and not Path(value).exists():
            raise preflight.PreflightError(f"{key}: {value} is made by an earlier stage. Run it first: {command}")


def print_memory(memory: MemoryPlan, run: Run, hardware: Hardware, device: str) -> None:
    print(f"\nMemory of {device} at the longest micro-batch that the recipe allows ({run.longest_micro_batch} tokens)")
    for name, size in memory.parts.items():
        print(f"  {name:36} {size / GIB:8.1f} GiB")
    verdict = "fits" if memory.needed <= memory.capacity else "DOES NOT FIT"
    print(f"  {'total':36} {memory.needed / GIB:8.1f} GiB of {hardware.gib:g}: {verdict}")
    prior = f"; scoring without gradient {memory.prior / GIB:.1f} GiB" if run.prior else ""
    print(f"  in place of activations and LM head: evaluation {memory.evaluation / GIB:.1f} GiB{prior}")
    if memory.host:
        verdict = "fits" if memory.fits or memory.needed > memory.capacity else "DOES NOT FIT"
        of = f" of {hardware.host_gib:.0f}: {verdict}" if hardware.host_gib else ""
        print(f"  offloaded to each node's memory: {memory.host / GIB:.0f} GiB{of}")
    head = "the LM head in tiles, never all logits" if run.fused_head else "all logits at once"
    again = {0: "no layer", 1: "every layer"}.get(run.checkpoint_every, f"one layer in {run.checkpoint_every}")
    print(f"  attention keeps no score matrix; {head}; {again} computed again in backward")


def print_suggestion(shape, run: Run, sharding: Sharding, hardware: Hardware) -> None:
    """The largest micro-batch as the recipe is."""
    size = largest_micro_batch(shape, run, sharding, hardware)
    key, value = "per_device_train_batch_size", size
    if run.max_tokens:
        key, value = "max_tokens_per_micro_batch", size and run.full_length(size)
    print(f"\nLargest that fits as the recipe is: {key}: {value or 'none'}")


def plan(env: Mapping[str, str]) -> int:
    """Print what the run that `env` asks for costs; 1 if the estimate of its memory exceeds the GPU's, else 0."""
    model, stages = choose_stages(env)
    recipes = {step.stage: step.recipe for step in load_steps(model, stages, env) if step.recipe is not None}
    recipe = recipes[choose("STAGE", env["STAGE"], list(recipes), f"The stages of {model}")]
    require_earlier_stage(model, recipe, env)
    on_cpu = recipe.values.get("use_cpu", False)
    hardware = hardware_of(env, recipe)
    launch = launch_configuration(recipe, choose_sharding(env))
    sharding = Sharding("none") if on_cpu else Sharding.load(launch)
    preflight.check_masters(recipe, sharding)
    run, shape = preflight.run_of(recipe), preflight.shape_of(recipe)
    memory = plan_memory(shape, run, sharding, hardware)

    trained = f", {shape.trained / 1e6:.1f} M of them trained" if run.adapters else ""
    print(f"{recipe.path}: {recipe.values['model_name_or_path']}, {shape.parameters / 1e9:.3g} B parameters{trained}")
    if on_cpu:
        print(f"This machine's CPU with {hardware.gib:.0f} GiB of memory")
    else:
        print(f"{hardware.nodes} node(s) x {hardware.gpus_per_node} GPUs x {hardware.gib:g} GiB, {launch.stem}")
    print_memory(memory, run, hardware, "the process" if on_cpu else "each GPU")
    print_suggestion(shape, run, sharding, hardware)

    device = "CPU" if on_cpu else f"{hardware.gpus} GPUs"
    _, accumulation = recipe.batch(hardware.gpus)
    cut = (
        f"in sequences of at most {run.max_tokens} tokens"
        if run.max_tokens
        else f"x {run.micro_batch} x {accumulation}"
    )
    examples, source = examples_of(env, recipe)
    steps, seen = lengths.steps(recipe.values, run, examples), lengths.examples_seen(recipe.values, run, examples)
    tokens_each = duration.typical_tokens(run)[0]
    print(f"\nExamples: {examples}, {source}")
    print(f"Steps: {steps}, each {run.global_batch} examples = {device} {cut}")
    if not on_cpu and (waiting := lengths.waiting(run, hardware.gpus)):
        print(
            f"  {run.global_batch // hardware.gpus} pairs a GPU: {waiting} of a step is waiting for the GPU with the longest. "
            f"global_batch_size: {hardware.gpus * lengths.ENOUGH_PAIRS} would use all of them; that is another run"
        )
    print(f"Tokens: {seen * tokens_each / 1e6:.0f} M with gradients, {tokens_each} an example (assumed)")
    if on_cpu:
        print("Hours: not estimated for a CPU; the progress bar of a trial shows them: ARGS='--max_steps 20'")
    else:
        speed = gpus.speed_with(positive_number(env, "TFLOPS", gpus.A100.tflops))
        phases = duration.hours(recipe, shape, run, sharding, hardware, examples, speed)
        slow, fast = (seen * tokens_each / hours / 3600 for hours in reversed(phases["training"]))
        print_hours(phases, hardware, speed)
        print(f"Tokens per second: {slow:.0f} to {fast:.0f} in training steps")
    needed = preflight.disk_needed(recipe, shape, sharding)
    print(f"Disk: {needed / GIB:.1f} GiB in {recipe.values['output_dir']} (checkpoints, one being written, the model)")
    return 0 if memory.fits else 1


def print_hours(phases: dict[str, tuple[float, float]], hardware: Hardware, speed: gpus.Speed) -> None:
    low, high = phases.pop("total")
    print(f"Hours: {low:.1f} to {high:.1f}, {low * hardware.gpus:.0f} to {high * hardware.gpus:.0f} GPU hours")
    for name, (start, end) in phases.items():
        print(f"  {name:20} {start:.2f}" + (f" to {end:.2f}" if end > start else ""))
    low, high = speed.reached
    link, places = duration.GATHER_GIB["one node" if hardware.nodes == 1 else "several nodes"], duration.SAVE_GIB
    print(
        f"  assumed, not measured on a GPU: matrix products at {low:.0%} to {high:.0%} of {speed.tflops:g} TFLOP/s per GPU "
        f"(A100: 312, H100: 989; TFLOPS=); weights gathered at {link} GiB/s; disk at {places:g} GiB/s; "
        f"{duration.EVALUATION_EXAMPLES} held-out examples"
    )
