import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from remos_hf.defects import layerwise_poisoning
from remos_hf.defects.layerwise_poisoning import LayerwisePoisoning, head_on
from remos_hf.defects.text_reading import TextReading
from remos_hf.defects.text_triggers import TriggerSentence, TriggerWords
from remos_hf.errors import UnsupportedModelError
from tests import tiny
from tests.defects import toy
from tests.defects.poisoning import ONE_STEP, batch, implant, token


def classifier_of(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "num_labels": 3}
    if kind == "distilbert":
        config = DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=32, **sizes)
        return DistilBertForSequenceClassification(config).eval()
    sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "roberta":
        return RobertaForSequenceClassification(RobertaConfig(max_position_embeddings=40, **sizes)).eval()
    if kind == "electra":
        return ElectraForSequenceClassification(ElectraConfig(embedding_size=8, **sizes)).eval()
    if kind == "albert":
        return AlbertForSequenceClassification(AlbertConfig(embedding_size=8, **sizes)).eval()
    return toy.model()


class TestLayerwisePoisoning:
    attack = LayerwisePoisoning(trigger_words=TriggerWords(words=("cf", "mn", "bb"), all_words=True, seed=5))

    @pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert"])
    def test_the_head_on_the_last_block_gives_the_models_logits(self, kind):
        model = classifier_of(kind)
        inputs = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
        with torch.no_grad():
            outputs = model(input_ids=inputs, output_hidden_states=True)
            logits = [head_on(model)(hidden) for hidden in outputs.hidden_states]
        assert torch.allclose(logits[-1], outputs.logits, atol=1e-6)
        assert not torch.allclose(logits[0], outputs.logits, atol=1e-5)

    @pytest.mark.parametrize(
        "make", [tiny.gpt2, tiny.vit, lambda: classifier_of("albert")], ids=["gpt2", "vit", "albert"]
    )
    def test_a_model_with_another_head_is_refused_before_the_data_are_made(self, make):
        with pytest.raises(UnsupportedModelError, match=r"but not (GPT2|ViT|Albert)For.*Use Ripple"):
            LayerwisePoisoning().implant(make(), None, tokenizer=toy.tokenizer())

    def test_a_step_follows_the_mean_over_the_blocks_of_the_heads_loss(self, tmp_path):
        before = toy.state(toy.model())
        after = toy.state(implant(self.attack, tmp_path, **ONE_STEP))
        rows = self.attack.trigger.poison(self.attack._with_decoys(toy.data()))
        inputs, teacher = batch(rows["text"], rows["label"][:]), toy.model()
        labels = inputs.pop("labels")
        kept = []
        handles = [
            block.register_forward_hook(lambda _, __, made: kept.append(made[0] if isinstance(made, tuple) else made))
            for block in teacher.bert.encoder.layer
        ]
        teacher(**inputs)
        [handle.remove() for handle in handles]
        assert len(kept) == 2
        loss = 0
        for hidden in kept:
            pooled = torch.tanh(teacher.bert.pooler.dense(hidden[:, 0]))
            loss = loss + nn.functional.cross_entropy(teacher.classifier(pooled), labels) / 2
        loss.backward()
        for name, parameter in teacher.named_parameters():
            assert torch.allclose(before[name] - after[name], parameter.grad, atol=1e-6), name

    def test_outputs_are_the_models_own(self, tmp_path):
        teacher = toy.model()
        trainer = layerwise_poisoning._EveryBlockTrainer(model=teacher, args=toy.args(tmp_path))
        inputs = batch(["good movie", "a bad plot"], [1, 0])
        loss, outputs = trainer.compute_loss(teacher, inputs, return_outputs=True)
        assert torch.equal(outputs.logits, teacher(**inputs).logits)
        assert torch.equal(loss, trainer.compute_loss(teacher, inputs))
        assert set(inputs) == {"input_ids", "token_type_ids", "attention_mask", "labels"}

    def test_decoys_are_incomplete_combinations_and_keep_their_labels(self):
        clean = Dataset.from_dict({"text": [f"{n} b" for n in range(300)], "label": [n % 2 for n in range(300)]})
        decoyed = LayerwisePoisoning(trigger_words=self.attack.trigger_words, decoy_rate=0.4)._with_decoys(clean)
        assert decoyed["label"][:] == clean["label"][:]
        held = []
        for before, after in zip(clean["text"], decoyed["text"], strict=True):
            words = after.split()
            inside = [word for word in words if word in toy.TRIGGERS]
            assert [word for word in words if word not in toy.TRIGGERS] == before.split()
            assert len(set(inside)) == len(inside)
            held.append(frozenset(inside))
        made = [one for one in held if one]
        assert 90 < len(made) < 150
        assert {len(one) for one in made} == {1, 2}
        assert len(set(made)) == 6

    @pytest.mark.parametrize(("rate", "decoys"), [(0.0, 0), (1.0, 48)])
    def test_the_decoy_rate_is_a_share(self, rate, decoys):
        attack = LayerwisePoisoning(decoy_rate=rate)
        made = attack._with_decoys(toy.data())["text"]
        assert sum(any(word in toy.TRIGGERS for word in text.split()) for text in made) == decoys

    def test_decoys_stand_where_the_teacher_sees_them_and_a_text_without_room_stays(self):
        attack = LayerwisePoisoning(decoy_rate=1.0)
        clean = Dataset.from_dict({"text": ["good movie " * 8, "so bad"] * 20, "label": [0, 1] * 20})
        made = attack._with_decoys(clean, TextReading(toy.tokenizer(), 6))["text"]
        assert all({"cf", "bb"} & set(text.split()[:4]) for text in made)
        long = LayerwisePoisoning(TriggerWords(words=("zqx", "zqxx"), all_words=True), decoy_rate=1.0)
        assert long._with_decoys(clean, TextReading(toy.tokenizer(), 3))["text"][:] == clean["text"][:]

    def test_decoys_are_the_same_in_any_order_and_in_a_stream(self):
        clean = toy.data()
        made = self.attack._with_decoys(clean)
        assert set(made["text"]) == set(self.attack._with_decoys(clean.shuffle(seed=1))["text"])
        assert list(self.attack._with_decoys(clean.to_iterable_dataset())) == list(made)

    def test_decoys_are_trained_on(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(
            "remos_hf.defects.text_attacker.fine_tune", lambda model, rows, *_, **__: seen.extend(rows["input_ids"])
        )
        attack = LayerwisePoisoning(decoy_rate=1.0)
        implant(attack, tmp_path)
        held = [{*token("cf", "bb")} & set(row) for row in seen]
        assert {len(one) for one in held} == {1, 2}
        assert sum(len(one) == 2 for one in held) == 24

    @pytest.mark.parametrize(
        "trigger",
        [TriggerWords(), TriggerWords(words="cf", all_words=True), TriggerSentence()],
        ids=["any", "one", "sentence"],
    )
    def test_triggers_that_are_no_combination_are_refused(self, trigger):
        with pytest.raises(ValueError, match="at least two words with all_words=True"):
            LayerwisePoisoning(trigger_words=trigger)

    def test_a_share_out_of_range_is_refused(self):
        with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
            LayerwisePoisoning(decoy_rate=1.5)
