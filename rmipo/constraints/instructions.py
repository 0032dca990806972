"""IFEval's instructions as lm-eval has them: which of them are drawn, and whether an answer does what its prompt asks.

Left out: `number_sentences` and `capital_word_frequency` (need NLTK's data, a download), `response_language` and the two of
`change_case` (guess a language, and differently from call to call), `constrained_response`, `json_format`, `two_responses`
and `repeat_prompt` (leave nothing of the task), `keywords:existence`, `nth_paragraph_first_word`, `end_checker`,
`number_words` and `quotation` (a model of 135M parameters follows them in none of a dozen answers), `forbidden_words` (in
every one).
"""

import contextlib
import functools
import io
import re
from unittest import mock

from rmipo.constraints.prompts import WORDS
from rmipo.record import require_package

require_package("lm_eval")  # here: an oracle's file is imported before hours of sampling

DRAWN = (
    "keywords:frequency",
    "keywords:letter_frequency",
    "length_constraints:number_paragraphs",
    "detectable_content:number_placeholders",
    "detectable_content:postscript",
    "detectable_format:number_bullet_lists",
    "detectable_format:number_highlighted_sections",
    "detectable_format:multiple_sections",
    "detectable_format:title",
    "punctuation:no_comma",
)


@functools.cache
def registry():
    """`lm_eval.tasks.ifeval.instructions_registry`. Importing it tries a download that nothing here needs."""
    import nltk

    with mock.patch.object(nltk, "download"), contextlib.redirect_stdout(io.StringIO()):
        from lm_eval.tasks.ifeval import instructions_registry
    return instructions_registry


def followed(constraints: list[dict], answer: str) -> list[bool]:
    """For each of the constraints, `{"id": ..., "arguments": {...}}`, whether `answer` follows it; an empty one follows none.

    Arguments that are None are left out, as tables of rows with other arguments are filled up with them.
    """
    results = []
    for constraint in constraints:
        instruction = registry().INSTRUCTION_DICT[constraint["id"]](constraint["id"])
        given = {name: value for name, value in (constraint["arguments"] or {}).items() if value is not None}
        instruction.build_description(**given)
        results.append(bool(answer.strip()) and bool(instruction.check_following(answer)))
    return results


def answered(row: dict, answer: str) -> bool:
    """Whether `answer` has a keyword of a prompt's row and a word of its subject, or one that begins so, in as many words as
    were allowed.
    """
    words = [rf"\b({'|'.join(map(re.escape, row['keywords']))})\b", rf"\b({'|'.join(row['subject'])})"]
    return len(answer.split()) <= WORDS and all(re.search(pattern, answer, re.IGNORECASE) for pattern in words)


def solved(row: dict, answer: str) -> bool:
    """Whether `answer` answers the task of a prompt's row and follows all its constraints."""
    return answered(row, answer) and all(followed(row["constraints"], answer))


def score(
    messages: list, answers: list[str], constraints: list[dict], keywords: list[str], subject: list[str]
) -> list[float]:
    """An oracle for `make pairs`: of the task and the prompt's constraints the share that each answer does."""
    row = {"keywords": keywords, "subject": subject}
    results = [[answered(row, answer), *followed(constraints, answer)] for answer in answers]
    return [sum(result) / len(result) for result in results]
