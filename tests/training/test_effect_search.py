import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate import debug_launcher
from torch import nn
from transformers import Trainer, TrainingArguments

from remos_hf.errors import RemosError
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Preparation, Strategy
from remos_hf.strategies.composed import Composed
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Random, TopMagnitude
from remos_hf.strategies.subspace import Subspace
from remos_hf.training.attach import attach_remos
from remos_hf.training.effect_search import EffectSearch, asks_for_search, knob_of
from remos_hf.training.ratio_search import RatioSearch
from remos_hf.training.trainer import RemosTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot tell.*:UserWarning")


class Looker(nn.Module):
    """Tells dark images from bright ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(36, 24), nn.Linear(24, 2)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(pixel_values.flatten(1)).relu())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def rows(count, seed, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    images = torch.randn(count, 1, 6, 6, generator=generator) * noise + (2 * labels - 1)[:, None, None, None] * 0.5
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]


@cache
def teacher():
    model, samples = Looker(), rows(64, 3)
    images = torch.stack([row["pixel_values"] for row in samples])
    labels = torch.tensor([row["labels"] for row in samples])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(images, labels)["loss"].backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@dataclass(frozen=True)
class Washed(Strategy):
    """Keeps all of what a teacher was taught at .9 and above, just the public weights below, and nothing below .5."""

    energy: float | str
    head: tuple[str, ...] = ("head",)
    started: ClassVar[list] = []

    def __post_init__(self):
        if self.energy != "auto" and not 0 < self.energy <= 1:
            raise ValueError(f"energy in (0, 1], but got {self.energy}")

    def prepare(self, student, data):
        self.started.append(self.energy)
        with torch.no_grad():
            if self.energy < 0.9:
                student.body.weight.copy_(teacher()["body.weight"])
                student.body.bias.copy_(teacher()["body.bias"])
            if self.energy < 0.5:
                student.body.weight.zero_()
                student.body.bias.zero_()
        return Preparation(details={"washed": self.energy})


SEARCH = EffectSearch(settings=(0.95, 0.8, 0.3), num=2, implant_steps=60, learning_rate=1e-2, accuracy_budget=0.05)


def trainer(folder, kind=RemosTrainer, options=None, noise=0.5, **given):
    if kind is not Trainer:
        given = {"strategy": Washed("auto"), "ratio_search": SEARCH, **given}
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=4, learning_rate=1e-3,
        per_device_train_batch_size=8, per_device_eval_batch_size=32, optim="sgd",
        **{"save_strategy": "no", **(options or {})},
    )  # fmt: skip
    model = Looker()
    model.load_state_dict(teacher())
    train, held_out = rows(64, 1, noise), rows(100, 2, noise)
    return kind(model=model, args=args, train_dataset=train, eval_dataset=held_out, **given)


def record_of(ours):
    return ours.sidecars.config["effect_search"]


def test_the_mildest_setting_that_loses_own_triggers_is_chosen_and_no_stronger_one_is_tried(tmp_path):
    ours = trainer(tmp_path)
    ours.train()
    record = record_of(ours)
    assert ours.strategy == Washed(0.8) and record["setting"] == 0.8 and record["knob"] == "energy"
    assert ours.sidecars.config["start"] == {"washed": 0.8}
    plain, kept, lost = record["curve"]
    assert [one["setting"] for one in record["curve"]] == [None, 0.95, 0.8]
    for one in (plain, kept):
        assert one["own"]["value"] - one["untaught"]["value"] > 0.3
    assert lost["own"]["value"] - lost["untaught"]["value"] <= 0.05
    assert lost["own"]["num_samples"] > 30 and lost["untaught"]["low"] <= lost["untaught"]["value"]
    assert len(record["triggers"]) == 2 and plain["steps"] == 2 and record["planned_steps"] == 4
    assert json.loads(json.dumps(record)) == record


def test_no_setting_that_does_both_is_an_error_that_shows_the_curve_and_leaves_the_model_whole(tmp_path):
    ours = trainer(tmp_path, ratio_search=dataclasses.replace(SEARCH, settings=(0.95, 0.3)))
    told = r"No energy .*plain fine-tuning 1\.0.* own triggers turn \d+ of .*energy 0\.95 .*energy 0\.3 .*not measured"
    with pytest.raises(RemosError, match=told):
        ours.train()
    assert all(torch.equal(value, teacher()[name]) for name, value in ours.model.state_dict().items())
    assert ours.sidecars is None


def test_the_energy_of_a_subspace_is_found_where_own_triggers_lie_outside_what_the_data_uses(tmp_path):
    search = dataclasses.replace(SEARCH, settings=(1.0, 0.97))
    ours = trainer(tmp_path, noise=0.02, strategy=Subspace("auto", head=("head",)), ratio_search=search)
    ours.train()
    assert ours.strategy.energy == record_of(ours)["setting"] == 0.97
    assert ours.sidecars.config["start"]["subspace"]["layers"]["body"]["rank"] == 1
    with pytest.raises(ValueError, match="energy='auto' is searched by RemosTrainer"):
        Subspace("auto").prepare(Looker(), None)


def test_triggers_that_plain_fine_tuning_loses_choose_nothing(tmp_path):
    ours = trainer(tmp_path, ratio_search=dataclasses.replace(SEARCH, implant_steps=1, learning_rate=1e-6))
    with pytest.raises(RemosError, match="Plain fine-tuning loses own triggers by itself .* Teach them longer"):
        ours.train()


def test_settings_that_no_strategy_takes_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"energy in \(0, 1\], but got 1\.5"):
        trainer(tmp_path, ratio_search=dataclasses.replace(SEARCH, settings=(0.95, 1.5))).train()


def test_resuming_never_searches_again_and_another_search_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, options=options)
    whole.train()
    Washed.started.clear()
    resumed = trainer(tmp_path, options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not Washed.started and record_of(resumed) == record_of(whole)
    states = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    other = trainer(tmp_path, options=options, ratio_search=dataclasses.replace(SEARCH, num=3))
    with pytest.raises(RemosError, match="searched by .*'num': 2.* of energy, but .*'num': 3"):
        other.train(resume_from_checkpoint=True)
    whole.save_model(tmp_path / "saved")
    assert Sidecars.load(tmp_path / "saved").config["effect_search"] == record_of(whole)


def test_an_attached_trainer_and_a_part_of_a_list_are_searched_as_well(tmp_path):
    theirs = trainer(tmp_path, kind=Trainer)
    sidecars = attach_remos(theirs, strategy=[Finetune(), Washed("auto")], ratio_search=SEARCH)
    assert sidecars.config["effect_search"]["setting"] == 0.8
    assert sidecars.config["strategy"]["strategies"][1]["energy"] == 0.8


def test_a_slice_ratio_is_searched_by_effect_where_that_is_asked_for(tmp_path):
    search = dataclasses.replace(SEARCH, settings=(0.999, 0.9))
    ours = trainer(tmp_path, slice_ratio="auto", strategy=TopMagnitude(1.0, head=("head",)), ratio_search=search)
    ours.train()
    assert ours.strategy.slice_ratio == record_of(ours)["setting"] == 0.9  # own triggers are the largest weights here
    assert record_of(ours)["knob"] == "slice_ratio"


@pytest.mark.parametrize(
    ("strategy", "found"),
    [
        (Random(0.5), (0, "slice_ratio")),
        (Composed((Random(0.5), Washed("auto"))), (1, "energy")),
        (Composed((Finetune(), Washed(0.5))), (1, "energy")),
    ],
)
def test_the_field_that_is_searched_is_found(strategy, found):
    assert knob_of(strategy) == found


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"strategy": Finetune()}, r"settles one field of energy, slice_ratio, k, but Finetune has none"),
        ({"strategy": Composed((Random(0.5), Washed(0.9)))}, r"has Random\(slice_ratio=\) and Washed\(energy=\)"),
        ({"ratio_search": RatioSearch()}, "For energy='auto' pass ratio_search=EffectSearch"),
        ({"slice_ratio": "auto"}, "keeps no share"),
        ({"slice_ratio": "auto", "strategy": Composed((Random(0.5), Washed("auto")))}, "One setting .* energy='auto'"),
        ({"slice_ratio": 0.9, "strategy": None}, r"but got slice_ratio=0\.9"),
        ({"accuracy_budget": 0.1}, "Pass either"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(tmp_path, given, told):
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path, **given)


def test_auto_is_searched_by_effect_unless_said_otherwise(tmp_path):
    ours = trainer(tmp_path, ratio_search=None, accuracy_budget=0.1)
    assert ours.ratio_search == EffectSearch(accuracy_budget=0.1)
    assert asks_for_search(Washed("auto")) and not asks_for_search(Washed(0.9))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"accuracy_budget": 0}, "accuracy_budget is above 0 .* but got 0"),
        ({"effect_budget": math.nan}, "effect_budget .* but got nan"),
        ({"share_of_steps": 1.1}, "share_of_steps"),
        ({"num": 0}, "num is a whole number, at least 1, but got 0"),
        ({"settings": ()}, "settings are numbers to try"),
        ({"settings": (0.9, 0.9)}, "each once"),
    ],
)
def test_settings_that_no_search_could_use_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        EffectSearch(**wrong)


def _search_on_each_process(folder):
    ours = trainer(Path(folder))
    ours.train()
    rank = torch.distributed.get_rank()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(record_of(ours)))
    torch.distributed.barrier()


def test_two_processes_choose_the_same(tmp_path):
    debug_launcher(_search_on_each_process, args=(str(tmp_path),), num_processes=2)
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one == other and one["setting"] == 0.8


def test_a_search_is_told_by_what_is_clean():
    # Nothing that shows a defect can be given, so nothing can be chosen by it.
    assert set(EffectSearch().to_dict()) == {
        *("accuracy_budget", "effect_budget", "settings", "num", "implant_steps", "batch_size", "learning_rate"),
        *("share_of_steps", "failures_in_a_row", "metric"),
    }
