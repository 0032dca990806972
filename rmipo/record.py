"""The files that a run leaves beside its model: `run.json`, `metrics.jsonl`, `generations.jsonl`.

`run.json` holds the run's identity (recipe, fingerprints, number of processes), its environment, and in the end its
results. A line of `metrics.jsonl` is what was logged at one step, a line of `generations.jsonl` one sample answer.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import secrets
import subprocess
import time
from pathlib import Path
from typing import Any

from rmipo.errors import EvaluationError
from rmipo.files import write_atomically, write_lines

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
GENERATIONS_FILE = "generations.jsonl"
PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "deepspeed", "wandb")
# Keys of a recipe that may change between the starts of a run: no weight, metric or checkpoint depends on them.
WITHOUT_EFFECT = {
    f"recipe.{key}"
    for key in (
        "ddp_timeout", "memory_check", "save_total_limit", "dataset_num_proc", "dataloader_num_workers", "report_to",
        "run_name", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision",
    )
}  # fmt: skip


def package_versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def require_package(module: str) -> None:
    """Raises EvaluationError if the extra `eval` isn't installed."""
    if importlib.util.find_spec(module) is None:
        raise EvaluationError(f"the package {module} isn't installed: make install EXTRAS=eval")


def environment() -> dict:
    """Versions, commit and hardware: what a number has to be quoted with."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": package_versions(*PACKAGES),
        "python": platform.python_version(),
        "commit": _commit(),
        # Times and memory mean nothing without it.
        "hardware": gpus or [f"{os.cpu_count()} CPU cores ({platform.machine()})"],
    }


def _commit() -> str | None:
    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # With uncommitted changes the commit alone says less than it seems to.
        return git("rev-parse", "HEAD") + ("+modified" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None  # installed without its repository


def recorded_run(run_dir: str | Path) -> dict[str, Any] | None:
    """The content of `run.json` in `run_dir`, None if there is none."""
    path = Path(run_dir) / RUN_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The lines of `metrics.jsonl` in `run_dir`; none where nothing was logged."""
    return _read_lines(Path(run_dir) / METRICS_FILE)


def append_metrics(run_dir: str | Path, line: dict) -> None:
    with open(Path(run_dir) / METRICS_FILE, "a") as file:
        file.write(json.dumps(line) + "\n")


def keep_metrics(run_dir: str | Path, step: int) -> list[dict]:
    """Drop the lines after `step`, which a resumed run makes again; returns those that stay. Step 0 drops all."""
    kept = [line for line in read_metrics(run_dir) if line["step"] <= step] if step else []
    write_lines(Path(run_dir) / METRICS_FILE, kept)
    return kept


def read_generations(run_dir: str | Path) -> list[dict]:
    """The lines of `generations.jsonl` in `run_dir`; none where nothing was generated."""
    return _read_lines(Path(run_dir) / GENERATIONS_FILE)


def write_generations(run_dir: str | Path, lines: list[dict]) -> None:
    write_lines(Path(run_dir) / GENERATIONS_FILE, lines)


def _read_lines(path: Path) -> list[dict]:
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(text) for text in texts if text.endswith("\n")]  # a kill can cut the last line short


def run_identity(recipe: dict, fingerprints: dict[str, str], world_size: int) -> dict:
    """The resolved recipe, the fingerprints of data and initial model, and the number of processes, as JSON has them."""
    identity = {"recipe": recipe, "fingerprints": fingerprints, "world_size": world_size}
    return json.loads(json.dumps(identity, default=str))


def differences(found: dict, expected: dict, prefix: str = "") -> list[str]:
    """`key: found, now expected` for every leaf in which two identities differ and that could change a run's results."""
    lines = []
    # A recipe's difference explains more than the data's fingerprint.
    for key in sorted(found.keys() | expected.keys(), key=lambda key: (key == "fingerprints", key)):
        there, here = found.get(key), expected.get(key)
        if f"{prefix}{key}" in WITHOUT_EFFECT:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            lines += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            lines.append(f"{prefix}{key}: {there}, now {here}")
    return lines


class RunRecord:
    """`run.json` of one output folder: written when training starts, completed when it ends.

    Args:
        output_dir: folder of the run.
        identity: from `run_identity`; its keys are at the top of the file.
        facts: anything else to record: data report, objective, ...
    """

    def __init__(self, output_dir: str | Path, identity: dict, **facts):
        self.path = Path(output_dir) / RUN_FILE
        # Chosen once and kept: a restart continues this W&B run.
        before = recorded_run(output_dir) or {"starts": 0, "wandb_run_id": secrets.token_hex(4)}
        self.content = {
            "finished": False,
            **identity,
            **environment(),
            **facts,
            "starts": before["starts"] + 1,
            "wandb_run_id": before["wandb_run_id"],
        }
        self.started = time.time()

    def start(self) -> None:
        self._write()

    def results(self, **results) -> None:
        """Record the results, and the seconds since this start."""
        self.content |= {"seconds": round(time.time() - self.started, 1), "results": results}
        self._write()

    def finish(self) -> None:
        """Say that nothing is left to do: a run that is killed before this goes on from its last checkpoint."""
        self.content["finished"] = True
        self._write()

    def _write(self) -> None:
        write_atomically(self.path, json.dumps(self.content, indent=2, default=str) + "\n")
