"""Reads the records of an offline W&B run back: LevelDB's log format around protocol buffers."""

import json
import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> list[wandb_internal_pb2.Record]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts, records = FILE_HEADER, [], []
    while position + RECORD_HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < RECORD_HEADER:  # padding at the end of a block
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + RECORD_HEADER])
        parts.append(data[position + RECORD_HEADER : position + RECORD_HEADER + length])
        position += RECORD_HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            records.append(record)
            parts = []
    return records


def read_history(path: Path) -> list[dict]:
    lines = []
    for record in read_records(path):
        if record.HasField("history"):
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines


def read_config(path: Path) -> dict:
    config = {}
    for record in read_records(path):
        updates = record.run.config.update if record.HasField("run") else record.config.update
        config |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
    return config
