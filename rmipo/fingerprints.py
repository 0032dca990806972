"""What tells texts, settings, datasets and the weights of models from others of their kind."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from rmipo.errors import EvaluationError

FILES = ("*.safetensors", "*.bin", "config.json")
PROMPTING = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
LENGTH = 16  # hex digits


def text_fingerprint(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:LENGTH]


def json_fingerprint(content: Any) -> str:
    """Of anything that `json` can write, whatever the order of its keys; other objects count by their text."""
    return text_fingerprint(json.dumps(content, sort_keys=True, default=str))


def rows_fingerprint(dataset) -> str:
    """Of a `datasets.Dataset`: every column of every row, in order, wherever it was read from."""
    digest = hashlib.sha256()
    for batch in dataset.iter(batch_size=1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()[:LENGTH]


def code_fingerprint(package: Path, libraries: Iterable[str]) -> str:
    """Of the modules in a package's folder, and of the versions of `libraries`."""
    digest = hashlib.sha256()
    for path in sorted(package.glob("*.py")):
        digest.update(path.read_bytes())
    for library in libraries:
        digest.update(f"{library} {importlib.metadata.version(library)}".encode())
    return digest.hexdigest()[:LENGTH]


def file_digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).digest()


def model_fingerprint(name: str | Path, revision: str = "main") -> str:
    """Of a local folder: every byte of its weights and configuration. Of a model on the hub: its name and commit."""
    source = Path(name)
    if not source.is_dir():
        from huggingface_hub import hf_hub_download  # only models of the hub need it

        config = hf_hub_download(str(name), "config.json", revision=revision)
        return text_fingerprint(f"{name} {Path(config).parent.name}")  # the cache's folders are named after commits
    digest = xxhash.xxh3_128()
    for path in sorted(path for pattern in FILES for path in source.glob(pattern)):
        # Names and sizes keep files apart: their bytes alone could be split elsewhere.
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        digest.update(file_digest(path))
    return digest.hexdigest()[:LENGTH]


def prompting_fingerprint(model_dir: Path) -> str:
    """Of what shapes a model's prompts and ends its answers, beside its weights and configuration."""
    files = [model_dir / name for name in PROMPTING]
    return json_fingerprint({file.name: text_fingerprint(file.read_bytes()) for file in files if file.is_file()})


def has_weights(model_dir: Path) -> bool:
    """False also for links whose model is no longer in the hub's cache."""
    return any(path.exists() for path in model_dir.glob("*.safetensors"))


def trained_fingerprint(model_dir: Path) -> str:
    """`model_fingerprint` of a trained model. Raises EvaluationError for a folder without weights.

    It is kept in eval/fingerprint until a file has another size or time: a table of 48 models would read 1.5 TB.
    """
    if not has_weights(model_dir):
        raise EvaluationError(f"{model_dir} holds no *.safetensors: train the model first (make train)")
    stats = {path.name: path.stat() for pattern in FILES for path in model_dir.glob(pattern)}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())}
    kept = model_dir / "eval/fingerprint"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    if found.get("files") != files:
        found = {"fingerprint": model_fingerprint(model_dir), "files": files}
        with contextlib.suppress(OSError):  # a folder that can't be written to
            kept.parent.mkdir(exist_ok=True)
            temporary = kept.with_name(f"fingerprint.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(found))
            temporary.replace(kept)
    return found["fingerprint"]
