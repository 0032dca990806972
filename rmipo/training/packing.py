"""Ragged token sequences -> one packed sequence in which the responses to a prompt share it.

A pair becomes `[x[:-1] | x[-1] y_w[:-1] | x[-1] y_l[:-1]]`: the prompt is computed once, both branches start from the
prompt's last token, and the labels are already shifted, so a branch's first position predicts the first response token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Segment(NamedTuple):
    """A non-empty response: its branch of `length` positions from `start`, and the prefix that it continues."""

    prefix_start: int
    prefix_length: int
    start: int
    length: int


class PackedSequence(NamedTuple):
    """T positions that hold S responses with R scored tokens in all. Made by `pack`.

    A group is a prefix with its branches, one per response. A position sees its group's prefix and its own branch,
    causally; `groups` and `branches` say so per position, `segments` per response.
    """

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T); the branches of a group all start at len(prefix) - 1
    groups: Tensor  # (T,) where the position's prefix starts
    branches: Tensor  # (T,) where the position's branch starts; -1 within a prefix
    scored: Tensor  # (R,) positions that predict a response token
    labels: Tensor  # (R,) the tokens that they predict
    owner: Tensor  # (R,) the response that each belongs to, in 0..S-1
    segments: tuple[Segment, ...]  # of the non-empty responses, in order
    num_responses: int  # S

    @property
    def length(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    @property
    def shift_labels(self) -> Tensor:
        """`(1, T)`: the token that each position predicts, -100 where nothing is scored."""
        labels = torch.full_like(self.input_ids, -100)
        labels[0, self.scored] = self.labels
        return labels

    @property
    def response_lengths(self) -> Tensor:
        """Scored tokens of each response, `(S,)` float32."""
        ones = torch.ones(len(self.owner), device=self.owner.device)
        return torch.zeros(self.num_responses, device=ones.device).index_add(0, self.owner, ones)

    def sum_by_response(self, values: Tensor) -> Tensor:
        """Sum `(R,)` per-token values over each response: `(S,)` float32, accumulated in float64."""
        # float64: the loss is of small differences between sums of a thousand terms.
        sums = torch.zeros(self.num_responses, dtype=torch.float64, device=values.device)
        return sums.index_add(0, self.owner, values.double()).float()

    def padded(self, multiple: int) -> "PackedSequence":
        """Lengthened to a multiple of `multiple` by positions that score nothing and form a group of their own."""
        extra = (0, -self.length % multiple)
        fill = {"input_ids": 0, "position_ids": 0, "groups": self.length, "branches": -1}
        return self._replace(**{name: F.pad(getattr(self, name), extra, value=value) for name, value in fill.items()})


def pack(groups: list[tuple[list[int], list[list[int]]]]) -> PackedSequence:
    """Lay groups out one after the other.

    Args:
        groups: `(prefix, responses)` per group: token ids of a non-empty prefix and of each response that continues it.
            A response may be empty: it takes no position and its log-probability is 0.
    """
    input_ids, position_ids, scored, labels, owner, segments, group_of, branch_of = ([] for _ in range(8))
    num_responses = 0
    for prefix, responses in groups:
        assert prefix, "a group needs at least one context token"
        shared = len(prefix) - 1
        prefix_start = len(input_ids)
        input_ids += prefix[:-1]  # nothing is scored here, and all branches see it
        position_ids += range(shared)
        branch_of += [-1] * shared
        for response in responses:
            if response:
                start, length = len(input_ids), len(response)
                input_ids.append(prefix[-1])  # each branch has a copy: its output predicts the first response token
                input_ids += response[:-1]  # the last token predicts nothing
                position_ids += range(shared, shared + length)
                scored += range(start, start + length)
                labels += response
                owner += [num_responses] * length
                branch_of += [start] * length
                segments.append(Segment(prefix_start, shared, start, length))
            num_responses += 1
        group_of += [prefix_start] * (len(input_ids) - prefix_start)
    columns = ([input_ids], [position_ids], group_of, branch_of, scored, labels, owner)
    tensors = (torch.tensor(values, dtype=torch.long) for values in columns)
    return PackedSequence(*tensors, segments=tuple(segments), num_responses=num_responses)


def pack_pairs(pairs: list[dict]) -> PackedSequence:
    """Pack preference pairs; response `2 i` is the chosen and `2 i + 1` the rejected one of pair i."""
    return pack([(pair["prompt_ids"], [pair["chosen_ids"], pair["rejected_ids"]]) for pair in pairs])


def pack_priors(pairs: list[dict], context: list[int]) -> PackedSequence:
    """Pack the responses of `pairs` without their prompts, to score log pi(y); responses as in `pack_pairs`.

    Args:
        context: tokens in front of every response, computed once for all. Empty: a response's own first token is the
            context and is not scored (the authors' released code), so that n - 1 of its tokens are.
    """
    responses = [pair[side] for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    if context:
        return pack([(context, responses)])
    return pack([(response[:1], [response[1:]]) for response in responses])


def split_pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """`(2 pairs,)` values in packing order -> chosen, rejected: each `(pairs,)`."""
    return values.view(-1, 2).unbind(1)


def concatenate(parts: list[PackedSequence]) -> PackedSequence:
    """Join packed sequences into one; responses keep their order."""
    shifted, segments, positions, responses = [], [], 0, 0
    for part in parts:
        groups, scored, owner = part.groups + positions, part.scored + positions, part.owner + responses
        branches = torch.where(part.branches < 0, -1, part.branches + positions)
        shifted.append((part.input_ids, part.position_ids, groups, branches, scored, part.labels, owner))
        for start, shared, branch, length in part.segments:
            segments.append(Segment(start + positions, shared, branch + positions, length))
        positions += part.length
        responses += part.num_responses
    columns = (torch.cat(column, dim=-1) for column in zip(*shifted, strict=True))
    return PackedSequence(*columns, tuple(segments), responses)
