import numpy as np
import pytest
import torch
from torch import nn

from remos_hf.adapters.flow_recording import flow_of
from remos_hf.errors import CorruptFileError, LayerMismatchError, NonFiniteError, UnsupportedModelError
from remos_hf.profiling.reference import Reference, profile_reference
from remos_hf.slicing import contributions as contributions_module
from remos_hf.slicing.contributions import Contributions, contributions, input_contributions, seeds_of
from remos_hf.slicing.gradient_contributions import gradient_contributions
from tests import tiny
from tests.slicing.slow_contributions import slow_contributions


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
        nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


TEXTS = [tiny.bert, tiny.gpt2, tiny.llama]


class Tokens(nn.Module):
    """Convolutions whose positions are read as tokens behind a max pool, by functions instead of modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.mix, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4), nn.Linear(64, 3)

    def forward(self, images):
        maps = nn.functional.conv2d(images, self.conv.weight, self.conv.bias, padding=1).relu()
        tokens = nn.functional.max_pool2d(maps, 2).flatten(2).transpose(1, 2)
        mixed = nn.functional.linear(input=tokens, weight=self.mix.weight, bias=self.mix.bias)
        return nn.functional.linear(mixed.relu().flatten(1), weight=self.fc.weight)


@pytest.mark.parametrize("theta", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["global", "class", "position"])
@pytest.mark.parametrize(
    "make", [small_net, lambda: tiny.ConvNet().eval(), lambda: Tokens().eval()], ids=["chain", "residual", "functions"]
)
def test_they_are_those_of_one_neuron_at_a_time(make, kind, theta):
    model, batches = make(), tiny.image_batches(2)
    reference = profile_reference(model, batches, kind=kind)
    found = contributions(model, batches[:1], reference, theta=theta)
    flow = flow_of(model, batches[0])
    slow, inputs = slow_contributions(flow, reference, seeds_of(flow, None, None), theta)
    assert slow.keys() == found.weights.keys()
    for name, one in slow.items():
        assert found.weights[name].tolist() == one.tolist(), name
    (image,) = input_contributions(model, batches[0], reference, theta=theta)
    assert image.tolist() == inputs[0].tolist()


@pytest.mark.parametrize("make", TEXTS)
def test_a_batch_is_its_samples_one_by_one_and_results_add(make):
    model, (batch, *_) = make(), tiny.text_batches()
    reference = profile_reference(model, [batch])
    whole = contributions(model, [batch], reference)
    one_by_one = contributions(model, [{k: v[row : row + 1] for k, v in batch.items()} for row in range(4)], reference)
    for key in ("weights", "absolute", "neurons"):
        for name, one in getattr(whole, key).items():
            assert torch.equal(one, getattr(one_by_one, key)[name]), (key, name)
    assert one_by_one.num_samples == 4
    assert all(bool((one.abs() <= whole.absolute[name]).all()) for name, one in whole.weights.items())
    assert not any(one.is_floating_point() for one in whole.weights.values())


def test_padding_contributes_nothing():
    model, (batch, *_) = tiny.bert(), tiny.text_batches()
    longer = {name: nn.functional.pad(one, (0, 5)) for name, one in batch.items() if name != "labels"}
    reference = profile_reference(model, [batch])
    short, long = (contributions(model, [one], reference) for one in (batch, longer))
    assert all(torch.equal(one, long.weights[name]) for name, one in short.weights.items())
    for token in input_contributions(model, longer, reference):
        if token.shape[1] == 14:
            assert not bool(token[:, 9:].any())


def test_relabelled_neurons_take_their_contributions_with_them():
    model, batches = small_net(), tiny.image_batches(1)
    order = torch.tensor([2, 0, 3, 1])
    twin = small_net()
    with torch.no_grad():
        twin[0].weight.copy_(model[0].weight[order])
        twin[0].bias.copy_(model[0].bias[order])
        twin[3].weight.copy_(model[3].weight[:, order])
    found, other = (contributions(one, batches, profile_reference(one, batches)) for one in (model, twin))
    assert torch.equal(other.weights["0.weight"], found.weights["0.weight"][order])
    assert torch.equal(other.weights["3.weight"], found.weights["3.weight"][:, order])
    assert torch.equal(other.neurons["0.weight"], found.neurons["0.weight"][order])


def test_a_larger_theta_makes_a_smaller_slice():
    model, batches = small_net(), tiny.image_batches(1)
    reference = profile_reference(model, batches)
    shares = [contributions(model, batches, reference, theta=theta).share_in_slice for theta in (0, 0.2, 0.6)]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]


def test_samples_can_be_had_one_by_one():
    model, batches = small_net(), tiny.image_batches(2)
    found = contributions(model, batches, profile_reference(model, batches), each_sample=["3.weight"])
    each = found.each_sample["3.weight"]
    assert each.shape == (8, 6, 4, 3, 3)
    assert torch.equal(each.sum(0), found.weights["3.weight"])
    assert torch.equal(each.abs().sum(0), found.absolute["3.weight"])


def test_the_last_layers_can_be_had_alone():
    model, batches = small_net(), tiny.image_batches(1)
    reference, asked = profile_reference(model, batches), ("10.weight", "3.weight")
    whole = contributions(model, batches, reference, each_sample=asked)
    last = contributions(model, batches, reference, each_sample=asked, only=asked)
    assert list(last.weights) == ["3.weight", "10.weight"]
    for kind in ("weights", "absolute", "neurons", "each_sample"):
        assert all(torch.equal(one, getattr(whole, kind)[name]) for name, one in getattr(last, kind).items())


def test_tracing_stops_at_the_first_layer_that_is_asked_about(monkeypatch):
    model, batches = small_net(), tiny.image_batches(1)
    reference, ran = profile_reference(model, batches), []
    weighted = contributions_module.RULES["weighted"]
    monkeypatch.setitem(
        contributions_module.RULES, "weighted", lambda one, *others: ran.append(one.name) or weighted(one, *others)
    )
    contributions(model, batches, reference, only=["8.weight"])
    assert ran == ["linear 10.weight", "linear 8.weight"]
    with pytest.raises(LayerMismatchError, match=r"only names no parameter\. Name some of .*8\.weight"):
        contributions(model, batches, reference, only=[])


def test_a_weight_that_is_used_twice_adds_up_before_its_size_is_taken():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, given):
            return self.head(self.inner(torch.relu(self.inner(given))))

    model, samples = Twice().eval(), torch.randn(6, 5)
    reference = profile_reference(model, [samples])
    found = contributions(model, [samples], reference, each_sample=["inner.weight"])
    assert torch.equal(found.absolute["inner.weight"], found.each_sample["inner.weight"].abs().sum(0))
    assert contributions(model, [samples], reference).absolute["inner.weight"].equal(found.absolute["inner.weight"])


def test_the_criterion_can_be_a_label_labels_a_function_or_positions():
    model, (batch, *_) = tiny.mlp().eval(), [torch.randn(4, 5)]
    reference = Reference()
    labels = torch.tensor([0, 0, 0, 0])
    named = [contributions(model, [batch], reference, outputs=one) for one in (0, labels, lambda _: labels)]
    assert all(one.neurons["4.weight"].tolist() == [4, 0, 0] for one in named)
    texts = tiny.text_batches(1)[0]
    pairs = torch.tensor([[0, 7], [1, 7], [0, 9], [1, 9]])
    neurons = contributions(tiny.llama(), [texts], reference, outputs=pairs).neurons["lm_head.weight"]
    assert neurons.nonzero()[:, 0].tolist() == [7, 9] and neurons[7] == 2
    flow = flow_of(tiny.llama(), texts)
    last = seeds_of(flow, None, texts).sum(2).argmax(1)
    assert last.tolist() == (texts["attention_mask"].sum(1) - 1).tolist()


def test_numbers_of_numpy_count_as_numbers_and_are_saved(tmp_path):
    model, batch = tiny.mlp().eval(), [torch.randn(2, 5)]
    found = contributions(model, batch, Reference(), theta=np.float32(0.25), outputs=np.int64(1))
    found.save_pretrained(tmp_path)
    assert Contributions.from_pretrained(tmp_path).theta == 0.25
    assert torch.equal(
        found.weights["0.weight"], contributions(model, batch, Reference(), theta=0.25, outputs=1).weights["0.weight"]
    )


def test_a_number_without_an_axis_beside_the_samples_is_no_sample():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, scale, x):
            return self.fc(x) * scale

    batch = {"scale": torch.tensor(2.0), "x": torch.randn(4, 5)}
    assert contributions(Scaled().eval(), [batch], Reference()).num_samples == 4


def test_they_are_saved_and_read_again(tmp_path):
    model, batches = small_net(), tiny.image_batches(1)
    found = contributions(model, batches, Reference())
    found.save_pretrained(tmp_path)
    read = Contributions.from_pretrained(tmp_path)
    assert torch.equal(read.weights["0.weight"], found.weights["0.weight"])
    assert (read.theta, read.reference, read.num_samples) == (0.2, "zero", 4)
    (tmp_path / "remos_contributions.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CorruptFileError):
        Contributions.from_pretrained(tmp_path)


class TestRefusals:
    @pytest.mark.parametrize("theta", [-0.1, 1.0, float("nan"), False, "0.2", None])
    def test_theta_is_a_share_below_1(self, theta):
        with pytest.raises(ValueError, match=r"in \[0, 1\)"):
            contributions(tiny.mlp().eval(), [torch.randn(2, 5)], Reference(), theta=theta)

    @pytest.mark.parametrize("outputs", [3, torch.tensor([0, -1])])
    def test_an_output_that_does_not_exist(self, outputs):
        with pytest.raises(ValueError, match="the model has 3 labels, 0 to 2"):
            contributions(tiny.mlp().eval(), [torch.randn(2, 5)], Reference(), outputs=outputs)

    @pytest.mark.parametrize(
        ("outputs", "told"),
        [
            ([0, 1], "got list"),
            (torch.tensor([0.0, 1.0]), "got torch.float32"),
            (torch.tensor([False, True]), "got torch.bool"),
            (True, "got bool"),
        ],
    )
    def test_labels_that_are_no_whole_numbers(self, outputs, told):
        with pytest.raises(ValueError, match=told):
            contributions(tiny.mlp().eval(), [torch.randn(2, 5)], Reference(), outputs=outputs)

    @pytest.mark.parametrize("traced", [contributions, gradient_contributions])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_the_model_cannot_compute(self, traced, value):
        samples = torch.randn(2, 5)
        samples[1, 0] = value
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            traced(tiny.mlp().eval(), [samples], Reference())

    def test_logits_without_an_axis_of_labels(self):
        with pytest.raises(ValueError, match=r"logits have the shape \(4,\)"):
            contributions(nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)).eval(), [torch.randn(4, 5)], Reference())

    def test_labels_of_other_samples(self):
        with pytest.raises(ValueError, match=r"a label of each sample, but got the shape \(3,\)"):
            contributions(
                tiny.mlp().eval(), [torch.randn(2, 5)], Reference(), outputs=torch.zeros(3, dtype=torch.int64)
            )

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("traced", [contributions, gradient_contributions])
    def test_a_quantised_model_which_has_no_parameters(self, traced):
        model = torch.ao.quantization.quantize_dynamic(tiny.mlp().eval(), {nn.Linear}, dtype=torch.qint8).eval()
        with pytest.raises(UnsupportedModelError, match="'linear_dynamic'"):
            traced(model, [torch.randn(2, 5)], Reference())

    @pytest.mark.parametrize("traced", [contributions, gradient_contributions])
    def test_no_sample(self, traced):
        with pytest.raises(ValueError, match="no sample to ask about"):
            traced(tiny.mlp().eval(), [], Reference())

    def test_a_parameter_that_never_ran(self):
        with pytest.raises(LayerMismatchError, match="each_sample names"):
            contributions(tiny.mlp().eval(), [torch.randn(2, 5)], Reference(), each_sample=["9.weight"])

    @pytest.mark.parametrize("asked", [{"only": ["9.weight"]}, {"only": ["8.weight"], "each_sample": ["3.weight"]}])
    def test_a_parameter_that_is_not_asked_about(self, asked):
        model, batches = small_net(), tiny.image_batches(1)
        with pytest.raises(LayerMismatchError, match="names"):
            contributions(model, batches, Reference(), **asked)

    def test_contributions_that_were_taken_otherwise_do_not_add(self):
        model, batch = tiny.mlp().eval(), [torch.randn(2, 5)]
        with pytest.raises(LayerMismatchError, match="taken alike"):
            contributions(model, batch, Reference(), theta=0.1) + contributions(model, batch, Reference())

    def test_samples_of_which_only_some_are_held_one_by_one_do_not_add(self):
        model, batch = tiny.mlp().eval(), [torch.randn(2, 5)]
        whole, each = (contributions(model, batch, Reference(), each_sample=one) for one in ((), ["0.weight"]))
        for first, second in ((whole, each), (each, whole)):
            with pytest.raises(LayerMismatchError, match="taken alike"):
                first + second


def test_no_hook_stays():
    model = tiny.bert()
    contributions(model, tiny.text_batches(1), profile_reference(model, tiny.text_batches(1)))
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
