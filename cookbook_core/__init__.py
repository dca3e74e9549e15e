"""Post-training with your own loss function, on your own machine. See README.md."""

from cookbook_core import chat, runs, tinker
from cookbook_core.alignment import (
    align_weights,
    check_alignment,
    weighted_mean,
    weighted_sum,
    weighted_sums,
)
from cookbook_core.datums import (
    datum_from_prompt_completion,
    datum_from_tokens_weights,
    datum_from_turns,
    shift_tokens,
    with_inputs,
)
from cookbook_core.runs import early
from cookbook_core.token_set import datum_from_token_set, single_tokens

early.answer()

__all__ = [
    "align_weights",
    "chat",
    "check_alignment",
    "datum_from_prompt_completion",
    "datum_from_token_set",
    "datum_from_tokens_weights",
    "datum_from_turns",
    "runs",
    "shift_tokens",
    "single_tokens",
    "tinker",
    "weighted_mean",
    "weighted_sum",
    "weighted_sums",
    "with_inputs",
]
