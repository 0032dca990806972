"""What only a GPU can show of the kernels of a step: parity with plain ones, and how many graphs are compiled.

    python -m benchmarks.gpu_kernels --output kernels.json [--dry]

flex attention against a dense mask, forward and backward, in bfloat16 and float32, at head dims 64, 128 and 256; the fused LM
head against full logits; Liger's norms, rotary embeddings and MLPs against transformers'. Exit code 1 where one is further off
than the dense kernel in the same precision is from float64 (times 4). --dry: small shapes on the CPU, without Liger.
"""

import argparse
import copy
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from transformers import LlamaForCausalLM
from transformers.utils import is_liger_kernel_available

from benchmarks import lengths, report
from benchmarks.contenders import Setup
from benchmarks.gpu import run_flex_on_cpu
from rmipo.recipe.schema import LIGER
from rmipo.training import attention, scoring
from rmipo.training.packing import pack_pairs

ALLOWED = 4  # times the plain kernel's own rounding


def scores_and_gradient(model: LlamaForCausalLM, packed, kind: str) -> list[torch.Tensor]:
    """Log-probabilities of the responses' tokens, and the gradient of their sum by the first layer's queries, in float64."""
    model.zero_grad()
    attention.attach(model, kind)
    logps = scoring.response_logps(model, packed, model.config)
    logps.sum().backward()
    return [logps.detach().double(), model.model.layers[0].self_attn.q_proj.weight.grad.double()]


def distances(model: LlamaForCausalLM, packed, kind: str, expected: list[torch.Tensor]) -> list[float]:
    """Per tensor: mean |difference|, relative to the mean size of what is expected."""
    pairs = zip(scores_and_gradient(model, packed, kind), expected, strict=True)
    return [((found - exact).abs().mean() / exact.abs().mean()).item() for found, exact in pairs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU")
    options = parser.parse_args()
    device = "cpu" if options.dry else "cuda"
    if options.dry:
        run_flex_on_cpu()
    source = lengths.from_profile("ultrafeedback", seed=0)
    (rows,) = lengths.batches(source, 1, 4, 0.05 if options.dry else 1.0, 512)
    packed, cases = send_to_device(pack_pairs(rows), device), []
    for head_dim in (16,) if options.dry else (64, 128, 256):
        exact = Setup(4 * head_dim, 2, head_dim, 512, device=device).model().double()
        expected = scores_and_gradient(exact, packed, "dense")
        for dtype in (torch.float32, torch.bfloat16):
            model = copy.deepcopy(exact).to(dtype)
            errors = {kind: distances(model, packed, kind, expected) for kind in ("dense", "flex")}
            cases.append((head_dim, model, expected, errors))
    if device == "cuda" and is_liger_kernel_available():
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        # Last: it replaces the rotary embeddings of every Llama in this program.
        for _, model, expected, errors in cases:
            _apply_liger_kernel_to_instance(model=model, **LIGER)
            errors["flex and liger"] = distances(model, packed, "flex", expected)
    result = {"environment": report.environment(), "cases": []}
    for head_dim, model, _, errors in cases:
        limits = [max(1e-5, ALLOWED * own) for own in errors["dense"]]
        passed = all(error <= limit for found in errors.values() for error, limit in zip(found, limits, strict=True))
        case = {"head_dim": head_dim, "dtype": str(model.dtype), "relative_errors": errors, "passed": passed}
        print(case)
        result["cases"].append(case)
    result["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    report.save(result, options.output)
    return 0 if all(case["passed"] for case in result["cases"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
