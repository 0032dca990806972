"""IFEval's instructions as lm-eval has them: which of them are drawn, and whether an answer follows them.

Left out: `number_sentences` and `capital_word_frequency` (need NLTK's data, a download), `response_language` and the two of
`change_case` (guess a language, and differently from call to call), `constrained_response`, `json_format`, `two_responses`
and `repeat_prompt` (leave nothing of the task), `keywords:existence`, `nth_paragraph_first_word`, `end_checker`,
`number_words` and `quotation` (a model of 135M parameters follows them in none of a dozen answers), `forbidden_words` (in
every one).
"""

import contextlib
import functools
import io
from unittest import mock

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


def score(messages: list[dict], answers: list[str], constraints: list[dict]) -> list[float]:
    """An oracle for `make pairs`: the share of the prompt's constraints that each answer follows."""
    results = [followed(constraints, answer) for answer in answers]
    return [sum(result) / len(result) for result in results]
