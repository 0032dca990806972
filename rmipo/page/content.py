"""What the page holds of one pair: texts of its tokens, what the limits cut off, and log-probabilities."""

import base64
import itertools
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from rmipo.data.chat import ChatFormat, TokenPair
from rmipo.evaluation.statistics import bootstrap, interval, resamples
from rmipo.objectives.rmipo import delta_pmi, response_pmi

TITLE = 100  # characters of a prompt that name its pair in the table
CUT = 2000  # characters of a cut text that are shown
DRAWS = 2000  # of the bootstrap of a correlation
ALIKE = 0.9  # share of bigrams that near-duplicates have in common


def shown_pair(
    chat: ChatFormat, whole: TokenPair, cut: TokenPair, values: dict[str, list[Tensor]], other: int | None
) -> dict:
    """What opening a pair shows.

    Args:
        whole, cut: the token ids before and after the cut.
        values: log-probabilities of the tokens of chosen and rejected: "given" the prompt, "prior", and under the prompt
            of another pair, whose place on the page is `other`.
    """
    lost = len(whole[0]) - len(cut[0])
    bos = int(lost > 0 and chat.bos_id is not None)  # it stays in front of what is left
    sides = []
    for number in (0, 1):
        ids, special = cut[1 + number], set(chat.tokenizer.all_special_ids)
        side = {"tokens": chat.pieces(ids), "special": [t for t, token in enumerate(ids) if token in special]}
        sides.append(side | cut_off(chat, whole[1 + number][len(ids) :])
                     | {name: packed(of_both[number]) for name, of_both in values.items()})  # fmt: skip
    prompt = {"text": chat.tokenizer.decode(cut[0])} | cut_off(chat, whole[0][bos : bos + lost])
    return {"prompt": prompt, "sides": sides, "other": other}


def cut_off(chat: ChatFormat, ids: list[int]) -> dict:
    return {"lost": len(ids), "cut": chat.tokenizer.decode(ids)[:CUT]}


def packed(values: Tensor) -> str:
    """Little-endian float32 in base64: exact, and shorter than digits."""
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


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
        related = interval(
            correlation(delta, longer),
            [correlation(delta[rows], longer[rows]) for rows in resamples(len(delta), DRAWS)],
        )
        coin, unrelated = higher.low <= 0.5 <= higher.high, related.low <= 0 <= related.high
        agrees, smaller = "agrees with" if higher.low > 0.5 else "opposes", "smaller" if related.mean > 0 else "larger"
        claims = (
            (higher, "{:z.0%}", coin, "of chosen responses have the higher PMI: ", f"the signal {agrees} the labels."),
            (related, "{:z.2f}", unrelated, "correlation of ΔPMI with the difference in length: ",
             f"longer chosen responses get a {smaller} margin."),
        )  # fmt: skip
        found[reading] = [
            {
                "number": form.format(value.mean).replace("-", "−"),
                "range": f"95%: {form.format(value.low)} to {form.format(value.high)}".replace("-", "−"),
                "text": what + ("no telling from noise." if noise else claim),
                "noise": noise,
            }
            for value, form, noise, what, claim in claims
        ]
    return found


def correlation(xs: np.ndarray, ys: np.ndarray) -> float:
    """0 where one doesn't vary, as in some draws of few pairs."""
    spread = xs.std() * ys.std()
    return float(np.mean((xs - xs.mean()) * (ys - ys.mean())) / spread) if spread > 0 else 0.0
