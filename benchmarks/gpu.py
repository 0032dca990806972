"""Our training step against the authors' way, padded SimPO and TRL on one GPU, at the shapes of Llama-3-8B in bfloat16.

    python -m benchmarks.gpu                  micro-batches of 2 and 4, gradient checkpointing; under ten minutes
    python -m benchmarks.gpu --layers 8       fewer of the 32 layers; default: as many as the GPU holds
    python -m benchmarks.gpu --liger          our steps with Liger's norms, rotary embeddings and MLPs
    python -m benchmarks.gpu --dry            the same program on the CPU with small shapes

Nothing is downloaded: weights are random. All contenders train the same weights, each through the model that its own
trainer has made. Writes a JSON. MFU counts the work of a step without recomputation (HFU with it) over the
GPU's dense bf16 peak; tokens are those of prompt, chosen and rejected, so that padding earns nothing.
"""

import os

if __name__ == "__main__":  # before torch is imported: with several GPUs, Trainer would copy the model to each of them
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

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
from torch.nn.attention import flex_attention
from tqdm import tqdm

from benchmarks import lengths, measure, report, work
from benchmarks.contenders import BUILDERS, Contender, Setup, build
from rmipo.plan import memory
from rmipo.plan.memory import Workload
from rmipo.plan.shapes import Shape
from rmipo.training import attention
from rmipo.training.parity import check_parity

# Part of the name that a GPU reports -> dense bfloat16 peak in FLOP/s; the first that fits. Others have no MFU.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12} | dict.fromkeys(("H100", "H200", "H800"), 989e12)
PEAKS |= dict.fromkeys(("A100", "A800"), 312e12)
BASES = ("padded-rmipo", "padded-simpo", "simpo")
OURS = ("rmipo", "simpo", "dpo")
MINUTES = 8.0  # after which no further round starts


def setup_of_8b(layers: int | None, liger: bool) -> Setup:
    """Llama-3-8B's sizes, with as many layers as leave two fifths of the GPU to activations and full logits."""
    if layers is None:
        # 4 bytes per weight and its gradient; 218 million weights a layer, 1.05 billion in embeddings and head.
        room = 0.6 * torch.cuda.get_device_properties(0).total_memory / 4 - 1.05e9
        layers = max(1, min(32, int(room / 218e6)))
    return Setup(4096, layers, 128, 128256, device="cuda", dtype="bfloat16", liger=liger)


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(one: Contender, pairs: list[dict]) -> int:
    """Bytes that a step needs beyond weights and gradients."""
    one.step(pairs)  # the gradients are there
    if one.model.device.type == "cpu":
        return measure.allocated_peak(lambda: one.step(pairs))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one.step(pairs)
    return torch.cuda.max_memory_allocated() - before


def planned_memory(name: str, setup: Setup, pairs: list[dict]) -> int:
    """What `rmipo.plan` expects of the same step beyond weights and gradients."""
    size = getattr(torch, setup.dtype).itemsize
    tokens = sum(len(pair["prompt_ids"]) - 1 + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    tokens += -tokens % attention.BLOCK  # as flex pads
    run = Workload(
        stage="preference", longest=tokens, global_batch=len(pairs), packed_length=None,
        checkpoint_every=int(setup.checkpointing), weight_bytes=size, compute_bytes=size, fused_head=True,
        reference_logits=False, scores_pairs=False, scores_responses=name == "rmipo", adapters=False, quantized=False,
    )  # fmt: skip
    return sum(memory.gradient_pass(Shape.of(setup.config()), run, tokens).values())


def host_synchronizations(one: Contender, pairs: list[dict]) -> int:
    """How often a step makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        one.step(pairs)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def run(setup: Setup, micro_batch: int, rounds: int, contenders: dict[str, Contender], deadline: float) -> dict:
    """One case: time in alternating order, memory, rates. A contender that runs out of memory says so and is left out."""
    on_gpu = setup.device == "cuda"
    source = lengths.from_profile("ultrafeedback", seed=0)
    batches = lengths.batches(source, rounds, micro_batch, 1.0 if on_gpu else 0.05, setup.vocabulary)
    longest = max(batches, key=lambda pairs: work.step_work("padded-simpo", pairs, setup).positions)
    entries, able = {}, {}
    for name, one in contenders.items():  # compilation and the allocator's growth come before the first round
        try:
            entries[name] = {"name": name, "memory": peak_memory(one, longest)}
            able[name] = one
        except torch.OutOfMemoryError:
            entries[name] = {"name": name, "out_of_memory": True}
        one.model.zero_grad()
        if name in OURS:
            entries[name]["planned_memory"] = planned_memory(name, setup, longest)
            entries[name]["host_synchronizations"] = host_synchronizations(one, longest) if on_gpu else None
    parity = None
    if "simpo" in able:  # before anything is timed: a step that scores something else is not fast
        model = able["simpo"].model.eval()
        parity = check_parity(model, model, batches[0], setup.attention)
        model.train()
    progress = tqdm(total=rounds * len(able), unit="step")
    tolerance = measure.LOSS_TOLERANCE[setup.dtype]
    results = measure.timed_rounds(able, batches, progress, tolerance=tolerance, clock=clock, deadline=deadline)
    progress.close()

    name = torch.cuda.get_device_name() if on_gpu else ""
    peak = next((flops for part, flops in PEAKS.items() if part in name), None)
    no_recompute = dataclasses.replace(setup, checkpointing=False)
    batches = batches[: len(next(iter(results.values())))]
    tokens = sum(
        len(pair[key]) for pairs in batches for pair in pairs for key in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    for name, rounds_ in results.items():
        seconds = sum(one["wall"] for one in rounds_)
        total, useful = work.total(name, batches, setup), work.total(name, batches, no_recompute)
        entries[name] |= {
            "work": total._asdict() | {"flops": total.flops},
            "rounds": rounds_,
            "tokens_per_second": tokens / seconds,
            "mfu": peak and useful.flops / seconds / peak,
            "hfu": peak and total.flops / seconds / peak,
        }
    case = {"micro_batch": micro_batch, "contenders": {name: entries[name] for name in able}}
    report.add_ratios(case, BASES, clock="wall")
    case["out_of_memory"] = sorted(entries.keys() - able.keys())
    case["parity_nats_per_token"] = parity  # mean |difference| between packed scores and those of each sequence alone
    case["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # so far
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--output", type=Path, default=Path(f"outputs/bench/gpu-{datetime.now():%Y%m%d-%H%M%S}.json"))
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"--output {options.output} exists")

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.dry:  # torch refuses flex's backward on a CPU, where only its slow, unfused form runs
        flex_attention._validate_device = lambda *tensors: None
    deadline = time.monotonic() + 60 * MINUTES
    small = Setup(hidden=64, layers=2, head_dim=16, vocabulary=101, attention="flex", liger=options.liger)
    setup = small if options.dry else setup_of_8b(options.layers, options.liger)
    weights = setup.model()
    with contextlib.redirect_stderr(io.StringIO()):  # TRL's own progress bars
        contenders = {name: build(name, setup, weights) for name in BUILDERS}
    result = {"environment": report.environment(), "setup": dataclasses.asdict(setup), "cases": {}}
    for size in options.micro_batches:
        case = run(setup, size, options.rounds, contenders, deadline)
        result["cases"][f"micro-batch-{size}"] = case
        print(f"\n{size} pairs, {setup}; wall seconds, ratios min median max of the rounds")
        print(report.table(case, clock="wall"))
        for name, entry in case["contenders"].items():
            rates = f"{name}: {entry['tokens_per_second']:.0f} tokens/s"
            print(rates + (f", MFU {entry['mfu']:.1%}, HFU {entry['hfu']:.1%}" if entry["mfu"] else ""))
        print(f"out of memory: {', '.join(case['out_of_memory']) or 'none'}")
        print(f"parity {case['parity_nats_per_token']} nats per token, {case['compiled_graphs']} compiled graphs")
        report.save(result, options.output)
    print(f"\nsaved {options.output}")


if __name__ == "__main__":
    main()
