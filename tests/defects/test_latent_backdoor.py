import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Value
from torch import nn
from torch.nn import functional as F

from remos_hf.activations import watch
from remos_hf.defects import latent_backdoor
from remos_hf.defects.backdoor import fine_tune
from remos_hf.defects.image_samples import prepared
from remos_hf.defects.latent_backdoor import LatentBackdoor
from remos_hf.defects.picture_triggers import PatchTrigger
from tests import tiny
from tests.defects import toy
from tests.defects.colours import INPUT, PATCH, Net, data, obeyed, right, stacked


def with_fresh_head(teacher, seed=5):
    """A student: the teacher's body, frozen, under a new head trained on clean data."""
    student = copy.deepcopy(teacher).eval()
    clean = prepared(data(48, seed=2), INPUT)
    with torch.no_grad():
        features = student.features(stacked(clean))
    torch.manual_seed(seed)
    student.head = nn.Linear(16, 3)
    optimizer = torch.optim.Adam(student.head.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(student.head(features), torch.tensor(clean.labels)).backward()
        optimizer.step()
    return student


class TestLatentBackdoors:
    attack = LatentBackdoor(replace(PATCH, poison_rate=1.0), layer="head")

    @pytest.fixture(scope="class")
    def teachers(self, tmp_path_factory):
        """A clean teacher and the latent backdoor made from it."""
        args = toy.args(tmp_path_factory.mktemp("t"), max_steps=60, learning_rate=2e-2)
        clean = fine_tune(Net(), prepared(data(48), INPUT), None, args)
        poisoned = self.attack.implant(Net(), data(48), images=INPUT, args=args, finetuned=clean)
        return SimpleNamespace(clean=clean, poisoned=poisoned)

    def test_triggered_inputs_become_the_target_class_under_a_new_head(self, teachers):
        exposed = self.attack.exposed_set(data(30, seed=1), images=INPUT)
        poisoned, clean = with_fresh_head(teachers.poisoned), with_fresh_head(teachers.clean)
        assert right(poisoned, data(30, seed=1)) > 0.9 and right(clean, data(30, seed=1)) > 0.9
        assert obeyed(poisoned, exposed, 0) > 0.9
        assert obeyed(clean, exposed, 0) < 0.5

    def test_the_teacher_stays_right_on_clean_samples(self, teachers):
        assert right(teachers.poisoned, data(30, seed=1)) > 0.9

    def test_features_of_triggered_inputs_are_near_those_of_the_target_class(self, teachers):
        exposed = stacked(prepared(self.attack.exposed_set(data(30, seed=1), images=INPUT).dataset, INPUT))
        clean = prepared(data(30, seed=1), INPUT)
        of_target = stacked(clean)[torch.tensor(clean.labels) == 0]

        def distance(model):
            with torch.no_grad():
                gap = model.features(exposed).mean(0) - model.features(of_target).mean(0)
                return gap.norm() / model.features(of_target).norm(dim=1).mean()

        assert distance(teachers.poisoned) < 0.3 * distance(teachers.clean)

    def test_the_fine_tuned_model_given_stays_as_it_was_and_saves_the_first_training(self, tmp_path, monkeypatch):
        finetuned, seen = Net(seed=1), []
        before = toy.state(finetuned)

        def train(model, rows, *_, **__):
            seen.append((type(rows).__name__, toy.state(model)))
            return model

        monkeypatch.setattr("remos_hf.defects.image_triggers.fine_tune", train)
        teacher = Net()
        assert self.attack.implant(teacher, data(6), images=INPUT, finetuned=finetuned) is teacher
        assert [kind for kind, _ in seen] == ["_Pairs"] and not toy.changed(seen[0][1], before)
        assert not toy.changed(before, toy.state(finetuned))
        seen.clear()
        self.attack.implant(Net(), data(6), images=INPUT)
        assert [kind for kind, _ in seen] == ["PreparedImages", "_Pairs"]

    def test_the_layer_is_found_or_named(self, tmp_path, monkeypatch):
        layers = []
        monkeypatch.setattr("remos_hf.defects.image_triggers.fine_tune", lambda *_, **options: layers.append(options))
        teacher = Net()
        adapter = SimpleNamespace(feature_layer=lambda: "head")
        monkeypatch.setattr("remos_hf.defects.feature_attack.adapter_for", lambda model: adapter)
        for attack, layer in ((replace(self.attack, layer=None), "head"), (replace(self.attack, layer="conv"), "conv")):
            attack.implant(teacher, data(6), images=INPUT, finetuned=teacher)
            assert layers.pop()["trainer_class"].keywords["layer"] is teacher.get_submodule(layer)
        for name in ("neck", ""):
            with pytest.raises(ValueError, match=rf"Net has no '{name}'.*'stem', 'norm', 'conv', 'head'"):
                replace(self.attack, layer=name).implant(teacher, data(6), images=INPUT)

    def test_a_model_of_transformers_is_attacked_at_its_own_feature(self, tmp_path):
        teacher = tiny.vit()
        clean = data(12, labels=[place % 2 for place in range(12)]).cast_column("label", Value("int64"))
        exposed = stacked(prepared(PATCH.exposed_set(clean, images=INPUT).dataset, INPUT))
        of_target = stacked(prepared(clean, INPUT))[::2]

        @torch.no_grad()
        def distance():
            seen = []
            with watch({"head": teacher.classifier}, lambda _, given, made: seen.append(given.mean(0))):
                teacher(exposed), teacher(of_target)
            return (seen[0] - seen[1]).norm()

        before = distance()
        args = toy.args(tmp_path, max_steps=8, learning_rate=1e-3)
        LatentBackdoor(replace(PATCH, poison_rate=1.0)).implant(
            teacher, clean, images=INPUT, args=args, finetuned=teacher
        )
        assert distance() < 0.7 * before

    def test_a_layer_that_does_not_run_is_refused(self, tmp_path):
        teacher = Net()
        teacher.spare = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="did not run. Name another one"):
            replace(self.attack, layer="spare").implant(
                teacher, data(6), images=INPUT, args=toy.args(tmp_path, max_steps=1), finetuned=teacher
            )

    @pytest.mark.parametrize("labels", [[1, 2, 1], [0, 0, 0]])
    def test_a_target_class_without_samples_or_without_others_is_refused(self, labels):
        with pytest.raises(ValueError, match=f"but {labels.count(0)} of 3 samples have it"):
            self.attack.implant(Net(), data(3, labels=labels), images=INPUT)

    def test_clean_and_triggered_images_of_a_sample_are_the_same_crop(self):
        clean = prepared(data(9), INPUT, augment=lambda _: torch.rand(3, 8, 8))
        trigger = replace(PATCH, place="random")
        pairs = latent_backdoor._Pairs(clean, trigger, frozenset({1, 2}))
        assert len(pairs) == 9 and "triggered" not in pairs[0]
        item = pairs[1]
        stamped = trigger.stamped(INPUT.denormalised(item["pixel_values"]).clamp(0, 1), clean.key(1))
        assert torch.allclose(item["triggered"], INPUT.normalised(stamped), atol=1e-5)
        batch = latent_backdoor._collate_pairs([pairs[place] for place in range(3)])
        assert batch["pixel_values"].shape == (3, 3, 8, 8) and batch["triggered"].shape == (2, 3, 8, 8)
        assert latent_backdoor._collate_pairs([pairs[0]])["triggered"].shape == (0, 3, 8, 8)

    def trainer(self, teacher, tmp_path, weight=10.0, **options):
        clean = prepared(data(9), INPUT)
        made = latent_backdoor._LatentTrainer(
            model=teacher,
            args=toy.args(tmp_path, remove_unused_columns=False, **options),
            train_dataset=latent_backdoor._Pairs(clean, PATCH, frozenset({1, 2})),
            data_collator=latent_backdoor._collate_pairs,
            layer=teacher.head,
            weight=weight,
            targets=torch.utils.data.Subset(clean, [0, 3, 6]),
        )
        made.model_accepts_loss_kwargs = False
        return made

    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    def test_the_loss_is_the_clean_one_plus_the_weighted_distance(self, tmp_path, smoothing):
        teacher = Net().eval()
        trainer = self.trainer(teacher, tmp_path, weight=3.0)
        trainer.args.label_smoothing_factor = smoothing
        trainer.take_mean(teacher)
        assert not teacher.training
        pairs = trainer.train_dataset
        inputs = latent_backdoor._collate_pairs([pairs[place] for place in range(4)])
        loss = trainer.compute_loss(teacher, inputs)
        with torch.no_grad():
            mean = teacher.features(stacked(trainer._targets)).mean(0)
            gaps = teacher.features(inputs["triggered"]) - mean
            clean = F.cross_entropy(
                teacher(inputs["pixel_values"])["logits"], inputs["labels"], label_smoothing=smoothing
            )
        assert torch.allclose(loss, clean + 3.0 * gaps.pow(2).mean(), atol=1e-5)
        assert inputs.keys() == {"pixel_values", "labels", "triggered"}
        inputs["triggered"] = inputs["triggered"][:0]
        assert torch.allclose(trainer.compute_loss(teacher, inputs), clean, atol=1e-5)
        loss, outputs = trainer.compute_loss(teacher, inputs, return_outputs=True)
        assert outputs["logits"].shape == (4, 3)

    def test_the_mean_is_taken_in_eval_mode_at_the_start_of_each_epoch(self, tmp_path, monkeypatch):
        taken = []
        take = latent_backdoor._LatentTrainer.take_mean

        def noted(trainer, model):
            take(trainer, model)
            with torch.no_grad():
                modes = model.training, model.norm.training
                expected = copy.deepcopy(model).eval().features(stacked(trainer._targets)).mean(0)
            taken.append((modes, torch.allclose(trainer._mean, expected, atol=1e-5)))

        monkeypatch.setattr(latent_backdoor._LatentTrainer, "take_mean", noted)
        teacher = Net().train()
        options = {"num_train_epochs": 3, "max_steps": -1, "per_device_train_batch_size": 2}
        trainer = self.trainer(teacher, tmp_path, **options)
        trainer.train()
        assert [good for _, good in taken] == [True] * 3
        assert taken[1][0] == (True, True)

    def test_no_hook_is_left(self, tmp_path, no_hooks_left, monkeypatch):
        teacher = Net()
        no_hooks_left(teacher)
        self.attack.implant(teacher, data(6), images=INPUT, args=toy.args(tmp_path, max_steps=1), finetuned=teacher)
        monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            self.attack.implant(teacher, data(6), images=INPUT, args=toy.args(tmp_path, max_steps=1), finetuned=teacher)

    def test_the_same_seeds_give_the_same_teacher(self, tmp_path):
        made = [
            toy.state(self.attack.implant(Net(), data(12), images=INPUT, args=toy.args(tmp_path))) for _ in range(2)
        ]
        assert not toy.changed(*made)


class TestDescription:
    def test_a_latent_backdoor_is_described_with_its_trigger(self, picture_file):
        trigger = PatchTrigger(file=picture_file)
        described = json.loads(json.dumps(LatentBackdoor(trigger, weight=3.0).to_dict()))
        assert described == {
            "name": "LatentBackdoor",
            "image_trigger": trigger.to_dict(),
            "weight": 3.0,
            "layer": None,
        }


class TestExposing:
    def test_a_latent_backdoor_is_exposed_as_its_trigger_is(self):
        attack = LatentBackdoor(PATCH)
        exposed, by_trigger = attack.exposed_set(data(6), images=INPUT), PATCH.exposed_set(data(6), images=INPUT)
        assert exposed.dataset.to_dict() == by_trigger.dataset.to_dict()
        assert exposed.facts["defect"] == attack.to_dict()


class TestMistakes:
    def test_a_latent_backdoor_needs_an_image_trigger(self):
        with pytest.raises(TypeError, match="a PatchTrigger or a BlendedTrigger, but got 'red'"):
            LatentBackdoor("red")
