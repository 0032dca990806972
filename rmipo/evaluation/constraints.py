"""IFEval's instructions on this repository's held-out tasks: how many constraints answers follow, exactly and without a judge.

The tasks and the pairs of constraints occur in no training prompt; see `rmipo.constraints.prompts`. A text that follows many
constraints whatever is asked does well by the plain shares: BOILERPLATE reaches 42% of the reported prompts.
`constraints_specific` takes off what an answer would get under the other prompts, so that every fixed text gets 0.
"""

from __future__ import annotations

import string
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from rmipo.evaluation.benchmark import Benchmark, Metric
from rmipo.evaluation.statistics import standard_error
from rmipo.files import write_lines
from rmipo.fingerprints import json_fingerprint
from rmipo.recipe.settings import merge_settings
from rmipo.record import require_package

if TYPE_CHECKING:
    from rmipo.generation.answers import Request

DEFAULTS = {
    "first_n": None,  # of the 300 prompts
    "skip_n": 0,  # prompts left out before those
    "answers": 1,  # per prompt; standard errors are over prompts
    "generation": {},
}
FAMILIES = (  # of `instructions.DRAWN`, whose import needs lm-eval
    "frequency", "letter_frequency", "number_paragraphs", "number_placeholders", "postscript", "number_bullet_lists",
    "number_highlighted_sections", "multiple_sections", "title", "no_comma",
)  # fmt: skip
# The best fixed text that a search over such parts found for the last 200 prompts.
BOILERPLATE = "\n".join(
    ["<<A>>", "*a* *b* *c* *d*", "[x] [y] [z] [w] [v]", "Section 1", "SECTION 1", "P.S. ok", "P.P.S ok", "* a", "* b",
     "a", "***", "b", "***", "c", " ".join(8 * [string.ascii_lowercase])]
)  # fmt: skip
SAMPLING = tuple(f"generation.{key}" for key in ("temperature", "top_p", "max_new_tokens"))


def run(model_dir: str | Path, output_dir: str | Path, settings: dict) -> dict:
    """Sample answers to the held-out prompts and verify them. Per-answer results go to `output_dir`/constraints.jsonl."""
    settings = merge_settings("constraints", DEFAULTS, settings)
    require_package("lm_eval")
    from rmipo.constraints.instructions import followed
    from rmipo.generation.answers import Generator

    prompts, requests = held_out(settings)
    with Generator(model_dir, settings["generation"]) as generator:
        answers = generator.ask("constraints", requests)
    results, each = [], settings["answers"]
    for start, prompt in zip(range(0, len(answers), each), prompts, strict=True):
        of_prompt, finishes = answers[start : start + each], generator.finishes[start : start + each]
        checks = [followed(prompt["constraints"], answer) for answer in of_prompt]
        whole = [finish != "length" for finish in finishes]
        results.append({**prompt, "answers": of_prompt, "followed": checks, "whole": whole})
    for row, values in zip(results, specific(results), strict=True):
        row["specific"] = values
    write_lines(Path(output_dir) / "constraints.jsonl", results)
    values = {  # per prompt and answer
        "constraints_all": [[all(check) for check in row["followed"]] for row in results],
        "constraints_each": [[mean(check) for check in row["followed"]] for row in results],
        "constraints_specific": [row["specific"] for row in results],
    }
    by_prompt = {name: [100 * mean(of_prompt) for of_prompt in rows] for name, rows in values.items()}
    metrics = {"constraints_cut": generator.cut} | by_family(results)
    # What texts get that know nothing. A share below these does not show that constraints were read.
    metrics["constraints_fixed"] = 100 * mean(all(followed(row["constraints"], BOILERPLATE)) for row in prompts)
    metrics["constraints_repeated"] = 100 * mean(all(followed(row["constraints"], row["prompt"])) for row in prompts)
    for name, percents in by_prompt.items():
        metrics |= {name: mean(percents), f"{name}_standard_error": standard_error(percents)}
    settings["prompts_sha256"] = json_fingerprint(prompts)
    return generator.result(metrics, settings, ["lm_eval"], per_prompt=by_prompt)


def held_out(settings: dict) -> tuple[list[dict], list[Request]]:
    """The prompts that `settings` take, and a request for each answer, a prompt's side by side, each with its own seed."""
    from rmipo.constraints.prompts import read_prompts
    from rmipo.generation.answers import Request

    prompts = read_prompts("test")[settings["skip_n"] :][: settings["first_n"]]
    seed = settings["generation"].get("seed", 42)
    requests = [
        Request(f"{number}-{n}", [{"role": "user", "content": prompt["prompt"]}], seed=seed + n)
        for number, prompt in enumerate(prompts)
        for n in range(settings["answers"])
    ]
    return prompts, requests


def specific(results: list[dict]) -> list[list[float]]:
    """Per prompt and answer: 1 if it follows all constraints of its own prompt, less the share of the other prompts whose
    constraints it follows. An answer that was cut follows none.

    The mean over the prompts is 0 for any text that is the answer to all of them.
    """
    from rmipo.constraints.instructions import followed  # needs lm-eval

    asked = [row["constraints"] for row in results]
    values = []
    for number, row in enumerate(results):
        values.append([])
        for answer, whole in zip(row["answers"], row["whole"], strict=True):
            follows = [whole and all(followed(constraints, answer)) for constraints in asked]
            others = (sum(follows) - follows[number]) / max(1, len(asked) - 1)
            values[-1].append(follows[number] - others)
    return values


def by_family(results: list[dict]) -> dict[str, float]:
    """Percent of the constraints of each family that the answers follow; only families that were asked for."""
    checks: dict[str, list[bool]] = defaultdict(list)
    for row in results:
        for number, constraint in enumerate(row["constraints"]):
            family = constraint["id"].partition(":")[2]
            checks[f"constraints_{family}"] += [check[number] for check in row["followed"]]
    return {name: 100 * mean(values) for name, values in checks.items()}


BENCHMARK = Benchmark(
    name="constraints",
    title="Verifiable constraints",
    run=run,
    defaults=DEFAULTS,
    metrics={
        "constraints_all": Metric("All constraints (%)"),
        "constraints_each": Metric("Constraints (%)"),
        "constraints_specific": Metric("Own constraints (%)"),
        "constraints_cut": Metric("Cut (%)", better=None),
        "constraints_fixed": Metric("A fixed text (%)", better=None, detail=True),
        "constraints_repeated": Metric("The prompt itself (%)", better=None, detail=True),
        **{
            f"constraints_{name}": Metric(
                f"{name.removeprefix('number_').replace('_', ' ').capitalize()} (%)", detail=True
            )
            for name in FAMILIES
        },
    },
    same=("prompts_sha256", "first_n", "skip_n", "answers", *SAMPLING),
    trial=("first_n", "skip_n"),
    optional=("prompts_sha256",),  # older results have none
)
