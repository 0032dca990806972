"""What only a GPU can show of the kernels of a step: parity with plain ones, and how many graphs are compiled.

    python -m benchmarks.gpu_kernels --output kernels.json [--dry]

flex attention against a dense mask, forward and backward, in bfloat16 and float32, at head dims 64, 128 and 256; the fused LM
head against full logits; Liger's norms, rotary embeddings and MLPs against transformers'. Exit code 1 where one is further off
than the dense kernel in the same precision is from float64 (times 4). --dry: small shapes on the CPU, without Liger.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch.nn.attention import flex_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_liger_kernel_available

from benchmarks import lengths, report
from rmipo.recipe.arguments import LIGER
from rmipo.training import attention, scoring
from rmipo.training.packing import pack_pairs

ALLOWED = 4  # times the plain kernel's own rounding


def small_model(head_dim: int, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=4 * head_dim, intermediate_size=8 * head_dim, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device)


def scores_and_gradient(model: LlamaForCausalLM, packed, kind: str) -> list[torch.Tensor]:
    """Log-probabilities of the responses' tokens, and the gradient of their sum by the first layer's queries, in float64."""
    model.zero_grad()
    attention.attach(model, kind)
    logps = scoring.response_logps(model, packed, kind, model.config)
    logps.sum().backward()
    return [logps.detach().double(), model.model.layers[0].self_attn.q_proj.weight.grad.double()]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """Per tensor: mean |difference|, relative to the mean size of what is expected."""
    return [((a - b).abs().mean() / b.abs().mean()).item() for a, b in zip(found, expected, strict=True)]


class Case:
    """The same pairs under the same weights, in one precision and head dim."""

    def __init__(self, head_dim: int, dtype: torch.dtype, device: str):
        self.name = {"head_dim": head_dim, "dtype": str(dtype)}
        exact = small_model(head_dim, device).double()
        (rows,) = lengths.batches(
            lengths.from_profile("ultrafeedback", seed=0), 1, 4, 1.0 if device == "cuda" else 0.05, 512
        )
        self.packed = send_to_device(pack_pairs(rows), device)
        self.model = copy.deepcopy(exact).to(dtype)
        self.expected = scores_and_gradient(exact, self.packed, "dense")
        self.errors: dict[str, list[float]] = {}

    def measure(self, name: str, kind: str) -> None:
        self.errors[name] = distance(scores_and_gradient(self.model, self.packed, kind), self.expected)

    def result(self) -> dict:
        limits = [max(1e-5, ALLOWED * own) for own in self.errors["dense"]]
        passed = all(
            error <= limit for found in self.errors.values() for error, limit in zip(found, limits, strict=True)
        )
        return {**self.name, "relative_errors": self.errors, "passed": passed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU")
    options = parser.parse_args()
    device = "cpu" if options.dry else "cuda"
    if options.dry:  # torch refuses flex's backward on a CPU, where only its slow, unfused form runs
        flex_attention._validate_device = lambda *tensors: None
    head_dims = (16,) if options.dry else (64, 128, 256)
    cases = [Case(head_dim, dtype, device) for head_dim in head_dims for dtype in (torch.float32, torch.bfloat16)]
    for case in cases:
        case.measure("dense", "dense")
        case.measure("flex", "flex")
    if device == "cuda" and is_liger_kernel_available():
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        for case in cases:  # last: it replaces the rotary embeddings of every Llama in this program
            _apply_liger_kernel_to_instance(model=case.model, **LIGER)
            case.measure("flex and liger", "flex")
    cases = [case.result() for case in cases]
    for case in cases:
        print(json.dumps(case))
    result = {"environment": report.environment(), "cases": cases}
    result["compiled_graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    report.save(result, options.output)
    return 0 if all(case["passed"] for case in cases) else 1


if __name__ == "__main__":
    raise SystemExit(main())
