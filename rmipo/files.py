"""Writing files so that a kill leaves the old content or the new one, never a part."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

TEMPORARY = ".tmp"  # the suffix of a file that is being written


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
