"""The runs of a comparison, several at a time, each in a process of its own and kept as a line of `runs.jsonl`."""

import functools
import json
import os
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import active_children, get_context
from pathlib import Path

from tqdm import tqdm

from rmipo.compare.run import CURVE_PAIRS, CURVE_STEPS, execute
from rmipo.compare.study import Study, Trial
from rmipo.files import read_lines
from rmipo.fingerprints import json_fingerprint, model_fingerprint
from rmipo.record import environment

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
        context.set_forkserver_preload(["rmipo.compare.run"])  # imported once for all workers
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
