import math
from dataclasses import replace

import pytest
import torch
from transformers import TrainingArguments

from remos_hf import ImageClassifier
from remos_hf.strategies import AdversarialTraining, Delta, FeatureLwF, Neft, Renofeation
from remos_hf.strategies.composed import strategy_from_dict
from remos_hf.strategies.presets import PRESETS, Phase, Preset
from remos_hf.training.accelerate_loop import fit
from tests import tiny
from tests.strategies.residual_nets import Net
from tests.training.runs import arguments, trainer

ALL = [(name, kind) for name, kinds in PRESETS.items() for kind in kinds]


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_every_preset_says_where_it_stands_and_how_it_differs_and_is_arguments_and_an_optimizer(name, kind, tmp_path):
    preset = PRESETS[name][kind]
    assert len(preset.source) > 20 and len(preset.differs) > 20
    assert strategy_from_dict(preset.strategy.to_dict()) == preset.strategy
    given = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **preset.arguments())
    assert (given.max_steps, given.per_device_train_batch_size) == (preset.steps, preset.batch_size)
    assert given.max_grad_norm == 0
    optimizer, scheduler = preset.optimizers(tiny.mlp())
    (group,) = optimizer.param_groups
    assert group["momentum"] == preset.momentum and group["weight_decay"] == preset.weight_decay
    assert scheduler.get_last_lr() == [preset.rate(0)]


def few_images():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": place % 4} for place in range(16)]


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_every_preset_trains_in_as_few_steps_as_it_is_cut_to(name, kind):
    preset = PRESETS[name][kind].within(6)
    strategy = preset.strategy
    if isinstance(strategy, (AdversarialTraining, Neft)):  # a small net has fewer units
        strategy = replace(strategy, k=2)
    if isinstance(strategy, AdversarialTraining):
        strategy = replace(strategy, mean=(0.5,) * 3, std=(0.25,) * 3)
    model = ImageClassifier(Net(), head=("head",))
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    fitted = fit(
        model, few_images(), strategy=strategy, optimizer=preset.optimizer, scheduler=preset.scheduler,
        max_steps=preset.steps, batch_size=8, progress=False,
    )  # fmt: skip
    rates = [one["learning_rate"] for one in fitted.history if "loss" in one]
    assert fitted.steps == 6 and rates == pytest.approx([preset.rate(step) for step in range(6)])
    moved = {name for name, one in fitted.model.named_parameters() if not torch.equal(one, before[name])}
    assert "body.head.weight" in moved and all(one.isfinite().all() for one in fitted.model.parameters())
    assert isinstance(strategy, Neft) == (len(moved) < len(before))


def test_paper_and_artifact_are_there_for_each_and_are_not_the_same():
    assert {"finetune", "retrain", "mag_prune", "delta", "renofeation", "adversarial_training", "neft"} <= set(PRESETS)
    assert set(PRESETS["feature_lwf"]) == {"artifact"}  # no paper gives its values
    both = [kinds for name, kinds in PRESETS.items() if name != "feature_lwf"]
    assert all(set(kinds) == {"paper", "artifact"} and kinds["paper"] != kinds["artifact"] for kinds in both)


@pytest.mark.parametrize("name", ["adversarial_training", "neft"])
def test_cartl_warms_up_for_an_epoch_and_multiplies_its_rate_by_a_fifth_three_times(name):
    paper = PRESETS[name]["paper"]
    epoch = -(-50_000 // paper.batch_size)
    assert paper.steps == 100 * epoch and paper.rate(0) == 0 and paper.rate(epoch // 2) == pytest.approx(0.05, rel=0.01)
    for number, rate in ((1, 0.1), (39, 0.1), (40, 0.02), (69, 0.02), (70, 0.004), (90, 0.0008), (99, 0.0008)):
        assert paper.rate(number * epoch) == pytest.approx(rate)
    assert paper.phases == PRESETS[name]["artifact"].phases


def test_the_two_parts_of_cartl_share_k_and_are_what_slides_and_code_say():
    teachers, students = PRESETS["adversarial_training"], PRESETS["neft"]
    assert {one.strategy.k for one in (*teachers.values(), *students.values())} == {6}
    assert [teachers[kind].strategy.reduction for kind in ("paper", "artifact")] == ["mean", "sum"]
    slides, code = (students[kind].strategy for kind in ("paper", "artifact"))
    assert (slides.mix, slides.head_start, slides.extractor_statistics) == (False, "keep", "reuse")
    assert (code.mix, code.head_start, code.extractor_statistics) == (True, "uniform", "update")
    assert slides.submodel_affine == code.submodel_affine == "freeze" and slides.beta == code.beta == 0.4


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_a_preset_is_cut_to_as_many_steps_as_asked_for_each_phase_one_at_least(name, kind):
    preset = PRESETS[name][kind]
    for steps in (len(preset.phases), 7, 100, 3 * preset.steps):
        short = preset.within(steps)
        assert short.steps == steps and all(one.steps > 0 for one in short.phases)
    with pytest.raises(ValueError, match=f"but got {len(preset.phases) - 1}"):
        preset.within(len(preset.phases) - 1)
    assert preset.within(preset.steps) == preset


def test_what_begins_within_a_run_begins_within_a_shorter_one():
    assert PRESETS["renofeation"]["paper"].within(2).strategy.average_start == 1
    lwf = PRESETS["feature_lwf"]["artifact"]
    assert isinstance(lwf.strategy, FeatureLwF) and lwf.strategy.head_steps == 25 * 391
    assert lwf.within(520).strategy.head_steps == 250 and lwf.within(1).strategy.head_steps == 0


def test_the_two_phases_of_renofeation_are_a_cosine_and_a_constant_rate_whose_500th_steps_are_averaged():
    paper = PRESETS["renofeation"]["paper"]
    assert [paper.rate(step) for step in (0, 45_000, 90_000, 119_999)] == pytest.approx([1e-2, 5e-3, 5e-3, 5e-3])
    assert paper.rate(89_999) < 1e-9 and paper.steps == 120_000
    recipe = paper.strategy
    assert (recipe.average_start, recipe.average_every, recipe.average_decay) == (90_000, 500, None)
    short = paper.within(400)
    assert [one.steps for one in short.phases] == [300, 100] and short.steps == 400
    assert (short.strategy.average_start, short.strategy.average_every) == (300, 2)
    assert (paper.steps - 90_000) // 500 == 60  # the snapshots of the published run


def test_a_rate_drops_to_a_tenth_after_two_thirds():
    drop = Phase(100, 0.5, "drop")
    assert (drop.rate(66), drop.rate(67)) == (0.5, 0.05) and Phase(10, 1.0, "cosine").rate(5) == pytest.approx(0.5)


def test_the_trainer_and_fits_scheduler_follow_the_phases(tmp_path):
    preset = Preset(
        Renofeation(average_start=3, average_every=1), (Phase(3, 0.1, "cosine"), Phase(2, 0.02)), 0.0, "", ""
    )
    model, seen = tiny.bert(), []
    ours = trainer(tmp_path, model=model, strategy=preset.strategy, optimizers=preset.optimizers(model),
                   options={**preset.arguments(), "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 4})  # fmt: skip # noqa: E501
    ours.train()
    seen = [one["learning_rate"] for one in ours.state.log_history if "learning_rate" in one]
    cosine = [0.1 * 0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3)]
    assert any(seen == pytest.approx(([*cosine, 0.02, 0.02, 0.02])[start : start + 5]) for start in (0, 1))
    assert ours.moments.hold.averaged == 2
    loop = torch.optim.SGD(model.parameters(), 0.1)
    assert preset.scheduler(loop, 5).get_last_lr() == [0.1]
    assert arguments(tmp_path).max_steps == 4


def test_the_deltas_have_the_reductions_that_their_weights_are_for():
    paper, artifact = (PRESETS["delta"][kind].strategy for kind in ("paper", "artifact"))
    assert paper == Delta(0.01) and paper.distance.mean_over == ("positions",)
    assert artifact.weight == 0.5 and set(artifact.distance.mean_over) == {"samples", "channels", "positions"}
