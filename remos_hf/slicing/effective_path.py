"""EffectivePath, which NNSlicer compares itself with: the largest positive effects that make up most of a sum."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from remos_hf.profiling.reference import Reference
from remos_hf.slicing.contributions import Contributions, Outputs, contributions


def effective_path(
    model: nn.Module,
    batches: Iterable,
    *,
    outputs: Outputs = None,
    theta: float = 0.5,
    each_sample: Collection[str] = (),
    only: Collection[str] | None = None,
) -> Contributions:
    """Trace what a model says of samples back along the largest positive effects. Values are compared with zero.

    Args:
        model: As in `contributions`, like all that is not named here.
        batches: Likewise.
        outputs: Likewise.
        theta: In [0, 1): of every sum, the fewest of the largest effects are followed that reach this share of it.
        each_sample: Likewise.
        only: Likewise.

    Returns:
        How many times each weight lies on a path, once for every position that it is used at; at least 0, unless a
        curve falls, as a square does: through it a path counts as -1.

    Source:
        Qiu et al., CVPR 2019, "Adversarial Defense Through Network Profiling Based Path Extraction".
        Differs: a weight counts once for every position, where theirs is a mark; what they mark is what is above 0.
        Operations follow the rules of `contributions`; biases play no part.
    """
    return contributions(
        model,
        batches,
        Reference(),
        outputs=outputs,
        theta=theta,
        each_sample=each_sample,
        only=only,
        keep=largest_positive,
    )


def largest_positive(effects: Tensor, theta: float) -> Tensor:
    """Mark the fewest of the largest effects whose sum reaches theta of the row's; equal ones stay together.

    Args:
        effects: Shape (rows, inputs).
        theta: In [0, 1).

    Returns:
        Float32 of 0 and 1, shape (rows, inputs); only positive effects have 1. Of a row whose sum is not positive, the
        largest alone is marked.
    """
    bound = theta * effects.sum(1, keepdim=True).clamp(min=0)
    ordered = effects.sort(1, descending=True).values
    # The last effect that is needed is the first at which the sum of those above, itself among them, is enough.
    enough = ordered.cumsum(1) >= bound
    enough[:, -1] = True
    smallest = ordered.gather(1, enough.to(torch.uint8).argmax(1, keepdim=True))
    return ((effects >= smallest) & (effects > 0)).float()
