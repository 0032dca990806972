"""What a run would cost, before it is paid: memory per GPU, steps, hours, disk. Needs no GPU and downloads no model.

    make plan MODEL=llama3-8b-instruct GPUS=8x80 [NODES=4] [METHOD=dpo] [STAGE=sft] [ARGS="--max_length 1024"]

GPUS is <GPUs of each machine>x<GiB of one>, by default what this machine has; STAGE is rmipo unless it is sft.
The exit code is 1 if the run can't fit.
"""

import os
from pathlib import Path

from rmipo import cli
from rmipo.errors import ConfigError
from rmipo.launch.choices import choose_sharding, choose_stages, node_count
from rmipo.launch.pipeline import launch_configuration, load_steps, maker
from rmipo.plan import lengths, preflight
from rmipo.plan import memory as plan
from rmipo.plan.memory import GIB, Hardware, Sharding
from rmipo.recipe.load import Recipe

VARIABLES = ("MODEL", "STAGE", "METHOD", "DATA", "ARGS", "GPUS", "NODES", "SHARDING", "EXAMPLES", "TFLOPS")
# Where the number of examples is not known: UltraFeedback's (the on-policy sets have about as many), UltraChat's.
ASSUMED_EXAMPLES = {
    "preference": lengths.ROWS["HuggingFaceH4/ultrafeedback_binarized", "train_prefs"],
    "sft": lengths.ROWS["HuggingFaceH4/ultrachat_200k", "train_sft"],
}


def number(env: dict[str, str], name: str, default: float) -> float:
    text = env.get(name) or str(default)
    if not text.replace(".", "", 1).isdecimal() or float(text) <= 0:
        raise ConfigError(f"{name}={text}: expected a number above 0")
    return float(text)


def hardware_of(env: dict[str, str], recipe: Recipe) -> Hardware:
    nodes = node_count(env)
    if env.get("GPUS"):
        return Hardware.parse(env["GPUS"], nodes)
    if nodes > 1:
        raise preflight.PreflightError(f"NODES={nodes}: name the GPUs of each and the GiB of one too, e.g. GPUS=8x80")
    hardware = preflight.local_hardware(use_cpu=recipe.values.get("use_cpu", False))
    if hardware is None:
        raise preflight.PreflightError("no GPU is visible here: name what to plan for, e.g. GPUS=4x80")
    return hardware


def examples_of(env: dict[str, str], recipe: Recipe) -> tuple[int, str]:
    """(training examples, where the number is from)."""
    if env.get("EXAMPLES"):
        return int(number(env, "EXAMPLES", 1)), "as EXAMPLES says"
    known = lengths.training_examples(recipe)
    if known is not None:
        return known, "in the training data"
    assumed = ASSUMED_EXAMPLES[recipe.stage]
    return min(assumed, recipe.values.get("max_train_samples") or assumed), "assumed; EXAMPLES= says otherwise"


def require_earlier_stage(model: str, recipe: Recipe, env: dict[str, str]) -> None:
    """Raises PreflightError if the recipe starts from, or trains on, what an earlier stage has not made yet."""
    for key in ("model_name_or_path", "dataset_name"):
        value = recipe.values.get(key) or ""
        command = maker(value, model, env)
        if command and not Path(value).exists():
            raise preflight.PreflightError(f"{key}: {value} is made by an earlier stage. Run it first: {command}")


def main() -> int:
    os.chdir(Path(__file__).parent.parent)
    env = {**os.environ, "STAGE": "rmipo"} | cli.variables(cli.options(__doc__, *VARIABLES).read())
    model, stages = choose_stages(env)
    recipe = next(step.recipe for step in load_steps(model, stages, env) if step.stage == env["STAGE"])
    require_earlier_stage(model, recipe, env)
    hardware = hardware_of(env, recipe)
    launch = launch_configuration(recipe, choose_sharding(env))
    sharding = Sharding.load(launch)
    run, shape = preflight.run_of(recipe), preflight.shape_of(recipe)
    memory = plan.plan_memory(shape, run, sharding, hardware)
    tokens = run.longest_row(run.micro_batch)

    print(f"{recipe.path}: {recipe.values['model_name_or_path']}, {shape.parameters / 1e9:.2f} B parameters", end="")
    print(f", {shape.trained / 1e6:.1f} M of them trained" if run.adapters else "")
    print(f"{hardware.nodes} node(s) x {hardware.gpus_per_node} GPUs x {hardware.gib:g} GiB, {launch.stem}")

    print(f"\nMemory per GPU at the longest micro-batch that the recipe allows ({tokens} tokens)")
    for name, size in memory.parts.items():
        print(f"  {name:36} {size / GIB:8.1f} GiB")
    print(
        f"  {'total':36} {memory.needed / GIB:8.1f} GiB of {hardware.gib:g}:",
        "fits" if memory.needed <= memory.capacity else "DOES NOT FIT",
    )
    prior = f"; the prior pass {memory.prior / GIB:.1f} GiB" if run.prior else ""
    print(f"  in place of activations and head logits: evaluation {memory.evaluation / GIB:.1f} GiB{prior}")
    if memory.host:
        found = (
            f" of {hardware.host_gib:.0f}: {'fits' if memory.host_fits else 'DOES NOT FIT'}"
            if hardware.host_gib
            else ""
        )
        print(f"  offloaded to each node's memory: {memory.host / GIB:.0f} GiB{found}")
    checkpointing = "with" if run.checkpointing else "without"
    print(
        f"  activations {checkpointing} gradient checkpointing; attention by flex or flash, which keeps no score matrix"
    )

    size = plan.largest_micro_batch(shape, run, sharding, hardware)
    key, value = "per_device_train_batch_size", size
    if run.max_tokens:
        key, value = "max_tokens_per_micro_batch", size and run.full_length(size)
    print(f"\nSuggested {key}: {value or 'none fits'}")
    _, accumulation = recipe.batch(hardware.gpus)
    cut = f"in rows of at most {run.max_tokens} tokens" if run.max_tokens else f"x {run.micro_batch} x {accumulation}"
    tflops, (examples, source) = number(env, "TFLOPS", plan.A100_TFLOPS), examples_of(env, recipe)
    steps, seen = lengths.steps(recipe.values, run, examples), lengths.examples_seen(recipe.values, run, examples)
    tokens_each = plan.typical_tokens(run)[0]
    duration = plan.hours(shape, run, hardware, seen, tflops)
    print(f"Examples: {examples}, {source}")
    print(f"Steps: {steps}, each {run.global_batch} rows = {hardware.gpus} GPUs {cut}")
    print(f"Tokens: {seen * tokens_each / 1e6:.0f} M with gradients")
    print(f"Hours: {duration:.1f} for the training steps, {duration * hardware.gpus:.0f} GPU hours")
    print(
        f"  assumed: {tokens_each} tokens an example; {plan.MFU:.0%} of {tflops:g} TFLOP/s per GPU "
        "(A100: 312, H100: 989; TFLOPS=). An assumption, not a measurement"
    )

    needed = preflight.disk_needed(recipe, shape, sharding)
    print(f"Disk: {needed / GIB:.0f} GiB in {recipe.values['output_dir']} (checkpoints, one being written, the model)")
    return 0 if memory.fits else 1


if __name__ == "__main__":
    cli.run(main)
