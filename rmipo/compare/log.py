"""The runs of a comparison, several at a time, each in a process of its own and kept as a line of `runs.jsonl`."""

import functools
import itertools
import json
import os
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import active_children, get_context
from pathlib import Path

from tqdm import tqdm

from rmipo.compare.run import CURVE_PAIRS, CURVE_STEPS, execute
from rmipo.compare.study import Study
from rmipo.compare.trial import INITIAL, SEARCH_SEED, Trial
from rmipo.errors import ConfigError, UserError
from rmipo.fingerprints import json_fingerprint, model_fingerprint
from rmipo.record import environment

NOT_THE_RUN = ("output_dir", "reference_cache_dir", "run_name")


class Log:
    """`runs.jsonl`: one line per finished run, found again by everything that defines the run."""

    def __init__(self, path: Path, study: Study):
        self.path, self.study = path, study
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A line that a kill cut short has no newline.
        self.lines = {line["key"]: line for line in map(json.loads, (text for text in lines if text.endswith("\n")))}
        path.write_text("".join(text for text in lines if text.endswith("\n")))

    @functools.cached_property
    def common(self) -> dict:
        """What defines every run beside its own recipe: initial weights, data, measurement."""
        recipe = self.study.base
        model = recipe.parse(world_size=1)[2]
        return {
            "model": model_fingerprint(model.model_name_or_path, model.model_revision),
            "data": self.study.task.identity(recipe),
            "measured": {"curve": [CURVE_STEPS, CURVE_PAIRS]},
        }

    def key(self, run: Trial) -> str:
        # Two recipes that write elsewhere train the same model.
        recipe = {key: value for key, value in self.study.recipe(run).resolved().items() if key not in NOT_THE_RUN}
        trial = {key: value for key, value in asdict(run).items() if key != "objective" or value}
        return json_fingerprint({"run": trial, "recipe": recipe, **self.common})

    def find(self, run: Trial) -> dict | None:
        return self.lines.get(self.key(run))

    def add(self, run: Trial, result: dict, environment: dict) -> dict:
        line = {"key": self.key(run), **asdict(run), **result, **environment}
        text = json.dumps(line)
        with open(self.path, "a") as file:
            file.write(text + "\n")
        self.lines[line["key"]] = json.loads(text)  # as the next start will read it
        return self.lines[line["key"]]


def execute_all(log: Log, runs: list[Trial], workers: int, bar: tqdm) -> list[dict]:
    """The line of every run, in the order of `runs`; those in the log are not run again. A run that fails raises."""
    facts, lines = environment(), {run: log.find(run) for run in runs}
    todo = [run for run in runs if lines[run] is None]
    bar.initial += len(runs) - len(todo)  # so that the ETA is that of a run, not of a line read
    bar.update(len(runs) - len(todo))
    # One process per run: memory is measured from a clean start, and a run can't leave anything to the next.
    context = get_context("forkserver")
    context.set_forkserver_preload(["rmipo.compare.run"])  # imported once for all workers
    output = str(log.path.with_name("workers.log"))
    with tempfile.TemporaryDirectory() as scratch:
        options = {"initializer": prepare_worker, "initargs": (output, scratch), "max_tasks_per_child": 1}
        with ProcessPoolExecutor(workers, mp_context=context, **options) as pool:
            futures = {pool.submit(execute, log.study, run): run for run in todo}
            try:
                for future in as_completed(futures):
                    run = futures[future]
                    lines[run] = log.add(run, future.result(), facts)
                    bar.update()
                    bar.set_postfix_str(str(run))
            except BrokenProcessPool as error:
                raise UserError(
                    f"a run was killed, as Linux does when memory runs out. {log.path} keeps those that have finished: the "
                    f"same command goes on after them. If it happens again, give WORKERS={max(1, workers - 1)}"
                ) from error
            except BaseException:  # Ctrl-C, or a run that failed: leaving the pool would wait for the others' training
                for worker in active_children():
                    worker.kill()
                raise
    return [lines[run] for run in runs]


def prepare_worker(log: str, scratch: str) -> None:
    """Send what a worker and its libraries print to a file; let it be killed without leaving anything behind."""
    # File descriptors, not sys.stdout: libraries in C print too.
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    tempfile.tempdir = scratch
    tqdm.set_lock(threading.RLock())  # its own holds a semaphore of the operating system


def search_runs(methods: Iterable[str], rates: Iterable[float]) -> list[Trial]:
    return [Trial("search", method, rate, SEARCH_SEED, 0.0) for method in methods for rate in rates]


def report_runs(methods: Iterable[str], rates: dict[str, float], seeds: list[int], noises: list[float]) -> list[Trial]:
    combinations = itertools.product(noises, seeds, (INITIAL, *methods))
    return [Trial("report", method, rates.get(method), seed, noise) for noise, seed, method in combinations]


def best_rates(lines: Iterable[dict], metric: str) -> dict[str, float]:
    """Method -> the learning rate of its search run with the highest `metric`, of equal ones the highest rate.

    Raises ConfigError if every run of some method diverged.
    """
    best: dict[str, tuple[float, float]] = {}
    for line in lines:
        value = line["metrics"].get(metric, float("-inf"))  # a run that diverged has none
        best[line["method"]] = max(best.get(line["method"], (float("-inf"), 0.0)), (value, line["learning_rate"]))
    if lost := [method for method, (value, _) in best.items() if value == float("-inf")]:
        raise ConfigError(f"every learning rate made {', '.join(lost)} diverge: add lower ones to search.yaml")
    return {method: rate for method, (_, rate) in best.items()}
