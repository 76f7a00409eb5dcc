import copy

import pytest
import torch

from remos_hf.activations import watch
from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.repair_rows import LADDER, RepairRows
from remos_hf.strategies.student_data import StudentData
from remos_hf.training.profiling_data import trainer_data
from tests import tiny
from tests.scanning import trained
from tests.training.runs import trainer


def data(held_out=None):
    return StudentData(lambda samples: trained.batches(), seed=0, held_out=held_out)


def repaired(model, recipe, given=None):
    given = data() if given is None else given
    recipe.prepare(model, given)
    hold = recipe.hold(model, None)
    before = copy.deepcopy(model.get_input_embeddings().weight.detach())
    hold.finish(model, given)
    after = model.get_input_embeddings().weight.detach()
    changed = (before != after).any(1).nonzero().flatten().tolist()
    return hold.details()["repaired_rows"], before, after, changed


def turned(model, token, label):
    ids = torch.cat([one["input_ids"][one["labels"] != label] for one in trained.batches(4, seed=11)])
    ids = torch.cat([ids[:, :1], torch.full((len(ids), 1), token), ids[:, 1:]], 1)
    with torch.no_grad():
        return (model(input_ids=ids).logits.argmax(-1) == label).float().mean().item()


def test_a_planted_row_gets_an_unseen_row_of_middling_effect_and_turns_nothing_any_more():
    model = trained.student([(45, 1), (52, 0)])
    assert turned(model, 45, 1) > 0.9 and turned(model, 52, 0) > 0.9
    told, before, after, changed = repaired(model, RepairRows(k=2))
    assert turned(model, 45, 1) < 0.1 and turned(model, 52, 0) < 0.1
    assert told["k"] == 2 and 45 in told["rows"]["1"] and 52 in told["rows"]["0"]
    assert set(changed) == {row for some in told["rows"].values() for row in some} <= {*trained.UNSEEN, 3, 4}
    untouched = [row for row in (*trained.UNSEEN, 3, 4) if row not in changed]
    for row in changed:
        assert any(torch.equal(after[row], before[other]) for other in untouched)


def test_a_planted_row_is_found_in_bfloat16_too():
    model = trained.student([(45, 1)])
    asked = []
    with watch({"head": model.classifier}, lambda name, given, made: asked.append(made.dtype)):
        told, *_ = repaired(model, RepairRows(k=1, bf16=True))
    assert told["rows"]["1"] == [45] and turned(model, 45, 1) < 0.1
    assert asked and set(asked) == {torch.bfloat16}


def test_the_seed_decides_what_stands_in():
    rows = [repaired(trained.student([(45, 1)]), RepairRows(k=2, seed=seed))[2] for seed in (1, 1, 2)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_auto_takes_the_most_rows_within_the_budget_of_held_out_accuracy(monkeypatch):
    monkeypatch.setattr("remos_hf.strategies.repair_rows.LADDER", (5, 3, 1))
    clean = trained.batches(2, seed=9)
    told, *_, changed = repaired(trained.student([(45, 1)]), RepairRows(k="auto"), data(lambda: clean))
    assert told["k"] == 5 and told["accuracy_before"] == told["accuracy"]["5"] == 1.0
    # Held-out texts that hold the five strongest rows: their accuracy falls when these are overwritten.
    fragile = [{**one, "input_ids": one["input_ids"].clone()} for one in clean]
    for one in fragile:
        one["input_ids"][:, 1:4], one["labels"] = 45, torch.ones_like(one["labels"])
    told, *_, changed = repaired(trained.student([(45, 1)]), RepairRows(k="auto"), data(lambda: fragile))
    assert told["k"] == 0 and told["rows"] == {} and changed == [] and set(told["accuracy"]) == {"5", "3", "1"}


def test_auto_without_held_out_data_is_refused_before_training():
    with pytest.raises(ValueError, match="eval_dataset"):
        RepairRows(k="auto").prepare(trained.student(), data())


def test_a_trainers_eval_dataset_is_the_held_out_data(tmp_path):
    ours = trainer(tmp_path, strategy=RepairRows())
    found = trainer_data(ours)
    assert sum(len(batch["labels"]) for batch in found.held_out()) == 8  # each once, unshuffled
    ours.eval_dataset = None
    assert trainer_data(ours).held_out is None


def test_rows_that_the_head_is_tied_to_are_refused_before_training():
    model = tiny.llama()
    model.lm_head.weight = model.get_input_embeddings().weight
    with pytest.raises(UnsupportedModelError, match="tied to the input embeddings"):
        RepairRows().prepare(model, data())
    with pytest.raises(TypeError, match="no input embeddings"):
        RepairRows().prepare(tiny.mlp(), data())


def test_a_student_that_cannot_be_scanned_stays_as_it_is_and_the_record_says_why():
    nothing = StudentData(lambda samples: [{**one, "labels": 1 - one["labels"]} for one in trained.batches(2)])
    told, *_, changed = repaired(trained.student(), RepairRows(k=2), nothing)
    assert changed == [] and told["k"] == 0 and "at most one label" in told["why"]


def test_no_more_rows_are_overwritten_than_others_can_stand_in_for():
    told, *_, changed = repaired(trained.student(), RepairRows(k=64))
    unseen = len(trained.UNSEEN) + 2
    assert told["k"] == unseen // 4 and len(changed) <= unseen // 2
    sees_all = torch.arange(60).repeat(2, 1)[:, :30]
    batches = [{"input_ids": ids, "labels": torch.tensor([0, 1])} for ids in (sees_all, sees_all + 30)]
    everything = StudentData(lambda samples: [*trained.batches(), *batches])
    told, *_, changed = repaired(trained.student(), RepairRows(), everything)
    assert changed == [] and "shows every token" in told["why"]


def test_values_that_no_run_could_use_are_refused():
    for k in (0, -1, True, 2.5, "most"):
        with pytest.raises(ValueError, match="k is the number of rows"):
            RepairRows(k=k)
    with pytest.raises(ValueError, match="accuracy_budget"):
        RepairRows(accuracy_budget=1.0)
    assert sorted(LADDER, reverse=True) == list(LADDER)
