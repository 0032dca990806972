"""Ten training steps on the GPUs of this machine, or on its CPU: what works, and what fits.

    make smoke [MODEL=llama3-8b-instruct] [METHOD=dpo] [ARGS="--overlay recipes/adapters/lora.yaml"]

The run is stopped after a few steps, and the same command goes on from its checkpoint. One line for each check: `pass`,
`FAIL` with what to do, or `skip` with the reason. The exit code is 1 if a check fails. MODEL is tiny where no GPU is
visible and none is named. All is written to outputs/<model>/smoke, which the next smoke run replaces.
"""

import os
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rmipo import cli
from rmipo.launch.choices import choose_stages, refuse
from rmipo.record import read_metrics, recorded_run

STEPS, STOP_AFTER = 10, 3
TOLERANCE = 1.1  # of the planned memory; no micro-batch is longer than planned for


def training_lines(folder: Path) -> list[dict]:
    return [line for line in read_metrics(folder) if "loss" in line]


def stop_once_started(folder: Path, ended: threading.Event) -> None:
    """Send this process a SIGTERM, as a job queue does, once STOP_AFTER steps are logged. `Program` passes it on."""
    while not ended.wait(0.05):
        if len(training_lines(folder)) >= STOP_AFTER:
            return os.kill(os.getpid(), signal.SIGTERM)


def checks(step, gpus: int, codes: tuple[int, int]) -> Iterator[tuple[str, bool | None, str]]:
    """Name, whether it passed (None: skipped), what was found. `codes`: exit codes when stopped, and when started again."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rmipo.plan import preflight
    from rmipo.plan.memory import GIB, RESERVE, Hardware, Sharding, plan_memory
    from rmipo.run.callbacks import EXIT_STOPPED

    folder = Path(step.output_dir)
    record, lines = recorded_run(folder) or {}, training_lines(folder)
    parity = record.get("results", {}).get("parity")
    yield "parity", parity is not None, f"packed and plain scores differ by {parity} nats a token"
    every_step = [line["step"] for line in lines] == list(range(1, STEPS + 1))
    went_on = codes == (EXIT_STOPPED, 0) and record.get("starts") == 2 and every_step
    yield "resume", went_on, f"exit codes {codes[0]} when stopped, {codes[1]} when started again; {len(lines)} steps"
    try:
        ids = AutoTokenizer.from_pretrained(folder)("Hello, how are you?", return_tensors="pt").input_ids
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
        with torch.no_grad():
            finite = bool(model(ids).logits.isfinite().all())
        yield "export", finite, f"{folder} loads with AutoModelForCausalLM; finite logits: {finite}"
    except (OSError, ValueError) as error:
        yield "export", False, str(error).splitlines()[0]
    if step.on_cpu or len(lines) <= STOP_AFTER:
        yield "memory", None, "not compared with the plan on a CPU, or of a run that did not end"
        return
    shape, work = preflight.shape_of(step.recipe), preflight.workload_of(step.recipe)
    memory = plan_memory(shape, work, Sharding.load(step.sharding), replace(Hardware.here(), gpus=gpus))
    needed, peak = (sum(memory.values()) - memory[RESERVE]) / GIB, max(line["peak_memory_gib"] for line in lines)
    found = f"{peak:.1f} GiB at most on the first GPU, {needed:.1f} planned; max_tokens_per_micro_batch lowers it"
    yield "memory", peak <= TOLERANCE * needed, found


@cli.main
def main() -> int:
    env = cli.environment(__file__, __doc__, "MODEL", "METHOD", "ARGS", "GPUS", "SHARDING")
    if not env.get("MODEL"):
        import torch

        env["MODEL"] = "llama3-8b-instruct" if torch.cuda.is_available() else "tiny"
    env["STAGE"] = "rmipo"
    refuse(env, "DRY", "SLURM", "DATA")
    choose_stages(env)
    folder = Path("outputs", env["MODEL"], "smoke")
    # A setting that is made from scratch starts from its untrained model: no stage has to run before.
    world = Path("recipes", env["MODEL"], "world.yaml")
    start = f"--model_name_or_path outputs/{env['MODEL']}/world/model" if world.is_file() else ""
    own = f"--output_dir {folder} --max_steps {STEPS} --logging_steps 1 --save_steps {STEPS} --save_total_limit 1"
    own += " --eval_strategy no --report_to none --push_to_hub false"
    env["ARGS"] = f"{start} {env.get('ARGS', '')} {own}"

    from rmipo.launch.environment import training_environment
    from rmipo.launch.pipeline import load_steps
    from rmipo.launch.train import Program, gpu_count

    # ------------------ The run, stopped and started again
    model, stages = choose_stages(env)
    *before, step = load_steps(model, [stage for stage in stages if stage != "report"], env)
    gpus = gpu_count(env, step.on_cpu)
    step.recipe.batch(step.processes(gpus))
    shutil.rmtree(folder, ignore_errors=True)
    for first in before:
        if code := Program().run(first.command(gpus)):
            return code
    command = step.command(gpus)
    environment = training_environment(os.environ, env.get("SHARDING", ""), gpus)
    print(shlex.join(command), flush=True)
    ended, program = threading.Event(), Program()
    watcher = threading.Thread(target=stop_once_started, args=(folder, ended))
    watcher.start()
    stopped = program.run(command, str(folder), environment)
    ended.set()
    watcher.join()
    codes = stopped, Program().run(command, str(folder), environment)

    # ------------------ What it shows
    failed = []
    for name, passed, found in checks(step, gpus, codes):
        failed += [name] * (passed is False)
        status = {True: "pass", False: "FAIL", None: "skip"}[passed]
        print(f"{status} {name:9} {found}", flush=True)
    print(f"{model}: {'failed: ' + ', '.join(failed) if failed else 'all checks passed'}")
    return int(bool(failed))
