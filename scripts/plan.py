"""What a run would cost, before it is paid: memory per GPU, steps, hours, disk. Needs no GPU and downloads no model.

    make plan MODEL=llama3-8b-instruct GPUS=8x80 [NODES=4] [METHOD=dpo] [STAGE=sft] [ARGS="--max_length 1024"]

GPUS is <GPUs per node>x<GiB of one>; without it, the GPUs of this machine. The exit code is 1 if the run can't fit.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rmipo import plan, preflight
from rmipo.config import load_recipe
from rmipo.plan import GIB, Hardware, Sharding

ROOT = Path(__file__).parent.parent
# Rows of UltraFeedback's train_prefs (the on-policy sets have about as many) and of UltraChat-200k's train_sft.
EXAMPLES = {"preference": 61_135, "sft": 207_865}
A100_TFLOPS = 312.0  # bfloat16 without sparsity; A800 likewise


def command_line() -> argparse.Namespace:
    environment = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=environment("MODEL", "tiny"), help="folder in recipes/")
    parser.add_argument("--stage", default=environment("STAGE", "rmipo"), choices=["sft", "rmipo"])
    parser.add_argument("--method", default=environment("METHOD", ""), help="overlay in recipes/methods/")
    parser.add_argument(
        "--overlay", action="append", default=[], help="further overlays, e.g. recipes/adapters/lora.yaml"
    )
    parser.add_argument("--gpus", default=environment("GPUS", ""), help="e.g. 8x80")
    parser.add_argument("--nodes", type=int, default=int(environment("NODES") or 1))
    parser.add_argument("--sharding", default=None, help="file in configs/accelerate/, e.g. zero3-offload")
    parser.add_argument("--examples", type=int, default=None, help="pairs or dialogues in the training data")
    parser.add_argument("--tflops", type=float, default=A100_TFLOPS, help="bfloat16 peak of one GPU")
    args, overrides = parser.parse_known_args()
    args.overrides = overrides or shlex.split(environment("ARGS", ""))
    return args


def sharding_of(name: str | None, run: plan.Run, hardware: Hardware) -> Sharding:
    if name is None:  # as the launcher does: bitsandbytes' weights and single GPUs are not sharded
        name = "ddp" if run.quantized or hardware.gpus == 1 else "zero3"
    return Sharding.load(ROOT / f"configs/accelerate/{name}.yaml")


def main() -> int:
    args = command_line()
    overlays = [ROOT / f"recipes/methods/{args.method}.yaml"] if args.method not in ("", "rmipo") else []
    recipe = load_recipe(ROOT / f"recipes/{args.model}/{args.stage}.yaml", [*overlays, *args.overlay], args.overrides)
    hardware = Hardware.parse(args.gpus, args.nodes) if args.gpus else preflight.local_hardware()
    if hardware is None:
        raise preflight.PreflightError("no GPU is visible here: name what to plan for, e.g. GPUS=4x80")
    run, shape = preflight.run_of(recipe), preflight.shape_of(recipe)
    sharding = sharding_of(args.sharding, run, hardware)
    memory = plan.plan_memory(shape, run, sharding, hardware)
    tokens = run.longest_row(run.micro_batch)

    print(f"{recipe.path}: {recipe.values['model_name_or_path']}, {shape.parameters / 1e9:.2f} B parameters", end="")
    print(f", {shape.trained / 1e6:.1f} M of them trained" if run.adapters else "")
    print(f"{hardware.nodes} node(s) x {hardware.gpus_per_node} GPUs x {hardware.gib:g} GiB, {sharding.kind}")

    print(f"\nMemory per GPU at the longest micro-batch ({run.micro_batch} pairs cut at max_length: {tokens} tokens)")
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
    print(f"\nSuggested per_device_train_batch_size: {size or 'none fits'}")
    _, accumulation = recipe.batch(hardware.gpus)
    examples, epochs = args.examples or EXAMPLES[run.stage], recipe.values.get("num_train_epochs", 1)
    tokens_each = plan.typical_tokens(run)[0]
    duration = plan.hours(shape, run, hardware, examples * epochs, args.tflops)
    steps = plan.steps(run, examples, epochs)
    print(f"Steps: {steps}, each {run.global_batch} rows = {hardware.gpus} GPUs x {run.micro_batch} x {accumulation}")
    print(f"Tokens: {examples * epochs * tokens_each / 1e6:.0f} M with gradients")
    print(f"Hours: {duration:.1f} for the training steps, {duration * hardware.gpus:.0f} GPU hours")
    print(
        f"  assumed: {examples} examples of {tokens_each} tokens; {plan.MFU:.0%} of {args.tflops:g} TFLOP/s per GPU "
        "(A100: 312, H100: 989; --tflops). An assumption, not a measurement"
    )

    needed = preflight.disk_needed(recipe, shape, sharding)
    print(f"Disk: {needed / GIB:.0f} GiB in {recipe.values['output_dir']} (checkpoints, one being written, the model)")
    return 0 if memory.fits else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
