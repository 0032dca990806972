"""One program at a time in a folder of outputs."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rmipo.errors import CheckpointError

LOCK_FILE = "run.lock"
LEASE = 120  # seconds after which a file server has freed the locks of a dead node (NFSv4: 90)


@contextlib.contextmanager
def locked(folder: Path, name: str = "output_dir") -> Iterator[None]:
    """Hold the lock of a folder, `name` to the user. The kernel frees it when this process ends, however it ends.

    Raises CheckpointError if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A requeued job may come before the lock of the node that failed is free.
    lock = FileLock(folder / LOCK_FILE, timeout=LEASE if "SLURM_JOB_ID" in os.environ else 0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"{name}: another run is active in {folder}. Wait for it, end it, or name another {name}"
        ) from error
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            if os.listdir(folder) == [LOCK_FILE]:  # filelock leaves its file, which holds nothing
                (folder / LOCK_FILE).unlink()
            folder.rmdir()  # if nothing was written
