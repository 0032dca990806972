"""What every use of a judge needs: any OpenAI-compatible endpoint, its address checked, its cost stated beforehand."""

import os
from urllib.parse import urlsplit

from rmipo.errors import EvaluationError
from rmipo.record import require_package

OPENAI = "api.openai.com/v1"
CHARACTERS_PER_TOKEN = 4  # about, in English
PROBE = 'Which is better? {"instruction": """a""", "output": """a""", "output": """b"""} Answer with m or M alone.'


def judge_endpoint() -> str:
    """The judge's URL, from OPENAI_BASE_URL; the key is read by the packages.

    Raises EvaluationError without OPENAI_API_KEY, with something that isn't a URL, and with variables that would send
    alpaca-eval elsewhere.
    """
    url = os.environ.get("OPENAI_BASE_URL", f"https://{OPENAI}").rstrip("/")
    problems = []
    if not os.environ.get("OPENAI_API_KEY"):
        problems.append("the judge needs OPENAI_API_KEY in the environment (any text for a server that asks for none)")
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # what `port` raises
        is_url = False
    if not is_url:
        problems.append("OPENAI_BASE_URL is not a URL such as http://127.0.0.1:8000/v1")
    overriding = [name for name in ("OPENAI_API_BASE", "OPENAI_CLIENT_CONFIG_PATH") if os.environ.get(name)]
    if overriding:
        problems.append(
            f"{' and '.join(overriding)} would send alpaca-eval to another judge than OPENAI_BASE_URL does: unset it, "
            "and name the endpoint in OPENAI_BASE_URL"
        )
    if problems:
        raise EvaluationError("; ".join(problems))
    return url


def shown(url: str) -> str:
    """The part of an endpoint's URL that may be written down: without a user name and password."""
    parts = urlsplit(url)
    return parts.hostname + (f":{parts.port}" if parts.port else "") + parts.path


def complete(client, model: str, **request):
    """One chat completion of the judge. Raises EvaluationError, which names the kind of failure.

    Args:
        client: an `openai.OpenAI`.
    """
    from openai import OpenAIError

    server = f"the judge {model} at {shown(str(client.base_url).rstrip('/'))}"
    try:
        answer = client.chat.completions.create(model=model, **request)
    except OpenAIError as error:  # only its kind: messages may quote requests
        status = getattr(error, "status_code", None)
        raise EvaluationError(
            f"{server} gave no answer ({type(error).__name__}{f', status {status}' if status else ''}): check OPENAI_BASE_URL, "
            "OPENAI_API_KEY, its limits, and whether it has this model"
        ) from error
    if isinstance(answer, str):  # the client hands over what isn't JSON
        raise EvaluationError(
            f"{server} answers with {answer[:80]!r}, not with JSON: OPENAI_BASE_URL ends in /v1 mostly"
        )
    return answer


def check_judge(endpoint: str, model: str, **request):
    """Ask the judge for one token, before anything is loaded. Returns its completion; raises EvaluationError."""
    require_package("openai")
    from openai import OpenAI

    client = OpenAI(base_url=endpoint, api_key=os.environ["OPENAI_API_KEY"], max_retries=1, timeout=30)
    question = {"role": "user", "content": PROBE}
    return complete(client, model, messages=[question], max_tokens=1, **request)


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
            "asked. Raise it (make eval: MAX_COST=..., make pairs: ARGS='--oracle.max_cost ...'), or choose another judge and "
            "its price."
        )
