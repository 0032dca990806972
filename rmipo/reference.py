"""Reference log-probabilities, scored once before the first update and cached by content.

The reference is the initial policy, so methods with one train with a single model in memory.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel


PAIR_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
MISMATCHED_COLUMNS = ("ref_mismatched_chosen_logps", "ref_mismatched_rejected_logps")


def model_fingerprint(model: PreTrainedModel) -> str:
    """What the initial weights are: the hub's commit, or name, size and both ends of each local weight file."""
    assert model.config._name_or_path, "the reference cache needs a model that was loaded from somewhere"
    source = Path(model.config._name_or_path)
    digest = hashlib.sha256()
    if source.is_dir():
        for path in sorted([*source.glob("*.safetensors"), source / "config.json"]):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(2**20))
                file.seek(max(0, size - 2**20))
                digest.update(file.read())
    else:
        digest.update(f"{source} {model.config._commit_hash}".encode())
    return digest.hexdigest()[:16]


class ReferenceCache:
    """Columns of reference sums for one tokenised dataset, in a file of `folder` named after their content.

    Args:
        folder: recipe key `reference_cache_dir`.
        model_key: from `model_fingerprint`.
        data_key: from `data.fingerprint` of the tokenised dataset.
        columns: names of the columns.
    """

    def __init__(self, folder: str | Path, model_key: str, data_key: str, columns: tuple[str, ...]):
        self.columns = columns
        self.content = f"model {model_key}, data {data_key}, {' '.join(columns)}"
        self.path = Path(folder) / f"{hashlib.sha256(self.content.encode()).hexdigest()[:24]}.safetensors"

    def load(self, num_pairs: int) -> dict[str, torch.Tensor] | None:
        """The columns, `(num_pairs,)` each; None, said aloud, where the file is not what its name promises."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                content = (file.metadata() or {}).get("content")
        except SafetensorError as error:
            print(f"reference cache {self.path} can't be read ({error}): scored anew")
            return None
        if content != self.content or any(len(values) != num_pairs for values in columns.values()):
            print(f"reference cache {self.path} holds {content}, expected {self.content}: scored anew")
            return None
        return columns

    def save(self, columns: dict[str, torch.Tensor]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        save_file(columns, temporary, metadata={"content": self.content})
        temporary.replace(self.path)
