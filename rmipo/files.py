"""Files of outputs: written so that a kill leaves the old content or the new one; one program at a time in a folder."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rmipo.errors import CheckpointError

TEMPORARY = ".tmp"  # the suffix of a file that is being written
LOCK_FILE = "run.lock"
LEASE = 120  # seconds after which a file server has freed the locks of a dead node (NFSv4: 90)
MOMENT = 1  # second in which the kernel has freed the lock of a process that was killed just now
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; the file takes the place of `path` if the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    yield temporary
    temporary.replace(path)


def write_atomically(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """`rows` as a JSONL file."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict]:
    """The lines of a JSONL file; one that a kill cut short is removed from it."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return [json.loads(line) for line in content[:end].splitlines()]


@contextlib.contextmanager
def locked(folder: Path, name: str = "output_dir", wait: float | None = None) -> Iterator[None]:
    """Hold the lock of a folder, `name` to the user. The kernel frees it when this process ends, however it ends.

    Raises CheckpointError if another process holds it for `wait` seconds (None: a moment; -1: waits as long as it takes);
    the file says which, and alone holds nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    # A requeued job may come before the lock of the node that failed is free.
    moment = LEASE if "SLURM_JOB_ID" in os.environ else MOMENT
    lock = FileLock(path, timeout=moment if wait is None else wait, fallback_to_soft=False)
    try:
        lock.acquire()
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout as error:
        raise CheckpointError(
            f"{name}: another run is active in {folder} ({path.read_text()}). Wait for it, end it, or name another {name}"
        ) from error
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        print(f"{folder} can't be locked on this file system: see that no other run writes there")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: filelock tries again where it locked a file that is gone
        lock.release()
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing was written
