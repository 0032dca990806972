"""One program at a time in a folder of outputs."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from rmipo.errors import CheckpointError

LOCK_FILE = "run.lock"
LEASE = 120  # seconds after which a file server has freed the locks of a dead node (NFSv4: 90)
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def locked(folder: Path, name: str = "output_dir") -> Iterator[None]:
    """Hold the lock of a folder, `name` to the user. The kernel frees it when this process ends, however it ends.

    It is a POSIX record lock: file servers pass it on between nodes, and the children of a process don't inherit it. The
    file only says who holds it; one that is left over holds nothing.

    Raises:
        CheckpointError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _acquire(folder / LOCK_FILE, name)
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)  # before it is closed: nobody else can have locked this file
        file.close()
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing was written


def _acquire(path: Path, name: str):
    deadline = None
    while True:
        file = open(path, "a+")  # noqa: SIM115 (held until the run ends)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                print(f"{path.parent} can't be locked on this file system: see that no other run writes there")
                return file
            file.seek(0)
            host, _, process = file.read().partition(" ")
            file.close()
            deadline = deadline or time.monotonic() + (LEASE if host and host != socket.gethostname() else 0)
            if time.monotonic() >= deadline:
                raise CheckpointError(
                    f"{name}: another run is active in {path.parent} (process {process} on {host}). Wait for it, end it, "
                    f"or name another {name}"
                ) from error
            time.sleep(1)
            continue
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"{socket.gethostname()} {os.getpid()}")
            file.flush()
            return file
        file.close()  # its holder removed it between our opening and locking it
