"""Writing files so that a kill leaves the old content or the new one, never a part."""

from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
