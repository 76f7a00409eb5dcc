import logging
from copy import deepcopy

import pytest
import torch
from accelerate import debug_launcher
from torch import nn
from torch.nn import functional

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError, UnsupportedModelError
from remos_hf.profiling.part_runs import PartRuns
from remos_hf.strategies.norm_statistics import fit_norm_statistics
from remos_hf.strategies.student_data import StudentData
from remos_hf.strategies.subspace import Subspace
from tests import tiny

# Samples of one batch are enough for the small layers here, and more would be for nothing.
pytestmark = pytest.mark.filterwarnings("ignore:.*saw fewer positions:UserWarning", "ignore:Less than half:UserWarning")


def started(model, batches, **options):
    """The student of a model, and what the record says of its start."""
    student = deepcopy(model)
    options = {"head": ()} | options
    done = Subspace(**options).prepare(student, StudentData(lambda samples: batches))
    return student, done.details["subspace"]


def fitted(inputs, outputs, energy):
    """Centre, project on the strongest right singular vectors, solve by least squares: weight and bias."""
    inputs, outputs = inputs.double(), outputs.double()
    x, t = inputs - inputs.mean(0), outputs - outputs.mean(0)
    values, vectors = torch.linalg.svd(x, full_matrices=False)[1:]
    rank = 1 + int((values.square().cumsum(0) / values.square().sum() < energy).sum())
    kept = vectors[:rank].T
    weight = (kept @ torch.linalg.lstsq(x @ kept, t, driver="gelsd").solution).T
    return weight, outputs.mean(0) - weight @ inputs.mean(0)


def test_a_linear_net_gets_the_closed_form_layer_by_layer():
    teacher = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    batches = [torch.randn(size, 6) * torch.logspace(0, -2, 6) for size in (9, 7)]
    student, told = started(teacher, batches, energy=0.9)
    x = t = torch.cat(batches)
    for mine, its in zip(student, teacher, strict=True):
        t = its(t).detach()
        weight, bias = fitted(x, t, 0.9)
        torch.testing.assert_close(mine.weight.double(), weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.bias.double(), bias, rtol=1e-5, atol=1e-6)
        x = mine(x).detach()  # the next layer reads what the rebuilt one makes
    assert [told["layers"][name]["rank"] for name in "01"] == [torch.linalg.matrix_rank(one.weight) for one in student]
    assert told["samples"] == 16 and told["energy"] >= 0.9


class Attending(nn.Module):
    """Packed attention, once of what is asked about itself and once across, and a layer without a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.itself = nn.MultiheadAttention(8, 2, batch_first=True)
        self.across = nn.MultiheadAttention(8, 2, batch_first=True, bias=False)
        self.plain = nn.Linear(8, 8, bias=False)

    def forward(self, inputs):
        made = inputs + self.itself(inputs, inputs, inputs)[0]
        return self.plain(made + self.across(made, inputs, inputs)[0])


def images():
    return [images for images, _ in tiny.image_batches()]


def texts():
    return [{key: one for key, one in batch.items() if key != "labels"} for batch in tiny.text_batches()]


def of(model, batch):
    with torch.no_grad():
        made = model(**batch) if isinstance(batch, dict) else model(batch)
    return made if isinstance(made, torch.Tensor) else made.logits


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        (tiny.bert, texts),
        (tiny.gpt2, texts),  # Conv1D, weights (in, out)
        (tiny.llama, texts),  # no biases
        (tiny.vit, lambda: [{"pixel_values": one} for one in images()]),
        (lambda: tiny.ConvNet().eval(), images),  # grouped, depthwise, an activation in place
        (lambda: Attending().eval(), lambda: [torch.randn(3, 5, 8) for _ in range(2)]),
    ],
    ids=["bert", "gpt2", "llama", "vit", "convolutions", "packed attention"],
)
def test_all_of_the_energy_gives_the_teachers_outputs_on_the_sample(make, batches):
    teacher, batches = make(), batches()
    student, told = started(teacher, batches, energy=1.0)
    for batch in batches:
        torch.testing.assert_close(of(student, batch), of(teacher, batch), rtol=1e-4, atol=1e-6)
    assert any(one["empty"] for one in told["layers"].values()) or make is not tiny.bert
    assert not all(torch.equal(*pair) for pair in zip(student.parameters(), teacher.parameters(), strict=True))


def test_less_energy_comes_less_near():
    teacher, batches = tiny.bert(), texts()
    students = [started(teacher, batches, energy=energy)[0] for energy in (0.999, 0.8, 0.3)]
    errors = [float(sum((of(one, b) - of(teacher, b)).square().sum() for b in batches)) for one in students]
    assert errors == sorted(errors) and errors[0] < errors[-1] / 10


def test_padding_batches_and_order_change_nothing_beyond_rounding():
    batches = tiny.text_batches()
    rows = [
        ids[mask.bool()][None]
        for one in batches
        for ids, mask in zip(one["input_ids"], one["attention_mask"], strict=True)
    ]
    some, told = started(tiny.bert(layers=1), batches)
    alone, _ = started(tiny.bert(layers=1), [{"input_ids": ids} for ids in reversed(rows)])
    for one, other in zip(some.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert told["samples"] == 12


def test_a_pixel_that_the_data_never_shows_has_weights_of_zero():
    batches = [one.clone() for one in images()]
    for one in batches:
        one[:, 1] = 0
    student, _ = started(tiny.ConvNet(), batches)
    assert not student.stem.weight[:, 1].any() and student.stem.weight[:, 0].any()


def test_a_layer_that_reads_one_constant_keeps_its_mean_output_in_the_bias():
    teacher = tiny.mlp()
    student, told = started(teacher, [torch.full((6, 5), 0.7)])
    torch.testing.assert_close(student(torch.full((1, 5), 0.7)), teacher(torch.full((1, 5), 0.7)))
    assert not student[0].weight.any() and told["layers"]["0"]["rank"] == 0


def test_norm_statistics_are_those_of_the_rebuilt_student():
    data = tiny.image_batches()
    student, _ = started(tiny.ConvNet(), data, energy=0.8)
    again = deepcopy(student).eval()
    fit_norm_statistics(PartRuns(adapter_for(again, ()), data))
    torch.testing.assert_close(student.norm.running_var, again.norm.running_var)
    assert not torch.equal(student.norm.running_mean, tiny.ConvNet().norm.running_mean)


def test_one_share_for_the_model_keeps_the_energy_on_average():
    teacher, batches = tiny.bert(), texts()
    _, by_layer = started(teacher, batches, energy=0.9)
    _, told = started(teacher, batches, energy=0.9, scope="model")
    energies = [one["energy"] for one in told["layers"].values()]
    assert abs(told["energy"] - 0.9) < 0.02 and max(energies) - min(energies) > 0.02
    rank = {name: sum(one["rank"] for one in of["layers"].values()) for name, of in (("l", by_layer), ("m", told))}
    assert rank["m"] <= rank["l"]


@pytest.mark.parametrize("by", ["channel", "median"])
def test_a_ridge_shrinks_more_the_larger_it_is(by):
    teacher, batches, sizes, ranks = tiny.mlp(sizes=(5, 4)), [torch.randn(40, 5)], [], []
    for ridge in (1e-6, 1.0, 100.0):
        student, told = started(teacher, batches, ridge=ridge, ridge_by=by)
        sizes.append(float(student[0].weight.detach().norm()))
        ranks.append(told["layers"]["0"]["rank"])
        torch.testing.assert_close(student(batches[0]).mean(0), teacher(batches[0]).mean(0))
    assert sizes == sorted(sizes, reverse=True) and ranks == sorted(ranks, reverse=True)
    assert ranks[0] == 5 and sizes[2] < sizes[0] / 10 and told["energy"] is None


def test_a_ridge_by_kind_is_by_channel_where_the_stream_is_read_and_ten_times_the_median_where_it_is_written():
    teacher, batches = tiny.bert(layers=1), texts()
    kind, channel, median = (
        started(teacher, batches, ridge=ridge, ridge_by=by)[0].bert.encoder.layer[0]
        for by, ridge in (("kind", 1.0), ("channel", 1.0), ("median", 10.0))
    )
    query, written = kind.attention.self.query.weight, kind.attention.output.dense.weight
    assert torch.equal(query, channel.attention.self.query.weight)
    assert not torch.equal(written, channel.attention.output.dense.weight)
    assert not torch.equal(query, median.attention.self.query.weight)


def test_a_ridge_by_kind_needs_a_stream_that_is_known():
    with pytest.raises(UnsupportedModelError, match="no residual stream"):
        started(tiny.mlp(), [torch.randn(4, 5)], ridge=1.0, ridge_by="kind")


def test_what_does_not_compete_stays_and_is_told():
    teacher = tiny.bert()
    teacher.bert.encoder.layer[0].output.dense.weight.requires_grad_(False)
    student, told = started(teacher, texts(), head=None, energy=0.5)
    inner = student.bert.encoder.layer[0]
    assert torch.equal(inner.output.dense.weight, teacher.bert.encoder.layer[0].output.dense.weight)
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    assert told["left_out"]["left_out"]["frozen"] == 512 and len(told["layers"]) == 11


class Shared(nn.Module):
    """Two modules that share a weight, each with a bias of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(functional.relu(self.first(inputs)))


def test_modules_that_share_a_weight_are_fitted_over_all_their_calls_and_keep_their_biases():
    teacher, batches = Shared(), [torch.randn(30, 4)]
    student, told = started(teacher, batches, energy=1.0)
    assert student.first.weight is student.second.weight and told["layers"]["first"]["rows"] == 60
    torch.testing.assert_close(student(batches[0]), teacher(batches[0]))
    assert torch.equal(student.first.bias, teacher.first.bias)
    assert torch.equal(student.second.bias, teacher.second.bias)


class Routed(nn.Module):
    """Tokens go to one of two experts, by a layer that is rebuilt before them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, inputs):
        chosen = self.router(inputs).argmax(-1)
        made = torch.zeros_like(inputs)
        for number, expert in enumerate(self.experts):
            made[chosen == number] = expert(inputs[chosen == number])
        return made


def test_an_expert_that_gets_other_tokens_than_in_the_teacher_is_fitted_to_its_own_outputs():
    teacher, batches = Routed(), [torch.randn(40, 4) for _ in range(3)]
    student, told = started(teacher, batches, energy=0.6)
    sent = [int((one.router(torch.cat(batches)).argmax(-1) == 0).sum()) for one in (student, teacher)]
    assert sent[0] != sent[1] and told["layers"]["experts.0"]["rows"] == sent[0]
    whole, _ = started(teacher, batches, energy=1.0)
    torch.testing.assert_close(whole(batches[0]), teacher(batches[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_is_fitted_in_double_and_its_rounding_is_told(dtype):
    teacher = tiny.bert(layers=1).to(dtype)
    student, told = started(teacher, texts(), energy=1.0)
    full, _ = started(teacher.float(), texts(), energy=1.0)
    assert student.bert.encoder.layer[0].output.dense.weight.dtype == dtype
    assert 0 < told["rounding"] < 0.02
    assert float((of(student, texts()[0]).float() - of(full, texts()[0])).abs().max()) < 0.05


def test_fewer_positions_than_directions_are_told():
    with pytest.warns(UserWarning, match=r"'2': 6 of 7.*max_samples"):
        started(tiny.mlp(), [torch.randn(6, 5)])


def test_what_is_not_finite_is_named_and_the_student_stays_whole():
    teacher, batch = tiny.mlp(), torch.randn(8, 5)
    teacher[0].bias.data[:] = 1e38
    teacher[2].weight.data[:] = 10
    student = deepcopy(teacher)
    with pytest.raises(NonFiniteError, match="'2' read or make on this data"):
        Subspace(head=()).prepare(student, StudentData(lambda samples: [batch]))
    assert all(torch.equal(*pair) for pair in zip(student.parameters(), teacher.parameters(), strict=True))
    teacher[2].weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'2.weight' holds NaN"):
        started(teacher, [batch])


def test_a_covariance_that_takes_too_much_memory_is_refused(monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "remos_hf"):
        started(tiny.mlp(), [torch.randn(9, 5)])
    assert "the largest takes up to 0.00 GiB" in caplog.text
    monkeypatch.setattr("remos_hf.strategies.subspace.DEFAULT_MAX_BYTES", 1000)
    with pytest.raises(UnsupportedModelError, match="covariance of what '2' reads"):
        started(tiny.mlp(), [torch.randn(9, 5)])


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        started(tiny.mlp(), [])


def test_outputs_that_take_much_memory_are_made_again(monkeypatch):
    some, _ = started(tiny.bert(layers=1), texts())
    monkeypatch.setattr("remos_hf.strategies.subspace._KEPT_BYTES", 1)
    others, _ = started(tiny.bert(layers=1), texts())
    assert all(torch.equal(*pair) for pair in zip(some.parameters(), others.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"energy": 0}, "got 0"),
        ({"energy": 1.5}, "got 1.5"),
        ({"energy": True}, "got True"),
        ({"scope": "all"}, "scope is"),
        ({"ridge": -1.0}, "ridge is a number above 0"),
        ({"ridge": 1.0, "scope": "model"}, "has no scope"),
        ({"ridge_by": "row"}, "ridge_by is"),
        ({"max_samples": 0}, "max_samples is"),
    ],
)
def test_values_that_no_run_could_use_are_refused_when_the_strategy_is_made(options, words):
    with pytest.raises(ValueError, match=words):
        Subspace(**options)


def test_max_samples_are_asked_for():
    asked = []
    data = StudentData(lambda samples: asked.append(samples) or [torch.randn(9, 5)], max_samples=5)
    for options in ({}, {"max_samples": 7}, {"max_samples": "all"}, {"max_samples": None}):
        Subspace(head=(), **options).prepare(tiny.mlp(), data)
    assert asked == [512, 7, None, 5]


def _start(rank, world):
    """What one process of several starts, given its share of the batches."""
    made = []
    for model, batches in ((tiny.bert(), texts()), (tiny.ConvNet(), tiny.image_batches())):
        data = StudentData(lambda samples, batches=batches: batches[rank::world])
        Subspace(0.9, head=()).prepare(model, data)
        made.append(torch.cat([value.flatten().double() for value in model.state_dict().values()]))
    return torch.cat(made)


def _start_on_each(folder):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.save(_start(rank, world), f"{folder}/{rank}.pt")


def test_processes_start_the_student_of_one_bit_for_bit(tmp_path):
    debug_launcher(_start_on_each, args=(str(tmp_path),), num_processes=2)
    alone = _start(0, 1)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone)
