"""What a run will cost: memory per GPU, steps, hours, disk. Needs no GPU and downloads no model.

    make plan MODEL=llama3-8b-instruct GPUS=8x80 [NODES=4] [METHOD=dpo] [STAGE=sft] [ARGS="--max_length 1024"]

GPUS is <GPUs of each machine>x<GB of one>, by default what this machine has; STAGE is rmipo unless it is sft.
EXAMPLES: training rows. TFLOPS: a GPU's bfloat16 peak. The exit code is 1 if the memory estimate exceeds the GPU's.
"""

from rmipo import cli
from rmipo.errors import ConfigError
from rmipo.launch.choices import choose_stages, whole_number


@cli.main
def main() -> int:
    names = ("MODEL", "STAGE", "METHOD", "DATA", "ARGS", "GPUS", "NODES", "SHARDING", "EXAMPLES", "TFLOPS")
    env = cli.environment(__file__, __doc__, *names, STAGE="sft or rmipo (default: rmipo)")
    env["STAGE"] = env.get("STAGE") or "rmipo"
    if env.get("GPUS"):  # also of a recipe that trains on this machine's CPU
        env["ARGS"] = f"{env.get('ARGS', '')} --use_cpu false"
    choose_stages(env)

    # These import torch and TRL, which takes seconds.
    from rmipo.launch.pipeline import load_steps
    from rmipo.plan import preflight
    from rmipo.plan.memory import GIB, Hardware, Sharding, plan_memory

    # ------------------ The run and its hardware
    step = [step for step in load_steps(*choose_stages(env), env) if step.recipe is not None][-1]
    recipe = step.recipe
    if step.on_cpu:
        raise ConfigError(f"{recipe.path} trains on this machine's CPU: for a plan on GPUs name them, as in GPUS=1x24")
    nodes = whole_number(env, "NODES", 1)
    hardware = Hardware.parse(env["GPUS"], nodes) if env.get("GPUS") else Hardware.here()
    if hardware is None or (nodes > 1 and not env.get("GPUS")):
        raise ConfigError("name the GPUs of each machine and the GB of one, such as GPUS=8x80")
    sharding = Sharding.load(step.sharding)
    preflight.check_masters(recipe, sharding)

    # ------------------ Memory
    work, shape = preflight.workload_of(recipe), preflight.shape_of(recipe)
    memory = plan_memory(shape, work, sharding, hardware)
    trained = f", {shape.trained / 1e6:.1f} M of them trained" if work.adapters else ""
    print(f"{recipe.path}: {recipe.values['model_name_or_path']}, {shape.parameters / 1e9:.3g} B parameters{trained}")
    print(f"{hardware.gpus} GPUs with {hardware.gib:g} GiB, {step.sharding.stem} over {nodes} node(s)")
    print(f"\nMemory at the longest micro-batch that the recipe allows ({work.longest} tokens)")
    for name, size in memory.items():
        print(f"  {name:36} {size / GIB:8.1f} GiB")
    needed = sum(memory.values()) / GIB
    verdict = "fits" if needed <= hardware.gib else "DOES NOT FIT"
    print(f"  {'total':36} {needed:8.1f} GiB of {hardware.gib:g}: {verdict}")

    # ------------------ Steps, time and disk
    examples, counted = preflight.training_examples(recipe)
    source = "in the training data" if counted else "assumed; EXAMPLES= says otherwise"
    if env.get("EXAMPLES"):
        examples, source = whole_number(env, "EXAMPLES", 1), "as EXAMPLES says"
    steps = preflight.steps(recipe, work, examples)
    print(f"\nExamples: {examples}, {source}")
    print(f"Steps: {steps}, each {recipe.batch(hardware.gpus)[0]} examples on {hardware.gpus} GPUs")
    tflops = whole_number(env, "TFLOPS", preflight.A100)
    low, high = preflight.hours(shape, work, hardware.gpus, steps, tflops)
    print(f"Hours of the training: {low:.2f} to {high:.2f}, evaluations and checkpoints apart")
    low, high = preflight.REACHED
    print(f"  not measured: assumed are {low:.0%} to {high:.0%} of {tflops:g} TFLOP/s (TFLOPS=; A100 312, H100 989)")
    disk = preflight.disk_needed(recipe, shape, sharding) / GIB
    print(f"Disk: {disk:.1f} GiB in {recipe.values['output_dir']} (checkpoints, one being written, the model)")
    return 0 if needed <= hardware.gib else 1
