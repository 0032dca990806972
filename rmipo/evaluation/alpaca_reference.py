"""AlpacaEval's reference outputs, whose instructions are the benchmark's prompts: from the hub or a file."""

import gzip
import json
from collections import Counter
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
    if not file.is_file():
        raise EvaluationError(f"alpacaeval.reference: {file} doesn't exist")
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if ".jsonl" in file.suffixes:
            chosen: dict[str, str] = {}
            for line in content.splitlines():
                pair = json.loads(line)
                chosen.setdefault(pair["prompt"][-1]["content"], pair["chosen"][-1]["content"])
            rows = [{"instruction": instruction, "output": output} for instruction, output in chosen.items()]
        else:
            rows = json.loads(content)
        return [
            {"instruction": row["instruction"], "output": row["output"], "generator": row.get("generator", "reference")}
            for row in rows
        ], file
    except (ValueError, TypeError, KeyError, IndexError, EOFError, gzip.BadGzipFile) as error:
        raise EvaluationError(
            f'alpacaeval.reference: {file} should be a JSON list of {{"instruction", "output"}}, or JSONL of '
            f"preference pairs as messages ({error!r})"
        ) from error


def hub_file(name: str, dataset: str = HUB_DATA) -> Path:
    """A file of a dataset on the hub, downloaded or from the cache. Raises EvaluationError with the command for it."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(dataset, name, repo_type="dataset"))
    except Exception as error:  # offline, gated, renamed: the remedy is the same
        without = (
            ". Without the length-controlled rate (alpacaeval.length_controlled: false) and with alpacaeval.reference set, "
            "nothing is needed from there"
        ) * (dataset == HUB_DATA)
        raise EvaluationError(
            f"{name} of the dataset {dataset} is neither cached nor downloadable ({type(error).__name__}). With a "
            f"network: .venv/bin/hf download {dataset} {name} --repo-type dataset{without}"
        ) from error


def require_benchmark(reference: list[dict]) -> None:
    """Raises EvaluationError unless `reference` has the benchmark's instructions, all of them, in their order.

    The length-controlled model has learned a difficulty for each of the 805 and joins on row numbers: for others it
    would compute a number without meaning.
    """
    ours = [row["instruction"] for row in reference]
    theirs = [row["instruction"] for row in load_reference(None)[0]]
    if ours != theirs:
        raise EvaluationError(
            f"alpacaeval.length_controlled: true needs the benchmark's own {len(theirs)} instructions in their order; "
            f"reference and first_n give {len(ours)}, {len(set(ours) & set(theirs))} of them in common. Set "
            "length_controlled: false, or both to null"
        )


def check_same_prompts(outputs: list[dict], reference: list[dict]) -> None:
    """Raises EvaluationError unless both have the same instructions, in the same order, each once.

    The length-controlled model joins on row numbers, and alpaca-eval pairs repeated instructions crosswise.
    """
    ours, theirs = ([row["instruction"] for row in rows] for rows in (outputs, reference))
    repeated = [text for text, count in Counter(theirs).items() if count > 1]
    if repeated:
        raise EvaluationError(f"{len(repeated)} instructions are repeated in the reference: {repeated[0][:100]!r}")
    if ours != theirs:
        differs = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
        row = differs[0] if differs else min(len(ours), len(theirs))
        raise EvaluationError(
            f"these outputs are for other prompts than the benchmark's: {len(ours)} outputs, {len(theirs)} "
            f"instructions, {len(set(ours) & set(theirs))} in common; the first difference is in row {row}"
        )
