"""Checkpoints that can be trusted: a marker written last, the identity of the run they belong to, a stop on signal."""

import contextlib
import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback

from .config import recorded_run
from .errors import UserError

MARKER = "complete.json"
OBJECTIVE_STATE = "objective_state.json"
EXIT_STOPPED = 75  # of a run that a signal stopped after it saved: start it again (EX_TEMPFAIL)


class CheckpointError(UserError, ValueError):
    """The output folder belongs to another run; the message names what differs."""


class FullDiskError(UserError, RuntimeError):
    """No room for a checkpoint; the message names the last good one."""


class Checkpoints(TrainerCallback):
    """Completes each checkpoint: the objective's state, and when all ranks have written, the marker.

    Args:
        identity: what a checkpoint must agree with to be resumed from; see `differences`.
        objective_state: returns the state to save; None where there is no objective (SFT).
    """

    def __init__(self, identity: dict, objective_state: Callable[[], dict[str, torch.Tensor]] | None = None):
        self.identity = identity
        self.objective_state = objective_state

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.objective_state is not None:
            values = {name: value.tolist() for name, value in self.objective_state().items()}
            (folder / OBJECTIVE_STATE).write_text(json.dumps(values))
        temporary = folder / f"{MARKER}.tmp"
        temporary.write_text(json.dumps({"step": state.global_step, **self.identity}))
        temporary.replace(folder / MARKER)


def load_objective_state(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    saved = json.loads((Path(checkpoint) / OBJECTIVE_STATE).read_text())
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in saved.items()}


def refuse_pickled_code() -> None:
    """Make every torch.load, DeepSpeed's too, take only tensors and plain values: no checkpoint can run code."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler  # seconds, and only runs need them
    from deepspeed.runtime.zero.config import ZeroStageEnum

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum])  # in ZeRO's optimizer states


def run_identity(recipe: dict, fingerprints: dict[str, str], world_size: int) -> dict:
    """What makes two runs the same run: the resolved recipe, the tokenised data, the number of processes."""
    return json.loads(
        json.dumps({"recipe": recipe, "fingerprints": fingerprints, "world_size": world_size}, default=str)
    )


def differences(found: dict, expected: dict, prefix: str = "") -> list[str]:
    """`key: found, now expected` for every leaf in which two identities differ."""
    lines = []
    for key in sorted(found.keys() | expected.keys()):
        there, here = found.get(key), expected.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            lines += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            lines.append(f"{prefix}{key}: {there}, now {here}")
    return lines


def resume_point(output_dir: str | Path, identity: dict) -> str | None:
    """The last complete checkpoint of this very run in `output_dir`; None if there is none.

    Raises:
        CheckpointError: the folder holds another run, or something else.
    """
    output_dir = Path(output_dir)
    run = recorded_run(output_dir)
    if run is not None:
        _refuse_other({key: run.get(key) for key in identity}, identity, output_dir)
    elif foreign := [
        path.name for path in output_dir.glob("*") if not path.match("checkpoint-*") and path.suffix != ".tmp"
    ]:
        raise CheckpointError(
            f"output_dir: {output_dir} is not empty, and there is no run.json of a run in it. Found: "
            f"{', '.join(sorted(foreign)[:5])}. Nothing is overwritten: name another --output_dir"
        )
    complete = {}
    for folder in output_dir.glob("checkpoint-*"):
        if not (folder / MARKER).exists():
            print(f"{folder} is incomplete: skipped")
            continue
        marker = json.loads((folder / MARKER).read_text())
        _refuse_other({key: marker.get(key) for key in identity}, identity, folder)
        complete[marker["step"]] = folder
    return str(complete[max(complete)]) if complete else None


def _refuse_other(found: dict, identity: dict, folder: Path) -> None:
    if lines := differences(found, identity):
        raise CheckpointError(
            f"{folder} belongs to another run. Name another --output_dir, or remove it. Different there:\n  "
            + "\n  ".join(lines)
        )


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGUSR1 (a queue that needs the machine): finish the step, save, stop. All ranks stop together."""

    def __init__(self):
        self.requested = False
        self.stopped = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._request)

    def _request(self, number, frame):
        self.requested = True

    def on_step_end(self, args, state, control, **kwargs):
        requested = torch.tensor([float(self.requested)], device=args.device)
        if gather(requested).sum().item() > 0:
            self.stopped = control.should_save = control.should_training_stop = True


@contextlib.contextmanager
def explained_full_disk(output_dir: str | Path) -> Iterator[None]:
    """Turn whatever a full disk raises while saving into a FullDiskError that names the last good checkpoint."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No space left on device" not in str(error):
            raise
        steps = [int(path.parent.name.split("-")[1]) for path in Path(output_dir).glob(f"checkpoint-*/{MARKER}")]
        last = f"checkpoint-{max(steps)} is the last good one" if steps else "there is no good one yet"
        raise FullDiskError(
            f"the disk is full: a checkpoint in {output_dir} could not be saved; {last}. Free some space (make plan "
            "says how much a checkpoint takes) and run the same command again: it goes on from there."
        ) from error
