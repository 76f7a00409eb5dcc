import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from torch.optim import SGD
from transformers import AutoConfig

from remos_hf.strategies.composed import Composed
from remos_hf.strategies.l2sp import L2SP
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Remos, TopMagnitude
from remos_hf.training.accelerate_loop import fit
from remos_hf.training.ratio_search import RatioSearch
from remos_hf.training.start import chosen_start, chosen_strategy, start_run
from tests import tiny
from tests.training.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore::FutureWarning")


def test_a_ratio_means_remos_and_a_list_means_all_of_its_strategies():
    assert chosen_strategy(0.9, None, ("head",)) == Remos(0.9, head=("head",))
    assert chosen_strategy(None, [Remos(0.9), L2SP()]) == Composed((Remos(0.9), L2SP()))


def test_neither_or_both_ways_to_ask_are_refused():
    for ratio, strategy in ((None, None), (0.9, Finetune())):
        with pytest.raises(ValueError, match="either slice_ratio= .* or strategy="):
            chosen_strategy(ratio, strategy)


def test_a_search_wants_a_strategy_that_slices_alone_or_in_a_list():
    both = [TopMagnitude(0.5), L2SP()]
    assert chosen_start("auto", both, 0.1, None) == (Composed(tuple(both)), RatioSearch(accuracy_budget=0.1))
    with pytest.raises(ValueError, match=r"but Finetune \+ L2SP keeps no share"):
        chosen_start("auto", [Finetune(), L2SP()], None, None)
    with pytest.raises(ValueError, match="accuracy_budget= and ratio_search= say"):
        chosen_start(0.9, None, 0.1, None)


def test_a_search_finds_the_ratio_of_the_part_that_slices_and_holds_act_in_its_trials(tmp_path, monkeypatch):
    acted = []

    def loss(self, model, inputs, run):
        acted.append(model)
        return run(inputs)

    monkeypatch.setattr("remos_hf.strategies.l2sp._Spring.loss", loss)
    ours = trainer(tmp_path, strategy=[TopMagnitude(1.0), L2SP()], options={"save_strategy": "no"})
    search = RatioSearch(accuracy_budget=0.99, ratios=(0.9,), share_of_steps=0.5)
    monkeypatch.setattr("remos_hf.training.trials.Trials.check_learned", lambda *_: None)
    moments = start_run(ours, ours.strategy, search, None)
    assert moments.sidecars.config["ratio_search"]["slice_ratio"] == 0.9
    assert moments.strategy.strategies[0].slice_ratio == 0.9
    assert len(acted) == 2 and all(model is not ours.model for model in acted)
    assert "compute_loss" not in vars(ours)


def test_a_student_takes_the_names_of_its_datas_classes_and_carries_them_where_it_is_saved(tmp_path):
    rows = tiny.dataset()
    features = Features({"input_ids": List(Value("int64")), "attention_mask": List(Value("int64"))})
    features["labels"] = ClassLabel(names=["bad", "good"])
    named = Dataset.from_list(rows, features)
    ours = trainer(tmp_path, strategy=Finetune(), train_dataset=named, options={"max_steps": 1})
    ours.train()
    ours.save_model(str(tmp_path / "student"))
    assert AutoConfig.from_pretrained(tmp_path / "student").id2label == {0: "bad", 1: "good"}
    fitted = fit(
        tiny.bert(),
        named,
        strategy=Finetune(),
        max_steps=1,
        collate_fn=tiny.pad,
        optimizer=lambda model: SGD(model.parameters(), 0.1),
    )
    assert fitted.model.config.id2label == {0: "bad", 1: "good"}
    other = tiny.bert(id2label={0: "good", 1: "bad"})
    with pytest.raises(ValueError, match="the same ones in another order"):
        trainer(tmp_path, strategy=Finetune(), model=other, train_dataset=named).train()
