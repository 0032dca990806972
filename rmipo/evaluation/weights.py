"""What tells the weights behind a result from others."""

from pathlib import Path

from rmipo.weights import model_fingerprint

from . import EvaluationError


def has_weights(model_dir: Path) -> bool:
    """False also for links whose model is no longer in the hub's cache."""
    return any(path.exists() for path in model_dir.glob("*.safetensors"))


def fingerprint(model_dir: Path) -> str:
    """`model_fingerprint` of a trained model. Raises EvaluationError for a folder without weights."""
    if not has_weights(model_dir):
        raise EvaluationError(f"{model_dir} holds no *.safetensors: train the model first (make train)")
    return model_fingerprint(model_dir)
