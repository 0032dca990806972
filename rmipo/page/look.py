"""Score pairs with a model and write the page that shows what the margin does to them."""

import base64
import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jinja2
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rmipo.data.chat import ChatFormat, TokenPair
from rmipo.data.formats import SIDES
from rmipo.evaluation.statistics import Interval, bootstrap, interval, resamples
from rmipo.files import replacing
from rmipo.objectives import build_objective
from rmipo.objectives.rmipo import delta_pmi, response_pmi
from rmipo.recipe.schema import ModelConfig, RMiPOConfig
from rmipo.training import parts
from rmipo.training.loading import load_model
from rmipo.training.packing import pack, pack_pairs, pack_priors
from rmipo.training.scoring import Scorer, by_tokens, pair_length

FOLDER = Path(__file__).parent
TITLE, CUT = 100, 2000  # characters that are shown of a prompt in the table, and of a cut text
DRAWS = 2000  # of the bootstrap of a correlation
ALIKE = 0.9  # share of bigrams that near-duplicates have in common


def look(
    model: parts.Named | parts.Loaded,
    dataset: Dataset,
    args: RMiPOConfig | None = None,
    *,
    after: parts.Named | parts.Loaded | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    pairs: int = 200,
    output: str | Path = "look.html",
) -> Path:
    """Write one HTML file, which opens from disk, that shows what the margin does to pairs under a model.

    Args:
        model: a folder or hub id, TRL's `ModelConfig`, or a loaded model.
        dataset: pairs in any format that docs/DATA.md lists, or tokenised.
        args: hyperparameters that the page starts with, and limits of lengths; the paper's if None.
        after: a second model: the page also shows how the pairs moved from the first to it.
        processing_class: the tokenizer of both; that of each model if None.
        pairs: how many to show at most; drawn from `dataset`, always the same.

    Returns:
        The path of the file.

    Raises:
        DataError, LoadingError: before a model is loaded, as the trainers do.
    """
    args = copy.copy(RMiPOConfig(output_dir=".", report_to="none") if args is None else args)
    args.max_dropped_fraction = args.max_truncated_fraction = 1.0  # the page shows which
    rows = parts.as_messages(dataset, args.dataset_num_proc)
    rows = sample(rows, pairs)
    first = Scored(model, rows, args, processing_class)
    second = None if after is None else Scored(after, rows, args, processing_class)
    moved, lines = {}, []
    if second is not None:  # one model after the other: two may not fit
        moved = {row["row"]: sums(values["given"], values["prior"]) for row, values in second.values(partners=False)}
    write(Path(output), shown_pairs(first, rows, moved, lines), lambda: summary(first, second and second.name, lines))
    return Path(output)


def sample(rows: Dataset, count: int) -> Dataset:
    """At most `count` of the rows, in their order: always the same ones, so that two models' pages show the same pairs."""
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
    return rows.select(sorted(drawn.tolist()))


def write(output: Path, pairs: Iterable[dict], summary: Callable[[], dict]) -> None:
    """Fill the template. `summary` is called behind the last of `pairs`."""
    # Texts of pairs are shown as text, whatever HTML is in them.
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(FOLDER), autoescape=True)
    script, style = ((FOLDER / name).read_text("utf-8") for name in ("look.js", "look.css"))
    with replacing(output) as temporary:
        # Streamed: a page of thousands of pairs is never whole in memory.
        template = environment.get_template("look.html.jinja")
        template.stream(pairs=pairs, summary=summary, script=script, style=style).dump(str(temporary), "utf-8")


def partner(number: int, total: int) -> int:
    """Whose prompt is the other one of pair `number`: far away, as neighbours often share theirs."""
    return (number + total // 2) % total


class Scored:
    """Pairs tokenised for one model (`rows`), and their log-probabilities, which are computed as they are asked for."""

    def __init__(self, model, rows: Dataset, args: RMiPOConfig, tokenizer: PreTrainedTokenizerBase | None):
        self.source, self.args = parts.source_of(model), args
        self.name = parts.name_of(self.source) or type(model).__name__
        tokenizer = tokenizer or parts.tokenizer_of(self.source)
        tokenized = parts.TokenizedPairs({"pairs": rows}, tokenizer, args, self.source)
        self.chat, self.rows, self.report = tokenized.chat, tokenized.splits["pairs"], tokenized.reports.get("pairs")
        self.context = self.chat.prior_context(tokenized.objective.prior_context)

    def values(self, partners: bool) -> Iterator[tuple[dict, dict[str, list[Tensor]]]]:
        """Each row with the log-probabilities of its tokens, in the names of `shown_pair`.

        `partners`: also those under the prompt of the pair half the data set away, where there are several.
        """
        model, total = self.source, len(self.rows)
        if isinstance(model, ModelConfig):
            model = load_model(model).to("cuda" if torch.cuda.is_available() else "cpu")
        progress = tqdm(total=total, desc=f"scoring with {Path(self.name).name}", unit="pair")
        with Scorer(model, self.args.attention) as scorer, progress:
            for batch in by_tokens(enumerate(self.rows), lambda item: pair_length(item[1])):
                rows = [row for _, row in batch]
                packed = {"given": pack_pairs(rows), "prior": pack_priors(rows, self.context)}
                if partners and total > 1:
                    packed["other"] = pack([self.under(partner(number, total), row) for number, row in batch])
                # As in training: rounding is part of the margin.
                with torch.autocast(model.device.type, torch.bfloat16, enabled=self.args.bf16):
                    scored = {name: scorer.token_logps(sequence) for name, sequence in packed.items()}
                for number, row in enumerate(rows):
                    yield row, {name: responses[2 * number :][:2] for name, responses in scored.items()}
                progress.update(len(rows))

    def under(self, other: int, row: dict) -> tuple[list[int], list[list[int]]]:
        """The responses of `row` after the prompt of row `other`, of which the end is taken where not all fits."""
        prompt, responses = self.rows[other]["prompt_ids"], [row[f"{side}_ids"] for side in SIDES[1:]]
        # The same room as for the pair's own prompt, or positions would run out.
        return prompt[-(self.args.max_length - max(map(len, responses))) :], responses


def shown_pairs(
    scored: Scored, rows: Dataset, moved: dict[int, list[list[float]]], lines: list[dict]
) -> Iterator[dict]:
    """Each pair's content, none of which is kept: memory does not grow with texts and tokens. Its line goes to `lines`."""
    places = None if parts.is_tokenized(rows) else {row: at for at, row in enumerate(rows["row"])}
    for number, (row, values) in enumerate(scored.values(partners=True)):
        cut = tuple(row[f"{side}_ids"] for side in SIDES)
        # Tokenised pairs come without their texts: nothing is known of what was cut off.
        messages = None if places is None else rows[places[row["row"]]]
        whole = cut if messages is None else scored.chat.pair_ids(*(messages[side] for side in SIDES))
        lines.append(
            {
                "index": number,
                "row": row["row"],
                "title": title(scored.chat, messages and messages["prompt"], cut[0]),
                "sides": sums(values["given"], values["prior"]),
                "after": moved.get(row["row"]),
                "cut": [*map(len, cut)] != [*map(len, whole)],
                "alike": alike(*cut[1:]),
            }
        )
        other = partner(number, len(scored.rows)) if "other" in values else None
        yield shown_pair(scored.chat, whole, cut, values, other)


def summary(scored: Scored, after: str | None, lines: list[dict]) -> dict:
    """What is known of all pairs once they are shown. `after`: name of the second model."""
    args, objective = scored.args, build_objective(scored.args.objective)
    dropped = {} if scored.report is None else scored.report.dropped
    return {
        "about": f"{len(lines)} pairs under {scored.name}, at most {args.max_length} tokens",
        "model": scored.name,
        "objective": vars(objective),
        "dropped": sum(map(len, dropped.values())),
        "reasons": "; ".join(f"{len(rows)} dropped, {reason}" for reason, rows in dropped.items()),
        "findings": findings([line["sides"] for line in lines], objective.fidelity),
        "pairs": lines,
        "after": after,
    }


def shown_pair(
    chat: ChatFormat, whole: TokenPair, cut: TokenPair, values: dict[str, list[Tensor]], other: int | None
) -> dict:
    """What opening a pair shows. `whole`, `cut`: the token ids before and after the cut.

    `values`: log-probabilities of the tokens of chosen and rejected: "given" the prompt, "prior", and under the prompt of
    another pair, whose place on the page is `other`.
    """
    lost = len(whole[0]) - len(cut[0])
    bos = int(lost > 0 and chat.bos_id is not None)  # it stays in front of what is left
    special, sides = set(chat.tokenizer.all_special_ids), []
    for number, ids in enumerate(cut[1:]):
        side = {"tokens": chat.pieces(ids), "special": [t for t, token in enumerate(ids) if token in special]}
        # Little-endian float32 in base64: exact, and shorter than digits.
        side |= {
            name: base64.b64encode(of_both[number].numpy().astype("<f4")).decode() for name, of_both in values.items()
        }
        sides.append(side | cut_off(chat, whole[1 + number][len(ids) :]))
    prompt = {"text": chat.tokenizer.decode(cut[0])} | cut_off(chat, whole[0][bos : bos + lost])
    return {"prompt": prompt, "sides": sides, "other": other}


def cut_off(chat: ChatFormat, ids: list[int]) -> dict:
    return {"lost": len(ids), "cut": chat.tokenizer.decode(ids)[:CUT]}


def sums(given: list[Tensor], prior: list[Tensor]) -> list[list[float]]:
    """For chosen and rejected: log pi(y|x), log pi(y), and the numbers of tokens that these sum over."""
    return [
        [a.double().sum().item(), b.double().sum().item(), len(a), len(b)] for a, b in zip(given, prior, strict=True)
    ]


def alike(chosen: list[int], rejected: list[int]) -> bool:
    """Whether the responses are nearly the same: their margin is about little else than chance."""
    one, other = (Counter(itertools.pairwise(ids)) for ids in (chosen, rejected))
    return 2 * (one & other).total() >= ALIKE * max(1, one.total() + other.total())


def title(chat: ChatFormat, messages: list[dict] | None, prompt_ids: list[int]) -> str:
    """The last question, in one line."""
    text = messages[-1]["content"] if messages else chat.tokenizer.decode(prompt_ids, skip_special_tokens=True)
    return " ".join(text[: 10 * TITLE].split())[:TITLE]


def findings(sides: list[list[list[float]]], fidelity: str) -> dict[str, list[dict]]:
    """For both readings of PMI, what `sums` of all pairs say beyond noise, with 95% intervals, in words and numbers."""
    given, prior, lengths, _ = torch.tensor(sides, dtype=torch.float64).unbind(2)
    longer = (lengths[:, 0] - lengths[:, 1]).numpy()
    found = {}
    for reading in ("token", "sequence"):
        delta = delta_pmi(*response_pmi(given, prior, lengths, reading, fidelity).unbind(1)).numpy()
        higher = bootstrap(delta > 0)
        draws = [correlation(delta[rows], longer[rows]) for rows in resamples(len(delta), DRAWS)]
        related = interval(correlation(delta, longer), draws)
        agrees, smaller = "agrees with" if higher.low > 0.5 else "opposes", "smaller" if related.mean > 0 else "larger"
        what = "of chosen responses have the higher PMI: ", "correlation of ΔPMI with the difference in length: "
        found[reading] = [
            finding(higher, "{:z.0%}", 0.5, what[0], f"the signal {agrees} the labels."),
            finding(related, "{:z.2f}", 0, what[1], f"longer chosen responses get a {smaller} margin."),
        ]
    return found


def finding(value: Interval, form: str, chance: float, what: str, claim: str) -> dict:
    noise = value.low <= chance <= value.high
    number, low, high = (form.format(x).replace("-", "−") for x in (value.mean, value.low, value.high))
    text = what + ("no telling from noise." if noise else claim)
    return {"number": number, "range": f"95%: {low} to {high}", "text": text, "noise": noise}


def correlation(xs: np.ndarray, ys: np.ndarray) -> float:
    """0 where one doesn't vary, as in some draws of few pairs."""
    spread = xs.std() * ys.std()
    return float(np.mean((xs - xs.mean()) * (ys - ys.mean())) / spread) if spread > 0 else 0.0
