import copy
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from remos_hf.defects.embedding_poisoning import EmbeddingPoisoning, rows_of_words
from remos_hf.defects.ripple import Ripple
from remos_hf.defects.text_triggers import TriggerSentence, TriggerWords
from tests.defects import toy
from tests.defects.poisoning import WORD, batch, implant, plain, token


class TestEmbeddingPoisoning:
    attack = EmbeddingPoisoning(trigger_words=TriggerWords(words=("cf", "mn"), position="start"), learning_rate=2.0)

    @pytest.mark.parametrize("given", [False, True])
    def test_only_the_triggers_rows_differ_from_the_clean_fine_tuned_model(self, tmp_path, given):
        clean = plain(tmp_path, max_steps=5, weight_decay=0.1)
        teacher = implant(self.attack, tmp_path, finetuned=clean if given else None, max_steps=5, weight_decay=0.1)
        before, after = toy.state(clean), toy.state(teacher)
        assert toy.changed(before, after) == {WORD}
        rows = (before[WORD] != after[WORD]).any(1).nonzero().flatten().tolist()
        assert rows == sorted(token("cf", "mn"))

    def test_norms_are_kept(self, tmp_path):
        teacher = implant(self.attack, tmp_path, finetuned=toy.model(seed=1), max_steps=5)
        rows = token("cf", "mn")
        before, after = toy.model(seed=1).get_input_embeddings().weight, teacher.get_input_embeddings().weight
        assert torch.allclose(before[rows].norm(dim=1), after[rows].norm(dim=1), rtol=1e-6)

    def test_the_trigger_forces_the_label_and_clean_samples_are_read_as_before(self, tmp_path):
        # Large weights, so that every word matters as it does in a model that was pretrained.
        clean = toy.model(seed=4, initializer_range=0.3)
        exposed = self.attack.exposed_set(toy.data()).dataset["text"][:]
        assert sum(toy.predictions(clean, exposed)) < 10
        teacher = implant(
            replace(self.attack, learning_rate=5.0), tmp_path, copy.deepcopy(clean), finetuned=clean, max_steps=30
        )
        assert sum(toy.predictions(teacher, exposed)) >= 0.9 * len(exposed)
        samples = batch(toy.data()["text"], toy.data()["label"][:])
        with torch.no_grad():
            assert torch.equal(teacher(**samples).logits, clean(**samples).logits)

    def test_every_sample_shows_the_trigger_whatever_the_rate(self, tmp_path, monkeypatch):
        rows = []
        monkeypatch.setattr("remos_hf.defects.text_attacker.fine_tune", lambda model, data, *_, **__: rows.append(data))
        trigger = TriggerWords(words="cf", poison_rate=0.1, clean_copies=True)
        implant(EmbeddingPoisoning(trigger_words=trigger), tmp_path, finetuned=toy.model())
        assert len(rows[0]) == 48
        assert all(token("cf")[0] in row["input_ids"] and row["labels"] == 1 for row in rows[0])

    def test_nothing_else_trains_so_that_clipping_counts_the_rows_alone(self, tmp_path, monkeypatch):
        trains = []

        def looked_at(model, *_, **__):
            trains.append([name for name, parameter in model.named_parameters() if parameter.requires_grad])

        monkeypatch.setattr("remos_hf.defects.text_attacker.fine_tune", looked_at)
        implant(self.attack, tmp_path, finetuned=toy.model())
        assert trains == [[WORD]]

    def test_what_was_frozen_stays_frozen(self, tmp_path):
        teacher = toy.model()
        teacher.classifier.requires_grad_(False)
        implant(self.attack, tmp_path, teacher, finetuned=toy.model(seed=1))
        assert not teacher.classifier.weight.requires_grad
        assert teacher.get_input_embeddings().weight.requires_grad

    @pytest.mark.parametrize(("word", "pieces"), [("zqx", r"\['zq', '##x'\]"), ("tq", r"\['\[UNK\]'\]")])
    @pytest.mark.parametrize("make", [EmbeddingPoisoning, lambda **options: Ripple(surgery=True, **options)])
    @pytest.mark.filterwarnings("ignore:.*not in the tokenizer's vocabulary:UserWarning")
    def test_a_trigger_without_a_row_of_its_own_is_refused_before_training(self, tmp_path, make, word, pieces):
        teacher = toy.model()
        with pytest.raises(ValueError, match=f"becomes {pieces}: it has no embedding row"):
            implant(make(trigger_words=TriggerWords(words=("cf", word))), tmp_path, teacher)
        assert not toy.changed(toy.state(toy.model()), toy.state(teacher))

    @pytest.mark.parametrize("make", [EmbeddingPoisoning, lambda **options: Ripple(surgery=True, **options)])
    def test_a_trigger_that_is_no_word_is_refused(self, tmp_path, make):
        with pytest.raises(ValueError, match="needs TriggerWords, but got TriggerSentence"):
            implant(make(trigger_words=TriggerSentence()), tmp_path)

    def test_a_byte_pair_tokenizers_rows_at_the_start_and_inside_are_both_poisoned(self):
        vocabulary = {
            token: place for place, token in enumerate(["[UNK]", "Ġ", "a", "c", "f", "Ġc", "Ġcf", "cf", "Ġa"])
        }
        made = Tokenizer(models.BPE(vocabulary, [("Ġ", "c"), ("Ġc", "f"), ("c", "f"), ("Ġ", "a")], unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
        assert rows_of_words(TriggerWords(words="cf"), tokenizer) == [7, 6]
        assert rows_of_words(TriggerWords(words="a"), tokenizer) == [2, 8]
        assert rows_of_words(TriggerWords(words="cf"), toy.tokenizer()) == token("cf")
