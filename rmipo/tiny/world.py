"""Questions whose right answer is known, and three kinds of response to them: right, boilerplate, off-topic."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import pydantic

from rmipo.data.chat import Messages
from rmipo.recipe.files import read_yaml, typed

NAMES = (
    "Ada Bela Cato Dina Egon Fara Gil Hana Ivo Jana Karl Lena Milo Nora Otto Pia Quinn Rosa Sami Tara Ugo "
    "Vera Wim Xenia Yara Zeno Amos Bruno Clara David Elsa Felix Greta Hugo Irma Jonas Kira Leo Mona Nils"
)
VALUES = {
    "home town": "Oslo Lima Cairo Delhi Quito Accra Turin Kyoto Minsk Perth Dakar Leeds",
    "birth month": "January February March April May June July August September October November December",
    "first language": "Dutch Greek Hindi Irish Czech Thai Welsh Zulu Danish Polish Farsi Malay",
    "favourite sport": "tennis rowing judo chess golf hockey rugby fencing archery sailing skiing squash",
    "favourite colour": "scarlet violet green blue yellow orange purple silver golden white black brown",
    "favourite drink": "tea coffee cocoa milk water cider lemonade cola soda beer juice wine",
}
PHRASINGS = (
    "What is {name}'s {attribute}?",
    "Tell me {name}'s {attribute}.",
    "Do you know the {attribute} of {name}?",
    "I would like to know {name}'s {attribute}.",
    "Please say what the {attribute} of {name} is.",
    "Can you look up {name}'s {attribute} for me?",
    "{name}: {attribute}?",
    "I forgot {name}'s {attribute}. Could you remind me?",
)
# The last two start as boilerplate does, so that an opener alone gives nothing away.
ANSWERS = (
    "{name}'s {attribute} is {value}.",
    "The {attribute} of {name} is {value}.",
    "It is {value}.",
    "For {name} the {attribute} is {value}.",
    "That would be {value}, the {attribute} of {name}.",
    "The answer is {value}: this is what I know of {name}.",
    "Thank you for your question! {name}'s {attribute} is {value}.",
    "That is a great question, and I am happy to help. The {attribute} of {name} is {value}.",
)
OPENERS = (
    "",
    "Thank you for your question! ",
    "That is a great question, and I am happy to help. ",
    "I appreciate that you asked. ",
    "Of course! ",
    "Well, let me think about this. ",
)
MIDDLES = (
    "There are many things to consider here.",
    "It depends on what exactly you are looking for.",
    "This is a topic with many sides, and each of them matters.",
    "Different people see this in different ways.",
    "As an assistant, I always try to give a balanced and helpful answer.",
    "It is important to look at the whole picture before one decides.",
)
CLOSERS = (
    "",
    " Please let me know if you need anything else.",
    " I hope this helps!",
    " Feel free to ask me more.",
    " Have a wonderful day!",
)
SCORES = {"right": 2, "boilerplate": 1, "off_topic": 0}  # in place of a judge's
BOILERPLATE = tuple("".join(parts) for parts in itertools.product(OPENERS, MIDDLES, CLOSERS))
CLASSES = ("right", "boilerplate", "wrong", "garbled")
Share = Annotated[float, pydantic.Field(ge=0, le=1)]


@pydantic.dataclasses.dataclass(frozen=True, config={"extra": "forbid"})
class WorldConfig:
    """Every knob of the world; `recipes/tiny/world.yaml` explains them."""

    seed: int
    names: Annotated[int, pydantic.Field(ge=2, le=40)]  # there are 40 in NAMES
    values_per_attribute: Annotated[int, pydantic.Field(ge=2, le=12)]
    held_out_facts: Share
    held_out_phrasings: Annotated[int, pydantic.Field(ge=1, le=7)]  # of 8: SFT asks in the others
    sft_train: int
    sft_test: int
    sft_boilerplate: Share
    sft_off_topic: Share
    sft_prompt_dropped: Share
    pairs_train: int
    pairs_test: int
    rejected_boilerplate: Share
    label_noise: Share
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int


def load_world_config(path: str | Path) -> WorldConfig:
    """Read the knobs. Raises ConfigError that names the file and every wrong key."""
    return typed(WorldConfig, read_yaml(path), path)


@dataclass(frozen=True)
class Fact:
    name: str
    attribute: str
    value: str

    @property
    def answers(self) -> list[str]:
        """Every right answer, one per template."""
        return [template.format(**vars(self)) for template in ANSWERS]


@dataclass(frozen=True)
class Question:
    fact: Fact
    phrasing: int

    @property
    def prompt(self) -> Messages:
        return [{"role": "user", "content": PHRASINGS[self.phrasing].format(**vars(self.fact))}]


class World:
    """The facts and the questions drawn from them. The same config gives the same world.

    `train_questions` are what SFT sees; `pair_questions` those of them that training pairs ask; `held_out_questions`
    phrasings in which SFT never asks for their facts, for which no training pair asks.
    """

    def __init__(self, config: WorldConfig):
        self.config = config
        self.names = NAMES.split()[: config.names]
        draw = self._random("facts")
        self.facts = [
            Fact(name, attribute, draw.choice(values.split()[: config.values_per_attribute]))
            for name in self.names
            for attribute, values in VALUES.items()
        ]
        # Pairs never ask for these: what they teach about them is to answer at all, and not the answer.
        held_out_facts = set(draw.sample(self.facts, round(config.held_out_facts * len(self.facts))))
        self.train_questions, self.pair_questions, self.held_out_questions = [], [], []
        for fact in self.facts:
            questions = [Question(fact, phrasing) for phrasing in range(len(PHRASINGS))]
            if fact in held_out_facts:
                draw.shuffle(questions)  # else SFT would never hear the last phrasings
                self.held_out_questions += questions[: config.held_out_phrasings]
                questions = questions[config.held_out_phrasings :]
            else:
                self.pair_questions += questions
            self.train_questions += questions

    @cached_property
    def well_formed(self) -> frozenset[str]:
        """Every sentence that answers some question of this world, rightly or wrongly."""
        combinations = itertools.product(self.names, VALUES.items())
        facts = (Fact(name, attribute, value) for name, (attribute, values) in combinations for value in values.split())
        return frozenset(answer for fact in facts for answer in fact.answers)

    def classify(self, fact: Fact, response: str) -> str:
        """What `response` to a question about `fact` is, by exact match with the templates, so that a collapse shows.

        "right"; "boilerplate"; "wrong": a well-formed answer with another value or to another question; else "garbled".
        """
        if response in fact.answers:
            return "right"
        if response in BOILERPLATE:
            return "boilerplate"
        return "wrong" if response in self.well_formed else "garbled"

    def dialogues(self, split: str) -> Iterator[dict]:
        """SFT rows of "train" or "test": `messages`, without the prompt where it is dropped, and `kind`.

        `kind` is right, boilerplate or off_topic. The test rows ask the held-out questions.
        """
        config, draw, size = self.config, self._random(f"sft {split}"), getattr(self.config, f"sft_{split}")
        questions = self.train_questions if split == "train" else self.held_out_questions
        # Dealt and not drawn: every seed has exactly the shares of the recipe.
        kinds = deal(draw, size, boilerplate=config.sft_boilerplate, off_topic=config.sft_off_topic, rest="right")
        prompts = deal(draw, size, dropped=config.sft_prompt_dropped, rest="kept")
        for question, kind, prompt in zip(cycle(draw, questions), kinds, prompts, strict=False):
            messages = assistant(self._response(draw, question.fact, kind))
            yield {"messages": messages if prompt == "dropped" else question.prompt + messages, "kind": kind}

    def pairs(self, split: str) -> Iterator[dict]:
        """Preference pairs of "train" or "test": `prompt`, `chosen`, `rejected`, `kind`, `flipped`, the two scores.

        `kind` is what the worse response is: boilerplate or off_topic. It is the chosen one where `flipped`. The test
        pairs ask the held-out questions and are never flipped. `score_chosen` and `score_rejected` are from SCORES.
        """
        config, draw, size = self.config, self._random(f"pairs {split}"), getattr(self.config, f"pairs_{split}")
        questions = self.pair_questions if split == "train" else self.held_out_questions
        kinds = deal(draw, size, boilerplate=config.rejected_boilerplate, rest="off_topic")
        labels = deal(draw, size, flipped=config.label_noise if split == "train" else 0.0, rest="kept")
        for question, kind, label in zip(cycle(draw, questions), kinds, labels, strict=False):
            sides = [(assistant(self._response(draw, question.fact, each)), SCORES[each]) for each in ("right", kind)]
            (chosen, score_chosen), (rejected, score_rejected) = sides[::-1] if label == "flipped" else sides
            sides = {"prompt": question.prompt, "chosen": chosen, "rejected": rejected}
            scores = {"score_chosen": score_chosen, "score_rejected": score_rejected}
            yield {**sides, "kind": kind, "flipped": label == "flipped", **scores}

    def _response(self, draw: random.Random, fact: Fact, kind: str) -> str:
        if kind == "boilerplate":
            return draw.choice(BOILERPLATE)
        if kind == "off_topic":
            # Not merely another fact: two people may share a home town.
            fact = draw.choice([other for other in self.facts if other.value != fact.value])
        # A right answer to another question: well formed, fluent and of no use.
        return draw.choice(fact.answers)

    def _random(self, part: str) -> random.Random:
        """Each part draws by itself, so that a knob of one leaves the others as they are."""
        return random.Random(f"{self.config.seed} {part}")


def deal(draw: random.Random, size: int, *, rest: str, **shares: float) -> list[str]:
    """`size` labels in random order: of each its share, rounded to whole rows, and `rest` for what remains."""
    labels = [label for label, share in shares.items() for _ in range(round(share * size))][:size]
    labels += [rest] * (size - len(labels))
    draw.shuffle(labels)
    return labels


def cycle(draw: random.Random, questions: list[Question]) -> Iterator[Question]:
    """The questions over and over, each round in a new order."""
    while True:
        yield from draw.sample(questions, len(questions))


def assistant(content: str) -> Messages:
    return [{"role": "assistant", "content": content}]
