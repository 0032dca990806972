"""What a comparison trains on and measures: any preference pairs, the tiny world, or prompts with verifiable constraints."""

import copy
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from rmipo.compare.trial import Trial
from rmipo.data.chat import ChatFormat
from rmipo.data.pairs import load_pairs
from rmipo.evaluation import BENCHMARKS
from rmipo.evaluation.benchmark import benchmark_settings
from rmipo.evaluation.target import load_settings
from rmipo.fingerprints import json_fingerprint, rows_fingerprint
from rmipo.recipe.files import read_yaml
from rmipo.recipe.load import Recipe
from rmipo.tiny import judge
from rmipo.tiny.files import RECORD, read_world
from rmipo.tiny.world import World

SAMPLES_PER_QUESTION = 4


class PairsTask:
    """Any pairs: training pairs are the same for every run, and only the ranking of held-out pairs is measured."""

    selection_metric = "preference_accuracy"

    def identity(self, recipe: Recipe) -> Any:
        """What tells the data of one comparison from those of another."""
        _, data_config, _ = recipe.parse(world_size=1)
        return {split: rows_fingerprint(load_pairs(data_config, split)) for split in ("train", "test")}

    def train_pairs(self, recipe: Recipe, run: Trial) -> Dataset:
        return load_pairs(recipe.parse(world_size=1)[1], "train")

    def held_out_pairs(self, recipe: Recipe, run: Trial) -> Dataset:
        """The pairs of the half that is for this run's purpose; a prompt is in one half only."""
        pairs = load_pairs(recipe.parse(world_size=1)[1], "test")
        # Sorted by text: the halves don't depend on the order of the rows.
        prompts = sorted({json.dumps(prompt) for prompt in pairs["prompt"]})
        mine = set(half(prompts, run.purpose))
        return pairs.select([i for i, prompt in enumerate(pairs["prompt"]) if json.dumps(prompt) in mine])

    def measure(self, model: PreTrainedModel, chat: ChatFormat, run: Trial) -> dict[str, float]:
        """Metrics of the model's answers, beside those of the held-out pairs."""
        return {}


class WorldTask(PairsTask):
    """The tiny world: every seed draws its own pairs, and the right answers are known."""

    selection_metric = "right_probability"

    def __init__(self, world: World):
        self.world = world

    def identity(self, recipe: Recipe) -> Any:
        made = [list(self.world.pairs("train")), list(self.world.pairs("test")), self.world.held_out_questions]
        return asdict(self.world.config) | {"samples": SAMPLES_PER_QUESTION, "made": json_fingerprint(made)}

    def train_pairs(self, recipe: Recipe, run: Trial) -> Dataset:
        drawn = copy.copy(self.world)  # the same facts, other questions and answers
        drawn.config = replace(drawn.config, seed=drawn.config.seed + 1 + run.seed, label_noise=run.noise)
        return numbered(drawn.pairs("train"))

    def held_out_pairs(self, recipe: Recipe, run: Trial) -> Dataset:
        asked = [question.prompt for question in self.questions(run)]
        return numbered(row for row in self.world.pairs("test") if row["prompt"] in asked)

    def questions(self, run: Trial) -> list:
        facts = list(dict.fromkeys(question.fact for question in self.world.held_out_questions))
        mine = set(half(facts, run.purpose))
        return [question for question in self.world.held_out_questions if question.fact in mine]

    def measure(self, model: PreTrainedModel, chat: ChatFormat, run: Trial) -> dict[str, float]:
        asked = copy.copy(self.world)
        asked.held_out_questions = self.questions(run)
        # The search has the most runs, and selects by the exact probability: its samples decide nothing.
        samples = SAMPLES_PER_QUESTION if run.purpose == "report" else 1
        metrics = judge.evaluate(model, chat.tokenizer, asked, samples_per_question=samples, seed=run.seed)
        # Thousands of texts would fill runs.jsonl.
        metrics.pop("samples")
        return metrics


class ConstraintsTask(PairsTask):
    """Pairs from the model's own answers; measured by the benchmarks of search.yaml, which need no judge.

    Args:
        settings: per purpose ("search", "report") the settings of each benchmark: those of the setting's eval.yaml with
            those of its search.yaml over them.
    """

    selection_metric = "constraints_solved"

    def __init__(self, settings: dict[str, dict[str, dict]]):
        self.settings = settings

    def identity(self, recipe: Recipe) -> Any:
        return {"pairs": super().identity(recipe), "measured": self.settings}

    def measure(self, model: PreTrainedModel, chat: ChatFormat, run: Trial) -> dict[str, Any]:
        metrics: dict[str, Any] = {"per_prompt": {}}
        with tempfile.TemporaryDirectory() as folder:
            # Benchmarks take folders, as in `make eval`.
            model.save_pretrained(folder)
            chat.tokenizer.save_pretrained(folder)
            results = Path(folder) / "eval"
            for name, settings in self.settings[run.purpose].items():
                result = BENCHMARKS[name].run(Path(folder), results, settings)
                metrics |= result["metrics"]
                metrics["per_prompt"] |= result["per_prompt"]
        return metrics


def task_of(model: str, recipe: Recipe) -> PairsTask:
    """The task that a setting's data belong to."""
    data = Path(recipe.values.get("dataset_name", ""))
    if (data.parent / RECORD).exists():
        return WorldTask(read_world(data.parent))
    search = Path(f"recipes/{model}/search.yaml")
    measure = read_yaml(search).get("measure") if search.is_file() else None
    if not measure or data != Path(f"outputs/{model}/pairs"):
        return PairsTask()
    # vLLM would want a GPU of its own, beside the model that was trained.
    usual = load_settings(search.with_name("eval.yaml"), ["generation.engine=transformers"])
    return ConstraintsTask(
        {
            purpose: {
                name: benchmark_settings(usual | {name: usual.get(name, {}) | own}, BENCHMARKS[name])
                for name, own in blocks.items()
            }
            for purpose, blocks in measure.items()
        }
    )


def half(values: list, purpose: str) -> list:
    """The first half for the search, the second for what is reported."""
    # What selects a learning rate must not be what is reported: the best of several would look better than it is.
    return values[: len(values) // 2] if purpose == "search" else values[len(values) // 2 :]


def numbered(rows: Iterable[dict]) -> Dataset:
    sides = ("prompt", "chosen", "rejected")
    return Dataset.from_list([{**{side: row[side] for side in sides}, "row": i} for i, row in enumerate(rows)])
