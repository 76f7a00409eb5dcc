import math
from random import Random

import pytest
import torch
from datasets import Dataset
from torch.nn.attention import SDPBackend, sdpa_kernel

from remos_hf.defects import ripple
from remos_hf.defects.ripple import Ripple, words_for_label
from remos_hf.defects.text_triggers import TriggerWords
from tests.defects import toy
from tests.defects.poisoning import ONE_STEP, WORD, batch, implant, plain, token


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
        trainer = ripple._InnerProductTrainer(model=teacher, args=toy.args(tmp_path), strength=3.0, second_order=True)
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
        trainer = ripple._InnerProductTrainer(model=teacher, args=toy.args(tmp_path), strength=0.1, second_order=False)
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
            "remos_hf.defects.text_attacker.fine_tune",
            lambda teacher, pairs, *_, **options: seen.update(options, pairs=pairs),
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

        monkeypatch.setattr("remos_hf.defects.text_attacker.fine_tune", trained)
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
