"""Files of outputs: written so that a kill leaves the old content or the new one; one program at a time in a folder."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rmipo.errors import CheckpointError

TEMPORARY = ".tmp"  # the suffix of a file that is being written
LOCK_FILE = "run.lock"


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
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        path.write_bytes(b"".join(lines))
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def locked(folder: Path, name: str = "output_dir", wait: float = 1) -> Iterator[None]:
    """Hold the lock of a folder, `name` to the user. The kernel frees it when this process ends, however it ends.

    Raises CheckpointError if another process holds it for `wait` seconds (-1: waits as long as it takes).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    lock = FileLock(path, timeout=wait, fallback_to_soft=False)  # a soft lock would outlive a killed run
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"{name}: another run is active in {folder}. End it, or name another {name}") from error
    except OSError:
        print(f"{folder} can't be locked on this file system: see that no other run writes there")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: filelock tries again where it locked a file that is gone
        lock.release()
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing was written
