"""AlpacaEval's reference outputs, whose instructions are the benchmark's prompts: from the hub or a file."""

import gzip
import json
from pathlib import Path

from rmipo.errors import EvaluationError

HUB_DATA = "tatsu-lab/alpaca_eval"
REFERENCE_FILE = "alpaca_eval_gpt4_baseline.json"
GAMED_FILE = "df_gamed.csv"  # instruction difficulties and regularisation rows of the length-controlled model


def load_reference(path: str | None) -> tuple[list[dict], Path]:
    """The reference outputs, which are the benchmark's prompts too, and their file.

    A JSON list of {"instruction", "output"}; or preference pairs as JSONL ({"prompt", "chosen"} as messages), whose
    chosen responses are the reference, the first one where a prompt is repeated. Raises EvaluationError otherwise.
    """
    file = Path(path).expanduser() if path else hub_file(REFERENCE_FILE)
    rows: dict[str, dict] = {}  # by instruction
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if ".jsonl" in file.suffixes:
            pairs = map(json.loads, content.splitlines())
            found = [{"instruction": p["prompt"][-1]["content"], "output": p["chosen"][-1]["content"]} for p in pairs]
        else:
            found = json.loads(content)
            if len({row["instruction"] for row in found}) < len(found):  # alpaca-eval would pair them crosswise
                raise ValueError("it repeats instructions")
        for row in found:
            made_by = {"generator": row.get("generator", "reference")}
            rows.setdefault(row["instruction"], {key: row[key] for key in ("instruction", "output")} | made_by)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EvaluationError(f"alpacaeval.reference: {file} has none of the two formats ({error!r})") from error
    return list(rows.values()), file


def hub_file(name: str, dataset: str = HUB_DATA) -> Path:
    """A file of a dataset on the hub, downloaded or from the cache. Raises EvaluationError with the command for it."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(dataset, name, repo_type="dataset"))
    except Exception as error:  # offline, gated, renamed: the remedy is the same
        command = f".venv/bin/hf download {dataset} {name} --repo-type dataset"
        raise EvaluationError(
            f"{name} is neither cached nor downloadable ({type(error).__name__}): {command}"
        ) from error


def require_benchmark(reference: list[dict]) -> None:
    """Raises EvaluationError unless `reference` has the benchmark's instructions, all of them, in their order.

    The length-controlled model has learned a difficulty for each of the 805 and joins on row numbers: for others it
    would compute a number without meaning.
    """
    ours, theirs = ([row["instruction"] for row in rows] for rows in (reference, load_reference(None)[0]))
    if ours != theirs:
        raise EvaluationError(
            f"alpacaeval.length_controlled needs all {len(theirs)} instructions, not these {len(ours)}"
        )
