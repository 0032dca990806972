"""Short tasks with IFEval's instructions on top: answers are checked exactly, without a judge.

An answer is solved if it ends, answers its task in at most 60 words, and follows all constraints. No task occurs in a training
prompt; see `rmipo.constraints.prompts`. Boilerplate alone follows many constraints but answers no task: `constraints_fixed` is
what a fixed text gets that was made to do both.
"""

from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean

from rmipo.evaluation.benchmark import Benchmark, Metric, details
from rmipo.evaluation.statistics import means
from rmipo.files import write_lines
from rmipo.fingerprints import json_fingerprint
from rmipo.record import require_package

DEFAULTS = {
    "first_n": None,  # of the 573 prompts
    "skip_n": 0,  # prompts left out before those
    "answers": 1,  # per prompt; standard errors are over prompts
    "generation": {},
}
FAMILIES = {  # of `instructions.DRAWN`, whose import needs lm-eval
    "frequency": "Frequency (%)", "letter_frequency": "Letter frequency (%)", "number_paragraphs": "Paragraphs (%)",
    "number_placeholders": "Placeholders (%)", "postscript": "Postscript (%)", "number_bullet_lists": "Bullet lists (%)",
    "number_highlighted_sections": "Highlighted sections (%)", "multiple_sections": "Multiple sections (%)",
    "title": "Title (%)", "no_comma": "No comma (%)",
}  # fmt: skip
# Text that follows many constraints whatever is asked; with more of that kind, less room is left for words that answer.
BOILERPLATE = "<<A>>\n*a* *b* *c* *d*\n[x] [y] [z] [w] [v]\nSection 1\nP.S. ok\nP.P.S ok"
SAMPLING = ("generation.temperature", "generation.top_p", "generation.max_new_tokens")


def measure(model_dir: Path, output_dir: Path, settings: dict) -> dict:
    """Sample answers to the held-out prompts and verify them. Per-answer results go to `output_dir`/constraints.jsonl."""
    from rmipo.constraints.instructions import answered, followed, solved

    generator, sampled = sample("constraints", model_dir, settings)
    rows, per_prompt = [], defaultdict(list)
    for prompt, answers, whole in sampled:
        checks = [followed(prompt["constraints"], answer) for answer in answers]
        tasks = [answered(prompt, answer) for answer in answers]
        rows.append({**prompt, "answers": answers, "followed": checks, "answered": tasks, "whole": whole})
        follows = [all(check) for check in checks]
        solves = [all(parts) for parts in zip(whole, tasks, follows, strict=True)]
        for name, shares in (("solved", solves), ("answered", tasks), ("all", follows)):
            per_prompt[f"constraints_{name}"].append(100 * mean(shares))
    write_lines(output_dir / "constraints.jsonl", rows)
    metrics = means(per_prompt) | by_family(rows) | {"constraints_cut": generator.cut}
    # What texts get that know nothing. A share below these does not show that tasks were answered.
    fixed = fixed_text(rows)
    metrics["constraints_fixed"] = 100 * mean(solved(row, fixed) for row in rows)
    metrics["constraints_repeated"] = 100 * mean(solved(row, row["prompt"]) for row in rows)
    return generator.result(metrics, settings, ["lm_eval"], per_prompt=dict(per_prompt))


def sample(name: str, model_dir: str | Path, settings: dict) -> tuple:
    """The `Generator`, and of each prompt its row, its answers, and which of those weren't cut.

    `settings` choose the prompts, whose hash is written to its key `prompts_sha256`.
    """
    require_package("lm_eval")
    from rmipo.constraints.prompts import read_prompts
    from rmipo.generation.answers import Generator, Request

    prompts, each = read_prompts("test")[settings["skip_n"] :][: settings["first_n"]], settings["answers"]
    settings["prompts_sha256"] = json_fingerprint(prompts)
    seed = settings["generation"].get("seed", 42)
    requests = [  # a prompt's side by side, each with its own seed
        Request(f"{number}-{n}", [{"role": "user", "content": prompt["prompt"]}], seed=seed + n)
        for number, prompt in enumerate(prompts)
        for n in range(each)
    ]
    with Generator(model_dir, settings["generation"]) as generator:
        answers = generator.ask(name, requests)
    whole = [finish != "length" for finish in generator.finishes]
    # The answers to one prompt side by side.
    answers, whole = ([values[i : i + each] for i in range(0, len(values), each)] for values in (answers, whole))
    return generator, list(zip(prompts, answers, whole, strict=True))


def fixed_text(prompts: list[dict]) -> str:
    """BOILERPLATE, followed by the keywords that answer most prompts, which a greedy search picks."""
    from rmipo.constraints.instructions import followed  # needs lm-eval
    from rmipo.constraints.prompts import WORDS

    subjects, text = Counter(word for row in prompts for word in row["subject"]), BOILERPLATE
    asked = [(max((subjects[word], word) for word in row["subject"]), row) for row in prompts]
    # Tasks with a frequent subject first: they share its word.
    for (_, subject), row in sorted(asked, key=lambda task: task[0], reverse=True):
        longer = " ".join([word for word in (subject, row["keywords"][0]) if word not in text.split()] + [text])
        if len(longer.split()) <= WORDS and all(followed(row["constraints"], longer)):
            text = longer
    return text


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
    measure=measure,
    defaults=DEFAULTS,
    metrics={
        "constraints_solved": Metric("Solved (%)"),
        "constraints_answered": Metric("Task answered (%)"),
        "constraints_all": Metric("All constraints (%)"),
        "constraints_cut": Metric("Cut (%)", better=None),
        "constraints_fixed": Metric("A fixed text (%)", better=None, detail=True),
        "constraints_repeated": Metric("The prompt itself (%)", better=None, detail=True),
        **details("constraints", FAMILIES),
    },
    same=("prompts_sha256", "first_n", "skip_n", "answers", *SAMPLING),
    trial=("first_n", "skip_n"),
)
