"""Ragged token sequences -> one packed row in which sequences of a group share their prefix.

A pair becomes `[x[:-1] | x[-1] y_w[:-1] | x[-1] y_l[:-1]]`: the prompt is computed once, both branches start from the
prompt's last token, and the labels are already shifted, so a branch's first position predicts the first response token.
"""

import torch
import torch.nn.functional as F

PackedRow = dict[str, torch.Tensor | list | int]


def pack(groups: list[tuple[list[int], list[list[int]]]]) -> PackedRow:
    """Lay groups out in one row.

    Args:
        groups: `(prefix, responses)` per group: token ids of a non-empty prefix and of each response that continues it.
            A response may be empty: it takes no position and its log-probability is 0.

    Returns:
        Mapping with, for a row of T positions, R response tokens and S responses in the order given:
            `input_ids`, `position_ids`: `(1, T)`; branches restart at position `len(prefix) - 1`.
            `shift_labels`: `(1, T)`, the token each position predicts, -100 where nothing is scored.
            `keep`: `(R,)` positions that are scored; `labels`: `(R,)` their target tokens; `owner`: `(R,)` the
            response each one belongs to, in `0..S-1`.
            `segments`: `(prefix_start, prefix_length, start, length)` per non-empty response, in row order.
            `groups`, `branches`: `(T,)` the same as tensors: where each position's prefix starts, and its branch (-1
            within a prefix).
            `num_sequences`: S.
    """
    input_ids, position_ids, keep, labels, owner, segments, group_of, branch_of = ([] for _ in range(8))
    sequence = 0
    for prefix, responses in groups:
        assert prefix, "a group needs at least one context token"
        shared = len(prefix) - 1
        prefix_start = len(input_ids)
        input_ids += prefix[:-1]
        position_ids += range(shared)
        branch_of += [-1] * shared
        for response in responses:
            if response:
                start, length = len(input_ids), len(response)
                input_ids.append(prefix[-1])
                input_ids += response[:-1]
                position_ids += range(shared, shared + length)
                keep += range(start, start + length)
                labels += response
                owner += [sequence] * length
                branch_of += [start] * length
                segments.append((prefix_start, shared, start, length))
            sequence += 1
        group_of += [prefix_start] * (len(input_ids) - prefix_start)
    shift_labels = torch.full((1, len(input_ids)), -100, dtype=torch.long)
    row = {
        "input_ids": torch.tensor([input_ids], dtype=torch.long),
        "position_ids": torch.tensor([position_ids], dtype=torch.long),
        "shift_labels": shift_labels,
        "keep": torch.tensor(keep, dtype=torch.long),
        "labels": torch.tensor(labels, dtype=torch.long),
        "owner": torch.tensor(owner, dtype=torch.long),
        "groups": torch.tensor(group_of, dtype=torch.long),
        "branches": torch.tensor(branch_of, dtype=torch.long),
        "segments": segments,
        "num_sequences": sequence,
    }
    shift_labels[0, row["keep"]] = row["labels"]
    return row


def pack_pairs(pairs: list[dict], chosen: str = "chosen_ids", rejected: str = "rejected_ids") -> PackedRow:
    """Pack preference pairs; sequence `2 i` is the chosen and `2 i + 1` the rejected response of pair i."""
    return pack([(pair["prompt_ids"], [pair[chosen], pair[rejected]]) for pair in pairs])


def pack_priors(pairs: list[dict], context: list[int]) -> PackedRow:
    """Pack the responses of `pairs` without their prompts, to score log pi(y); sequences as in `pack_pairs`.

    Args:
        context: tokens in front of every response, computed once for all. Empty: a response's own first token is the
            context and is not scored (the authors' released code), so that n - 1 of its tokens are.
    """
    responses = [pair[side] for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    if context:
        return pack([(context, responses)])
    return pack([(response[:1], [response[1:]]) for response in responses])


def concatenate(rows: list[PackedRow]) -> PackedRow:
    """Join packed rows into one; sequences keep their order."""
    tokens = sequences = 0
    parts: dict[str, list[torch.Tensor]] = {name: [] for name, value in rows[0].items() if torch.is_tensor(value)}
    segments = []
    for row in rows:
        shifted = {
            "keep": row["keep"] + tokens,
            "owner": row["owner"] + sequences,
            "groups": row["groups"] + tokens,
            "branches": torch.where(row["branches"] < 0, -1, row["branches"] + tokens),
        }
        for name, values in parts.items():
            values.append(shifted.get(name, row[name]))
        segments += [(prefix + tokens, shared, start + tokens, n) for prefix, shared, start, n in row["segments"]]
        tokens += row["input_ids"].shape[1]
        sequences += row["num_sequences"]
    joined = {name: torch.cat(values, dim=-1) for name, values in parts.items()}
    return {**joined, "segments": segments, "num_sequences": sequences}


def pad(row: PackedRow, multiple: int) -> PackedRow:
    """Lengthen a row to a multiple of `multiple` positions that score nothing and form a group of their own."""
    length = row["input_ids"].shape[1]
    fill = {"input_ids": 0, "position_ids": 0, "shift_labels": -100, "groups": length, "branches": -1}
    extra = -length % multiple
    return row | {name: F.pad(row[name], (0, extra), value=value) for name, value in fill.items()}
