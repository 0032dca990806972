"""Requests for short answers, their settings, and answer files that another machine wrote."""

import json

from rmipo.generation.answers import Generator, Request

SETTINGS = {"dtype": "float32", "engine": "transformers", "max_new_tokens": 12, "batch_size": 4, "temperature": 1.0}


def requests(count: int) -> list[Request]:
    words = [" ".join(f"w{(3 * i + j) % 20}" for j in range(1 + i % 5)) for i in range(count)]
    return [Request(f"q{i}", [{"role": "user", "content": text}]) for i, text in enumerate(words)]


def generate(model_dir, requests: list[Request], path, settings: dict) -> list[str]:
    with Generator(model_dir, settings) as generator:
        return generator.answer(requests, path)


def other_versions(path, engine: str) -> dict[str, str]:
    """Make an answers file one that another machine wrote; returns the versions that it had."""
    header, *answers = path.read_text().splitlines()
    versions = {engine: "0.30.0", "torch": "2.13.0+cu130", "transformers": "5.10.4"}
    header = json.loads(header)
    header["versions"], header["decoding"]["engine"] = versions, engine
    path.write_text("\n".join([json.dumps(header), *answers]) + "\n")
    return versions
