"""A workload as `rmipo.plan` sees it, for estimates by hand."""

import dataclasses

from rmipo.plan.memory import Workload


def make_work(**changes):
    work = Workload(
        stage="preference", micro_batch=2, evaluation_batch=2, global_batch=128, max_length=2048, max_tokens=None,
        checkpoint_every=1, packing=False, weight_bytes=2, autocast=False, fused_head=True, prior=True,
        reference="none", adapters=False, quantized=False,
    )  # fmt: skip
    return dataclasses.replace(work, **changes)
