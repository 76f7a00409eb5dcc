import json
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

from remos_hf.evaluation.measures import Rate, excess_dir
from remos_hf.judging.report import DefectReport
from remos_hf.strategies.plain import Finetune
from remos_hf.training.attach import attach_remos
from remos_hf.training.reporting import earlier_slice, log_defects
from tests.training.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore::FutureWarning")


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


@pytest.mark.parametrize(("knob", "settings", "steps"), [("energy", (0.97,), (1000, 970)), ("k", (16,), (0, 16))])
def test_the_curve_of_a_search_by_effect_is_drawn_over_its_setting(tmp_path, knob, settings, steps):
    ours = trainer(tmp_path, slice_ratio=0.9, options={"max_steps": 1})
    ours._start(None)
    accuracy = {"accuracy": 0.9, "low": 0.85, "high": 0.95, "lost": 0.0}
    rates = {"own": {"value": 0.75}, "untaught": {"value": 0.25}}
    curve = [{"setting": setting, **accuracy, **rates} for setting in (None, *settings)]
    curve[-1].pop("own")  # too much accuracy was lost, so it was not measured
    budgets = {"accuracy_budget": 0.02, "effect_budget": 0.05}
    ours.sidecars.config["effect_search"] = {**budgets, "knob": knob, "setting": settings[0], "curve": curve}
    ours.train()
    heard = logged(ours.state)
    assert [(step, value) for step, name, value in heard if name == "remos/effect_search/own"] == [(steps[0], 0.75)]
    assert [step for step, name, _ in heard if name == "remos/effect_search/untaught"] == list(steps)
    assert [step for step, name, _ in heard if name == "remos/effect_search/accuracy"] == list(steps)
    for name, value in {**budgets, "setting": settings[0]}.items():
        assert (0, f"remos/effect_search/{name}", float(value)) in heard


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


def test_an_earlier_slice_is_told_also_where_its_record_cannot_be_read(tmp_path):
    assert earlier_slice("") == earlier_slice(tmp_path) == earlier_slice("owner/name") == ""
    (tmp_path / "remos_config.json").write_text("{")
    assert "holds a record that cannot be read, so whether it was sliced before is not known" in earlier_slice(tmp_path)
