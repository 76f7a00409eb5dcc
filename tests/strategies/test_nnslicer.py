import pytest
import torch

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.strategies.nnslicer import NNSlicer, contribution_rule
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def started(**options):
    student = tiny.bert(layers=1)
    done = NNSlicer(0.7, head_steps=2, **options).prepare(student, tiny.student_data(max_samples=12))
    return student, done


def test_a_student_in_half_precision_is_asked_on_a_copy_and_its_data_as_float32():
    def batches():
        return [(images.to(torch.bfloat16), labels.long()) for images, labels in tiny.image_batches(2)]

    student = tiny.ConvNet().to(torch.bfloat16)
    done = NNSlicer(0.7, head_steps=1, head=("head",)).prepare(student, tiny.student_data(batches, max_samples=8))
    assert done.details["nnslicer"]["samples"] == 8 and student.conv.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("score", ["absolute", "signed"])
def test_weights_that_contribute_nothing_go_first(score):
    student, done = started(score=score)
    told = done.details["nnslicer"]
    assert told["samples"] == 12 and told["head_steps"] == 2 and 0 < told["in_slice"] < 1
    assert done.relevant_slice.share_kept == pytest.approx(0.7, abs=0.01)
    # Queries and keys are behind the frozen pattern, so magnitude alone decides there.
    query = tiny.bert(layers=1).bert.encoder.layer[0].attention.self.query.weight
    kept = done.relevant_slice.kept["bert.encoder.layer.0.attention.self.query.weight"]
    assert query[kept].abs().min() > query[~kept].abs().max()


def test_the_head_that_was_trained_to_ask_is_not_the_students():
    student, _ = started()
    assert torch.equal(student.classifier.weight, tiny.bert(layers=1).classifier.weight)


def test_the_largest_contributions_stay_and_of_equal_ones_the_largest_weights():
    layers = list(adapter_for(tiny.mlp(), ()).layers().values())[:1]
    scores = torch.zeros(7, 5, dtype=torch.int64)
    scores[0, 0], scores[1, 1] = -3, 2
    kept = contribution_rule({"0.weight": scores})(layers, None, 4 / 35, 0).bits[0]
    bits = torch.tensor([bool(int(kept[place // 8]) >> (place % 8) & 1) for place in range(35)]).view(7, 5)
    weight = layers[0].weight.abs()
    assert bits[0, 0] and bits[1, 1] and int(bits.sum()) == 4
    others = (scores == 0) & bits
    assert weight[others].min() >= weight[(scores == 0) & ~bits].max()


@pytest.mark.parametrize(
    "options", [{"score": "size"}, {"theta": 1.0}, {"reference": "zero"}, {"samples": 0}, {"embeddings": True}]
)
def test_what_no_run_could_use_is_refused(options):
    with pytest.raises(ValueError):
        NNSlicer(0.7, **options)
