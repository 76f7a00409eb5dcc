import inspect
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from remos_hf.defects.backdoor import TEXT_RECIPE, Backdoor, Trigger, fine_tune
from remos_hf.defects.samples import tokenize
from tests.defects import toy


class Line(nn.Module):
    """A classifier of points."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)

    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values)
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


class Noted(Trainer):
    """Keeps its arguments and its first batch, and trains nothing."""

    made = None

    def train(self):
        type(self).made = SimpleNamespace(
            args=self.args, batch=next(iter(self.get_train_dataloader())), callbacks=self.callback_handler.callbacks
        )


def rows(count=16):
    return tokenize(toy.data(count), toy.tokenizer(), ("text",))


def points(count=8):
    return [{"pixel_values": torch.tensor([n / 8, 1 - n / 8]), "labels": int(n > 4)} for n in range(count)]


class TestFineTuning:
    def test_nothing_is_written_but_where_the_arguments_say(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "out").mkdir()
        fine_tune(toy.model(), rows(), toy.tokenizer(), toy.args("out", max_steps=1))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_updates_do_not_grow_with_accumulation(self, tmp_path):
        # As Trainer's would for models that take num_items_in_batch but ignore it (transformers #47688).
        options = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        made = [
            toy.state(
                fine_tune(
                    toy.model(),
                    rows(16),
                    toy.tokenizer(),
                    toy.args(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options),
                )
            )
            for size, steps in ((16, 1), (4, 4))
        ]
        assert all(made[0][name].allclose(made[1][name], atol=1e-6) for name in made[0])

    def test_the_model_is_changed_in_place_and_left_in_eval_mode(self, tmp_path):
        model = Line()
        before = toy.state(model)
        assert fine_tune(model, points(), None, toy.args(tmp_path)) is model
        assert toy.changed(before, toy.state(model)) and not model.training

    def test_without_a_tokenizer_samples_of_one_shape_are_stacked(self, tmp_path):
        args = toy.args(tmp_path, per_device_train_batch_size=3)
        fine_tune(Line(), points(), None, args, trainer_class=Noted)
        assert Noted.made.batch["pixel_values"].shape == (3, 2)
        assert Noted.made.batch["labels"].dtype == torch.int64

    def test_texts_are_padded_to_the_longest_of_their_batch(self, tmp_path):
        fine_tune(toy.model(), rows(), toy.tokenizer(), toy.args(tmp_path), trainer_class=Noted)
        held = Noted.made.batch["attention_mask"].sum(1)
        assert held.min() < held.max() == Noted.made.batch["input_ids"].shape[1]

    def test_a_collator_of_the_callers_own_gets_every_column(self, tmp_path):
        data = Dataset.from_dict({"pixel_values": [[0.0, 1.0]], "labels": [1], "extra": [7]})
        seen = []

        def collate(batch):
            seen.extend(batch)
            return {"pixel_values": torch.zeros(1, 2), "labels": torch.tensor([1])}

        fine_tune(Line(), data, None, toy.args(tmp_path, max_steps=1), data_collator=collate)
        assert set(seen[0]) == {"pixel_values", "labels", "extra"}

    def test_the_callers_arguments_stay_as_they_were(self, tmp_path):
        args = toy.args(tmp_path, max_steps=1)
        before = args.to_dict()
        fine_tune(Line(), points(), None, args)
        assert args.to_dict() == before and args.remove_unused_columns

    def test_without_arguments_the_recipe_is_used(self):
        fine_tune(toy.model(), rows(), toy.tokenizer(), None, trainer_class=Noted)
        made = Noted.made.args
        assert (made.learning_rate, made.per_device_train_batch_size, made.max_steps) == (2e-5, 16, 5000)
        fine_tune(toy.model(), rows(), toy.tokenizer(), None, trainer_class=Noted, recipe={"max_steps": 7})
        assert Noted.made.args.max_steps == 7 and TEXT_RECIPE["max_steps"] == 5000

    def test_callbacks_are_added_to_the_trainers(self, tmp_path):
        class Mine(TrainerCallback):
            pass

        fine_tune(Line(), points(), None, toy.args(tmp_path), callbacks=[Mine()], trainer_class=Noted)
        assert any(isinstance(one, Mine) for one in Noted.made.callbacks) and len(Noted.made.callbacks) > 1


class Shown(Trigger):
    """A trigger of points, with an attacker that notes what it is asked."""

    asked: ClassVar[list] = []

    def attacker(self, teacher, dataset, *, args=None, finetuned=None, **reading):
        self.asked.append((teacher, dataset, args, finetuned, reading))
        return SimpleNamespace(poisoned=lambda: "poisoned", tune=lambda model, samples: (model, samples))

    def exposed_for(self, backdoor, dataset, **reading):
        return backdoor, dataset, reading


class Named(Backdoor):
    """An attack that names its trigger."""

    @property
    def trigger(self):
        return Shown()

    def attack(self, teacher, attacker):
        return teacher, attacker.poisoned(), "by the attack"


class TestComposition:
    def test_a_trigger_alone_is_implanted_by_poisoning_data(self):
        assert Shown().trigger == Shown()
        assert Shown().implant("teacher", "data", args="args", finetuned="tuned", way=1) == ("teacher", "poisoned")
        assert Shown.asked.pop() == ("teacher", "data", "args", "tuned", {"way": 1})

    def test_an_attack_implants_with_the_samples_of_the_trigger_that_it_names(self):
        assert Named().implant("teacher", "data") == ("teacher", "poisoned", "by the attack")

    def test_it_is_exposed_by_its_trigger_under_its_own_name(self):
        given = {"teacher": 1, "cache": "somewhere", "workers": 3, "way": 1}
        assert Named().exposed_set("data", **given) == (Named(), "data", {"way": 1})

    @pytest.mark.parametrize(("kind", "parts"), [(Backdoor, {"trigger", "attack"}), (Trigger, {"attacker"})])
    def test_a_backdoor_must_say_what_its_parts_are(self, kind, parts):
        assert inspect.isabstract(kind) and parts <= kind.__abstractmethods__
