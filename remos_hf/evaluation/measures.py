"""How well a student does and how much it inherited: labels in, numbers out. No model, no torch.

Labels are 1-d sequences, arrays or CPU tensors of integer ids, one entry a sample, aligned by position. A share is in
[0, 1], never a percentage, and None when no sample is left to count, never NaN.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
_ENTRIES_AT_ONCE = 1_000_000  # bounds what a bootstrap holds in memory


class _Number:
    def to_dict(self) -> dict:
        """Give the fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Rate(_Number):
    """A share of samples, with what it was counted on. `Rate.of(count, num_samples)` makes one.

    Attributes:
        value: count / num_samples, in [0, 1]; None when num_samples is 0.
        count: Samples that did it.
        num_samples: Samples that could have done it.
        low: Lower end of the 95 % Wilson interval; None when num_samples is 0.
        high: Upper end, likewise.
    """

    value: float | None
    count: int
    num_samples: int
    low: float | None
    high: float | None

    @classmethod
    def of(cls, count: int, num_samples: int) -> "Rate":
        """Make the rate of a count, with its interval.

        Args:
            count: Samples that did it, from 0 to num_samples.
            num_samples: Samples that could have done it; 0 gives a rate without a value.

        Raises:
            ValueError: The counts are no integers, or contradict each other.
        """
        low, high = wilson_interval(count, num_samples)
        value = int(count) / int(num_samples) if num_samples else None
        return cls(value, int(count), int(num_samples), low, high)


def rate_of(values: Mapping[str, Any]) -> Rate:
    """Give a rate back from its JSON values."""
    return Rate(**{name: values[name] for name in ("value", "count", "num_samples", "low", "high")})


@dataclass(frozen=True)
class Difference(_Number):
    """One rate minus another.

    Attributes:
        value: In [-1, 1]; None when a rate has no value.
        low: Lower end of its 95 % interval; None likewise.
        high: Upper end, likewise.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Ratio(_Number):
    """One rate over another.

    Attributes:
        value: At least 0; None when a rate has no value, or the one below the line is 0.
        low: Lower end of its 95 % interval; None likewise.
        high: Upper end, likewise.
    """

    value: float | None
    low: float | None
    high: float | None


def wilson_interval(
    count: int, num_samples: int, confidence: float = CONFIDENCE
) -> tuple[float, float] | tuple[None, None]:
    """Wilson's score interval of a share. It stays inside [0, 1] and has a width at 0 and at 1 too.

    Args:
        count: Samples that did it, from 0 to num_samples.
        num_samples: Samples that could have done it; 0 gives (None, None).
        confidence: Share of such intervals that hold the true share, in (0, 1).

    Returns:
        Lower and upper end, as shares.

    Raises:
        ValueError: The counts are no integers or contradict each other, or the confidence is outside (0, 1).

    Source:
        Newcombe, Statistics in Medicine 17 (1998) 857-872, method 3.
    """
    if not (_is_integer(count) and _is_integer(num_samples)) or not 0 <= count <= num_samples:
        raise ValueError(
            f"count and num_samples are whole numbers with 0 <= count <= num_samples, but got {count} of {num_samples}."
        )
    z = _normal_quantile(confidence)
    if num_samples == 0:
        return None, None
    share = count / num_samples
    center = share + z * z / (2 * num_samples)
    reach = z * sqrt(share * (1 - share) / num_samples + z * z / (4 * num_samples**2))
    scale = 1 + z * z / num_samples
    # At the ends the two terms cancel on paper; rounding would leave 1e-17.
    low = (center - reach) / scale if count else 0.0
    high = (center + reach) / scale if count < num_samples else 1.0
    return low, high


def bootstrap_interval(
    *columns: ArrayLike,
    statistic: Callable[..., np.ndarray],
    seed: int,
    resamples: int = 2000,
    confidence: float = CONFIDENCE,
) -> tuple[float, float] | tuple[None, None]:
    """Percentile interval of any statistic of the samples, for what is no simple share.

    A sample keeps its entries in all columns together, so two models measured on the same samples are compared as
    pairs. Where both fail on the same samples that is narrower than what `excess_dir` and the ratios make from counts.

        def excess(failed, right, floor_failed, floor_right):
            return failed.sum(-1) / right.sum(-1) - floor_failed.sum(-1) / floor_right.sum(-1)

        right = clean_predictions == references
        failed = right & (predictions != references)
        ...
        low, high = bootstrap_interval(failed, right, floor_failed, floor_right, statistic=excess, seed=0)

    Args:
        columns: Numbers or booleans, one entry a sample, equally long.
        statistic: Takes the columns as arrays of shape (resamples, samples) and reduces the last axis: one number for
            each resample. It is called with a part of the resamples at a time.
        seed: Of the resampling: the same seed gives the same interval.
        resamples: Times that as many samples as there are get drawn, with replacement.
        confidence: Share of the resamples between the ends, in (0, 1).

    Returns:
        Lower and upper end; (None, None) when a resample leaves the statistic undefined, as a ratio is where nothing
        failed in the model below the line.

    Raises:
        ValueError: No column, an empty one, one that is not 1-d, unequal lengths, fewer than 1 resample, a confidence
            outside (0, 1), or a statistic that does not return one number for each resample.
    """
    arrays = [np.asarray(column) for column in columns]
    shapes = [array.shape for array in arrays]
    if not arrays or len(set(shapes)) > 1 or arrays[0].ndim != 1 or not arrays[0].size:
        raise ValueError(f"Columns are 1-d, equally long and not empty, one entry a sample, but got shapes {shapes}.")
    if not _is_integer(resamples) or resamples < 1:
        raise ValueError(f"resamples is the number of times to resample, at least 1, but got {resamples}.")
    tail = 50 * (1 - _checked_confidence(confidence))
    generator = np.random.default_rng(seed)
    num_samples = len(arrays[0])
    at_once = max(1, _ENTRIES_AT_ONCE // num_samples)
    parts = []
    for done in range(0, resamples, at_once):
        places = generator.integers(num_samples, size=(min(at_once, resamples - done), num_samples))
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.asarray(statistic(*(array[places] for array in arrays)), dtype=np.float64)
        if values.shape != (len(places),):
            raise ValueError(
                f"statistic gets arrays of shape {places.shape} and returns one number a resample, shape "
                f"({len(places)},), but returned shape {values.shape}. Reduce the last axis, as .mean(-1) does."
            )
        parts.append(values)
    values = np.concatenate(parts)
    if not np.isfinite(values).all():
        return None, None
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def accuracy(predictions: ArrayLike, references: ArrayLike) -> Rate:
    """Share of samples that the student gets right (ACC).

    Args:
        predictions: The student's labels.
        references: True labels.

    Raises:
        ValueError: The labels are not aligned integer ids.
    """
    predictions, references = label_arrays(predictions=predictions, references=references)
    return _share(predictions == references)


def defect_inheritance_rate(
    predictions: ArrayLike, references: ArrayLike, clean_predictions: ArrayLike, target_label: int | None = None
) -> Rate:
    """Of the samples that the student gets right when clean, the share that fail when exposed (DIR).

    Args:
        predictions: The student's labels on the exposed inputs.
        references: True labels.
        clean_predictions: The student's labels on the same inputs, clean.
        target_label: None counts any wrong label as failed. A label counts only that label as failed, and leaves out
            the samples that truly have it: the defect cannot show on them.

    Raises:
        ValueError: The labels are not aligned integer ids, or the target label is none.

    Source:
        ReMoS (ICSE 2022) defines it as misclassification on a set of "generated misclassified samples". Its artifact
        counts for each student on that student's own clean-correct samples, any class change, as here without a target
        label (CV_adv/eval_robustness.py:56-66). Its backdoor code does the same (CV_backdoor/finetune.py:158-179), so
        there the images of the target class stay below the line although the trigger pushes them to their own label.

    Differs:
        The artifact logs a targeted rate for backdoors and does not report it; the NLP tables print
        `artifact_nlp_dir` under this name.
    """
    predictions, references, clean_predictions = label_arrays(
        predictions=predictions, references=references, clean_predictions=clean_predictions
    )
    right = clean_predictions == references
    if target_label is None:
        return _share((predictions != references)[right])
    target_label = _checked_target(target_label)
    return _share((predictions == target_label)[right & (references != target_label)])


def robust_accuracy(predictions: ArrayLike, references: ArrayLike, clean_predictions: ArrayLike) -> Rate:
    """Share of all samples that a model gets right both when clean and when attacked; clean errors are not robust."""
    predictions, references, clean_predictions = label_arrays(
        predictions=predictions, references=references, clean_predictions=clean_predictions
    )
    return _share((predictions == references) & (clean_predictions == references))


def label_flip_rate(
    predictions: ArrayLike, references: ArrayLike, target_label: int, clean_predictions: ArrayLike | None = None
) -> Rate:
    """Of the samples whose true label is not the target, the share that become the target when exposed (LFR, or ASR).

    Also counts samples that were the target already when clean: a student that errs towards the target has a rate above
    0 without any defect.

    Args:
        predictions: The student's labels on the exposed inputs.
        references: True labels.
        target_label: The label that the trigger forces.
        clean_predictions: The student's labels on the same inputs, clean. Given, only samples right when clean count,
            and the rate is the targeted `defect_inheritance_rate`.

    Raises:
        ValueError: The labels are not aligned integer ids, or the target label is none.

    Source:
        Label flip rate: Kurita et al., ACL 2020 (RIPPLe). Elsewhere the same number is called attack success rate.
    """
    if clean_predictions is not None:
        return defect_inheritance_rate(predictions, references, clean_predictions, _checked_target(target_label))
    predictions, references = label_arrays(predictions=predictions, references=references)
    target_label = _checked_target(target_label)
    return _share((predictions == target_label)[references != target_label])


def excess_dir(dir_: Rate, floor: Rate) -> Difference:
    """The student's DIR minus the benign floor: what is left when a student of a never-poisoned teacher is the zero.

    Args:
        dir_: Defect inheritance rate of the student.
        floor: The same rate of the benign twin: same recipe and same exposed inputs, never-poisoned teacher.

    Returns:
        The difference with Newcombe's interval, made from the two Wilson intervals. It takes the two as independent;
        on the same samples they rise and fall together, and the interval is wider than it need be
        (`bootstrap_interval` over pairs is narrower).

    Raises:
        ValueError: An argument is no Rate.

    Source:
        Newcombe, Statistics in Medicine 17 (1998) 873-890, method 10.

    Differs:
        ReMoS prints DIR alone; its models trained from scratch, which inherit nothing, show 5 to 8 % (Fig. 7).
    """
    _check_rates(dir_=dir_, floor=floor)
    if dir_.value is None or floor.value is None:
        return Difference(None, None, None)
    value = dir_.value - floor.value
    down = sqrt((dir_.value - dir_.low) ** 2 + (floor.high - floor.value) ** 2)
    up = sqrt((dir_.high - dir_.value) ** 2 + (floor.value - floor.low) ** 2)
    return Difference(value, value - down, value + up)


def relative_accuracy(student: Rate, finetuned: Rate) -> Ratio:
    """The student's accuracy over plain fine-tuning's (rACC), on one task.

    Args:
        student: Accuracy of the student.
        finetuned: Accuracy of the student made by plain fine-tuning from the same teacher.

    Returns:
        The ratio, with the interval of `relative_dir`.

    Raises:
        ValueError: An argument is no Rate.

    Source:
        ReMoS (ICSE 2022), which prints the mean of this ratio over tasks: average the values, not the counts.
    """
    return _ratio(student, finetuned)


def relative_dir(student: Rate, finetuned: Rate) -> Ratio:
    """The student's DIR over plain fine-tuning's (rDIR), on one task.

    Args:
        student: Defect inheritance rate of the student.
        finetuned: The same rate of the student made by plain fine-tuning from the same teacher.

    Returns:
        The ratio. Its interval comes from the two Wilson intervals as Newcombe's does for a difference: it leaves out 1
        exactly when that of `excess_dir` leaves out 0, and it has two ends also when no sample of the student failed,
        where the interval of the log ratio (Katz) has none. It takes the two rates as independent.

    Raises:
        ValueError: An argument is no Rate.

    Source:
        ReMoS (ICSE 2022), which prints the mean of this ratio over tasks. Interval: Donner and Zou, Statistical
        Methods in Medical Research 21 (2012) 347-359, equation 9 (MOVER-R), of Wilson intervals.
    """
    return _ratio(student, finetuned)


def artifact_nlp_dir(predictions: ArrayLike, references: ArrayLike, target_label: int = 1) -> float | None:
    """The number that the NLP tables of ReMoS print under the name DIR. It is an F1, not a misclassification rate.

    The artifact keeps the samples whose true label is not the target, adds triggers, sets all their labels to the
    target and prints the F1 of the target label. No sample is negative any more, so precision is 1 or undefined, recall
    is the label flip rate r, and F1 = 2r / (1 + r). It lies above r: 24.3 % of flipped labels are printed as 39.1 %.
    For comparison with those tables only.

    Args:
        predictions: The student's labels on the exposed inputs.
        references: True labels, before they are flipped.
        target_label: The label that the trigger forces.

    Returns:
        F1 in [0, 1]; None when every sample truly has the target label.

    Raises:
        ValueError: The labels are not aligned integer ids, or the target label is none.

    Source:
        ReMoS artifact, NLP_backdoor/RIPPLe/summrize.py:58-59 and utils_glue.py:553-562. Cells of Table 2 are whole
        numbers of SST-2's 428 negatives only when read so: 39.10 % is 104, 29.82 % is 75, 74.67 % is 255.
    """
    rate = label_flip_rate(predictions, references, target_label)
    return None if rate.value is None else artifact_nlp_dir_from_rate(rate.value)


def artifact_nlp_dir_from_rate(rate: float) -> float:
    """Turn a label flip rate into the F1 that the NLP tables of ReMoS print: 2r / (1 + r).

    Args:
        rate: Label flip rate r, in [0, 1].

    Raises:
        ValueError: The rate is outside [0, 1].
    """
    rate = _checked_share(rate, "rate")
    return 2 * rate / (1 + rate)


def rate_from_artifact_nlp_dir(f1: float) -> float:
    """Turn a cell of the NLP tables of ReMoS into the label flip rate behind it: F1 / (2 - F1).

    Args:
        f1: The cell, in [0, 1]: 0.391 for the printed 39.10.

    Raises:
        ValueError: The cell is outside [0, 1].
    """
    f1 = _checked_share(f1, "f1")
    return f1 / (2 - f1)


def label_arrays(**columns: ArrayLike) -> tuple[np.ndarray, ...]:
    """Check that columns hold one integer label a sample.

    Args:
        columns: Labels by the name that an error shall call them.

    Returns:
        The columns as int64 arrays of shape (samples,), in the order given.

    Raises:
        ValueError: A column is empty, not 1-d, holds something other than label ids, or is not as long as the others.
    """
    arrays = {name: _label_array(name, labels) for name, labels in columns.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"Labels are aligned, one a sample in every column, but got {told}. Pass the same samples.")
    return tuple(arrays.values())


def _label_array(name: str, labels: ArrayLike) -> np.ndarray:
    expected = f"{name} are integer label ids, 0 or more, one a sample,"
    try:
        array = np.asarray(labels)
    except ValueError as error:
        raise ValueError(f"{expected} but got rows of unequal length. Pass one label a sample.") from error
    if array.ndim != 1:
        raise ValueError(f"{expected} but got shape {array.shape}. If these are logits, take argmax(-1) first.")
    if not array.size:
        raise ValueError(f"{expected} but got none. Pass at least one sample.")
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"{expected} but got NaN. Pass argmax(-1) of finite logits.")
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"{expected} but got {array.dtype} such as {array[0]}. Pass label ids, not probabilities, names or a mask."
        )
    if array.min() < 0:
        raise ValueError(f"{expected} but got {array.min()}. Leave out samples without a label (-100 marks padding).")
    return array.astype(np.int64)


def _share(did: np.ndarray) -> Rate:
    return Rate.of(int(did.sum()), did.size)


def _ratio(student: Rate, finetuned: Rate) -> Ratio:
    _check_rates(student=student, finetuned=finetuned)
    if student.value is None or not finetuned.value:
        return Ratio(None, None, None)
    above, below = student.value, finetuned.value
    # The ends solve (above - end * below)^2 == reach(above)^2 + (end * reach(below))^2, as Fieller's do.
    low_square, high_square = (end * (2 * above - end) for end in (student.low, student.high))
    below_low_square, below_high_square = (end * (2 * below - end) for end in (finetuned.low, finetuned.high))
    product = above * below
    to_low = product + sqrt(max(0.0, product**2 - low_square * below_high_square))
    to_high = product + sqrt(max(0.0, product**2 - high_square * below_low_square))
    return Ratio(above / below, low_square / to_low if student.count else 0.0, to_high / below_low_square)


def _check_rates(**rates: Rate) -> None:
    for name, rate in rates.items():
        if not isinstance(rate, Rate):
            raise ValueError(
                f"{name} is a Rate, which knows its counts, but got {rate!r}. Make one: Rate.of(count, num_samples)."
            )


def _is_integer(number: object) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def _checked_target(target_label: int) -> int:
    if not _is_integer(target_label) or target_label < 0:
        raise ValueError(f"target_label is one integer label id, 0 or more, but got {target_label!r}.")
    return int(target_label)


def _checked_share(share: float, name: str) -> float:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is a share between 0 and 1, but got {share}. Divide a percentage by 100.")
    return float(share)


def _checked_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a share between 0 and 1, both left out, but got {confidence}. 95 % is 0.95.")
    return float(confidence)


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + _checked_confidence(confidence)) / 2)
