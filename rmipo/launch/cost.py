"""What a run will cost: memory per GPU, steps, hours, disk. Needs no GPU and downloads no model."""

from collections.abc import Mapping
from pathlib import Path

from rmipo.launch.choices import choose_stages, node_count, positive_number
from rmipo.launch.pipeline import load_steps
from rmipo.plan import duration, preflight
from rmipo.plan.gpus import A100, speed_with
from rmipo.plan.memory import GIB, Hardware, Sharding, plan_memory
from rmipo.plan.shapes import KNOWN
from rmipo.recipe.load import Recipe

# Where the number of examples is not known: UltraFeedback's (the on-policy sets have about as many), UltraChat's.
ASSUMED_EXAMPLES = {
    "preference": duration.ROWS["HuggingFaceH4/ultrafeedback_binarized", "train_prefs"],
    "sft": duration.ROWS["HuggingFaceH4/ultrachat_200k", "train_sft"],
}


def plan(env: Mapping[str, str]) -> int:
    """Print what the run that `env` asks for costs; 1 if the estimate of its memory exceeds the GPU's, else 0."""
    model, stages = choose_stages(env)
    step = [step for step in load_steps(model, stages, env) if step.recipe is not None][-1]
    recipe, on_cpu = step.recipe, step.on_cpu
    check_earlier_stages(model, recipe)
    hardware = hardware_of(env, on_cpu)
    sharding = Sharding("none") if on_cpu else Sharding.load(step.sharding)
    preflight.check_masters(recipe, sharding)
    work, shape = preflight.workload_of(recipe), preflight.shape_of(recipe)

    ###################
    # Memory
    ###################
    memory = plan_memory(shape, work, sharding, hardware)
    trained = f", {shape.trained / 1e6:.1f} M of them trained" if work.adapters else ""
    print(f"{recipe.path}: {recipe.values['model_name_or_path']}, {shape.parameters / 1e9:.3g} B parameters{trained}")
    if on_cpu:
        print(f"This machine's CPU with {hardware.gib:.0f} GiB of memory")
    else:
        print(f"{hardware.nodes} node(s) x {hardware.gpus_per_node} GPUs x {hardware.gib:g} GiB, {step.sharding.stem}")
    print(f"\nMemory at the longest micro-batch that the recipe allows ({work.longest_micro_batch} tokens)")
    for name, size in memory.parts.items():
        if size:
            print(f"  {name:36} {size / GIB:8.1f} GiB")
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    print(f"  {'total':36} {memory.needed / GIB:8.1f} GiB of {hardware.gib:g}: {verdict}")
    if memory.offloaded:
        print(f"  offloaded to each node's memory: {memory.offloaded / GIB:.0f} GiB")

    ###################
    # Time and disk
    ###################
    examples, source = examples_of(env, recipe)
    steps = duration.steps(recipe, work, examples)
    accumulation = recipe.batch(hardware.gpus)[1]
    cut = f"x {work.micro_batch} x {accumulation}"
    if work.max_tokens:
        cut = f"in sequences of at most {work.max_tokens} tokens"
    print(f"\nExamples: {examples}, {source}")
    print(f"Steps: {steps}, each {work.global_batch} examples = {'CPU' if on_cpu else f'{hardware.gpus} GPUs'} {cut}")
    if waiting := duration.waiting(work, hardware.gpus):
        print(
            f"  {work.global_batch // hardware.gpus} pairs a GPU: {waiting} of a step is waiting for the GPU with the longest. "
            f"global_batch_size: {hardware.gpus * duration.ENOUGH_PAIRS} would use all of them; that is another run"
        )
    if on_cpu:
        print("Hours: not estimated for a CPU; the progress bar of a trial shows them: ARGS='--max_steps 20'")
    else:
        speed = speed_with(positive_number(env, "TFLOPS", A100.tflops))
        for name, (low, high) in duration.hours(recipe, shape, work, hardware.gpus, examples, speed).items():
            print(f"Hours of the {name}: {low:.2f} to {high:.2f}")
        low, high = speed.reached
        fastest = (
            hardware.gpus * speed.tflops * 1e12 / duration.step_flops(shape, work) * duration.typical_tokens(work)[0]
        )
        print(f"Tokens per second: {low * fastest:.0f} to {high * fastest:.0f} in training steps")
        print(
            f"  assumed, not measured on a GPU: matrix products at {low:.0%} to {high:.0%} of {speed.tflops:g} TFLOP/s per GPU "
            "(A100: 312, H100: 989; TFLOPS=); evaluations and checkpoints come on top"
        )
    needed = preflight.disk_needed(recipe, shape, sharding)
    print(f"Disk: {needed / GIB:.1f} GiB in {recipe.values['output_dir']} (checkpoints, one being written, the model)")
    return 0 if memory.fits else 1


def check_earlier_stages(model: str, recipe: Recipe) -> None:
    """Raises PreflightError if the recipe starts from, or trains on, what an earlier stage has not made yet."""
    for key in ("model_name_or_path", "dataset_name"):
        name = recipe.values.get(key) or ""
        if name.startswith("outputs/") and name not in KNOWN and not Path(name).exists():
            raise preflight.PreflightError(
                f"{key}: {name} is made by an earlier stage of make train MODEL={model}, which has to run first"
            )


def hardware_of(env: Mapping[str, str], on_cpu: bool) -> Hardware:
    """What GPUS and NODES say, or the GPUs of this machine. Raises PreflightError where neither tells."""
    nodes = node_count(env)
    if env.get("GPUS"):
        return Hardware.parse(env["GPUS"], nodes)
    hardware = preflight.local_hardware(on_cpu)
    if nodes > 1 or hardware is None:
        raise preflight.PreflightError("name the GPUs of each machine and the GB of one, such as GPUS=8x80")
    return hardware


def examples_of(env: Mapping[str, str], recipe: Recipe) -> tuple[int, str]:
    """(training examples, where the number is from)."""
    if env.get("EXAMPLES"):
        return int(positive_number(env, "EXAMPLES", 1)), "as EXAMPLES says"
    if (known := duration.training_examples(recipe)) is not None:
        return known, "in the training data"
    assumed = ASSUMED_EXAMPLES[recipe.stage]
    return min(assumed, recipe.values.get("max_train_samples") or assumed), "assumed; EXAMPLES= says otherwise"
