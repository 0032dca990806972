"""Our training step against the authors' way, padded SimPO and TRL on one GPU, at the shapes of Llama-3-8B in bfloat16.

    python -m benchmarks.gpu                  micro-batches of 2 and 4, gradient checkpointing; under ten minutes
    python -m benchmarks.gpu --layers 8       fewer of the 32 layers; default: as many as the GPU holds
    python -m benchmarks.gpu --liger          our steps with Liger's norms, rotary embeddings and MLPs
    python -m benchmarks.gpu --dry            the same program on the CPU with small shapes

Nothing is downloaded: weights are random. Writes a JSON. MFU counts the work of a step without recomputation over the
GPU's dense bf16 peak; tokens are those of prompt, chosen and rejected, so that padding earns nothing.
"""

import os

if __name__ == "__main__":  # before torch is imported: with several GPUs, Trainer would copy the model to each of them
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import argparse
import dataclasses
import time

import torch
from torch.nn.attention import flex_attention

from benchmarks import lengths, measure, report, work
from benchmarks.bench import output_option, quiet
from benchmarks.contenders import BUILDERS, Contender, Setup
from rmipo.training.scoring import check_parity

# Part of the name that a GPU reports -> dense bfloat16 peak in FLOP/s; the first that fits. Others have no MFU.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12} | dict.fromkeys(("H100", "H200", "H800"), 989e12)
PEAKS |= dict.fromkeys(("A100", "A800"), 312e12)
MINUTES = 8.0  # after which no further round starts
SMALL = Setup(hidden=64, layers=2, head_dim=16, vocabulary=101, attention="flex")


def setup_of_8b(layers: int | None) -> Setup:
    """Llama-3-8B's sizes, with as many layers as leave two fifths of the GPU to activations and full logits."""
    if layers is None:
        # 4 bytes per weight and its gradient; 218 million weights a layer, 1.05 billion in embeddings and head.
        room = 0.6 * torch.cuda.get_device_properties(0).total_memory / 4 - 1.05e9
        layers = max(1, min(32, int(room / 218e6)))
    return Setup(4096, layers, 128, 128256, device="cuda", dtype="bfloat16")


def run(contenders: dict[str, Contender], setup: Setup, micro_batch: int, rounds: int, deadline: float) -> dict:
    """One case, with rates, parity and compiled graphs."""
    on_gpu = setup.device == "cuda"
    source = lengths.from_profile("ultrafeedback", seed=0)
    batches = lengths.batches(source, rounds, micro_batch, 1.0 if on_gpu else 0.05, setup.vocabulary)
    # Before anything is timed: a step that scores something else is not fast.
    model = contenders["simpo"].model.eval()
    parity = check_parity(model, model, batches[0], setup.attention)
    model.train()
    case = measure.run_case(contenders, setup, batches, deadline)
    device = torch.cuda.get_device_name() if on_gpu else ""
    peak = next((flops for part, flops in PEAKS.items() if part in device), None)
    for name, entry in case["contenders"].items():
        done = batches[: len(entry["rounds"])]
        seconds = sum(one["wall"] for one in entry["rounds"])
        pairs = [pair for batch in done for pair in batch]
        tokens = sum(len(pair[key]) for pair in pairs for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
        useful = work.total(name, done, dataclasses.replace(setup, checkpointing=False))
        entry |= {"tokens_per_second": tokens / seconds, "mfu": peak and useful.flops / seconds / peak}
    case["parity_nats_per_token"] = parity  # mean |difference| between packed scores and those of each sequence alone
    case["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # so far
    return case


def run_flex_on_cpu() -> None:
    """torch refuses flex's backward on a CPU, where only its slow, unfused form runs."""
    flex_attention._validate_device = lambda *tensors: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU")
    output_option(parser, "gpu-")
    options = parser.parse_args()
    quiet()
    if options.dry:
        run_flex_on_cpu()
    deadline = time.monotonic() + 60 * MINUTES
    setup = dataclasses.replace(SMALL if options.dry else setup_of_8b(options.layers), liger=options.liger)
    contenders = measure.build_all(BUILDERS, setup)
    result = {"environment": report.environment(), "setup": dataclasses.asdict(setup), "cases": {}}
    for size in options.micro_batches:
        case = run(contenders, setup, size, options.rounds, deadline)
        result["cases"][f"micro-batch-{size}"] = case
        print(f"\n{size} pairs, {setup}; wall seconds, ratios min median max of the rounds")
        print(report.table(case["contenders"], setup.clock))
        for name, entry in case["contenders"].items():
            print(f"{name}: {entry['tokens_per_second']:.0f} tokens/s, MFU {entry['mfu']}")
        print({name: value for name, value in case.items() if name != "contenders"})
        report.save(result, options.output)
    print(f"\nsaved {options.output}")


if __name__ == "__main__":
    main()
