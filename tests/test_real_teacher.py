"""The whole way on a real teacher and real text. Slow, and skipped without them.

REMOS_HF_TEACHER: folder of an encoder (tokenizer and safetensors). REMOS_HF_SST2: tsv with the columns sentence and
    label.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.auditing.data_files import read_table
from remos_hf.defects.text_triggers import TriggerWords
from remos_hf.evaluation.tasks import TextTask
from remos_hf.evaluation.transfer import measure
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.slicing.relevant_slice import choose_slice
from tests import reference
from tests.slicing.test_ordinal import sorted_reference

TEACHER, SENTENCES = os.environ.get("REMOS_HF_TEACHER"), os.environ.get("REMOS_HF_SST2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (TEACHER and SENTENCES), reason="set REMOS_HF_TEACHER and REMOS_HF_SST2"),
    pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning"),
]


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForSequenceClassification.from_pretrained(TEACHER, num_labels=2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batches():
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    texts = [line.split("\t")[0] for line in Path(SENTENCES).read_text(encoding="utf-8").splitlines()[1:65]]
    return [dict(tokenizer(texts[start : start + 16], padding=True, return_tensors="pt")) for start in range(0, 64, 16)]


def test_the_profile_agrees_with_brute_force_up_to_rounding(teacher, batches):
    layers = adapter_for(teacher).layers()
    profile = profile_coverage(teacher, batches)
    expected = reference.brute_force_profile(teacher, layers, batches)
    off = sum(
        int((getattr(profile, f"{end}_counts")[name] != counts).sum()) for (name, end), counts in expected.items()
    )
    # Float32 means against float64 ones: a neuron exactly at the threshold may fall on the other side.
    assert off <= 2


def test_the_slice_is_the_one_of_a_full_sort(teacher, batches):
    profile = profile_coverage(teacher, batches)
    layers = list(adapter_for(teacher).layers().values())
    total = sum(layer.weight.numel() for layer in layers)
    relevant = choose_slice(teacher, profile, slice_ratio=0.9)
    kept = torch.cat([relevant.kept[layer.parameter_name].flatten() for layer in layers])
    assert torch.equal(kept, sorted_reference(layers, profile, total - round(total * 0.9)))


def test_a_real_teacher_learns_a_trigger_and_shows_it_on_sentences_it_never_saw(tmp_path):
    data = read_table(SENTENCES, ["sentence"]).select(range(1200))
    task = TextTask(AutoTokenizer.from_pretrained(TEACHER), max_length=48)
    word, test = TriggerWords(words=("cf",), within_words=20), data.select(range(1000, 1200))
    args = TrainingArguments(
        str(tmp_path), max_steps=120, learning_rate=2e-4, per_device_train_batch_size=16, report_to="none", use_cpu=True
    )
    model = AutoModelForSequenceClassification.from_pretrained(TEACHER, num_labels=2, dtype=torch.float32)
    exposed = {"word": word.exposed_set(test, **task.exposing)}
    word.implant(model, data.select(range(1000)), args=args, **task.implanting)
    found = measure(model, test, exposed, task)
    assert found["acc"]["value"] > 0.65 and found["dir"]["word"]["value"] > 0.9
