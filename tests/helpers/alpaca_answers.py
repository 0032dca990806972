"""Answers for AlpacaEval's judge: ours, the reference's, and settings for a judge on loopback."""

from rmipo.evaluation import alpaca

SETTINGS = alpaca.DEFAULTS | {"length_controlled": False, "concurrency": 4, "max_retries": 1, "timeout": 10}
ROWS = 20
REFERENCE = [
    {"instruction": f"tell me {i} things of apple", "output": f"apple {i}" + " me" * (i % 3), "generator": "reference"}
    for i in range(ROWS)
]
OUTPUTS = [
    {"instruction": row["instruction"], "output": "tell " * (i % 2) + f"things {i} " * (i % 4), "generator": "ours"}
    for i, row in enumerate(REFERENCE)
]
