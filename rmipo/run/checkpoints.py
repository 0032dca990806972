"""Where a run goes on from, what it must not overwrite, and what a full disk leaves."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from rmipo.errors import CheckpointError, UserError
from rmipo.files import LOCK_FILE, TEMPORARY
from rmipo.record import differences, recorded_run
from rmipo.training.checkpoints import MARKER, complete_checkpoints, delete, marked, numbered_checkpoints

FULL_BYTES = 2**20  # less is a full disk: a failed write may have left some blocks free


class FullDiskError(UserError, RuntimeError):
    """No room for a checkpoint; the message names the last good one."""


def resume_point(output_dir: str | Path, identity: dict) -> str | None:
    """The last complete checkpoint of this very run in `output_dir`; None if there is none.

    Raises CheckpointError: the folder holds another run, or something else.
    """
    output_dir = Path(output_dir)
    run, complete = recorded_run(output_dir), complete_checkpoints(output_dir)
    names = {path.name for path in output_dir.glob("*") if path.suffix != TEMPORARY}
    # Results that no run of ours wrote may lie here.
    if run is None and (foreign := sorted(names - {LOCK_FILE} - {folder.name for folder in complete})):
        found = f"{output_dir} is not empty and has no run.json of a run. Found: {', '.join(foreign[:5])}"
        raise CheckpointError(f"output_dir: {found}. Nothing is overwritten: name another --output_dir")
    if complete and identity["recipe"].get("save_only_model"):
        raise CheckpointError(
            f"{complete[-1]} holds the model alone (save_only_model: true): a run can't go on from it"
        )
    # All of them, as any may be the one that a user goes back to.
    for folder, found in [(output_dir, run)] * (run is not None) + [(folder, marked(folder)) for folder in complete]:
        if lines := differences({key: found.get(key) for key in identity}, identity):
            said = f"{folder} belongs to another run. Name another --output_dir, or remove it. Different there:"
            raise CheckpointError("\n  ".join([said, *lines]))
    return str(complete[-1]) if complete else None


def delete_torn(output_dir: Path) -> None:
    for folder in numbered_checkpoints(output_dir):
        if not (folder / MARKER).exists():
            delete(folder)
            print(f"{folder} is incomplete: deleted")


@contextlib.contextmanager
def explained_full_disk(output_dir: str | Path) -> Iterator[None]:
    """Turn whatever a full disk raises while saving into a FullDiskError that names the last good checkpoint."""
    try:
        yield
    except Exception as error:
        # torch.save says only that its writer failed, with the place in its file.
        torn = "inline_container" in str(error) and shutil.disk_usage(Path(output_dir)).free < FULL_BYTES
        if not torn and not any(text in str(error) for text in ("No space left on device", "Disk quota exceeded")):
            raise
        last = ["none", *(path.name for path in complete_checkpoints(output_dir))][-1]
        said = f"the disk of {output_dir} is full; the last good checkpoint: {last}. Free some space"
        raise FullDiskError(f"{said}: the same command goes on from there") from error
