import copy
import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from remos_hf.errors import LayerMismatchError, NonFiniteError, TeacherMismatchError
from remos_hf.evaluation import anatomy as module
from remos_hf.evaluation.anatomy import (
    LAYER_QUANTILES,
    QUANTILES,
    anatomy,
    change_of_weights,
    check_anatomy,
    coverage_of,
    curves_of,
    in_order,
    layers_of,
    weights_of,
)
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.slicing.refill import reset_outside
from remos_hf.slicing.relevant_slice import RelevantSlice, choose_slice
from tests import tiny


def pair(teacher=None, ratio=0.75):
    """The teacher's weights before, its slice, and the student that was reset and moved a little."""
    teacher = tiny.mlp() if teacher is None else teacher
    before = {name: weight.detach().clone() for name, weight in teacher.named_parameters()}
    relevant = choose_slice(teacher, slice_ratio=ratio, rule="top_magnitude", progress=False)
    student = reset_outside(copy.deepcopy(teacher), relevant)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in student.parameters():
            moved = torch.rand(weight.shape, generator=generator) < 0.8
            weight += 0.01 * torch.randn(weight.shape, generator=generator) * moved
    return before, relevant, student


def lower_quantile(values, level):
    return float(np.sort(values)[int(level * (len(values) - 1))])


def parts_of(before, relevant, student, names=None):
    after, parts = dict(student.named_parameters()), {"kept": [], "reset": []}
    for name in names or relevant.kept:
        change = (after[name] - before[name]).detach()
        parts["kept"].append(change[relevant.kept[name]])
        parts["reset"].append(change[~relevant.kept[name]])
    return {group: torch.cat(one).numpy() for group, one in parts.items()}


def rounded(values):
    return pytest.approx(values, rel=5e-3)


# --- the summary ---


def places(value, at=()):
    """Every place in JSON values."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*at, key))


UNREAD = {"levels", "criterion", "share_unchanged"}  # by pictures; and the change by layer


@pytest.mark.parametrize("how", ["missing", "text"])
def test_what_a_picture_reads_is_checked_wherever_it_was_meddled_with(how):
    before, relevant, student = pair()
    counts = {"net.0": torch.tensor([0, 3, 1])}
    history = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    profile = CoverageProfile(counts, counts, 3)
    whole = json.loads(json.dumps(anatomy(before, student, relevant=relevant, profile=profile, history=history)))
    check_anatomy(whole)
    check_anatomy({**whole, "slice": None, "coverage": None, "history": {}})
    meddled = 0
    for *path, last in list(places(whole))[1:]:
        if {*path, last} & UNREAD or (path[:1] == ["layers"] and "change" in (*path, last)):
            continue
        broken = copy.deepcopy(whole)
        place = broken
        for key in path:
            place = place[key]
        named = path in (["change"], ["history"]) or path[-1:] == ["magnitude"]
        if how == "missing" and (isinstance(place, list) or named):
            continue  # an entry fewer
        if how == "missing":
            del place[last]
        else:
            place[last] = 7 if isinstance(place[last], str) else "7"
        with pytest.raises(ValueError, match=f"^anatomy.*{'lacks' if how == 'missing' else 'is (str|int), not'}"):
            check_anatomy(broken)
        meddled += 1
    assert meddled > 40


def test_every_layer_says_what_was_kept_how_large_it_was_and_how_far_it_moved():
    before, relevant, student = pair()
    found = anatomy(before, student, relevant=relevant)
    assert [layer["name"] for layer in found["layers"]] == list(relevant.kept)
    for layer in found["layers"]:
        kept = relevant.kept[layer["name"]]
        assert (layer["num_weights"], layer["num_kept"]) == (kept.numel(), int(kept.sum()))
        magnitude = before[layer["name"]].abs()
        moved = parts_of(before, relevant, student, [layer["name"]])
        for group, which in (("kept", kept), ("reset", ~kept)):
            for key, values in (("magnitude", magnitude[which].numpy()), ("change", moved[group])):
                told = layer[key][group]
                assert told["num_weights"] == len(values)
                assert told["quantiles"] == rounded([lower_quantile(values, level) for level in LAYER_QUANTILES])
    assert found["levels"] == list(LAYER_QUANTILES)
    facts = {"rule": "top_magnitude", "scope": "model", "slice_ratio": 0.75, "num_kept": relevant.num_kept}
    assert found["slice"] == {**facts, "num_weights": relevant.num_weights}
    for group, values in parts_of(before, relevant, student).items():
        assert found["change"][group]["num_weights"] == len(values)
        assert found["change"][group]["quantiles"]["0.5"] == rounded(lower_quantile(values, 0.5))


def test_magnitudes_are_the_teachers_and_not_the_students():
    before, relevant, student = pair()
    found = anatomy(before, student, relevant=relevant)
    with torch.no_grad():
        for weight in student.parameters():
            weight *= 100
    again = anatomy(before, student, relevant=relevant)
    for one, other in zip(found["layers"], again["layers"], strict=True):
        assert one["magnitude"] == other["magnitude"] and one["change"] != other["change"]


def test_without_a_slice_all_weights_of_the_body_count_and_none_of_the_head():
    teacher = tiny.bert()
    before = dict(teacher.state_dict())
    found = anatomy(before, tiny.bert(seed=1))
    body = list(choose_slice(teacher, slice_ratio=1.0, rule="random", progress=False).kept)
    assert [layer["name"] for layer in found["layers"]] == body and not any("classifier" in name for name in body)
    assert found["slice"] is None and list(found["change"]) == ["all"] and found["layers"][0]["num_kept"] is None
    assert found["change"]["all"]["num_weights"] == sum(before[name].numel() for name in body)
    plain = tiny.mlp()
    found = anatomy(dict(plain.state_dict()), tiny.mlp(1), head=("4",))
    assert [layer["num_weights"] for layer in found["layers"]] == [35, 42]


def test_the_summary_is_json_and_small_for_a_bert_of_12_blocks():
    before, relevant, student = pair(tiny.bert(layers=12, hidden=4))
    counts = {name.removesuffix(".weight"): torch.arange(4) for name in relevant.kept}
    history = [{"step": step, "loss": 0.123456789 * step} for step in range(1, 5001)]
    found = anatomy(before, student, relevant=relevant, profile=CoverageProfile(counts, counts, 3), history=history)
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text) == found and len(found["layers"]) == 72
    assert len(text) < 60_000


def test_nothing_is_written_into_what_was_given():
    before, relevant, student = pair()
    held = [{name: one.clone() for name, one in weights.items()} for weights in (before, student.state_dict())]
    anatomy(before, student, relevant=relevant)
    for weights, expected in zip((before, student.state_dict()), held, strict=True):
        assert all(torch.equal(weights[name], one) for name, one in expected.items())


def test_layers_come_in_the_students_order_whatever_order_the_slice_has():
    before, relevant, student = pair(tiny.bert(layers=12, hidden=4))
    read = RelevantSlice({name: relevant.kept[name] for name in sorted(relevant.kept)}, 0.75, "top_magnitude")
    assert list(read.kept) != list(relevant.kept)
    assert anatomy(before, student, relevant=read)["layers"] == anatomy(before, student, relevant=relevant)["layers"]
    blocks = [int(layer["name"].split(".")[3]) for layer in layers_of(None, read)]
    assert blocks == sorted(blocks) and blocks[-1] == 11


@pytest.mark.parametrize("broken", ["teacher", "student"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_names_its_layer(broken, value):
    before, relevant, student = pair()
    with torch.no_grad():
        (before if broken == "teacher" else dict(student.named_parameters()))["2.weight"][0, 0] = value
    with pytest.raises(NonFiniteError, match=r"'2\.weight'"):
        anatomy(before, student, relevant=relevant)


def test_weights_that_do_not_fit_are_named():
    before, relevant, student = pair()
    with pytest.raises(LayerMismatchError, match=r"'2\.weight' is wanted"):
        anatomy({name: one for name, one in before.items() if name != "2.weight"}, student, relevant=relevant)
    with pytest.raises(LayerMismatchError, match=r"\(7, 5\)"):
        anatomy(before, tiny.mlp(sizes=(5, 8, 6, 3)), relevant=relevant)
    with pytest.raises(LayerMismatchError, match="in the teacher and"):
        anatomy(before, tiny.mlp(sizes=(5, 8, 6, 3)))
    with pytest.raises(TeacherMismatchError):
        weights_of(student, list(relevant.kept), relevant, is_teacher=True)
    with pytest.raises(ValueError, match="Profile some data first"):
        anatomy(before, student, relevant=relevant, profile=CoverageProfile({}, {}, 0))


# --- changes ---


@pytest.mark.parametrize("part", [7, 1 << 22])
def test_the_change_is_that_of_all_weights_sorted(part, monkeypatch):
    monkeypatch.setattr(module, "_PART", part)
    before, relevant, student = pair()
    after = weights_of(student, list(relevant.kept), relevant)
    found = change_of_weights({name: before[name] for name in after}, after, relevant)
    for group, values in parts_of(before, relevant, student).items():
        assert found[group]["num_weights"] == len(values)
        for level in QUANTILES:
            assert found[group]["quantiles"][f"{level:g}"] == lower_quantile(values, level)
        assert found[group]["share_unchanged"] == float((values == 0).mean())
        reach = found[group]["reach"]
        assert found[group]["histogram"] == np.histogram(values.astype(float), 101, (-reach, reach))[0].tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_quantiles_are_exact_for_any_float32(values):
    held = torch.tensor(values, dtype=torch.float32)
    found = change_of_weights({"a": torch.zeros(len(held))}, {"a": held})["all"]
    for level in QUANTILES:
        assert found["quantiles"][f"{level:g}"] == lower_quantile(held.numpy(), level)
    assert sum(found["histogram"]) <= len(values)


@pytest.mark.parametrize("values", [[0.0] * 500, [0.0] * 500 + [0.25]])
def test_weights_that_hardly_moved_still_have_bars(values):
    found = change_of_weights({"a": torch.zeros(len(values))}, {"a": torch.tensor(values)})["all"]
    assert found["histogram"][50] == 500 and sum(found["histogram"]) == len(values)
    assert found["share_unchanged"] == 500 / len(values)


def test_half_precision_is_compared_as_float32():
    before, relevant, student = pair()
    half = copy.deepcopy(student).bfloat16()
    values = parts_of(before, relevant, copy.deepcopy(half).float())["kept"]
    found = change_of_weights(
        {name: before[name] for name in relevant.kept}, weights_of(half, list(relevant.kept), relevant), relevant
    )
    assert found["kept"]["quantiles"]["0.5"] == lower_quantile(values, 0.5)


def test_a_slice_that_keeps_all_has_no_numbers_of_reset_weights():
    before, relevant, student = pair(ratio=1.0)
    found = anatomy(before, student, relevant=relevant)
    assert found["change"]["reset"] | {"histogram": 0, "reach": 0} == {
        "num_weights": 0,
        "share_unchanged": None,
        "quantiles": {},
        "histogram": 0,
        "reach": 0,
    }
    assert all(layer["magnitude"]["reset"] == {"num_weights": 0, "quantiles": []} for layer in found["layers"])


# --- coverage ---


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400), st.data())
def test_neurons_are_counted_by_whole_numbers_of_samples(num_samples, data):
    counts = data.draw(st.lists(st.integers(0, num_samples), min_size=1, max_size=30))
    profile = CoverageProfile({"a": torch.tensor(counts)}, {"a": torch.tensor([0])}, num_samples, {"name": "Top"})
    found = coverage_of(profile)
    expected = [0] * 20
    for count in counts:
        expected[max(place for place in range(20) if 20 * count >= place * num_samples)] += 1
    (layer,) = found["layers"]
    told = {"num_neurons": len(counts), "num_never": counts.count(0), "histogram": expected}
    assert layer["input"] == told and layer["output"]["histogram"] == [1] + [0] * 19
    assert (found["num_samples"], found["criterion"]) == (num_samples, {"name": "Top"})


# --- history ---


def test_curves_come_from_the_histories_of_either_trainer_without_what_the_time_took():
    trainers = [{"step": 10, "loss": 0.5, "grad_norm": float("nan")}, {"step": 10, "eval_accuracy": 0.75}]
    trainers += [{"step": 20, "loss": 0.25, "eval_runtime": 3.0, "eval_steps_per_second": 1.0, "eval_f1": None}]
    told = {"loss": {"num_logged": 2, "steps": [10.0, 20.0], "values": [0.5, 0.25]}}
    told["eval_accuracy"] = {"num_logged": 1, "steps": [10.0], "values": [0.75]}
    assert curves_of(trainers) == told
    fits = [{"step": 10, "loss": 0.5}, {"step": 10, "evaluation": {"accuracy": 0.75}}, {"step": 20, "loss": 0.25}]
    assert curves_of(fits) == told
    assert curves_of([{"train_runtime": 3.0, "epoch": 1.0}]) == curves_of([]) == {}


def test_long_curves_are_means_of_neighbours_and_say_how_many_were_logged():
    found = curves_of([{"step": step, "loss": 1 / step} for step in range(1, 501)])["loss"]
    assert len(found["steps"]) == len(found["values"]) == 200 and found["num_logged"] == 500
    assert found["steps"][0] == 2 and found["values"][0] == rounded((1 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.parametrize("key", ["loss", "eval_loss"])
def test_a_training_that_diverged_is_refused_with_its_step(key):
    with pytest.raises(NonFiniteError, match=f"{key} = nan at step 7"):
        curves_of([{"step": 7, key: float("nan")}])


def test_experts_of_a_stack_are_weights_of_their_own_in_the_order_of_their_numbers():
    config = transformers.GptOssConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=11,
        head_dim=4,
    )
    teacher = transformers.GptOssForCausalLM(config)
    relevant = choose_slice(teacher, slice_ratio=0.5, rule="random")
    found = weights_of(teacher, sorted(relevant.kept), relevant, is_teacher=True)
    assert list(found) == list(relevant.kept)
    stack = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(found[f"{stack}[10]"], teacher.get_parameter(stack)[10])
    numbered = [f"{stack}[{expert}]" for expert in (1, 2, 10)]
    assert in_order(sorted(numbered)) == numbered
