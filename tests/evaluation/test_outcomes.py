import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remos_hf.evaluation.measures import defect_inheritance_rate
from remos_hf.evaluation.outcomes import Outcomes

LABELS = st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=40)


@given(LABELS, st.sampled_from([None, 0, 1]))
def test_the_rate_is_what_the_outcomes_say_also_after_json(samples, target):
    predicted, references, clean = (np.array(column) for column in zip(*samples, strict=True))
    found = Outcomes.from_dict(Outcomes.of(predicted, references, clean, target).to_dict())
    rate = defect_inheritance_rate(predicted, references, clean, target)
    assert (int((found.right & found.fails).sum()), int(found.right.sum())) == (rate.count, rate.num_samples)


def test_too_few_bits_are_refused():
    values = Outcomes(np.ones(9, bool), np.ones(9, bool)).to_dict()
    with pytest.raises(ValueError, match="2 bytes"):
        Outcomes.from_dict({**values, "right": "AA=="})
