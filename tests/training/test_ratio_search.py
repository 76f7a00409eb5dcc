import json
import logging
import math
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from remos_hf.errors import NonFiniteError, RemosError
from remos_hf.evaluation.measures import Rate
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies import student_data
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Remos, TopMagnitude
from remos_hf.training import ratio_search
from remos_hf.training.attach import attach_remos
from remos_hf.training.held_out import samples_to_tell
from remos_hf.training.ratio_search import RatioSearch
from remos_hf.training.trainer import RemosTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore:.*cannot tell.*:UserWarning")


class Reader(nn.Module):
    """Tells the sign of x6 + x7, which it reads by its seventh and eighth largest weights of 64.

    Resetting the largest weights costs nothing down to a slice ratio of 58/64, a quarter of the samples at 57/64, and
    everything from 56/64 on, as long as it learns little.
    """

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body, self.dropout, self.head = nn.Linear(8, 8, bias=False), nn.Dropout(dropout), nn.Linear(8, 2)
        with torch.no_grad():
            self.body.weight.copy_(torch.diag(2 - 0.1 * torch.arange(8)))
            self.head.weight.zero_()
            self.head.weight[1, 6:] = 1 / self.body.weight.diagonal()[6:]
            self.head.bias.copy_(torch.tensor([0.0, 0.001]))

    def forward(self, inputs, labels=None):
        logits = self.head(self.dropout(self.body(inputs)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def rows(count, seed):
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return [{"inputs": row, "labels": int(row[6] + row[7] > 0)} for row in inputs]


RULE = TopMagnitude(1.0, head=("head",))
RATIOS = (0.95, 0.89, 0.8, 0.7)


def arguments(folder, **options):
    defaults = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 4, "save_strategy": "no"}
    defaults |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 32, "learning_rate": 1e-4}
    return TrainingArguments(output_dir=str(folder), **{**defaults, "optim": "sgd", **options})


def trainer(folder, kind=RemosTrainer, model=None, train=None, held_out=None, options=None, **given):
    if kind is not Trainer and "slice_ratio" not in given:
        given = {"slice_ratio": "auto", "strategy": RULE, **given}
        if "accuracy_budget" not in given:
            given.setdefault("ratio_search", RatioSearch(ratios=RATIOS))
    return kind(
        model=Reader() if model is None else model,
        args=arguments(folder, **(options or {})),
        train_dataset=rows(40, 1) if train is None else train,
        eval_dataset=rows(100, 2) if held_out is None else held_out,
        **given,
    )


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def accuracy_of(model, samples):
    model.eval()
    with torch.no_grad():
        logits = model(torch.stack([row["inputs"] for row in samples]))["logits"]
    return (logits.argmax(-1) == torch.tensor([row["labels"] for row in samples])).double().mean().item()


def search_of(ours):
    return ours.sidecars.config["ratio_search"]


# What is chosen


@pytest.mark.parametrize(("budget", "chosen", "tried"), [(0.02, 0.95, 3), (0.4, 0.89, 4), (0.7, 0.7, 4)])
def test_the_smallest_ratio_within_the_budget_is_chosen(tmp_path, budget, chosen, tried):
    ours = trainer(tmp_path, ratio_search=RatioSearch(accuracy_budget=budget, ratios=RATIOS))
    ours.train()
    assert ours.strategy == TopMagnitude(chosen, head=("head",))
    assert ours.relevant_slice.slice_ratio == chosen
    record = search_of(ours)
    assert record["slice_ratio"] == chosen and record["accuracy_budget"] == budget
    assert [point["slice_ratio"] for point in record["curve"]] == [1.0, *RATIOS[:tried]]


def test_the_curve_holds_what_each_trial_measured(tmp_path):
    ours = trainer(tmp_path)
    ours.train()
    plain, *others = search_of(ours)["curve"]
    assert plain["accuracy"] == 1 and plain["lost"] == 0 and plain["steps"] == 2 and plain["seconds"] > 0
    rate = Rate.of(100, 100)
    assert (plain["low"], plain["high"], plain["num_samples"]) == (rate.low, rate.high, 100)
    assert [point["within_budget"] for point in others] == [True, False, False]
    assert others[1]["lost"] == pytest.approx(1 - others[1]["accuracy"]) and 0.1 < others[1]["lost"] < 0.4
    assert others[1]["low"] < others[1]["accuracy"] < others[1]["high"]
    assert json.loads(json.dumps(search_of(ours))) == search_of(ours)


def test_one_bad_trial_does_not_end_the_search_unless_asked_to(tmp_path):
    once = trainer(tmp_path, ratio_search=RatioSearch(ratios=RATIOS, failures_in_a_row=1))
    once.train()
    assert [point["slice_ratio"] for point in search_of(once)["curve"]] == [1.0, 0.95, 0.89]


def test_ratios_are_tried_from_the_largest_down_whatever_their_order():
    assert RatioSearch(ratios=[0.5, 0.9, 0.9, 0.7]).ratios == (0.9, 0.7, 0.5)


def test_the_student_is_that_of_the_chosen_ratio_bit_for_bit(tmp_path):
    # Trials take nothing from the random state, and leave no trace in the model that is trained.
    found = trainer(tmp_path / "a", model=Reader(dropout=0.3), options={"learning_rate": 0.1})
    found.train()
    known = trainer(tmp_path / "b", model=Reader(dropout=0.3), options={"learning_rate": 0.1},
                    slice_ratio=None, strategy=found.strategy)  # fmt: skip
    known.train()
    assert same(weights(found.model), weights(known.model))
    assert found.relevant_slice == known.relevant_slice


def test_a_trial_of_full_length_measures_what_the_student_will_have(tmp_path):
    # The same start, the same order of samples, the same dropout, the same schedule.
    held_out = rows(300, 2)
    options = {"learning_rate": 1.0, "max_steps": -1, "num_train_epochs": 2, "warmup_steps": 3}
    search = RatioSearch(accuracy_budget=0.3, ratios=(0.8,), share_of_steps=1)
    for seed in range(3):
        torch.manual_seed(seed)
        ours = trainer(tmp_path / str(seed), model=Reader(dropout=0.5), held_out=held_out, options=options,
                       ratio_search=search)  # fmt: skip
        torch.manual_seed(seed)
        ours.train()
        trial = search_of(ours)["curve"][1]
        assert trial["steps"] == ours.state.global_step == 10
        assert trial["accuracy"] == accuracy_of(ours.model, held_out)


def test_trials_are_no_longer_than_they_should_be(tmp_path):
    seen = []

    class Counting(RemosTrainer):
        def training_step(self, *given, **named):
            seen.append(self.args.warmup_steps)
            return super().training_step(*given, **named)

    options = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2, "warmup_steps": 6}
    search = RatioSearch(ratios=(0.95,), share_of_steps=0.3)
    ours = trainer(tmp_path, kind=Counting, options=options, ratio_search=search)
    ours.train()
    # 40 samples make 5 batches and 3 steps an epoch: 9 planned, of which 0.3 is 2.7.
    assert search_of(ours)["planned_steps"] == 9
    assert [point["steps"] for point in search_of(ours)["curve"]] == [3, 3]
    assert seen[:10] == [2] * 10 and seen[10:] == [6] * 15


def test_the_coverage_is_taken_once_and_every_ratio_is_cut_by_it(tmp_path, monkeypatch):
    taken = []

    def profiled(*given, **named):
        taken.append(original(*given, **named))
        return taken[-1]

    original = student_data.profile_coverage
    monkeypatch.setattr(student_data, "profile_coverage", profiled)
    search = RatioSearch(accuracy_budget=0.9, ratios=RATIOS)
    ours = trainer(tmp_path / "a", strategy=Remos(1.0, head=("head",)), ratio_search=search)
    ours.train()
    assert len(taken) == 1 and ours.profile is taken[0]
    known = trainer(tmp_path / "b", slice_ratio=None, strategy=Remos(0.7, head=("head",)))
    known.train()
    assert ours.profile == known.profile and ours.relevant_slice == known.relevant_slice
    assert same(weights(ours.model), weights(known.model))


def test_auto_without_a_strategy_is_remos(tmp_path):
    ours = trainer(tmp_path, slice_ratio="auto")
    assert type(ours.strategy) is Remos
    assert ours.ratio_search == RatioSearch() and ours.ratio_search.accuracy_budget == 0.02


def test_an_attached_trainer_finds_the_ratio_and_the_student_of_remos_trainer(tmp_path):
    ours = trainer(tmp_path / "a")
    ours.train()
    theirs = trainer(tmp_path / "b", kind=Trainer)
    sidecars = attach_remos(theirs, slice_ratio="auto", strategy=RULE, ratio_search=RatioSearch(ratios=RATIOS))
    theirs.train()
    assert sidecars.config["ratio_search"]["slice_ratio"] == 0.95
    assert same(weights(ours.model), weights(theirs.model))


def test_trials_use_the_trainers_own_optimizer(tmp_path):
    class Frozen(RemosTrainer):
        def create_optimizer(self, *given):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
            return self.optimizer

    # A learning rate that would spoil every trial, if it were used.
    ours = trainer(tmp_path, kind=Frozen, options={"learning_rate": 1e3, "lr_scheduler_type": "constant"})
    ours.train()
    assert search_of(ours)["curve"][0]["accuracy"] == 1


def test_adapters_are_tried_as_they_will_be_trained(tmp_path):
    from peft import LoraConfig

    seen = []

    class Watching(RemosTrainer):
        def training_step(self, model, *given, **named):
            seen.append({name for name, weight in self.model.named_parameters() if weight.requires_grad})
            return super().training_step(model, *given, **named)

    config = LoraConfig(target_modules=["body"], r=2)
    ours = trainer(tmp_path, kind=Watching, peft_config=config, ratio_search=RatioSearch(ratios=(0.95,)))
    ours.train()
    assert len(seen) == 2 + 2 + 4 and len({frozenset(names) for names in seen}) == 1
    assert all("lora_" in name for name in seen[0])
    assert ours.relevant_slice.slice_ratio == 0.95


# What trials leave alone


def test_trials_log_and_save_nothing_and_call_nobody(tmp_path):
    heard = []

    class Listener(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            heard.append(args.max_steps)

        def on_save(self, args, state, control, **kwargs):
            heard.append("saved")

    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    ours = trainer(tmp_path, callbacks=[Listener()], options=options)
    before = vars(ours.args).copy()
    ours.train()
    assert heard == [4, 4, "saved", 4, 4, "saved"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert [entry["step"] for entry in ours.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    assert vars(ours.args) == before


def test_no_ratio_within_the_budget_is_an_error_that_shows_the_curve_and_leaves_all_as_it_was(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    ours = trainer(tmp_path, ratio_search=RatioSearch(ratios=(0.8, 0.7)), options=options)
    state = torch.random.get_rng_state()
    with pytest.raises(RemosError, match=r"plain fine-tuning 1\.0000 .* slice ratio 0\.8 0\..* ask for strategy=Finet"):
        ours.train()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(weights(ours.model), weights(Reader()))
    assert ours.sidecars is None and ours.optimizer is None
    assert not list(tmp_path.iterdir())


def test_the_model_keeps_its_mode(tmp_path):
    model = Reader()
    model.body.eval()
    with pytest.raises(RemosError):
        trainer(tmp_path, model=model, ratio_search=RatioSearch(ratios=(0.7,))).train()
    assert not model.body.training and model.training


# What cannot be told


def test_trials_that_learn_nothing_are_refused(tmp_path):
    model = Reader()
    nn.init.zeros_(model.head.weight)
    with pytest.raises(RemosError, match=r"After 2 steps, plain fine-tuning 0\.\d+ .*commonest label"):
        trainer(tmp_path, model=model, ratio_search=RatioSearch(accuracy_budget=0.9)).train()


@pytest.mark.filterwarnings("default:.*cannot tell.*:UserWarning")
def test_too_few_samples_for_the_budget_are_told_with_the_number_that_would_do(tmp_path, recwarn):
    ours = trainer(tmp_path, accuracy_budget=0.02)
    ours.train()
    needed = samples_to_tell(Rate.of(100, 100), 0.02)
    assert [str(warning.message) for warning in recwarn if "cannot tell" in str(warning.message)] == [
        "100 held-out samples cannot tell whether accuracy falls by accuracy_budget=0.02: near 1.000 that takes about "
        f"{needed:,}. The choice may be by chance. Hold out more samples, or allow more."
    ]
    assert search_of(ours)["samples_needed"] == needed > 100
    recwarn.clear()
    trainer(tmp_path, accuracy_budget=0.2).train()
    assert not [warning for warning in recwarn if "cannot tell" in str(warning.message)]


@pytest.mark.parametrize("change", [{"train": "stream"}, {"held_out": "stream"}])
def test_streams_are_refused(tmp_path, change):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows(40, 1))

    ours = trainer(tmp_path, **dict.fromkeys(change, Stream()))
    with pytest.raises(ValueError, match=f"{'train' if 'train' in change else 'eval'}_dataset is a stream"):
        ours.train()


@pytest.mark.parametrize(
    ("held_out", "told"),
    [
        (None, "needs eval_dataset=, one data set, but got none"),
        ({"a": rows(8, 2), "b": rows(8, 3)}, r"but got a dict of \['a', 'b'\]"),
        ([], "eval_dataset holds no sample"),
        ([{"inputs": row["inputs"]} for row in rows(8, 2)], r"has no labels that Reader takes as \['labels'\]"),
        ([{**row, "labels": -1} for row in rows(8, 2)], "the held-out data has the label -1"),
    ],
)
def test_held_out_data_that_cannot_be_used_is_refused_before_any_training(tmp_path, monkeypatch, held_out, told):
    ours = trainer(tmp_path)
    ours.eval_dataset = held_out
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=told):
        ours.train()


def test_data_that_the_student_trains_on_is_refused(tmp_path):
    ours = trainer(tmp_path)
    ours.eval_dataset = ours.train_dataset
    with pytest.raises(ValueError, match="eval_dataset is train_dataset"):
        ours.train()


class Regression(Reader):
    def forward(self, inputs, labels=None):
        return {"loss": super().forward(inputs)["logits"].sum(), "logits": self.body(inputs)[:, :2]}


class OneLogit(Reader):
    def forward(self, inputs, labels=None):
        return {"loss": self.body(inputs).sum(), "logits": self.body(inputs)[:, :1]}


def test_tasks_without_one_class_a_sample_are_refused_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("trained"))
    data = [{**row, "labels": 0.5} for row in rows(8, 2)]
    with pytest.raises(ValueError, match=r"has 1 x float32 of shape \(8,\)"):
        trainer(tmp_path, model=Regression(), held_out=data).train()
    with pytest.raises(ValueError, match="OneLogit gives no logits of shape"):
        trainer(tmp_path, model=OneLogit()).train()


def test_predictions_that_are_not_finite_are_refused(tmp_path):
    model = Reader()
    model.head.bias.data[0] = torch.nan
    with pytest.raises(NonFiniteError, match="32 of 32 held-out samples get NaN or infinite logits"):
        trainer(tmp_path, model=model).train()


def test_a_trainer_with_an_optimizer_of_its_own_is_refused(tmp_path):
    model = Reader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer or scheduler was made for the model itself"):
        trainer(tmp_path, model=model, optimizers=(optimizer, None)).train()


# Whose accuracy


def test_a_share_of_the_callers_own_can_be_compared(tmp_path):
    def measure(prediction):
        right = prediction.predictions.argmax(-1) == prediction.label_ids
        return {"halved": right.mean() / 2}

    search = RatioSearch(accuracy_budget=0.2, ratios=RATIOS, metric="halved")
    ours = trainer(tmp_path, compute_metrics=measure, ratio_search=search)
    ours.train()
    plain = search_of(ours)["curve"][0]
    assert plain["accuracy"] == 0.5 and plain["low"] is None and plain["num_samples"] is None
    assert search_of(ours)["slice_ratio"] == 0.89  # a loss of a quarter, halved


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [(math.nan, NonFiniteError, "'own' of a trial is nan"), (93.0, ValueError, r"in \[0, 1\], but 'own' is 93\.0")],
)
def test_metrics_that_are_no_share_are_refused(tmp_path, value, error, told):
    ours = trainer(tmp_path, compute_metrics=lambda _: {"own": value}, ratio_search=RatioSearch(metric="own"))
    with pytest.raises(error, match=told):
        ours.train()


def test_a_metric_that_nobody_gives_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metric='f1' is none of the numbers that Reader gives: loss"):
        trainer(tmp_path, ratio_search=RatioSearch(metric="f1")).train()


def test_what_the_caller_makes_of_logits_does_not_change_the_accuracy(tmp_path):
    def best_labels(logits, labels):
        return logits.topk(2).indices

    ours = trainer(tmp_path, preprocess_logits_for_metrics=best_labels, compute_metrics=lambda _: {"own": 0.0})
    ours.train()
    assert search_of(ours)["curve"][0]["accuracy"] == 1
    assert ours.preprocess_logits_for_metrics is best_labels


# What is asked for


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"accuracy_budget": 0}, "between 0 and 1 .* but got 0"),
        ({"accuracy_budget": 1.0}, r"but got 1\.0"),
        ({"accuracy_budget": -0.1}, r"but got -0\.1"),
        ({"accuracy_budget": math.nan}, "but got nan"),
        ({"share_of_steps": 0}, r"in \(0, 1\], but got 0"),
        ({"share_of_steps": 1.1}, r"but got 1\.1"),
        ({"failures_in_a_row": 0}, "at least 1, but got 0"),
        ({"ratios": ()}, "ratios holds slice ratios to try"),
        ({"ratios": (1.0, 0.9)}, r"each below 1 .* but got \(1\.0, 0\.9\)"),
        ({"ratios": (0.9, 0.0)}, r"slice_ratio is the share .* but got 0\.0"),
    ],
)
def test_settings_that_no_search_could_use_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        RatioSearch(**settings)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"slice_ratio": 0.9, "accuracy_budget": 0.1},
            r"say how slice_ratio='auto' or energy='auto' searches, but got slice_ratio=0\.9",
        ),
        ({"slice_ratio": None, "strategy": Finetune(), "ratio_search": RatioSearch()}, "but got slice_ratio=None"),
        ({"slice_ratio": "auto", "strategy": Finetune()}, "but Finetune keeps no share of the weights"),
        ({"slice_ratio": "auto", "accuracy_budget": 0.1, "ratio_search": RatioSearch()}, r"own \(0\.02\)"),
        ({"slice_ratio": "auto", "accuracy_budget": 2.0}, r"accuracy_budget is .* but got 2\.0"),
        ({"slice_ratio": "most"}, r"a number in \(0, 1\], or 'auto' .* but got 'most'"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(tmp_path, given, told):
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path, **given)
    with pytest.raises(ValueError, match=told):
        attach_remos(trainer(tmp_path, kind=Trainer), **given)


# Resuming


SAVING = {"save_strategy": "steps", "save_steps": 2}


def test_resuming_never_searches_again(tmp_path, monkeypatch):
    whole = trainer(tmp_path, options=SAVING)
    whole.train()
    monkeypatch.setattr("remos_hf.training.start.start_at_smallest_ratio", lambda *_: pytest.fail("searched again"))
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = trainer(tmp_path, options=SAVING)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same(weights(resumed.model), weights(whole.model))
    assert resumed.strategy == whole.strategy and search_of(resumed) == search_of(whole)
    named = trainer(tmp_path, options=SAVING, slice_ratio=None, strategy=whole.strategy)
    named.train(resume_from_checkpoint=checkpoint)
    assert search_of(named) == search_of(whole)
    theirs = trainer(tmp_path, kind=Trainer, options=SAVING)
    again = attach_remos(theirs, slice_ratio="auto", strategy=RULE, ratio_search=RatioSearch(ratios=RATIOS),
                         resume_from_checkpoint=checkpoint)  # fmt: skip
    assert again.config["ratio_search"] == search_of(whole)


def test_training_on_does_not_search_again(tmp_path, monkeypatch):
    ours = trainer(tmp_path)
    ours.train()
    monkeypatch.setattr("remos_hf.training.start.start_at_smallest_ratio", lambda *_: pytest.fail("searched again"))
    ours.train()
    assert ours.relevant_slice.slice_ratio == 0.95


def test_a_checkpoint_of_another_search_is_refused(tmp_path):
    trainer(tmp_path / "auto", options=SAVING).train()
    other = trainer(tmp_path / "auto", options=SAVING, ratio_search=RatioSearch(ratios=RATIOS, share_of_steps=0.25))
    with pytest.raises(RemosError, match=r"searched by .*'share_of_steps': 0\.5.* asks for .*'share_of_steps': 0\.25"):
        other.train(resume_from_checkpoint=True)
    other = trainer(tmp_path / "auto", options=SAVING, strategy=TopMagnitude(1.0, scope="layer", head=("head",)))
    with pytest.raises(RemosError, match="scope='model', but .* scope='layer'"):
        other.train(resume_from_checkpoint=True)
    trainer(tmp_path / "given", options=SAVING, slice_ratio=None, strategy=TopMagnitude(0.9, head=("head",))).train()
    with pytest.raises(RemosError, match=r"slice_ratio=0\.9 was given, not searched"):
        trainer(tmp_path / "given", options=SAVING).train(resume_from_checkpoint=True)


def test_the_record_lies_beside_the_student(tmp_path):
    ours = trainer(tmp_path)
    ours.train()
    ours.save_model()
    assert Sidecars.load(tmp_path).config["ratio_search"] == search_of(ours)


def test_every_trial_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="remos_hf"):
        trainer(tmp_path, ratio_search=RatioSearch(accuracy_budget=0.9, ratios=(0.95, 0.9))).train()
    assert "Trial of 2 steps: plain fine-tuning 1.0000 [0.9630, 1.0000]" in caplog.text
    assert "Trial of 2 steps: slice ratio 0.9 1.0000" in caplog.text
    assert "Chose slice_ratio=0.9, within 0.9 of plain fine-tuning" in caplog.text
    assert "the smallest that was tried" in caplog.text


def test_a_search_is_told_by_what_is_clean():
    # Nothing that shows a defect can be given, so nothing can be chosen by it.
    names = set(RatioSearch().to_dict())
    assert names == {"accuracy_budget", "ratios", "share_of_steps", "failures_in_a_row", "metric"}


def _search_on_each_process(folder):
    ours = trainer(Path(folder), train=rows(43, 1), held_out=rows(101, 2), options={"learning_rate": 0.5})
    ours.train()
    rank = torch.distributed.get_rank()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(search_of(ours)))
    torch.save(ours.model.state_dict(), Path(folder) / f"rank{rank}.pt")
    torch.distributed.barrier()


def test_two_processes_choose_the_same(tmp_path):
    debug_launcher(_search_on_each_process, args=(str(tmp_path),), num_processes=2)
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert one["slice_ratio"] == 0.95 and one["curve"][0]["num_samples"] == 101
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert same(*states)


def test_distributed_ways_that_were_not_tried_are_refused(tmp_path):
    ours = trainer(tmp_path)
    ours.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="not with DeepSpeed or FSDP"):
        ours.train()
    assert ratio_search.RECORD_KEY == "ratio_search"
