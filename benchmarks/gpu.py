"""Our training step against the authors' way, padded SimPO and TRL on one GPU, at the shapes of Llama-3-8B in bfloat16.

    python -m benchmarks.gpu                  micro-batches of 2 and 4, gradient checkpointing; under ten minutes
    python -m benchmarks.gpu --layers 8       fewer of the 32 layers; default: as many as the GPU holds
    python -m benchmarks.gpu --liger          our steps with Liger's norms, rotary embeddings and MLPs
    python -m benchmarks.gpu --kernels        nothing is timed: parity of the kernels. Exit code 1 where one is further from
                                              float64 than the dense kernel in the same precision is (times 4)
    python -m benchmarks.gpu --dry            the same program on the CPU with small shapes

Nothing is downloaded: weights are random. Writes a JSON. MFU counts the work of a step without recomputation over the
GPU's dense bf16 peak; tokens are those of prompt, chosen and rejected, so that padding earns nothing.
"""

import os

if __name__ == "__main__":  # before torch is imported: with several GPUs, Trainer would copy the model to each of them
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import copy
import dataclasses
import sys
import time

import torch
from accelerate.utils import send_to_device
from torch.nn.attention import flex_attention
from transformers import LlamaForCausalLM
from transformers.utils import is_liger_kernel_available

from benchmarks import lengths, measure, work
from benchmarks.bench import parser_of, quiet
from benchmarks.contenders import BUILDERS, Contender, Setup
from rmipo.recipe.schema import LIGER
from rmipo.training import attention, scoring
from rmipo.training.packing import PackedSequence, pack_pairs
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


def run(contenders: dict[str, Contender], setup: Setup, batches: list[list[dict]], deadline: float) -> dict:
    """One case, with rates, parity and compiled graphs."""
    # Before anything is timed: a step that scores something else is not fast.
    model = contenders["simpo"].model.eval()
    parity = check_parity(model, model, batches[0], setup.attention)
    model.train()
    case = measure.run_case(contenders, setup, batches, deadline)
    device = torch.cuda.get_device_name() if setup.device == "cuda" else ""
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


def scores_and_gradient(model: LlamaForCausalLM, packed: PackedSequence, kind: str) -> list[torch.Tensor]:
    """Log-probabilities of the responses' tokens, and the gradient of their sum by the first layer's queries, in float64."""
    model.zero_grad()
    attention.attach(model, kind)
    logps = scoring.response_logps(model, packed, model.config)
    logps.sum().backward()
    return [logps.detach().double(), model.model.layers[0].self_attn.q_proj.weight.grad.double()]


def distances(model: LlamaForCausalLM, packed: PackedSequence, kind: str, expected: list[torch.Tensor]) -> list[float]:
    """Per tensor: mean |difference|, relative to the mean size of what is expected."""
    pairs = zip(scores_and_gradient(model, packed, kind), expected, strict=True)
    return [((found - exact).abs().mean() / exact.abs().mean()).item() for found, exact in pairs]


def kernels(rows: list[dict], head_dims: tuple[int, ...], device: str) -> dict[str, dict]:
    """flex attention, the fused LM head and Liger's kernels against plain ones, forward and backward."""
    packed, models, cases = send_to_device(pack_pairs(rows), device), {}, {}
    for head_dim in head_dims:
        exact = Setup(4 * head_dim, 2, head_dim, 512, device=device).model().double()
        expected = scores_and_gradient(exact, packed, "dense")
        for dtype in ("float32", "bfloat16"):
            name, model = f"head dim {head_dim}, {dtype}", copy.deepcopy(exact).to(getattr(torch, dtype))
            cases[name] = {kind: distances(model, packed, kind, expected) for kind in ("dense", "flex")}
            models[name] = (model, expected)
    if device == "cuda" and is_liger_kernel_available():
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        # Last: it replaces the rotary embeddings of every Llama in this program.
        for name, (model, expected) in models.items():
            _apply_liger_kernel_to_instance(model=model, **LIGER)
            cases[name]["flex and liger"] = distances(model, packed, "flex", expected)
    for errors in cases.values():
        limits = [max(1e-5, 4 * own) for own in errors["dense"]]  # the plain kernel's own rounding
        near = [error <= limit for found in errors.values() for error, limit in zip(found, limits, strict=True)]
        errors["passed"] = all(near)
    return cases


def main() -> None:
    parser = parser_of(__doc__, "gpu-")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4])
    for flag in ("--liger", "--kernels", "--dry"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    quiet()
    scale, device, head_dims = 1.0, "cuda", (64, 128, 256)
    if options.dry:
        scale, device, head_dims = 0.05, "cpu", (16,)
        # torch refuses flex's backward on a CPU, where only its slow, unfused form runs.
        flex_attention._validate_device = lambda *tensors: None
    result = {"environment": measure.environment(), "cases": {}}
    if options.kernels:
        (rows,) = lengths.batches("ultrafeedback", 1, 4, scale, 512)
        cases = result["cases"] = kernels(rows, head_dims, device)
        print(*cases.items(), sep="\n")
        result["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        measure.save(result, options.output)
        sys.exit(not all(case["passed"] for case in cases.values()))
    deadline = time.monotonic() + 60 * MINUTES
    setup = dataclasses.replace(SMALL if options.dry else setup_of_8b(options.layers), liger=options.liger)
    result["setup"] = dataclasses.asdict(setup)
    contenders = measure.build_all(BUILDERS, setup)
    for size in options.micro_batches:
        batches = lengths.batches("ultrafeedback", options.rounds, size, scale, setup.vocabulary)
        case = result["cases"][f"micro-batch-{size}"] = run(contenders, setup, batches, deadline)
        print(f"\n{size} pairs, {setup}; wall seconds, ratios min median max of the rounds")
        print(measure.table(case["contenders"], setup.clock))
        for name, entry in case["contenders"].items():
            print(f"{name}: {entry['tokens_per_second']:.0f} tokens/s, MFU {entry['mfu']}")
        print({name: value for name, value in case.items() if name != "contenders"})
        measure.save(result, options.output)
    print(f"\nsaved {options.output}")


if __name__ == "__main__":
    main()
