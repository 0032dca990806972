"""How far a length-controlled win rate would move with other prompts: its model fitted anew to draws of them."""

import functools

import pandas as pd
from tqdm import tqdm

from rmipo.evaluation.statistics import resamples

DRAWS = 1000  # of a fit each: a tenth of a second on the benchmark's 805 prompts


def length_controlled_draws(annotations: list[dict]) -> list[float]:
    """The length-controlled win rate (percent) of each of DRAWS resamples of `annotations`, which are alpaca-eval's.

    Every method gets the same draws of prompts, so the differences between two methods, draw by draw, are the paired
    bootstrap. Their spread is the standard error. alpaca-eval's own is that of the mean of the fitted preferences: it
    takes the fit for exact and can be far too small.
    """
    from alpaca_eval.metrics import glm_winrate

    # The regularisation rows come from the hub: asked for once, not for every draw.
    glm_winrate.hf_hub_download = functools.cache(glm_winrate.hf_hub_download)
    rows = pd.DataFrame(annotations)  # its index is the row number that leads to an instruction's difficulty
    draws = tqdm(resamples(len(rows), DRAWS), total=DRAWS, desc="resampling prompts for LC")
    return [
        float(
            glm_winrate.get_length_controlled_winrate(
                rows.iloc[draw].copy(), save_weights_dir=None, is_warn_extreme_changes=False
            )["length_controlled_winrate"]
        )
        for draw in draws
    ]
