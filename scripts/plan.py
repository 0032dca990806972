"""What a run will cost: memory per GPU, steps, hours, disk. Needs no GPU and downloads no model.

    make plan MODEL=llama3-8b-instruct GPUS=8x80 [NODES=4] [METHOD=dpo] [STAGE=sft] [ARGS="--max_length 1024"]

GPUS is <GPUs of each machine>x<GB of one>, by default what this machine has; STAGE is rmipo unless it is sft.
The exit code is 1 if the estimate of the memory exceeds the GPU's.
"""

from pathlib import Path

from rmipo import cli
from rmipo.errors import ConfigError
from rmipo.launch.choices import check_choices, choose_stages, node_count, whole_number


@cli.main
def main() -> int:
    names = ("MODEL", "STAGE", "METHOD", "DATA", "ARGS", "GPUS", "NODES", "SHARDING", "EXAMPLES", "TFLOPS")
    env = cli.environment(__file__, __doc__, *names, STAGE="sft or rmipo (default: rmipo)")
    env["STAGE"] = env.get("STAGE") or "rmipo"
    check_choices(env)

    # These import torch and TRL, which takes seconds.
    from rmipo.launch.pipeline import load_steps
    from rmipo.plan import duration, preflight
    from rmipo.plan.memory import GIB, Hardware, Sharding, plan_memory

    # ------------------ The run and its hardware
    step = [step for step in load_steps(*choose_stages(env), env) if step.recipe is not None][-1]
    recipe, on_cpu = step.recipe, step.on_cpu
    for key in ("model_name_or_path", "dataset_name"):
        name = recipe.values.get(key) or ""
        if name.startswith("outputs/") and not Path(name).exists():
            raise ConfigError(f"{key}: {name} is made by an earlier stage of make train: run that first")
    nodes = node_count(env)
    hardware = Hardware.parse(env["GPUS"], nodes) if env.get("GPUS") else Hardware.here(on_cpu)
    if hardware is None or hardware.nodes != nodes:
        raise ConfigError("name the GPUs of each machine and the GB of one, such as GPUS=8x80")
    sharding = Sharding("none") if on_cpu else Sharding.load(step.sharding)
    preflight.check_masters(recipe, sharding)

    # ------------------ Memory
    work, shape = preflight.workload_of(recipe), preflight.shape_of(recipe)
    memory = plan_memory(shape, work, sharding, hardware)
    place = "CPU" if on_cpu else f"{hardware.gpus} GPUs"
    trained = f", {shape.trained / 1e6:.1f} M of them trained" if work.adapters else ""
    print(f"{recipe.path}: {recipe.values['model_name_or_path']}, {shape.parameters / 1e9:.3g} B parameters{trained}")
    print(f"{place} with {hardware.gib:g} GiB{'' if on_cpu else f', {step.sharding.stem} over {nodes} node(s)'}")
    print(f"\nMemory at the longest micro-batch that the recipe allows ({work.longest_micro_batch} tokens)")
    for name, size in memory.parts.items():
        if size:
            print(f"  {name:36} {size / GIB:8.1f} GiB")
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    print(f"  {'total':36} {memory.needed / GIB:8.1f} GiB of {hardware.gib:g}: {verdict}")

    # ------------------ Steps
    examples, source = duration.training_examples(recipe), "in the training data"
    if env.get("EXAMPLES"):
        examples, source = whole_number(env, "EXAMPLES", 1), "as EXAMPLES says"
    elif examples is None:  # the recipes' on-policy sets have about as many as UltraFeedback
        known = duration.ROWS["HuggingFaceH4/ultrafeedback_binarized", "train_prefs"]
        examples = min(known, recipe.values.get("max_train_samples") or known)
        source = "assumed; EXAMPLES= says otherwise"
    steps = duration.steps(recipe, work, examples)
    pairs = f"x {work.micro_batch} x {recipe.batch(hardware.gpus)[1]}"
    cut = f"in sequences of at most {work.max_tokens} tokens" if work.max_tokens else pairs
    print(f"\nExamples: {examples}, {source}")
    print(f"Steps: {steps}, each {work.global_batch} examples = {place} {cut}")

    # ------------------ Time and disk
    if on_cpu:
        print("Hours: not estimated for a CPU; the progress bar of a trial shows them: ARGS='--max_steps 20'")
    else:
        tflops = whole_number(env, "TFLOPS", duration.A100)
        low, high = duration.hours(shape, work, hardware.gpus, examples, steps, tflops)
        print(f"Hours of the training: {low:.2f} to {high:.2f}, evaluations and checkpoints apart")
        low, high = duration.reached(tflops)
        print(
            f"  not measured: assumed are {low:.0%} to {high:.0%} of {tflops:g} TFLOP/s (TFLOPS=; A100 312, H100 989)"
        )
    needed = preflight.disk_needed(recipe, shape, sharding)
    print(f"Disk: {needed / GIB:.1f} GiB in {recipe.values['output_dir']} (checkpoints, one being written, the model)")
    return 0 if memory.fits else 1
