"""Short tasks with IFEval's instructions on top: answers are checked exactly, without a judge.

An answer is solved if it ends, answers its task in at most 60 words, and follows all constraints. No task occurs in a training
prompt; see `rmipo.constraints.prompts`. Boilerplate alone follows many constraints but answers no task: `constraints_fixed` is
what the best fixed text gets.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
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
    "first_n": None,  # of the 573 prompts
    "skip_n": 0,  # prompts left out before those
    "answers": 1,  # per prompt; standard errors are over prompts
    "generation": {},
}
FAMILIES = {  # of `instructions.DRAWN`, whose import needs lm-eval
    "frequency": "Frequency", "letter_frequency": "Letter frequency", "number_paragraphs": "Paragraphs",
    "number_placeholders": "Placeholders", "postscript": "Postscript", "number_bullet_lists": "Bullet lists",
    "number_highlighted_sections": "Highlighted sections", "multiple_sections": "Multiple sections", "title": "Title",
    "no_comma": "No comma",
}  # fmt: skip
# Text that follows many constraints whatever is asked, part by part.
BOILERPLATE = (
    "<<A>>", "*a* *b* *c* *d*", "[x] [y] [z] [w] [v]", "Section 1", "SECTION 1", "P.S. ok", "P.P.S ok", "* a\n* b",
    "a\n***\nb\n***\nc", " ".join(8 * [string.ascii_lowercase]),
)  # fmt: skip
SAMPLING = tuple(f"generation.{key}" for key in ("temperature", "top_p", "max_new_tokens"))


def run(model_dir: str | Path, output_dir: str | Path, settings: dict) -> dict:
    """Sample answers to the held-out prompts and verify them. Per-answer results go to `output_dir`/constraints.jsonl."""
    settings = merge_settings("constraints", DEFAULTS, settings)
    require_package("lm_eval")
    from rmipo.constraints.instructions import answered, followed, solved
    from rmipo.generation.answers import Generator

    prompts, requests = held_out(settings)
    with Generator(model_dir, settings["generation"]) as generator:
        answers = generator.ask("constraints", requests)
    results, each = [], settings["answers"]
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        own = slice(number * each, (number + 1) * each)
        checks = [followed(prompt["constraints"], answer) for answer in answers[own]]
        tasks = [answered(prompt, answer) for answer in answers[own]]
        whole = [finish != "length" for finish in generator.finishes[own]]
        results.append({**prompt, "answers": answers[own], "followed": checks, "answered": tasks, "whole": whole})
        follows = [all(check) for check in checks]
        solves = [all(parts) for parts in zip(whole, tasks, follows, strict=True)]
        for name, shares in (("solved", solves), ("answered", tasks), ("all", follows)):
            by_prompt[f"constraints_{name}"].append(100 * mean(shares))
    write_lines(Path(output_dir) / "constraints.jsonl", results)
    metrics = {"constraints_cut": generator.cut} | by_family(results)
    # What texts get that know nothing. A share below these does not show that tasks were answered.
    metrics["constraints_fixed"] = 100 * mean(solved(row, text) for text in [fixed_text(prompts)] for row in prompts)
    metrics["constraints_repeated"] = 100 * mean(solved(row, row["prompt"]) for row in prompts)
    for name, percents in by_prompt.items():
        metrics |= {name: mean(percents), f"{name}_standard_error": standard_error(percents)}
    settings["prompts_sha256"] = json_fingerprint(prompts)
    return generator.result(metrics, settings, ["lm_eval"], per_prompt=dict(by_prompt))


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


def fixed_text(prompts: list[dict]) -> str:
    """A text that is a good answer to as many prompts as a greedy search finds.

    Parts of BOILERPLATE are left out as long as the text gets better; what they leave of the allowed words is filled with
    words that answer tasks.
    """
    from rmipo.constraints.instructions import followed, solved  # needs lm-eval
    from rmipo.constraints.prompts import WORDS

    subjects = Counter(word for row in prompts for word in row["subject"])

    def filled(parts: tuple[str, ...]) -> tuple[int, str]:
        text = "\n".join(parts)
        asked = [(max((subjects[word], word) for word in row["subject"]), row) for row in prompts]
        # Tasks with a frequent subject first: they share its word.
        for (_, subject), row in sorted(asked, key=lambda task: task[0], reverse=True):
            longer = " ".join([word for word in (subject, row["keywords"][0]) if word not in text.split()] + [text])
            if len(longer.split()) <= WORDS and all(followed(row["constraints"], longer)):
                text = longer
        return sum(solved(row, text) for row in prompts), text

    parts, best = BOILERPLATE, filled(BOILERPLATE)
    while parts:
        shorter = [parts[:i] + parts[i + 1 :] for i in range(len(parts))]
        found = [filled(some) for some in shorter]
        if max(found)[0] <= best[0]:
            break
        best, parts = max(zip(found, shorter, strict=True))
    return best[1]


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
        "constraints_solved": Metric("Solved (%)"),
        "constraints_answered": Metric("Task answered (%)"),
        "constraints_all": Metric("All constraints (%)"),
        "constraints_cut": Metric("Cut (%)", better=None),
        "constraints_fixed": Metric("A fixed text (%)", better=None, detail=True),
        "constraints_repeated": Metric("The prompt itself (%)", better=None, detail=True),
        **{f"constraints_{name}": Metric(f"{label} (%)", detail=True) for name, label in FAMILIES.items()},
    },
    same=("prompts_sha256", "first_n", "skip_n", "answers", *SAMPLING),
    trial=("first_n", "skip_n"),
    optional=("prompts_sha256",),  # older results have none
)
