"""What every use of a judge needs: any OpenAI-compatible endpoint, a client for it, its cost stated beforehand."""

import os
from urllib.parse import urlsplit

from rmipo.errors import EvaluationError
from rmipo.record import require_package

OPENAI = "api.openai.com/v1"
CHARACTERS_PER_TOKEN = 4  # about, in English
PROBE = 'Which is better? {"instruction": """a""", "output": """a""", "output": """b"""} Answer with m or M alone.'


def judge_endpoint() -> str:
    """The judge's URL, from OPENAI_BASE_URL; the key is read by the packages. Raises EvaluationError without a key."""
    if not os.environ.get("OPENAI_API_KEY"):
        raise EvaluationError("the judge needs OPENAI_API_KEY (any text for a server that asks for none)")
    return os.environ.get("OPENAI_BASE_URL", f"https://{OPENAI}").rstrip("/")


def shown(url: str) -> str:
    """The part of an endpoint's URL that may be written down: without a user name and password."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] + parts.path


def open_client(endpoint: str, **options):
    require_package("openai")
    from openai import OpenAI

    return OpenAI(base_url=endpoint, **options)


def complete(client, model: str, text: str, **request) -> str:
    """The judge's reply to `text`."""
    reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **request)
    return reply.choices[0].message.content or ""


def check_judge(endpoint: str, model: str) -> None:
    """Ask the judge for one token: a wrong key or name is found out, by openai's error, before hours of answers."""
    complete(open_client(endpoint, max_retries=1, timeout=30), model, PROBE, max_tokens=1)


def check_cost(what: str, calls: int, input_characters: float, output_tokens: float, settings: dict) -> None:
    """Print what `calls` requests to the judge will cost, before the first of them.

    Args:
        settings: `price`, US dollars per million input and output tokens; `max_cost`, dollars.

    Raises EvaluationError if the expected cost is more than `max_cost`.
    """
    (price_in, price_out), limit = settings["price"], settings["max_cost"]
    input_tokens = input_characters / CHARACTERS_PER_TOKEN
    # Rough on purpose: it tells five dollars from five hundred.
    cost = (input_tokens * price_in + output_tokens * price_out) / 1e6
    tokens = f"about {input_tokens / 1e3:.0f}k + {output_tokens / 1e3:.0f}k tokens"
    prices = f"${cost:.2f} at ${price_in} and ${price_out} per million (max_cost ${limit})"
    print(f"{what}: {calls} verdicts, {tokens}, {prices}", flush=True)
    if cost > limit:
        raise EvaluationError(f"{what}: the judge would cost about ${cost:.2f}, more than max_cost {limit}")
