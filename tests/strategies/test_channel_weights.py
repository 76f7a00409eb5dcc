import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from remos_hf.activations import alter
from remos_hf.errors import NonFiniteError
from remos_hf.strategies.channel_weights import loss_by_gradient, loss_when_silenced, weights_of_channels
from remos_hf.strategies.short_runs import Samples
from tests import tiny
from tests.adapters import timm_nets

TEXT = {"bert.encoder.layer.0.output.dense": (1, 1, -1), "bert.encoder.layer.1.output.dense": (1, 1, -1)}
IMAGE = {"conv": (1, -1, 1, 1), "grouped": (1, -1, 1, 1)}


def asked(make, names, batches):
    model = make().requires_grad_(False).eval()
    for name in names:
        model.get_submodule(name).weight.mul_(10)
    samples = Samples(tiny.student_data(batches), torch.device("cpu"), 0)
    return model, {name: model.get_submodule(name) for name in names}, samples


def labelled(model, batch):
    return (
        model(**batch).loss if isinstance(batch, dict) else functional.cross_entropy(model(batch[0]), batch[1].long())
    )


def one_by_one(model, modules, shapes, batches):
    """The slow and obvious way: the whole net once for every channel and batch."""
    found, rows = {}, 0
    for batch in batches:
        size = len(batch["labels"] if isinstance(batch, dict) else batch[1])
        rows += size
        for name, module in modules.items():
            count = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
            for channel in range(count):
                heard = (torch.arange(count) != channel).float().view(shapes[name])
                with torch.no_grad(), alter({name: module}, lambda _, made, heard=heard: made * heard):
                    losses = found.setdefault(name, torch.zeros(count))
                    losses[channel] += size * labelled(model, batch)
    return {name: losses / rows for name, losses in found.items()}


@pytest.mark.parametrize(("make", "shapes", "batches"), [(tiny.bert, TEXT, tiny.text_batches),
                                                          (tiny.ConvNet, IMAGE, tiny.image_batches)])  # fmt: skip
def test_silencing_many_channels_at_once_gives_what_one_at_a_time_does(make, shapes, batches, no_hooks_left):
    model, modules, samples = asked(make, shapes, batches)
    no_hooks_left(model)
    found = loss_when_silenced(model, modules, samples, 100)
    expected = one_by_one(model, modules, shapes, batches())
    for name, losses in expected.items():
        assert losses.std() > 1e-5
        assert torch.allclose(found[name], losses, rtol=0, atol=0.05 * losses.std())


def test_what_cannot_run_at_once_runs_one_by_one_and_the_log_says_so(caplog):
    class Looks(tiny.ConvNet):
        def forward(self, images):
            return super().forward(images) * (1.0 if self.grouped(torch.ones(1, 12, 1, 1)).sum().item() else 1.0)

    model, modules, samples = asked(Looks, IMAGE, tiny.image_batches)
    with caplog.at_level(logging.WARNING):
        found = loss_when_silenced(model, modules, samples, 100)
    assert "Channels of a Conv2d in Looks are silenced one by one" in caplog.text
    plain = loss_when_silenced(*asked(tiny.ConvNet, IMAGE, tiny.image_batches), 100)
    assert torch.allclose(found["grouped"], plain["grouped"], atol=1e-6)


def test_the_gradient_estimates_the_same_and_is_exact_where_the_loss_is_linear():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, inputs, labels):
            return {"loss": self.head(self.body(inputs)).mean()}

    batches = lambda: [{"inputs": torch.randn(5, 3), "labels": torch.zeros(5)}]  # noqa: E731
    model, modules, samples = asked(Linear, ["body"], batches)
    silenced = loss_when_silenced(model, modules, samples, 5)["body"]
    whole = float(model(**samples.batches[0])["loss"])
    estimated = loss_by_gradient(model, modules, samples, 5)["body"]
    assert torch.allclose(silenced - whole, estimated, atol=1e-6)


def test_the_gradient_ranks_a_nets_channels_much_as_silence_does():
    parts = [asked(tiny.ConvNet, IMAGE, tiny.image_batches) for _ in range(2)]
    silenced, estimated = loss_when_silenced(*parts[0], 100), loss_by_gradient(*parts[1], 100)
    for name in IMAGE:
        assert torch.corrcoef(torch.stack([silenced[name], estimated[name]]))[0, 1] > 0.8


@pytest.mark.parametrize("names", [["aside"], ["aside", "body"]])
def test_what_the_loss_does_not_read_adds_nothing_to_it(names):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.aside, self.head = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(4, 2)

        def forward(self, inputs):
            self.aside(inputs)
            return self.head(self.body(inputs))

    model, modules, samples = asked(Aside, names, lambda: [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))])
    estimated, silenced = (weigh(model, modules, samples, 4) for weigh in (loss_by_gradient, loss_when_silenced))
    assert torch.equal(estimated["aside"], torch.zeros(5)) and not silenced["aside"].std()
    assert "body" not in names or estimated["body"].std() > 0


@pytest.mark.timm
@pytest.mark.parametrize("weigh", [loss_by_gradient, loss_when_silenced])
def test_channels_of_maps_that_have_them_last_are_weighed(weigh):
    batches = lambda: [(torch.randn(2, 3, timm_nets.PIXELS, timm_nets.PIXELS), torch.tensor([0, 1]))]  # noqa: E731
    model = timm_nets.swin().requires_grad_(False).eval()
    names = ["layers.0", "layers.1", "patch_embed.proj"]
    samples = Samples(tiny.student_data(batches), torch.device("cpu"), 0)
    found = weigh(model, {name: model.get_submodule(name) for name in names}, samples, 2)
    assert [len(found[name]) for name in names] == [8, 16, 8]


def test_weights_have_the_mean_1_and_grow_with_importance():
    weights = weights_of_channels(torch.tensor([0.0, 1.0, 2.0]))
    z = torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5
    assert torch.allclose(weights, 3 * (z / 5).softmax(0))
    assert weights.mean().item() == pytest.approx(1)
    assert weights_of_channels(torch.ones(4)).tolist() == [1, 1, 1, 1]


def test_without_samples_it_says_what_to_pass():
    model, modules, samples = asked(tiny.bert, TEXT, lambda: [])
    with pytest.raises(ValueError, match="Pass the student's training data"):
        loss_when_silenced(model, modules, samples, 4)


@pytest.mark.parametrize("weigh", [loss_when_silenced, loss_by_gradient])
def test_channels_whose_silence_costs_nan_are_refused(weigh):
    broken = lambda: [(images * torch.nan, labels) for images, labels in tiny.image_batches()]  # noqa: E731
    with pytest.raises(NonFiniteError, match="channels of 'conv' .* NaN"):
        weigh(*asked(tiny.ConvNet, IMAGE, broken), 100)
