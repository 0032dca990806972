"""What tells the weights of a model from others, without reading 16 GB."""

import hashlib
from pathlib import Path

from rmipo.errors import EvaluationError

FILES = ("*.safetensors", "*.bin", "config.json")
SAMPLED_BYTES = 2**20


def model_fingerprint(name: str | Path, commit: str | None = None) -> str:
    """Of a local folder: name, size and both ends of each file. Of a model on the hub: its name and `commit`."""
    source = Path(name)
    digest = hashlib.sha256()
    if source.is_dir():
        for path in sorted(path for pattern in FILES for path in source.glob(pattern)):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(SAMPLED_BYTES))
                file.seek(max(0, size - SAMPLED_BYTES))
                digest.update(file.read())
    else:
        digest.update(f"{name} {commit}".encode())
    return digest.hexdigest()[:16]


def has_weights(model_dir: Path) -> bool:
    """False also for links whose model is no longer in the hub's cache."""
    return any(path.exists() for path in model_dir.glob("*.safetensors"))


def trained_fingerprint(model_dir: Path) -> str:
    """`model_fingerprint` of a trained model. Raises EvaluationError for a folder without weights."""
    if not has_weights(model_dir):
        raise EvaluationError(f"{model_dir} holds no *.safetensors: train the model first (make train)")
    return model_fingerprint(model_dir)
