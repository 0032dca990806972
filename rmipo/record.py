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
        # Times and memory mean nothing without it, and on a CPU neither do last digits.
        "hardware": gpus or [f"{os.cpu_count()} CPU cores ({cpu_name()})"],
    }


def cpu_name() -> str:
    import torch

    name = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return f"{name}, bfloat16" if cpu_has_bf16() else name


def cpu_has_bf16() -> bool:
    """Whether the CPU computes in bfloat16, and does not imitate it: then recipes do, unless they say otherwise."""
    import torch

    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def _commit() -> str | None:
    # With uncommitted changes the commit alone says less than it seems to.
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+modified"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
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
        name, there, here = f"{prefix}{key}", found.get(key), expected.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            lines += differences(there, here, f"{name}.")
        elif there != here and name not in WITHOUT_EFFECT:
            lines.append(f"{name}: {there}, now {here}")
    return lines


def new_record(output_dir: str | Path, identity: dict, **facts) -> dict:
    """What `run.json` says of this start of a run. `identity`: from `run_identity`; `facts`: data report, objective, ..."""
    # The W&B run is chosen once and kept: a restart continues it.
    before = recorded_run(output_dir) or {"starts": 0, "wandb_run_id": secrets.token_hex(4)}
    kept = {"starts": before["starts"] + 1, "wandb_run_id": before["wandb_run_id"]}
    return {"finished": False, **identity, **environment(), **facts, **kept}


def write_record(output_dir: str | Path, record: dict) -> None:
    write_atomically(Path(output_dir) / RUN_FILE, json.dumps(record, indent=2, default=str) + "\n")
