"""What a run would cost, before it is paid: memory per GPU, steps, hours, disk. Needs no GPU and downloads no model.

    make plan MODEL=llama3-8b-instruct GPUS=8x80 [NODES=4] [METHOD=dpo] [STAGE=sft] [ARGS="--max_length 1024"]

MODEL, METHOD, STAGE (sft or rmipo), ARGS, DATA, SHARDING: as for `make train`. Besides:
  GPUS      <GPUs per node>x<GiB of one>; default: the GPUs of this machine
  NODES     how many machines, default 1
  EXAMPLES  pairs or dialogues in the training data     TFLOPS  bfloat16 peak of one GPU, default an A100's 312
The exit code is 1 if the run can't fit.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rmipo import plan, preflight
from rmipo.config import Recipe
from rmipo.plan import GIB, Hardware, Sharding
from rmipo.stages import choose_stages, launch_configuration, load_steps

ROOT = Path(__file__).parent.parent
# Rows of UltraFeedback's train_prefs (the on-policy sets have about as many) and of UltraChat-200k's train_sft.
EXAMPLES = {"preference": 61_135, "sft": 207_865}
A100_TFLOPS = 312.0  # bfloat16 without sparsity; A800 likewise


def number(env: dict[str, str], name: str, default: float) -> float:
    text = env.get(name) or str(default)
    if not text.replace(".", "", 1).isdecimal() or float(text) <= 0:
        raise ValueError(f"{name}={text}: expected a number above 0")
    return float(text)


def hardware_of(env: dict[str, str], recipe: Recipe) -> Hardware:
    if env.get("GPUS"):
        return Hardware.parse(env["GPUS"], int(number(env, "NODES", 1)))
    hardware = preflight.local_hardware(use_cpu=recipe.values.get("use_cpu", False))
    if hardware is None:
        raise preflight.PreflightError("no GPU is visible here: name what to plan for, e.g. GPUS=4x80")
    return hardware


def main() -> int:
    env = {**os.environ, "STAGE": os.environ.get("STAGE") or "rmipo"}
    os.chdir(ROOT)
    model, stages = choose_stages(env)
    recipe = next(step.recipe for step in load_steps(model, stages, env) if step.stage == env["STAGE"])
    hardware = hardware_of(env, recipe)
    launch = launch_configuration(recipe, env.get("SHARDING"))
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
        "fits" if memory.fits else "DOES NOT FIT",
    )
    prior = f"; the prior pass {memory.prior / GIB:.1f} GiB" if run.prior else ""
    print(f"  in place of activations and head logits: evaluation {memory.evaluation / GIB:.1f} GiB{prior}")
    if memory.host:
        print(f"  offloaded to each node's memory: {memory.host / GIB:.0f} GiB")
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
    examples = int(number(env, "EXAMPLES", EXAMPLES[run.stage]))
    tflops, epochs = number(env, "TFLOPS", A100_TFLOPS), recipe.values.get("num_train_epochs", 1)
    tokens_each = plan.typical_tokens(run)[0]
    duration = plan.hours(shape, run, hardware, examples * epochs, tflops)
    steps = plan.steps(run, examples, epochs)
    print(f"Steps: {steps}, each {run.global_batch} rows = {hardware.gpus} GPUs {cut}")
    print(f"Tokens: {examples * epochs * tokens_each / 1e6:.0f} M with gradients")
    print(f"Hours: {duration:.1f} for the training steps, {duration * hardware.gpus:.0f} GPU hours")
    print(
        f"  assumed: {examples} examples of {tokens_each} tokens; {plan.MFU:.0%} of {tflops:g} TFLOP/s per GPU "
        "(A100: 312, H100: 989; TFLOPS=). An assumption, not a measurement"
    )

    needed = preflight.disk_needed(recipe, shape, sharding)
    print(f"Disk: {needed / GIB:.0f} GiB in {recipe.values['output_dir']} (checkpoints, one being written, the model)")
    return 0 if memory.fits else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
