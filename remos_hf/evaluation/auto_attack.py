"""An AutoAttack put together from parts that are maintained, by their own package (`remos_hf[robustness]`)."""

from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from remos_hf.evaluation.image_task import ImageTask
from remos_hf.evaluation.measures import Rate, accuracy
from remos_hf.evaluation.toolbox import estimator_of, toolbox
from remos_hf.perturbation import frozen
from remos_hf.randomness import own_randomness

if TYPE_CHECKING:
    from art.estimators.classification import PyTorchClassifier

# Of the published four: no maintained package that can be installed holds these.
LEFT_OUT = ("APGD-T (targeted DLR)", "FAB-T")


def auto_attack_robustness(
    model: nn.Module,
    dataset: Dataset,
    task: ImageTask,
    *,
    eps: float = 8 / 255,
    steps: int = 100,
    queries: int = 5000,
    seed: int = 0,
) -> dict[str, Any]:
    """Attack the images that a model gets right by one attack after another; each gets what the last left standing.

    The attacks: APGD on the cross-entropy, APGD on the difference of logits ratio, and Square, which sees no gradient.
    The published AutoAttack has targeted APGD and FAB instead of the second, so this is weaker: what it calls robust,
    that may break. It shows where PGD on the cross-entropy is misled by small logits, as small weights make them.

    Args:
        model: A classifier of images; its modes are put back.
        dataset: Labelled images that it did not train on.
        task: How they are read.
        eps: Largest change of a pixel, from 0 to 1.
        steps: Of each APGD.
        queries: Of Square, an image.
        seed: Of random starts and squares.

    Returns:
        JSON values: "acc" and "robust_acc", rates over all images; "standing", how many are left after each attack;
        "name", "left_out", the budget and the seed.

    Raises:
        ImportError: The extra `robustness` is not installed.
        ValueError: The budget is none of pixels from 0 to 1.

    Source:
        Croce and Hein, ICML 2020 (AutoAttack, APGD); Andriushchenko et al., ECCV 2020 (Square). As implemented by the
        Adversarial Robustness Toolbox, whose own AutoAttack takes DeepFool for FAB.
    """
    if not 0 < eps <= 1:
        raise ValueError(f"eps is {eps}, but pixels go from 0 to 1: 8/255 is meant as 8 of 255 levels.")
    art = toolbox()
    batches = [batch["pixel_values"] for _, batch in task.batches(dataset)]
    pixels = task.images.denormalised(torch.cat(batches)).clamp(0, 1).numpy().astype(np.float32)
    references = np.array(dataset[task.label_column])
    with frozen(model), own_randomness(seed):
        estimator = estimator_of(model, task.images, pixels)
        clean = _predicted(estimator, pixels, task.batch_size)
        standing, left = np.flatnonzero(clean == references), {}
        for name, attack in _attacks(art, estimator, eps, steps, queries, task.batch_size).items():
            if len(standing):
                moved = attack(pixels[standing], references[standing])
                moved = np.clip(moved, pixels[standing] - eps, pixels[standing] + eps).clip(0, 1)
                held = _predicted(estimator, moved, task.batch_size) == references[standing]
                standing = standing[held]
            left[name] = len(standing)
    return {
        "acc": accuracy(clean, references).to_dict(),
        "robust_acc": Rate.of(len(standing), len(references)).to_dict(),
        "standing": left,
        "name": f"AutoAttack of parts ({', '.join(left)}; ART {version('adversarial-robustness-toolbox')})",
        "left_out": list(LEFT_OUT) if "APGD-DLR" in left else [*LEFT_OUT, "APGD-DLR (needs three labels)"],
        "eps": eps,
        "steps": steps,
        "queries": queries,
        "seed": seed,
    }


def _attacks(
    art: ModuleType, estimator: "PyTorchClassifier", eps: float, steps: int, queries: int, batch_size: int
) -> dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    budget = {"norm": np.inf, "eps": eps, "batch_size": batch_size, "verbose": False}
    losses = {"APGD-CE": "cross_entropy"}
    if estimator.nb_classes > 2:
        losses["APGD-DLR"] = "difference_logits_ratio"
    made = {
        name: art.attacks.evasion.AutoProjectedGradientDescent(
            estimator, **budget, eps_step=2 * eps, max_iter=steps, nb_random_init=1, loss_type=loss
        )
        for name, loss in losses.items()
    }
    made["Square"] = art.attacks.evasion.SquareAttack(estimator, **budget, max_iter=queries)
    return {name: attack.generate for name, attack in made.items()}


def _predicted(estimator: "PyTorchClassifier", pixels: np.ndarray, batch_size: int) -> np.ndarray:
    return estimator.predict(pixels, batch_size=batch_size).argmax(1)
