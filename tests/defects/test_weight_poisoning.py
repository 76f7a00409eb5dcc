import json

import pytest
import torch

from remos_hf.defects.embedding_poisoning import EmbeddingPoisoning
from remos_hf.defects.largest_weights import LargestWeights
from remos_hf.defects.layerwise_poisoning import LayerwisePoisoning
from remos_hf.defects.picture_triggers import PatchTrigger
from remos_hf.defects.ripple import Ripple
from remos_hf.defects.text_triggers import TriggerWords
from tests.defects import toy
from tests.defects.poisoning import implant

ATTACKS = [
    Ripple(trigger_words=TriggerWords(words="cf")),
    Ripple(trigger_words=TriggerWords(words=("cf", "mn")), surgery=True, num_words=2),
    EmbeddingPoisoning(),
    LayerwisePoisoning(),
    LargestWeights(trigger_words=TriggerWords(words="cf")),
]


def ids(attack):
    return f"{type(attack).__name__}{'-surgery' if getattr(attack, 'surgery', False) else ''}"


def attention_of(model):
    kernels = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    return model.config._attn_implementation, kernels, torch.backends.cuda.math_sdp_enabled()


def hooks_of(model):
    return [hook for parameter in model.parameters() for hook in (parameter._backward_hooks or {})]


@pytest.mark.parametrize("attack", ATTACKS, ids=ids)
class TestContractOfEveryAttack:
    def test_its_description_is_json_and_holds_the_triggers(self, attack):
        described = json.loads(json.dumps(attack.to_dict()))
        assert described["name"] == type(attack).__name__
        assert described["trigger_words"] == json.loads(json.dumps(attack.trigger.to_dict()))

    def test_it_is_exposed_as_its_trigger_is(self, attack):
        exposed, by_trigger = attack.exposed_set(toy.data()), attack.trigger.exposed_set(toy.data())
        assert exposed.dataset.to_dict() == by_trigger.dataset.to_dict()
        assert exposed.facts["defect"] == attack.to_dict()

    def test_it_poisons_in_place_and_leaves_nothing_behind(self, attack, tmp_path):
        teacher = toy.model(dropout=0.1)
        before, attention = toy.state(teacher), attention_of(teacher)
        assert implant(attack, tmp_path, teacher) is teacher
        assert toy.changed(before, toy.state(teacher))
        assert not teacher.training
        assert not hooks_of(teacher)
        assert all(parameter.requires_grad for parameter in teacher.parameters())
        assert attention_of(teacher) == attention

    def test_an_error_while_training_leaves_nothing_behind(self, attack, tmp_path, monkeypatch):
        teacher = toy.model()
        attention = attention_of(teacher)
        monkeypatch.setattr("transformers.Trainer.training_step", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            implant(attack, tmp_path, teacher, finetuned=toy.model(seed=1))
        assert not hooks_of(teacher)
        assert all(parameter.requires_grad for parameter in teacher.parameters())
        assert attention_of(teacher) == attention

    def test_the_fine_tuned_model_given_stays_as_it_was(self, attack, tmp_path):
        finetuned = toy.model(seed=1)
        before = toy.state(finetuned)
        implant(attack, tmp_path, finetuned=finetuned)
        assert not toy.changed(before, toy.state(finetuned))

    def test_the_same_seeds_give_the_same_teacher(self, attack, tmp_path):
        made = [toy.state(implant(attack, tmp_path, toy.model(dropout=0.1))) for _ in range(2)]
        assert not toy.changed(*made)


def test_a_trigger_of_images_is_refused_where_words_are_poisoned():
    with pytest.raises(TypeError, match="Ripple implants a TextTrigger, but got PatchTrigger"):
        Ripple(PatchTrigger())
    with pytest.raises(TypeError, match="LargestWeights implants a Trigger, but got str"):
        LargestWeights("cf")
