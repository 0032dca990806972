"""Fold a trained adapter into its base model: a plain model folder that needs no PEFT.

    .venv/bin/python scripts/merge_adapter.py outputs/llama3-8b-instruct/rmipo-lora [--output FOLDER]

The base is loaded in the recipe's `dtype`, unquantized: after QLoRA the merged weights are not those that training saw,
since rounding them to 4 bits again would cost more. Before it is saved, the merged model has to give the adapter's
logits.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo.config import ConfigError, recorded_run

# Largest difference of log-probabilities between merged and adapter model: rounding of the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
PROBE = "The adapter and the merged model have to agree on every token of this sentence."


@torch.no_grad()
def logps(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token, `(1, T, vocabulary)` float32."""
    return model(input_ids=ids).logits.float().log_softmax(-1)


def merge(folder: Path, output: Path) -> float:
    """Write the merged model of the run in `folder` to `output`; returns the largest difference of log-probabilities.

    Raises ConfigError: no adapter there, `output` exists, or the merged model says something else.
    """
    run = recorded_run(folder)
    if run is None or not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} holds no trained adapter: expected run.json and adapter_config.json, of use_peft: true"
        )
    if output.exists():
        raise ConfigError(f"{output} exists: remove it, or name another folder with --output")
    recipe = run["recipe"]
    base = AutoModelForCausalLM.from_pretrained(
        recipe["model_name_or_path"], revision=recipe.get("model_revision", "main"), dtype=recipe["dtype"]
    )
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(PROBE)["input_ids"]])
    wanted = logps(model, ids)
    merged = model.merge_and_unload()
    difference = (logps(merged, ids) - wanted).abs().max().item()
    if not difference <= TOLERANCE[merged.dtype]:
        raise ConfigError(
            f"{folder}: merged and adapter model differ by {difference:.1e} nats, more than {merged.dtype} explains"
        )
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return difference


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the run's folder, with adapter_config.json")
    parser.add_argument("--output", type=Path, help="default: the run's folder with -merged at its end")
    args = parser.parse_args()
    output = args.output or args.folder.with_name(f"{args.folder.name}-merged")
    try:
        difference = merge(args.folder, output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"model: {output} (largest difference from the adapter's log-probabilities: {difference:.1e})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
