"""How long a run takes: its arithmetic over what GPUs reach, and what it reads and writes besides. Estimates.

The range stands for what is not known without a measurement: the share of a GPU's peak that the step reaches. What is
assumed is a named constant here, and printed with the plan.
"""

from rmipo.plan import lengths
from rmipo.plan.gpus import Speed
from rmipo.plan.lengths import TYPICAL_DIALOGUE, TYPICAL_PROMPT, TYPICAL_RESPONSE
from rmipo.plan.memory import GIB, Hardware, Run, Shape, Sharding, checkpoint_bytes
from rmipo.recipe.load import Recipe
from rmipo.recipe.schema import PreferenceRunConfig

GATHER_GIB = {"one node": 100, "several nodes": 20}  # per second and GPU, of weights that a forward gathers
SAVE_GIB = 1.0  # per second, to disk
EVALUATION_EXAMPLES = 2000  # UltraFeedback's held-out pairs


def typical_tokens(run: Run) -> tuple[int, int]:
    """(tokens through the layers, tokens through the LM head) of one example of typical lengths."""
    if run.stage == "sft":
        return TYPICAL_DIALOGUE, TYPICAL_DIALOGUE
    return TYPICAL_PROMPT + 2 * TYPICAL_RESPONSE, 2 * TYPICAL_RESPONSE


def forward_flops(shape: Shape, run: Run, prior: bool = False) -> tuple[float, float]:
    """(layers, LM head) FLOPs of one forward of a typical example, or of its responses without their prompt.

    2 per weight and token; causal attention adds 2 q per layer, token and token of the sequence.
    """
    tokens, scored = typical_tokens(run)
    sequence = tokens if run.stage == "sft" else TYPICAL_PROMPT + TYPICAL_RESPONSE
    if prior:
        tokens, sequence = scored, TYPICAL_RESPONSE
    layers = 2 * shape.body * tokens + 2 * shape.layers * shape.heads_width * sequence * tokens
    return float(layers), 2.0 * shape.vocabulary * shape.hidden * scored


def scoring_flops(shape: Shape, run: Run) -> float:
    """FLOPs to score one example without gradient, with what the objective needs besides log pi(y|x)."""
    return sum(forward_flops(shape, run)) + sum(forward_flops(shape, run, prior=True)) * run.prior


def reference_flops(shape: Shape, run: Run) -> float:
    """FLOPs to score one example with the initial policy, before training starts."""
    if run.reference == "cached prior":
        return sum(forward_flops(shape, run, prior=True))
    return scoring_flops(shape, run) * (run.reference == "cached")


def step_flops(shape: Shape, run: Run) -> float:
    """FLOPs of one example in a training step: forward 1, backward 2 (frozen weights: 1), and what is computed again."""
    layers, head = forward_flops(shape, run)
    backward = 1 if run.adapters else 2
    again = -(-shape.layers // run.checkpoint_every) / shape.layers if run.checkpoint_every else 0.0
    total = layers * (1 + backward + again) + head * (1 + backward + run.fused_head)
    total += sum(forward_flops(shape, run, prior=True)) * run.prior
    return total + (layers + head) * (run.reference == "logits")


def hours(
    recipe: Recipe, shape: Shape, run: Run, sharding: Sharding, hardware: Hardware, examples: int, speed: Speed
) -> dict[str, tuple[float, float]]:
    """Expected hours (from, to) of each phase of a run on `examples`, and in all ("total")."""
    values = recipe.values
    steps = lengths.steps(values, run, examples)
    evaluations = (lengths.occasions(values, "eval", steps) or 0) + 1  # and at the end
    evaluated = evaluations * min(EVALUATION_EXAMPLES, values.get("max_eval_samples") or EVALUATION_EXAMPLES)
    flops = {
        "training": lengths.examples_seen(values, run, examples) * step_flops(shape, run),
        "reference pass": examples * reference_flops(shape, run),
        "evaluation": evaluated * scoring_flops(shape, run),
    }
    rate, (low, high) = hardware.gpus * speed.tflops * 1e12 * 3600, speed.reached
    phases = {name: (work / rate / high, work / rate / low) for name, work in flops.items()}
    if sharding.divides_weights and hardware.gpus > 1 and run.stage == "preference":
        # Every new token is a forward of all samples, and every forward gathers all weights.
        new_tokens = values.get("generation_max_new_tokens", PreferenceRunConfig.generation_max_new_tokens)
        answering = values.get("generation_samples", PreferenceRunConfig.generation_samples) > 0
        tokens = new_tokens * evaluations * answering
        link = GATHER_GIB["one node" if hardware.nodes == 1 else "several nodes"] * GIB
        phases["sample generations"] = (tokens * 2 * shape.parameters / link / 3600,) * 2
    saves = lengths.occasions(values, "save", steps) or 0
    checkpoint = checkpoint_bytes(shape, run, sharding, only_model=values.get("save_only_model", False))
    phases["saving"] = (saves * checkpoint / (SAVE_GIB * GIB) / 3600,) * 2
    low, high = map(sum, zip(*phases.values(), strict=True))
    return {name: span for name, span in phases.items() if span[1] > 0} | {"total": (low, high)}
