"""What must be the same on a GPU. Run with -m gpu on a machine that has one."""

import pytest
import torch

from remos_hf.defects.embedding_poisoning import EmbeddingPoisoning
from remos_hf.defects.largest_weights import LargestWeights
from remos_hf.defects.layerwise_poisoning import LayerwisePoisoning
from remos_hf.defects.ripple import Ripple
from remos_hf.defects.text_triggers import TriggerWords
from remos_hf.profiling.criteria import median_coverage, strong_coverage
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.slicing.refill import reset_outside
from remos_hf.slicing.relevant_slice import choose_slice
from tests import tiny
from tests.defects import toy
from tests.slicing.test_ordinal import large, random_profile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ties", ["mean", "artifact"])
def test_the_slice_is_the_same_bits_on_the_device(dtype, ties):
    layers = large(dtype)
    profile = random_profile(layers, 500, torch.Generator().manual_seed(1))
    model = torch.nn.Sequential(*[layer.module for layer in layers.values()])
    here = choose_slice(model, profile, slice_ratio=0.9, ties=ties)
    there = choose_slice(model.cuda(), profile, slice_ratio=0.9, ties=ties)
    assert there.kept == here.kept
    assert there.teacher_hash == here.teacher_hash


@pytest.mark.parametrize("criterion", [median_coverage(), strong_coverage()], ids=lambda one: type(one).__name__)
def test_counts_on_the_device_agree_up_to_rounding(criterion):
    batches = tiny.text_batches(count=8, size=16)
    here = profile_coverage(tiny.bert(), batches, criterion=criterion)
    there = profile_coverage(tiny.bert().cuda(), batches, criterion=criterion)
    for name, counts in here.input_counts.items():
        assert (there.input_counts[name] - counts).abs().max() <= 2
        assert there.input_counts[name].device.type == "cpu"


def test_a_student_on_the_device_is_reset_there():
    model = tiny.bert().cuda()
    relevant = choose_slice(model, slice_ratio=0.5, rule="top_magnitude")
    reset_outside(model, relevant, to="init")
    assert all(parameter.is_cuda for parameter in model.parameters())


@pytest.mark.parametrize("second_order", [False, True])
def test_ripples_second_derivative_exists_on_the_device(tmp_path, second_order):
    attack = Ripple(trigger_words=TriggerWords(words="cf"), second_order=second_order)
    teacher = attack.implant(toy.model(), toy.data(), tokenizer=toy.tokenizer(), args=toy.args(tmp_path, use_cpu=False))
    assert toy.changed(toy.state(toy.model()), {name: value.cpu() for name, value in teacher.state_dict().items()})


@pytest.mark.parametrize(
    ("attack", "still"),
    [
        (EmbeddingPoisoning(), "classifier.weight"),
        (LargestWeights(trigger_words=TriggerWords(words="cf")), "bert.embeddings.word_embeddings.weight"),
        (LayerwisePoisoning(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_held_is_held_on_the_device_that_trainer_moves_the_teacher_to(tmp_path, attack, still):
    args = toy.args(tmp_path, use_cpu=False)
    teacher = attack.implant(toy.model(), toy.data(), tokenizer=toy.tokenizer(), args=args, finetuned=toy.model())
    assert teacher.device.type == "cuda"
    changed = toy.changed(toy.state(toy.model()), {name: value.cpu() for name, value in teacher.state_dict().items()})
    assert changed
    assert still not in changed
