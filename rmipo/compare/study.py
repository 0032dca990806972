"""What is compared: the runs, the recipe of each, what they train on and what is measured."""

import copy
import functools
import json
import shlex
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from rmipo.data.chat import ChatFormat
from rmipo.data.formats import SIDES
from rmipo.data.pairs import load_pairs
from rmipo.evaluation import BENCHMARKS
from rmipo.evaluation.benchmark import benchmark_settings
from rmipo.evaluation.target import load_settings
from rmipo.fingerprints import json_fingerprint, rows_fingerprint
from rmipo.launch.pipeline import load_steps
from rmipo.objectives import OBJECTIVES
from rmipo.recipe.files import read_yaml
from rmipo.recipe.load import Recipe
from rmipo.recipe.schema import DataConfig
from rmipo.tiny import judge
from rmipo.tiny.files import RECORD, read_world
from rmipo.tiny.world import World

INITIAL, FLOOR = "initial", "sft-chosen"  # the SFT model itself, and more SFT on the chosen responses
METHODS = ("rmipo", *(name for name in OBJECTIVES if name != "rmipo"), FLOOR)
READINGS = ("fidelity-sequence", "fidelity-release", "initial-prior", "shuffled")  # of RMiPO, beside the default one
SEARCH_SEED = 1000  # pairs and order of the search; no reported run has them
SAMPLES_PER_QUESTION = 4


@dataclass(frozen=True)
class Trial:
    """One training: which method, how, on which draw of the pairs; `purpose` is "search" or "report"."""

    purpose: str
    method: str
    learning_rate: float | None
    seed: int
    noise: float  # share of the training pairs whose labels are swapped
    objective: tuple[tuple[str, float], ...] = ()  # hyperparameters in place of the method's own


class PairsTask:
    """Any pairs, the same for every run. Answers are measured by benchmarks that need no judge.

    `settings`: purpose ("search", "report") -> benchmark -> its settings; without any, only held-out pairs are measured.
    """

    swaps_labels = False  # whether a run's noise is that of its labels

    def __init__(self, data: DataConfig, settings: dict[str, dict[str, dict]]):
        self.data, self.settings = data, settings
        self.selection_metric = "constraints_solved" if settings else "preference_accuracy"

    def identity(self) -> Any:
        """What tells the data of one comparison from those of another."""
        pairs = {split: rows_fingerprint(load_pairs(self.data, split)) for split in ("train", "test")}
        return {"pairs": pairs, "measured": self.settings}

    def train_pairs(self, run: Trial) -> Dataset:
        return load_pairs(self.data, "train")

    def held_out_pairs(self, run: Trial) -> Dataset:
        """The pairs of the half that is for this run's purpose; a prompt is in one half only."""
        pairs = load_pairs(self.data, "test")
        texts = [json.dumps(prompt) for prompt in pairs["prompt"]]
        # Sorted by text: the halves don't depend on the order of the rows.
        mine = {*half(sorted({*texts}), run.purpose)}
        return pairs.select([i for i, text in enumerate(texts) if text in mine])

    def measure(self, model: PreTrainedModel, chat: ChatFormat, run: Trial) -> dict[str, Any]:
        """Metrics of the model's answers, beside those of the held-out pairs."""
        metrics: dict[str, Any] = {"per_prompt": {}}
        with tempfile.TemporaryDirectory() as folder:
            for name, settings in self.settings.get(run.purpose, {}).items():
                # Benchmarks take folders, as in `make eval`.
                model.save_pretrained(folder)
                chat.tokenizer.save_pretrained(folder)
                result = BENCHMARKS[name].run(Path(folder), Path(folder, "eval"), settings)
                metrics |= result["metrics"]
                metrics["per_prompt"] |= result["per_prompt"]
        return metrics


class WorldTask(PairsTask):
    """The tiny world: every seed draws its own pairs, and the right answers are known."""

    selection_metric = "right_probability"
    swaps_labels = True

    def __init__(self, world: World):
        self.world = world

    def identity(self) -> Any:
        made = [list(self.world.pairs("train")), list(self.world.pairs("test")), self.world.held_out_questions]
        return asdict(self.world.config) | {"samples": SAMPLES_PER_QUESTION, "made": json_fingerprint(made)}

    def train_pairs(self, run: Trial) -> Dataset:
        drawn = copy.copy(self.world)  # the same facts, other questions and answers
        drawn.config = replace(drawn.config, seed=drawn.config.seed + 1 + run.seed, label_noise=run.noise)
        return numbered(drawn.pairs("train"))

    def held_out_pairs(self, run: Trial) -> Dataset:
        asked = [question.prompt for question in self.questions(run)]
        return numbered(row for row in self.world.pairs("test") if row["prompt"] in asked)

    def questions(self, run: Trial) -> list:
        mine = half(list(dict.fromkeys(question.fact for question in self.world.held_out_questions)), run.purpose)
        return [question for question in self.world.held_out_questions if question.fact in mine]

    def measure(self, model: PreTrainedModel, chat: ChatFormat, run: Trial) -> dict[str, Any]:
        asked = copy.copy(self.world)
        asked.held_out_questions = self.questions(run)
        # The search has the most runs, and selects by the exact probability: its samples decide nothing.
        samples = SAMPLES_PER_QUESTION if run.purpose == "report" else 1
        metrics = judge.evaluate(model, chat.tokenizer, asked, samples_per_question=samples, seed=run.seed)
        del metrics["samples"]  # thousands of texts would fill runs.jsonl
        return metrics


def task_of(model: str, data: DataConfig) -> PairsTask:
    """The task that the `data` of a setting belong to."""
    world, search = Path(data.dataset_name or "").parent, Path(f"recipes/{model}/search.yaml")
    if (world / RECORD).exists():
        return WorldTask(read_world(world))
    own = data.dataset_name == f"outputs/{model}/pairs" and search.is_file()
    settings: dict[str, dict] = {}
    for purpose, blocks in (read_yaml(search).get("measure", {}) if own else {}).items():
        # vLLM would want a GPU of its own, beside the model that was trained.
        usual = load_settings(search.with_name("eval.yaml"), ["generation.engine=transformers"])
        usual |= {name: usual.get(name, {}) | block for name, block in blocks.items()}
        settings[purpose] = {name: benchmark_settings(usual, BENCHMARKS[name]) for name in blocks}
    return PairsTask(data, settings)


def half(values: list, purpose: str) -> list:
    """The first half for the search, the second for what is reported."""
    # What selects a learning rate must not be what is reported: the best of several would look better than it is.
    return values[: len(values) // 2] if purpose == "search" else values[len(values) // 2 :]


def numbered(rows: Iterable[dict]) -> Dataset:
    return Dataset.from_list([{**{side: row[side] for side in SIDES}, "row": i} for i, row in enumerate(rows)])


@dataclass(frozen=True)
class Study:
    """What all runs have in common. `arguments` are overrides of every recipe."""

    model: str
    arguments: str = ""

    def recipe(self, run: Trial, folder: str | Path = "unused") -> Recipe:
        """The recipe of the setting with the method's overlay, as this run trains it. Raises ConfigError."""
        own = {"output_dir": folder, "reference_cache_dir": folder, "seed": run.seed, "eval_strategy": "no"}
        own |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": "true"}
        if run.learning_rate is not None:
            own["learning_rate"] = f"{run.learning_rate:g}"
        own |= {f"objective.{name}": f"{value:g}" for name, value in run.objective}
        arguments = f"{self.arguments} {shlex.join(f'--{key}={value}' for key, value in own.items())}"
        method = "rmipo" if run.method in (INITIAL, FLOOR) else run.method
        return load_steps(self.model, ["rmipo"], {"METHOD": method, "ARGS": arguments})[0].recipe

    @functools.cached_property
    def base(self) -> Recipe:
        """RMiPO's, for what all runs share: initial weights, data, device."""
        return self.recipe(Trial("report", "rmipo", None, 0, 0.0))

    @functools.cached_property
    def task(self) -> PairsTask:
        return task_of(self.model, self.base.parse(world_size=1)[1])
