"""A small OpenAI-compatible chat server with log-probs, to judge without an account: for tests and the tiny recipe.

    .venv/bin/python tests/helpers/judge_server.py --port 8123
    OPENAI_BASE_URL=http://127.0.0.1:8123/v1 OPENAI_API_KEY=none make eval MODEL=tiny BENCH=alpacaeval

Its verdicts are arithmetic, not judgement: AlpacaEval's weighted judge prefers output m with probability
s_m / (s_m + s_M), s being 1 + the number of an output's words that occur in the instruction; MT-Bench's rating is
1 + (number of words of the request) mod 10.
"""

import argparse
import json
import math
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FIELD = re.compile(r'"(?:instruction|output)": """(.*?)"""', re.DOTALL)


def words_shared(instruction: str, output: str) -> int:
    return 1 + len(set(re.findall(r"\w+", instruction.lower())) & set(re.findall(r"\w+", output.lower())))


def probability_of_first(instruction: str, first: str, second: str) -> float:
    ours, theirs = words_shared(instruction, first), words_shared(instruction, second)
    return ours / (ours + theirs)


def rating(request: str) -> int:
    return 1 + len(request.split()) % 10


def reply(body: dict) -> tuple[str, list[dict] | None]:
    """(content, top log-probs of its first token or None) for a chat completion request."""
    text = body["messages"][-1]["content"]
    fields = FIELD.findall(text)
    if len(fields) != 3:
        return f"Rating: [[{rating(text)}]]", None
    p = probability_of_first(*fields)
    top = [{"token": token, "logprob": math.log(q), "bytes": None} for token, q in (("m", p), ("M", 1 - p))]
    return ("m" if p >= 0.5 else "M"), sorted(top, key=lambda entry: -entry["logprob"])


class Loopback(ThreadingHTTPServer):
    """Serves on this machine alone while its `with` block runs, on a free port unless `port` is given."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, handler: type[BaseHTTPRequestHandler], port: int = 0):
        super().__init__(("127.0.0.1", port), handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):  # clients that were killed are part of the tests
        pass


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: int = 200, content=b"", **headers: str) -> None:
        """`content`: bytes, or what is written as JSON."""
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content_Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


class JudgeServer(Loopback):
    """A judge that may fail.

    Args:
        fault: request number (from 0) -> None, or one of "429" (rate limit), "malformed" (an answer that is no verdict),
            "no_logprobs", "drop" (the connection is closed). It is called under a lock.
    """

    def __init__(self, port: int = 0, fault: Callable[[int], str | None] = lambda number: None):
        super().__init__(Handler, port)
        self.url = f"{self.address}/v1"
        self.fault = fault
        self.lock = threading.Lock()
        self.requests: list[str] = []  # the last message of every request


class Handler(Answering):
    server: JudgeServer

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self.server.lock:
            fault = self.server.fault(len(self.server.requests))
            self.server.requests.append(text)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "429":
            self.answer(429, {"error": {"message": "Rate limit reached, try again", "type": "requests", "code": "429"}})
            return
        content, top = reply(body)
        if fault == "malformed":
            content, top = "I would rather not say.", [{"token": "I", "logprob": -0.1, "bytes": None}]
        if fault == "no_logprobs" or not body.get("logprobs"):
            top = None
        self.answer(200, completion(body["model"], content, top))


def completion(model: str, content: str, top: list[dict] | None) -> dict:
    logprobs = None if top is None else {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    answer = {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": model, "usage": usage}
    return answer | {"choices": [choice | {"logprobs": logprobs}]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8123)
    server = JudgeServer(parser.parse_args().port)
    print(f"judging at {server.url}", flush=True)
    server.serve_forever()
