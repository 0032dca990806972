"""Our training step against the authors' way, padded SimPO and TRL on one GPU, at the shapes of Llama-3-8B in bf16.

    python -m benchmarks.gpu                  32 layers, micro-batches of 2 and 4, gradient checkpointing
    python -m benchmarks.gpu --layers 8       where memory asks for fewer
    python -m benchmarks.gpu --dry            the same program on the CPU with tiny shapes

All contenders train the same weights in turn. MFU counts the work of a step without recomputation (HFU with it), over
the device's dense bf16 peak; tokens are those of prompt, chosen and rejected, so that padding earns nothing.
"""

import argparse
import contextlib
import dataclasses
import io
import logging
import time
import warnings
from datetime import datetime
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm

from benchmarks import lengths, measure, report, work
from benchmarks.contenders import BUILDERS, Contender, Setup, build
from rmipo.training import attention

BASES = ("padded-rmipo", "padded-simpo", "simpo")
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, from the vendor's data sheets


def clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(one: Contender, pairs: list[dict]) -> int:
    """Bytes that a step needs beyond weights and gradients."""
    attention.attach(one.model, one.attention)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one.step(pairs)
    return torch.cuda.max_memory_allocated() - before


def host_synchronizations(one: Contender, pairs: list[dict]) -> int:
    """How often a step makes the host wait for the device."""
    attention.attach(one.model, one.attention)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        one.step(pairs)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def run(setup: Setup, micro_batch: int, rounds: int, contenders: dict[str, Contender], progress: tqdm) -> dict:
    source = lengths.from_profile("ultrafeedback", seed=0)
    batches = lengths.batches(source, rounds, micro_batch, 1.0 if setup.device == "cuda" else 0.02, setup.vocabulary)
    on_gpu = setup.device == "cuda"
    for one in contenders.values():  # compilation and the allocator's growth come before the first round
        attention.attach(one.model, one.attention)
        one.step(batches[0])
    longest = max(batches, key=lambda pairs: work.step_work("padded-simpo", pairs, setup).positions)
    extra = {}
    for name, one in contenders.items() if on_gpu else ():
        extra[name] = {
            "memory": peak_memory(one, longest),
            "host_synchronizations": host_synchronizations(one, longest),
        }
    times = {"clock": clock} if on_gpu else {}
    tolerance = measure.LOSS_TOLERANCE[setup.dtype]
    results = measure.timed_rounds(contenders, batches, progress, tolerance=tolerance, **times)

    case = {"micro_batch": micro_batch, "setup": dataclasses.asdict(setup), "contenders": {}}
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if on_gpu and gpu in torch.cuda.get_device_name()), None)
    no_recompute = dataclasses.replace(setup, checkpointing=False)
    sides = ("prompt_ids", "chosen_ids", "rejected_ids")
    tokens = sum(len(pair[side]) for pairs in batches for pair in pairs for side in sides)
    for name, rounds_ in results.items():
        seconds = sum(one["wall"] for one in rounds_)
        total, useful = work.total(name, batches, setup), work.total(name, batches, no_recompute)
        case["contenders"][name] = extra.get(name, {}) | {
            "name": name,
            "work": dataclasses.asdict(total) | {"flops": total.flops},
            "rounds": rounds_,
            "tokens_per_second": tokens / seconds,
            "mfu": peak and useful.flops / seconds / peak,
            "hfu": peak and total.flops / seconds / peak,
        }
    report.add_ratios(case, BASES, clock="wall")
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--output", type=Path, default=Path(f"outputs/bench/gpu-{datetime.now():%Y%m%d-%H%M%S}.json"))
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; --dry runs tiny shapes on the CPU")
    if options.output.exists():
        parser.error(f"--output {options.output} exists")

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    setup = Setup(4096, options.layers, 128, 128256, device="cuda", dtype="bfloat16")
    if options.dry:
        setup = Setup(hidden=64, layers=2, head_dim=16, vocabulary=101)
    model = setup.model()
    with contextlib.redirect_stderr(io.StringIO()):  # TRL's own progress bars
        contenders = {name: build(name, setup, model) for name in BUILDERS}
    result = {"environment": report.environment(), "rounds": options.rounds, "cases": {}}
    progress = tqdm(total=len(options.micro_batches) * options.rounds * len(contenders), unit="step")
    for size in options.micro_batches:
        case = run(setup, size, options.rounds, contenders, progress)
        case["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # so far
        result["cases"][f"micro-batch-{size}"] = case
        progress.write(f"\n{size} pairs, {setup}; wall seconds, ratios min median max of {options.rounds} rounds")
        progress.write(report.table(case, clock="wall"))
        for name, entry in case["contenders"].items():
            rates = f"{name}: {entry['tokens_per_second']:.0f} tokens/s"
            progress.write(rates + (f", MFU {entry['mfu']:.1%}, HFU {entry['hfu']:.1%}" if entry["mfu"] else ""))
        report.save(result, options.output)
    progress.close()
    print(f"\nsaved {options.output}")


if __name__ == "__main__":
    main()
