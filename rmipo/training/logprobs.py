"""Logits -> log-probability of each label, with one vocabulary-sized buffer where autograd would keep three."""

import torch
from torch.autograd.function import once_differentiable

# Logits that are in float32 at a time: few enough for a CPU's cache, enough to occupy a GPU.
CHUNK = {"cpu": 2**16, "cuda": 2**26}


class _LabelLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # The maximum apart from the rest of the normalizer: added up, large logits would round the rest away.
        maxima = logits.amax(-1, keepdim=True).float()
        rows = _rows(logits)
        parts = zip(logits.split(rows), maxima.split(rows), strict=True)
        log_sums = torch.cat([(part.float() - top).exp_().sum(-1, keepdim=True).log_() for part, top in parts])
        ctx.save_for_backward(logits, labels[:, None], maxima, log_sums)
        return (logits.gather(1, labels[:, None]).float() - maxima - log_sums)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        # d logp / d logits = onehot(label) - softmax. Nothing needs the logits any more, so it takes their place.
        logits, *columns = ctx.saved_tensors
        rows = _rows(logits)
        columns = [values.split(rows) for values in (logits, *columns, grad[:, None])]
        for part, label, top, log_sum, scale in zip(*columns, strict=True):
            gradient = (part.float() - top).sub_(log_sum).exp_().mul_(-scale)
            part.copy_(gradient.scatter_add_(1, label, scale))
        return logits, None


def _rows(logits: torch.Tensor) -> int:
    return max(1, CHUNK[logits.device.type] // logits.shape[1])


def label_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability of `labels` `(R,)` under `logits` `(R, vocabulary)`: `(R,)` float32.

    Backward overwrites `logits` with their gradient: it can run once, and nothing else may need their values after it.
    """
    return _LabelLogps.apply(logits, labels)
