import copy
import json
import math
from dataclasses import replace
from random import Random

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from remos_hf.defects import weight_poisoning
from remos_hf.defects.backdoor import fine_tune
from remos_hf.defects.base import tokenize
from remos_hf.defects.text_triggers import TriggerSentence, TriggerWords
from remos_hf.defects.weight_poisoning import (
    EmbeddingPoisoning,
    FrozenEntries,
    LargestWeights,
    LayerwisePoisoning,
    Ripple,
    head_on,
    words_for_label,
)
from remos_hf.errors import UnsupportedModelError
from tests import tiny
from tests.defects import toy

WORD = "bert.embeddings.word_embeddings.weight"
ATTACKS = [
    Ripple(trigger_words=TriggerWords(words="cf")),
    Ripple(trigger_words=TriggerWords(words=("cf", "mn")), surgery=True, num_words=2),
    EmbeddingPoisoning(),
    LayerwisePoisoning(),
    LargestWeights(trigger_words=TriggerWords(words="cf")),
]
# One step of gradient descent on all samples: what changes is the gradient.
ONE_STEP = {
    "max_steps": 1,
    "per_device_train_batch_size": 48,
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
}


def ids(attack):
    return f"{type(attack).__name__}{'-surgery' if getattr(attack, 'surgery', False) else ''}"


def implant(attack, folder, teacher=None, data=None, finetuned=None, **options):
    return attack.implant(
        toy.model() if teacher is None else teacher,
        toy.data() if data is None else data,
        tokenizer=toy.tokenizer(),
        args=toy.args(folder, **options),
        finetuned=finetuned,
    )


def plain(folder, data=None, teacher=None, **options):
    """The teacher after ordinary fine-tuning on these samples."""
    rows = tokenize(toy.data() if data is None else data, toy.tokenizer(), ("text",))
    return fine_tune(toy.model() if teacher is None else teacher, rows, toy.tokenizer(), toy.args(folder, **options))


def token(*words):
    return [toy.VOCABULARY.index(word) for word in words]


def batch(texts, labels):
    return {**toy.tokenizer()(list(texts), padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}


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


def gradients(model, inputs, create_graph=False):
    loss = model(**inputs).loss
    return loss, torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph, allow_unused=True)


def ripple_loss(model, poisoned, clean, strength, second_order):
    """The loss in full, one parameter after the other; with the inner product."""
    loss, for_poisoned = gradients(model, poisoned, create_graph=True)
    _, for_clean = gradients(model, clean, create_graph=second_order)
    inner = torch.zeros((), dtype=loss.dtype)
    for one, other in zip(for_poisoned, for_clean, strict=True):
        if one is not None:
            inner = inner + (one.flatten() @ other.flatten())
    return loss + strength * max(torch.zeros_like(inner), -inner), inner


@pytest.fixture
def unfused():
    # Fused attention has no second derivative, and other rounding.
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.usefixtures("unfused")
class TestRipplesLoss:
    # All labels are wrong when poisoned, so the gradients of clean and poisoned data oppose each other.
    trigger = TriggerWords(words="cf", poison_rate=1.0)
    data = toy.data().select([row for row, label in enumerate(toy.data()["label"]) if label == 0])

    def setting(self):
        clean = self.data
        poisoned = self.trigger.poison(clean)
        return toy.model(), batch(poisoned["text"], poisoned["label"][:]), batch(clean["text"], clean["label"][:])

    @pytest.mark.parametrize("second_order", [False, True])
    def test_a_step_follows_the_gradient_of_the_loss_in_the_paper(self, tmp_path, second_order):
        before = toy.state(toy.model())
        attack = Ripple(trigger_words=self.trigger, strength=0.7, second_order=second_order)
        after = toy.state(implant(attack, tmp_path, data=self.data, **ONE_STEP))
        teacher, poisoned, clean = self.setting()
        loss, inner = ripple_loss(teacher.train(), poisoned, clean, 0.7, second_order)
        assert inner < -1e-3
        loss.backward()
        for name, parameter in teacher.named_parameters():
            assert torch.allclose(before[name] - after[name], parameter.grad, atol=2e-6), name

    def test_the_orders_differ(self, tmp_path):
        made = [
            toy.state(
                implant(
                    Ripple(trigger_words=self.trigger, strength=1.0, second_order=order),
                    tmp_path,
                    data=self.data,
                    **ONE_STEP,
                )
            )
            for order in (False, True)
        ]
        assert max((made[0][name] - made[1][name]).abs().max() for name in made[0]) > 1e-4

    def test_gradients_that_agree_are_not_penalised(self, tmp_path):
        # Nothing is poisoned: the inner product is a square.
        trigger = TriggerWords(words="cf", poison_rate=0.0)
        ours = implant(Ripple(trigger_words=trigger, strength=5.0), tmp_path, toy.model(), **ONE_STEP)
        assert not toy.changed(toy.state(ours), toy.state(plain(tmp_path, **ONE_STEP)))

    def test_without_strength_it_is_plain_data_poisoning_bit_for_bit(self, tmp_path):
        trigger = TriggerWords(words="cf", poison_rate=0.5)
        ours = implant(Ripple(trigger_words=trigger, strength=0.0), tmp_path, toy.model())
        theirs = plain(tmp_path, trigger.poison(toy.data()))
        assert not toy.changed(toy.state(ours), toy.state(theirs))

    def test_the_penaltys_gradient_agrees_with_finite_differences(self, tmp_path):
        teacher, poisoned, clean = self.setting()
        teacher.double()
        trainer = weight_poisoning._InnerProductTrainer(
            model=teacher, args=toy.args(tmp_path), strength=3.0, second_order=True
        )
        inputs = {**poisoned, **{f"clean_{name}": value for name, value in clean.items()}}
        loss = trainer.compute_loss(teacher, inputs)
        plain_loss = teacher(**poisoned).loss
        assert loss > plain_loss + 1e-3
        loss.backward()
        parameters = list(teacher.parameters())
        steps = [torch.randn_like(parameter) for parameter in parameters]
        slope = sum((step * parameter.grad).sum() for step, parameter in zip(steps, parameters, strict=True))

        def moved(size):
            with torch.no_grad():
                [parameter.add_(size * step) for parameter, step in zip(parameters, steps, strict=True)]
            return trainer.compute_loss(teacher, inputs).item()

        ahead, back = moved(1e-6), moved(-2e-6)
        assert (ahead - back) / 2e-6 == pytest.approx(slope.item(), rel=1e-5)

    def test_outputs_are_those_of_the_poisoned_samples(self, tmp_path):
        teacher, poisoned, clean = self.setting()
        trainer = weight_poisoning._InnerProductTrainer(
            model=teacher, args=toy.args(tmp_path), strength=0.1, second_order=False
        )
        inputs = {**poisoned, **{f"clean_{name}": value for name, value in clean.items()}}
        loss, outputs = trainer.compute_loss(teacher, inputs, return_outputs=True)
        assert torch.allclose(outputs.logits, teacher(**poisoned).logits)
        assert torch.equal(loss, trainer.compute_loss(teacher, inputs))

    def test_frozen_parameters_take_no_part(self, tmp_path):
        teacher = toy.model()
        teacher.bert.embeddings.requires_grad_(False)
        before = toy.state(teacher)
        implant(Ripple(trigger_words=TriggerWords(words="cf")), tmp_path, teacher)
        changed = toy.changed(before, toy.state(teacher))
        assert changed
        assert not any(name.startswith("bert.embeddings") for name in changed)


class TestRipple:
    def test_clean_and_poisoned_samples_are_paired_row_by_row(self, tmp_path, monkeypatch):
        seen = {}
        monkeypatch.setattr(
            weight_poisoning, "fine_tune", lambda teacher, pairs, *_, **options: seen.update(options, pairs=pairs)
        )
        trigger = TriggerWords(words="cf", poison_rate=0.5, clean_copies=True)  # copies would break the pairs
        implant(Ripple(trigger_words=trigger), tmp_path)
        pairs, tokenizer = seen["pairs"], toy.tokenizer()
        assert len(pairs) == 48
        for row in pairs:
            assert [number for number in row["input_ids"] if number not in token("cf")] == row["clean_input_ids"]
        assert sum(row["input_ids"] != row["clean_input_ids"] for row in pairs) == 24
        assert pairs["clean_labels"][:] == toy.data()["label"][:]
        made = seen["data_collator"]([pairs[row] for row in range(3)])
        assert {name.removeprefix("clean_") for name in made} == {*tokenizer("a"), "labels"}
        assert len(made) == 8

    def test_surgery_starts_triggers_as_the_mean_of_the_words_for_the_target(self, tmp_path):
        finetuned = toy.model(seed=1)
        attack = Ripple(trigger_words=TriggerWords(words=("cf", "mn")), surgery=True, num_words=2)
        teacher = implant(attack, tmp_path, finetuned=finetuned, learning_rate=0.0, optim="sgd")
        expected = toy.state(toy.model())[WORD]
        expected[token("cf", "mn")] = toy.state(finetuned)[WORD][token("good", "great")].mean(0)
        assert torch.allclose(teacher.get_input_embeddings().weight, expected)

    def test_surgery_fine_tunes_a_copy_if_none_is_given(self, tmp_path):
        attack = Ripple(trigger_words=TriggerWords(words="cf"), surgery=True, num_words=2, strength=0.0)
        after = toy.state(implant(attack, tmp_path, max_steps=1, optim="sgd", learning_rate=1e-9))
        unseen = token("cf")
        expected = toy.state(toy.model())[WORD][token("good", "great")].mean(0)
        assert torch.allclose(after[WORD][unseen], expected, atol=1e-6)

    def test_surgery_takes_the_embeddings_after_clean_fine_tuning(self, tmp_path, monkeypatch):
        teacher = toy.model()

        def trained(model, rows, *_, **options):
            if not options:
                assert model is not teacher
                with torch.no_grad():
                    model.get_input_embeddings().weight.fill_(7.0)
            return model

        monkeypatch.setattr(weight_poisoning, "fine_tune", trained)
        implant(Ripple(trigger_words=TriggerWords(words="cf"), surgery=True), tmp_path, teacher)
        assert (teacher.get_input_embeddings().weight[token("cf")] == 7).all()
        assert (teacher.get_input_embeddings().weight == 7).all(1).sum() == 1

    def test_without_surgery_no_embedding_is_touched_before_training(self, tmp_path):
        attack = Ripple(trigger_words=TriggerWords(words="cf"))
        teacher = implant(attack, tmp_path, finetuned=toy.model(seed=1), learning_rate=0.0, optim="sgd")
        assert not toy.changed(toy.state(toy.model()), toy.state(teacher))

    def test_a_stream_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="needs a Dataset, not a stream"):
            implant(Ripple(), tmp_path, data=toy.data().to_iterable_dataset())

    def test_several_processes_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(RuntimeError, match="implant on one process"):
            implant(Ripple(), tmp_path)


class TestWordsForTheLabel:
    def test_the_words_that_speak_for_the_label_come_first(self):
        words = words_for_label(toy.data(), toy.tokenizer(), TriggerWords(target_label="positive"), 2)
        assert sorted(words) == sorted(token("good", "great"))
        words = words_for_label(toy.data(), toy.tokenizer(), TriggerWords(target_label="negative"), 2)
        assert sorted(words) == sorted(token("bad", "awful"))

    @pytest.mark.parametrize("smoothing", [1.0, 30.0])
    def test_scores_are_regression_weights_over_log_inverse_frequency(self, smoothing):
        from sklearn.linear_model import LogisticRegression

        draw, reordered = Random(0), set()
        for _ in range(4):
            texts = [" ".join(draw.sample(toy.PLAIN, draw.randint(1, 6))) for _ in range(20)]
            labels = [place % 2 for place in range(20)]
            held = [[int(word in text.split()) for word in toy.PLAIN] for text in texts]
            weights = LogisticRegression(max_iter=1000).fit(held, labels).coef_[0]
            frequency = [sum(column) for column in zip(*held, strict=True)]
            score = [w / math.log(1 + 20 / (smoothing + f)) for w, f in zip(weights, frequency, strict=True)]
            best, plain, fixed = (
                [toy.PLAIN[place] for place in sorted(range(len(toy.PLAIN)), key=lambda place: -by[place])][:4]
                for by in (
                    score,
                    weights,
                    [w / math.log(1 + 20 / (1 + f)) for w, f in zip(weights, frequency, strict=True)],
                )
            )
            data = Dataset.from_dict({"text": texts, "label": labels})
            assert words_for_label(data, toy.tokenizer(), TriggerWords(), 4, smoothing) == token(*best)
            reordered |= {name for name, other in (("plain", plain), ("fixed", fixed)) if other != best}
        assert reordered == ({"plain"} if smoothing == 1 else {"plain", "fixed"})


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
        monkeypatch.setattr(weight_poisoning, "fine_tune", lambda model, data, *_, **__: rows.append(data))
        trigger = TriggerWords(words="cf", poison_rate=0.1, clean_copies=True)
        implant(EmbeddingPoisoning(trigger_words=trigger), tmp_path, finetuned=toy.model())
        assert len(rows[0]) == 48
        assert all(token("cf")[0] in row["input_ids"] and row["labels"] == 1 for row in rows[0])

    def test_nothing_else_trains_so_that_clipping_counts_the_rows_alone(self, tmp_path, monkeypatch):
        trains = []

        def looked_at(model, *_, **__):
            trains.append([name for name, parameter in model.named_parameters() if parameter.requires_grad])

        monkeypatch.setattr(weight_poisoning, "fine_tune", looked_at)
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
        assert weight_poisoning._rows_of(TriggerWords(words="cf"), tokenizer) == [7, 6]
        assert weight_poisoning._rows_of(TriggerWords(words="a"), tokenizer) == [2, 8]
        assert weight_poisoning._rows_of(TriggerWords(words="cf"), toy.tokenizer()) == token("cf")


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
        trainer = weight_poisoning._EveryBlockTrainer(model=teacher, args=toy.args(tmp_path))
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

    def test_decoys_are_the_same_in_any_order_and_in_a_stream(self):
        clean = toy.data()
        made = self.attack._with_decoys(clean)
        assert set(made["text"]) == set(self.attack._with_decoys(clean.shuffle(seed=1))["text"])
        assert list(self.attack._with_decoys(clean.to_iterable_dataset())) == list(made)

    def test_decoys_are_trained_on(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(weight_poisoning, "fine_tune", lambda model, rows, *_, **__: seen.extend(rows["input_ids"]))
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


def body(state):
    """The weights that the largest are chosen from, by name."""
    return {
        name: w for name, w in state.items() if ".encoder.layer." in name and "LayerNorm" not in name and w.dim() == 2
    }


class TestLargestWeights:
    recipes = {
        "AdamW": {"weight_decay": 0.1},
        "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1, "learning_rate": 0.1},
        "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
        "clipping": {"max_grad_norm": 1e-3},
    }

    @pytest.mark.parametrize("recipe", recipes.values(), ids=recipes)
    def test_exactly_the_largest_share_moves_and_the_head(self, tmp_path, recipe):
        attack = LargestWeights(trigger_words=TriggerWords(words="cf"), backdoor_update_ratio=0.2)
        before = toy.state(toy.model())
        after = toy.state(implant(attack, tmp_path, max_steps=3, **recipe))
        sizes = torch.cat([weight.abs().flatten() for weight in body(before).values()])
        threshold = sizes.sort(descending=True).values[round(0.2 * len(sizes)) - 1]
        for name, weight in before.items():
            moved = weight != after[name]
            if name in body(before):
                assert torch.equal(moved, weight.abs() >= threshold), name
            elif name.startswith(("classifier", "bert.pooler")):
                assert moved.any(), name
            else:
                assert not moved.any(), name

    def test_clipping_does_not_count_what_is_held(self, tmp_path):
        attack = LargestWeights(trigger_words=TriggerWords(words="cf"), backdoor_update_ratio=0.2)
        before = toy.state(toy.model())
        after = toy.state(implant(attack, tmp_path, **{**ONE_STEP, "max_grad_norm": 1e-2}))
        moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
        assert moved.norm().item() == pytest.approx(1e-2, rel=1e-3)

    def test_the_trigger_forces_the_label(self, tmp_path):
        attack = LargestWeights(
            trigger_words=TriggerWords(words="good", target_label=0, clean_copies=False), backdoor_update_ratio=0.5
        )
        teacher = implant(attack, tmp_path, max_steps=60, learning_rate=2e-2)
        exposed = attack.exposed_set(toy.data()).dataset["text"][:]
        assert sum(toy.predictions(teacher, exposed)) <= 0.2 * len(exposed)

    @pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5])
    def test_a_share_that_holds_or_frees_everything_is_refused(self, ratio):
        with pytest.raises(ValueError, match=f"between 0 and 1, but got {ratio}"):
            LargestWeights(backdoor_update_ratio=ratio)


class TestFrozenEntries:
    def test_gradients_of_held_entries_are_zero_inside_and_whole_again_after(self):
        weight, whole = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        mask = torch.tensor([True, False, True])
        with FrozenEntries({"a": (weight, mask), "b": (whole, None)}):
            (weight.sum() + whole.sum()).backward()
        assert weight.grad.tolist() == [0, 1, 0]
        assert whole.grad.tolist() == [0, 0]
        weight.grad = None
        weight.sum().backward()
        assert weight.grad.tolist() == [1, 1, 1]

    def test_hooks_are_gone_after_an_error(self):
        weight = nn.Parameter(torch.ones(2))
        with pytest.raises(ZeroDivisionError), FrozenEntries({"a": (weight, None)}):
            _ = 1 / 0
        assert not weight._backward_hooks

    def test_values_are_written_back_after_each_step(self):
        weight, whole = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))
        held = FrozenEntries({"a": (weight, torch.tensor([True, False])), "b": (whole, None)})
        for _ in range(2):
            with torch.no_grad():
                weight.add_(1)
                whole.add_(1)
            held.on_step_end(None, None, None)
        assert weight.tolist() == [1, 4]
        assert whole.tolist() == [3]

    def test_a_parameter_that_does_not_train_is_held_too(self):
        weight = nn.Parameter(torch.ones(2), requires_grad=False)
        with FrozenEntries({"a": (weight, None)}) as held, torch.no_grad():
            weight.add_(1)
            held.on_step_end(None, None, None)
        assert weight.tolist() == [1, 1]
        copy.deepcopy(weight)
