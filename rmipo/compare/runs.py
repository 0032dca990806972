"""The runs of a comparison, several at a time, each in a process of its own and kept as a line of `runs.jsonl`."""

import functools
import json
import os
import resource
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from rmipo.compare.study import FLOOR, INITIAL, Study, Trial
from rmipo.files import read_lines
from rmipo.fingerprints import json_fingerprint, model_fingerprint
from rmipo.recipe.schema import of_recipe
from rmipo.record import environment
from rmipo.run.frame import TrainingRun, training_run
from rmipo.tiny import judge
from rmipo.training import attention
from rmipo.training.loading import load_tokenizer
from rmipo.training.metrics import NonFiniteLossError
from rmipo.training.parts import TokenizedPairs, policy
from rmipo.training.trainer import PreferenceTrainer

CURVE_STEPS = 10  # optimizer steps between two points of a curve
CURVE_PAIRS = 100


def seconds(device: torch.device) -> float:
    """On a CPU this process's own time, on which others have no influence; on a GPU the clock's."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


class HeldOutCurve(TrainerCallback):
    """Preference accuracy and margin on held-out pairs every few steps; `seconds` is the time that this took."""

    def __init__(self, pairs: Dataset, kind: str):
        self.pairs, self.kind = pairs, kind  # kind: the attention that the model trains with
        self.points, self.seconds = [], 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % CURVE_STEPS == 0 or state.global_step == state.max_steps:
            start = seconds(args.device)
            self.points.append({"step": state.global_step, **judge.preference_metrics(model, self.pairs)})
            # Scoring has left it attached to ordinary sequences.
            attention.attach(model, self.kind)
            self.seconds += seconds(args.device) - start

    on_train_begin = on_step_end  # step 0


def execute(study: Study, run: Trial) -> dict[str, Any]:
    """Train and measure one run in this process; returns what its line has about the result."""
    # CPU seconds then measure the work, and runs beside each other don't disturb one another.
    torch.set_num_threads(1)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        recipe = study.recipe(run, folder)
        args, data_config, model_config = recipe.parse(world_size=1)
        with training_run(recipe, args, model_config, keep=False) as frame:
            tokenizer = load_tokenizer(model_config, data_config.chat_template)
            model = policy(model_config).to(args.device)
            held_out = TokenizedPairs({"test": study.task.held_out_pairs(run)}, tokenizer, args, model)
            chat, test = held_out.chat, held_out.splits["test"]
            chat.set_end_of_turn(model.generation_config)
            result = {"curve": [], "seconds_per_step": None, "peak_memory_mib": None}
            if run.method != INITIAL:
                train = study.task.train_pairs(run)
                if run.method == FLOOR:
                    # The preference recipe's optimisation, on the chosen responses.
                    values = recipe.resolved() | {"gradient_accumulation_steps": recipe.batch(1)[1]}
                    rows = Dataset.from_dict({"prompt": train["prompt"], "completion": train["chosen"]})
                    tokenizer.eos_token_id = chat.end_id
                    trainer = SFTTrainer(
                        model, of_recipe(SFTConfig, values), train_dataset=rows, processing_class=tokenizer
                    )
                else:
                    trainer = PreferenceTrainer(model, args, train, processing_class=tokenizer)
                try:
                    result |= train_and_time(frame, trainer, test.select(range(min(CURVE_PAIRS, len(test)))))
                # A result of this learning rate, and no reason to end the others' runs.
                except NonFiniteLossError:
                    return {**result, "metrics": {"diverged": True}}
                if isinstance(trainer, PreferenceTrainer) and "gamma" in trainer.window.columns[0]:
                    # Nothing was logged, so the window holds every pair that was trained.
                    result["gamma_mean"] = torch.cat([pairs["gamma"] for pairs in trainer.window.columns]).mean().item()
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                metrics = judge.preference_metrics(model, test) | study.task.measure(model, chat, run)
    return {**result, "metrics": metrics}


def train_and_time(frame: TrainingRun, trainer: Trainer, held_out: Dataset) -> dict:
    """Train. Time includes a reference's scoring; memory is beyond that at the start, on a GPU all that is allocated."""
    curve, device = HeldOutCurve(held_out, getattr(trainer, "attention_kind", "plain")), trainer.args.device
    before, start = psutil.Process().memory_info().rss, seconds(device)
    frame.train(trainer, [curve])
    took = seconds(device) - start - curve.seconds
    # ru_maxrss, in KiB: of this process, which has trained nothing else.
    on_cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    peak = on_cpu if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
    per_step = took / trainer.state.global_step
    return {"curve": curve.points, "seconds_per_step": per_step, "peak_memory_mib": peak / 2**20}


NOT_THE_RUN = ("output_dir", "reference_cache_dir", "run_name")  # two recipes that write elsewhere train the same model


class Log:
    """`runs.jsonl`: one line per finished run, found again by everything that defines the run. `workers`: runs at a time."""

    def __init__(self, path: Path, study: Study, workers: int):
        self.path, self.study, self.workers = path, study, workers
        self.lines = {line["key"]: line for line in read_lines(path)}

    @functools.cached_property
    def common(self) -> dict:
        """What defines every run beside its own recipe: initial weights, data, measurement."""
        model = self.study.base.parse(world_size=1)[2]
        return {
            "model": model_fingerprint(model.model_name_or_path, model.model_revision),
            "data": self.study.task.identity(),
            "measured": {"curve": [CURVE_STEPS, CURVE_PAIRS]},
        }

    def key(self, run: Trial) -> str:
        recipe = {key: value for key, value in self.study.recipe(run).values.items() if key not in NOT_THE_RUN}
        trial = {key: value for key, value in asdict(run).items() if key != "objective" or value}
        return json_fingerprint({"run": trial, "recipe": recipe, **self.common})

    def find(self, run: Trial) -> dict | None:
        return self.lines.get(self.key(run))

    def add(self, run: Trial, result: dict, environment: dict) -> None:
        text = json.dumps({"key": self.key(run), **asdict(run), **result, **environment})
        with open(self.path, "a") as file:
            file.write(text + "\n")
        line = json.loads(text)  # as the next start will read it
        self.lines[line["key"]] = line

    def train(self, title: str, runs: list[Trial]) -> list[dict]:
        """The line of each of `runs`, in their order; only those without one are trained. A run that fails raises."""
        todo, facts = [run for run in runs if self.find(run) is None], environment()
        # One process per run: memory is measured from a clean start, and a run can't leave anything to the next.
        context = get_context("forkserver")
        context.set_forkserver_preload(["rmipo.compare.runs"])  # imported once for all workers
        bar = tqdm(desc=title, initial=len(runs) - len(todo), total=len(runs), unit="run", disable=not runs)
        with bar, tempfile.TemporaryDirectory() as scratch:
            own = {"initializer": prepare_worker, "initargs": (str(self.path.with_name("workers.log")), scratch)}
            with ProcessPoolExecutor(self.workers, context, **own, max_tasks_per_child=1) as pool:
                futures = {pool.submit(execute, self.study, run): run for run in todo}
                try:
                    for future in as_completed(futures):
                        self.add(futures[future], future.result(), facts)
                        bar.update()
                except BaseException:  # Ctrl-C, or a run that failed: the pool would wait for the others' training
                    for worker in active_children():
                        worker.kill()
                    raise
        return [self.find(run) for run in runs]


def prepare_worker(log: str, scratch: str) -> None:
    """Send what a worker and its libraries print to a file; let it be killed without leaving anything behind."""
    # File descriptors, not sys.stdout: libraries in C print too.
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    tempfile.tempdir = scratch
    tqdm.set_lock(threading.RLock())  # its own holds a semaphore of the operating system
