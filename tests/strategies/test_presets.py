import math

import pytest
import torch
from transformers import TrainingArguments

from remos_hf.strategies import Delta, Renofeation
from remos_hf.strategies.composed import strategy_from_dict
from remos_hf.strategies.presets import PRESETS, Phase, Preset
from tests import tiny
from tests.training.runs import arguments, trainer

ALL = [(name, kind) for name, kinds in PRESETS.items() for kind in kinds]


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_every_preset_says_where_it_stands_and_how_it_differs_and_trains(name, kind, tmp_path):
    preset = PRESETS[name][kind]
    assert len(preset.source) > 20 and len(preset.differs) > 20
    assert strategy_from_dict(preset.strategy.to_dict()) == preset.strategy
    given = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **preset.arguments())
    assert (given.max_steps, given.per_device_train_batch_size) == (preset.steps, 64) and given.max_grad_norm == 0
    optimizer, scheduler = preset.optimizers(tiny.mlp())
    (group,) = optimizer.param_groups
    assert group["momentum"] == preset.momentum and group["weight_decay"] == preset.weight_decay
    assert scheduler.get_last_lr() == [preset.phases[0].learning_rate]


def test_paper_and_artifact_are_there_for_each_and_are_not_the_same():
    assert {"finetune", "retrain", "mag_prune", "delta", "renofeation"} <= set(PRESETS)
    assert all(
        set(kinds) == {"paper", "artifact"} and kinds["paper"] != kinds["artifact"] for kinds in PRESETS.values()
    )


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
