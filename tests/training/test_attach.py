import json
import logging
import math

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from remos_hf.evaluation.measures import Rate, excess_dir
from remos_hf.evaluation.report import DefectReport
from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.relevant_slice import RelevantSlice
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Random, Remos
from remos_hf.training.attach import attach_remos
from remos_hf.training.moments import Moments
from remos_hf.training.profiling_data import student_batches
from remos_hf.training.reporting import log_defects
from tests import tiny
from tests.training.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore::FutureWarning")


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("options", [{"slice_ratio": 0.9}, {"strategy": Random(0.8)}])
def test_an_attached_trainer_trains_the_student_of_remos_trainer(tmp_path, options):
    theirs = trainer(tmp_path / "a", kind=Trainer)
    sidecars = attach_remos(theirs, **options)
    theirs.train()
    ours = trainer(tmp_path / "b", **options)
    ours.train()
    assert same(theirs.model, ours.model)
    assert sidecars.relevant_slice == ours.relevant_slice


def test_sidecars_lie_beside_checkpoints_and_the_student(tmp_path):
    theirs = trainer(tmp_path, kind=Trainer)
    sidecars = attach_remos(theirs, slice_ratio=0.9)
    theirs.train()
    theirs.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        assert RelevantSlice.from_pretrained(folder) == sidecars.relevant_slice


def test_resuming_takes_the_checkpoints_slice(tmp_path, monkeypatch):
    theirs = trainer(tmp_path, kind=Trainer)
    sidecars = attach_remos(theirs, slice_ratio=0.9)
    theirs.train()
    monkeypatch.setattr(Moments, "start", lambda *_: pytest.fail("sliced again"))
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = trainer(tmp_path, kind=Trainer)
    again = attach_remos(resumed, slice_ratio=0.9, resume_from_checkpoint=checkpoint)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same(resumed.model, theirs.model)
    assert again.relevant_slice == sidecars.relevant_slice


def test_a_sequence_to_sequence_trainer_can_be_attached(tmp_path):
    from transformers import BartForConditionalGeneration

    model = BartForConditionalGeneration(tiny.bart().config)
    rows = [{**row, "labels": row["input_ids"][:3]} for row in tiny.dataset(8)]

    def pad(batch):
        padded = tiny.pad([{**row, "labels": 0} for row in batch])
        return {**padded, "labels": torch.tensor([row["labels"] for row in batch])}

    args = Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True, save_strategy="no"
    )
    theirs = Seq2SeqTrainer(model=model, args=args, train_dataset=rows, data_collator=pad)
    sidecars = attach_remos(theirs, slice_ratio=0.9)
    theirs.train()
    assert any(".decoder." in name for name in sidecars.relevant_slice.kept)
    assert Sidecars.load(tmp_path).relevant_slice == sidecars.relevant_slice


def test_the_summary_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="remos_hf"):
        attach_remos(trainer(tmp_path, kind=Trainer), slice_ratio=0.9)
    assert "Kept 3,686 of 4,096 weights" in caplog.text
    assert "Share kept by layer group: bert.encoder.layer.0" in caplog.text


def tokens(batches):
    return [row[row != 0].tolist() for batch in batches for row in batch["input_ids"]]


@pytest.fixture
def finetuner(tmp_path):
    return trainer(tmp_path, strategy=Finetune(), train_dataset=tiny.dataset(10))


def test_batches_hold_every_sample_once_in_order(finetuner):
    assert tokens(student_batches(finetuner)) == [row["input_ids"] for row in tiny.dataset(10)]


def test_reading_the_batches_leaves_the_global_random_state_alone(finetuner):
    state = torch.random.get_rng_state()
    list(student_batches(finetuner, 4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_max_samples_are_drawn_from_the_whole_data_by_the_seed(finetuner):
    drawn = tokens(student_batches(finetuner, 4))
    everything = [row["input_ids"] for row in tiny.dataset(10)]
    assert len(drawn) == 4
    assert drawn != everything[:4]
    assert all(row in everything for row in drawn)
    assert drawn == tokens(student_batches(finetuner, 4))


@pytest.mark.parametrize("samples", [None, 7])
def test_the_shares_of_processes_are_the_batches_of_one(finetuner, monkeypatch, samples):
    whole = tokens(student_batches(finetuner, samples))
    shares = []
    for rank in range(3):
        monkeypatch.setattr(type(finetuner.args), "process_index", rank)
        monkeypatch.setattr(type(finetuner.args), "world_size", 3)
        shares += tokens(student_batches(finetuner, samples))
    assert sorted(shares) == sorted(whole)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tiny.dataset(10))


def test_a_stream_is_profiled_too(tmp_path):
    ours = trainer(tmp_path, strategy=Remos(0.9, max_samples=6), train_dataset=Stream(), options={"max_steps": 1})
    ours.train()
    assert ours.profile.num_samples == 6
    known = trainer(tmp_path / "b", slice_ratio=0.9, train_dataset=tiny.dataset(10)[:6], options={"max_steps": 1})
    known.train()
    assert ours.profile == known.profile


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path):
    rows = [{**row, "sentence": "text", "idx": n} for n, row in enumerate(tiny.dataset(8))]
    ours = trainer(tmp_path, strategy=Finetune(), train_dataset=datasets.Dataset.from_list(rows))
    assert tokens(student_batches(ours)) == [row["input_ids"] for row in tiny.dataset(8)]


# Logging


def logged(state):
    """The numbers of ours in a history, each with the step it was logged at."""
    return [
        (entry["step"], name, value)
        for entry in state.log_history
        for name, value in entry.items()
        if name.startswith("remos/")
    ]


def shown(folder):
    """What TensorBoard reads back: (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for place in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(place)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def expected_of(sidecars):
    profile, relevant = sidecars.profile, sidecars.relevant_slice
    counts = [count for side in (profile.input_counts, profile.output_counts) for count in side.values()]
    frequencies = [value / profile.num_samples for count in counts for value in count.tolist()]
    kept = {
        layer: [relevant.kept[name] for name in relevant.kept if name.startswith(layer)]
        for layer in ("bert.encoder.layer.0", "bert.encoder.layer.1")
    }
    return {
        "remos/share_kept": relevant.num_kept / relevant.num_weights,
        **{
            f"remos/share_kept/{layer}": sum(int(bits.sum()) for bits in tensors) / sum(map(torch.numel, tensors))
            for layer, tensors in kept.items()
        },
        "remos/squares_reset": sidecars.config["slice"]["squares_reset"],
        "remos/share_never_covered": frequencies.count(0) / len(frequencies),
        "remos/mean_coverage_frequency": sum(frequencies) / len(frequencies),
        "remos/coverage_samples": 24,
        **{f"remos/seconds/{step}": sidecars.config["seconds"][step] for step in ("profile", "choose", "reset")},
    }


WRITING = {"report_to": "tensorboard", "max_steps": 2}


def started(kind, folder, options):
    if kind is not Trainer:
        ours = trainer(folder, slice_ratio=0.9, options=options)
        ours.train()
        return ours, ours.sidecars
    theirs = trainer(folder, kind=Trainer, options=options)
    sidecars = attach_remos(theirs, slice_ratio=0.9)
    theirs.train()
    return theirs, sidecars


@pytest.mark.parametrize("kind", [None, Trainer], ids=["RemosTrainer", "attach_remos"])
def test_tensorboard_shows_the_coverage_and_the_slice_once_at_the_start(tmp_path, kind):
    _, sidecars = started(kind, tmp_path, WRITING)
    found = {name: events for name, events in shown(tmp_path).items() if name.startswith("train/remos/")}
    expected = expected_of(sidecars)
    assert found.keys() == {f"train/{name}" for name in expected}
    for name, value in expected.items():
        assert found[f"train/{name}"] == [(0, pytest.approx(value, rel=1e-6))], name


def test_the_history_holds_plain_finite_numbers_and_survives_json(tmp_path):
    ours, sidecars = started(None, tmp_path, {"max_steps": 2})
    assert {name: value for _, name, value in logged(ours.state)} == pytest.approx(expected_of(sidecars))
    assert all(type(value) is float and math.isfinite(value) for _, _, value in logged(ours.state))
    kept = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry for entry in kept if "remos/share_kept" in entry] == ours.state.log_history[:1]
    assert [entry["step"] for entry in ours.state.log_history if "loss" in entry] == [1, 2]


class Reporter(TrainerCallback):
    """Hears what W&B and trackio hear, and as they do only once it was set up."""

    def __init__(self):
        self.heard, self.ready = [], False

    def on_train_begin(self, args, state, control, **kwargs):
        self.ready = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert self.ready
        self.heard.append((state.global_step, dict(logs)))


def test_reporters_hear_of_it_also_those_added_later(tmp_path):
    theirs = trainer(tmp_path, kind=Trainer, options={"max_steps": 2})
    early, late = Reporter(), Reporter()
    theirs.add_callback(early)
    sidecars = attach_remos(theirs, slice_ratio=0.9)
    theirs.add_callback(late)
    theirs.train()
    for reporter in (early, late):
        told = [logs for step, logs in reporter.heard if "remos/share_kept" in logs]
        assert len(told) == 1 and told[0]["remos/share_kept"] == sidecars.relevant_slice.share_kept


def test_a_resumed_run_logs_it_no_second_time(tmp_path):
    started(None, tmp_path, {})
    resumed = trainer(tmp_path, slice_ratio=0.9)
    reporter = Reporter()
    resumed.add_callback(reporter)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not [logs for _, logs in reporter.heard if "remos/share_kept" in logs]
    assert len([entry for entry in resumed.state.log_history if "remos/share_kept" in entry]) == 1


def test_a_strategy_that_slices_nothing_logs_nothing(tmp_path):
    ours = trainer(tmp_path, strategy=Finetune(), options={"max_steps": 1})
    ours.train()
    assert logged(ours.state) == []


def test_reset_embedding_rows_are_logged(tmp_path):
    ours = trainer(tmp_path, strategy=Finetune(embedding_rows="mean"), options={"max_steps": 1})
    ours.train()
    assert logged(ours.state) == [
        (0, "remos/embedding_rows_reset", float(ours.sidecars.config["embedding_rows_reset"]))
    ]


def test_the_curve_of_a_search_is_drawn_over_the_slice_ratio(tmp_path):
    ours = trainer(tmp_path, slice_ratio=0.9, options={**WRITING, "max_steps": 1})
    ours._start(None)
    points = [(1.0, 0.9, 0.8), (0.95, 0.8, 0.7), (0.9, None, 0.75)]
    ours.sidecars.config["ratio_search"] = {
        "accuracy_budget": 0.1,
        "slice_ratio": 0.95,
        "curve": [
            {"slice_ratio": ratio, "accuracy": one or 0.85, "low": low, "high": one, "lost": 0.9 - (one or 0.85)}
            for ratio, one, low in points
        ],
    }
    reporter = Reporter()
    ours.add_callback(reporter)
    ours.train()
    curve = [(step, logs["remos/ratio_search/accuracy"]) for step, logs in reporter.heard
             if "remos/ratio_search/accuracy" in logs]  # fmt: skip
    assert curve == [(1000, 0.9), (950, 0.8), (900, 0.85)]
    found = shown(tmp_path)["train/remos/ratio_search/accuracy"]
    assert [step for step, _ in found] == [1000, 950, 900]
    assert [value for _, value in found] == pytest.approx([0.9, 0.8, 0.85])
    low = [(step, value) for step, name, value in logged(ours.state) if name == "remos/ratio_search/accuracy/low"]
    assert low == [(1000, 0.8), (950, 0.7), (900, 0.75)]
    assert [step for step, name, _ in logged(ours.state) if name.endswith("/high")] == [1000, 950]
    assert (0, "remos/ratio_search/slice_ratio", 0.95) in logged(ours.state)
    assert (0, "remos/ratio_search/accuracy_budget", 0.1) in logged(ours.state)
    assert [entry["step"] for entry in ours.state.log_history if "loss" in entry] == [1]


def record(student, acc, dir_, floor, task="sst2", seed=0, defect="words/rare"):
    rates = {"acc": acc, "dir": dir_, "floor": floor}
    rates = {name: count if count is None else Rate.of(count, 10).to_dict() for name, count in rates.items()}
    excess = excess_dir(Rate.of(dir_, 10), Rate.of(floor, 10)).to_dict() if floor is not None else None
    named = {"task": task, "defect": defect, "student": student, "seed": seed}
    return {**named, **rates, "excess": excess, "made": {}}


def test_what_was_inherited_is_logged_by_task_defect_and_student(tmp_path):
    report = DefectReport(
        [
            record("finetune", 9, 8, 1),
            record("finetune", 7, 6, 1, seed=1),
            record("remos 0.9", 8, 1, None),
            record("finetune", 5, 5, None, task=None),
        ]
    )
    ours, _ = started(None, tmp_path, WRITING)
    log_defects(ours, report)
    expected = {
        "remos/acc/sst2/words_rare/finetune": 0.8,
        "remos/dir/sst2/words_rare/finetune": 0.7,
        "remos/floor/sst2/words_rare/finetune": 0.1,
        "remos/excess/sst2/words_rare/finetune": 0.6,
        "remos/dir_num_samples/sst2/words_rare/finetune": 20.0,
        "remos/acc/sst2/words_rare/remos 0.9": 0.8,
        "remos/dir/sst2/words_rare/remos 0.9": 0.1,
        "remos/dir_num_samples/sst2/words_rare/remos 0.9": 10.0,
        "remos/acc/words_rare/finetune": 0.5,
        "remos/dir/words_rare/finetune": 0.5,
        "remos/dir_num_samples/words_rare/finetune": 10.0,
    }
    last = {name: value for name, value in ours.state.log_history[-1].items() if name.startswith("remos/")}
    assert last == pytest.approx(expected)
    assert all(type(value) is float for value in last.values())
    found = shown(tmp_path)
    for name, value in expected.items():
        assert found[f"train/{name}"] == [(2, pytest.approx(value))], name
