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
    for name in ("OPENAI_API_BASE", "OPENAI_CLIENT_CONFIG_PATH"):
        if os.environ.get(name):
            raise EvaluationError(f"{name} would send alpaca-eval to another judge than OPENAI_BASE_URL does: unset it")
    return os.environ.get("OPENAI_BASE_URL", f"https://{OPENAI}").rstrip("/")


def shown(url: str) -> str:
    """The part of an endpoint's URL that may be written down: without a user name and password."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] + parts.path


def http_client(endpoint: str):
    """For `openai.OpenAI`, which would hand over a web page in place of a completion: it raises EvaluationError then."""
    from openai import DefaultHttpxClient

    def require_json(response) -> None:
        if response.is_success and "json" not in response.headers.get("content-type", ""):
            text = response.read()[:80].decode(errors="replace")
            raise EvaluationError(f"{shown(endpoint)} answers {text!r}, which is no JSON: does the URL end in /v1?")

    return DefaultHttpxClient(event_hooks={"response": [require_json]})


def open_client(endpoint: str, **options):
    require_package("openai")
    from openai import OpenAI

    return OpenAI(base_url=endpoint, http_client=http_client(endpoint), **options)


def complete(client, model: str, **request):
    """One chat completion of the judge. Raises EvaluationError, which names the kind of failure."""
    from openai import OpenAIError

    try:
        return client.chat.completions.create(model=model, **request)
    except OpenAIError as error:  # only its kind: messages may quote requests
        status = getattr(error, "status_code", None)
        kind, place = type(error).__name__, shown(str(client.base_url).rstrip("/"))
        raise EvaluationError(f"the judge {model} at {place} gave no answer ({kind}, status {status})") from error


def check_judge(endpoint: str, model: str, **request):
    """Ask the judge for one token, before anything is loaded. Returns its completion; raises EvaluationError."""
    # A wrong key or name is found out for one token, and not after hours of answers.
    client = open_client(endpoint, max_retries=1, timeout=30)
    return complete(client, model, messages=[{"role": "user", "content": PROBE}], max_tokens=1, **request)


def check_cost(
    what: str, calls: int, input_characters: float, output_tokens: float, settings: dict, attempts: int = 1
) -> None:
    """Print what `calls` requests to the judge will cost, before the first of them.

    Args:
        settings: `price`, US dollars per million input and output tokens; `max_cost`, dollars.
        attempts: how often a verdict is asked for at most, if it can't be read.

    Raises EvaluationError if the expected cost, of one attempt, is more than `max_cost`.
    """
    price_in, price_out = settings["price"]
    input_tokens = input_characters / CHARACTERS_PER_TOKEN
    # Rough on purpose: it tells five dollars from five hundred.
    cost = (input_tokens * price_in + output_tokens * price_out) / 1e6
    worst = f"; ${attempts * cost:.2f} if each has to be asked for {attempts} times" if attempts > 1 else ""
    print(
        f"{what}: {calls} verdicts to ask for, about {input_tokens / 1e3:.0f}k + {output_tokens / 1e3:.0f}k tokens,"
        f" ${cost:.2f} at ${price_in} and ${price_out} per million (max_cost ${settings['max_cost']}){worst}",
        flush=True,
    )
    if cost > settings["max_cost"]:
        raise EvaluationError(
            f"{what}: the judge would cost about ${cost:.2f}, more than max_cost {settings['max_cost']}; nothing was "
            "asked. Raise it (make eval: MAX_COST=...; make pairs: --oracle.max_cost), or name another judge"
        )
