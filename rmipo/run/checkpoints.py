"""Checkpoints that can be trusted: a marker written last, and the identity of the run they belong to."""

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from rmipo.errors import CheckpointError, UserError
from rmipo.files import LOCK_FILE, TEMPORARY, write_atomically
from rmipo.record import differences, recorded_run
from rmipo.training import checkpoints

MARKER = "complete.json"
FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_BYTES = 2**20  # less is a full disk: a failed write may have left some blocks free


class FullDiskError(UserError, RuntimeError):
    """No room for a checkpoint; the message names the last good one."""


class Checkpoints(TrainerCallback):
    """Completes each checkpoint with a marker, when all processes have written.

    Only then are older ones deleted, down to `save_total_limit` complete ones: the Trainer would delete the last complete
    one before the new one has its marker.

    Args:
        identity: what a checkpoint must agree with to be resumed from; see `differences`.
    """

    def __init__(self, identity: dict):
        self.identity = identity
        self.limit: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        # The Trainer's own rotation is switched off; `on_save` rotates.
        self.limit, args.save_total_limit = args.save_total_limit, None
        if state.is_world_process_zero:
            for folder in checkpoints.numbered_checkpoints(args.output_dir):
                if checkpoints.is_torn(folder, MARKER):
                    checkpoints.delete(folder, MARKER)
                    print(f"{folder} is incomplete: deleted")

    def on_save(self, args, state, control, **kwargs):
        # Under ZeRO-3 each process writes a share: the marker waits for the slowest.
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        content = {"step": state.global_step, "files": checkpoints.files_of(folder), **self.identity}
        write_atomically(folder / MARKER, json.dumps(content))
        if self.limit is not None and self.limit > 0:  # below 1 the Trainer keeps all, too
            complete = complete_checkpoints(args.output_dir)
            checkpoints.rotate(complete, MARKER, self.limit, keep=state.best_model_checkpoint)


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders of complete checkpoints, earliest step first. A copy under another step's name is not one."""
    complete = checkpoints.complete_checkpoints(output_dir, MARKER)
    return [
        folder
        for folder in complete
        if json.loads((folder / MARKER).read_text())["step"] == checkpoints.step_of(folder)
    ]


def resume_point(output_dir: str | Path, identity: dict) -> str | None:
    """The last complete checkpoint of this very run in `output_dir`; None if there is none.

    Raises CheckpointError: the folder holds another run, or something else.
    """
    output_dir = Path(output_dir)
    run, complete = recorded_run(output_dir), complete_checkpoints(output_dir)
    if run is not None:
        _refuse_other(run, identity, output_dir)
        step = checkpoints.step_of(complete[-1]) if complete else 0
        for folder in checkpoints.numbered_checkpoints(output_dir):
            unsafe = folder not in complete and not checkpoints.is_torn(folder, MARKER)
            if unsafe and checkpoints.step_of(folder) > step:
                raise CheckpointError(f"{folder} is not this run's, and the run would overwrite it. Move it away")
    else:
        ours = {LOCK_FILE, *(folder.name for folder in complete)}
        names = {path.name for path in output_dir.glob("*") if path.suffix != TEMPORARY}
        # Results that no run of ours wrote may lie here.
        if foreign := sorted(names - ours):
            found = f"{output_dir} is not empty and has no run.json of a run. Found: {', '.join(foreign[:5])}"
            raise CheckpointError(f"output_dir: {found}. Nothing is overwritten: name another --output_dir")
    if complete and identity["recipe"].get("save_only_model"):
        raise CheckpointError(
            f"{complete[-1]} holds the model alone (save_only_model: true): a run can't go on from it"
        )
    # All of them, as any may be the one that a user goes back to.
    for folder in complete:
        _refuse_other(json.loads((folder / MARKER).read_text()), identity, folder)
    return str(complete[-1]) if complete else None


def _refuse_other(found: dict, identity: dict, folder: Path) -> None:
    if lines := differences({key: found.get(key) for key in identity}, identity):
        found = f"{folder} belongs to another run. Name another --output_dir, or remove it. Different there:"
        raise CheckpointError("\n  ".join([found, *lines]))


@contextlib.contextmanager
def explained_full_disk(output_dir: str | Path) -> Iterator[None]:
    """Turn whatever a full disk raises while saving into a FullDiskError that names the last good checkpoint."""
    try:
        yield
    except Exception as error:
        # torch.save says only that its writer failed, with the place in its file.
        full = "inline_container" in str(error) and shutil.disk_usage(Path(output_dir)).free < FULL_BYTES
        if not (full or getattr(error, "errno", None) in FULL or "No space left on device" in str(error)):
            raise
        names = [folder.name for folder in complete_checkpoints(output_dir)]
        last = f"{names[-1]} is the last good one" if names else "there is no good one yet"
        raise FullDiskError(
            f"the disk of {output_dir} is full; {last}. Free some space: the same command goes on from there"
        ) from error
