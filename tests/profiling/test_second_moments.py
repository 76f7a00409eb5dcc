import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from remos_hf.errors import NonFiniteError, UnsupportedModelError
from remos_hf.profiling.data_pass import observe
from remos_hf.profiling.second_moments import SecondMoments
from tests import tiny
from tests.profiling.test_means import inputs_by_hand


def moments_of(model, batches, **options):
    moments = SecondMoments(**options)
    observe(model, batches, [moments], progress=False)
    return moments.moments()


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2])
def test_moments_are_those_of_all_real_positions(make):
    model, batches = make().eval(), tiny.text_batches()
    found = moments_of(model, batches)
    for name, rows in inputs_by_hand(model, batches).items():
        torch.testing.assert_close(found[name], rows.T @ rows / len(rows), rtol=1e-6, atol=1e-7)


def test_layers_that_read_one_tensor_share_one_matrix():
    found = moments_of(tiny.bert(layers=1), tiny.text_batches())
    attention = "bert.encoder.layer.0.attention.self."
    assert found[attention + "query"] is found[attention + "key"] is found[attention + "value"]
    assert len({id(matrix) for matrix in found.values()}) == 4


class Patches(nn.Module):
    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        return self.convolution(x)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (1, 3), padding="same", dilation=2, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=4),
        nn.Conv1d(4, 6, 5, padding=2),
    ],
)
def test_moments_of_a_convolution_give_the_norm_of_its_outputs(convolution):
    shape = (5, 4, 7) if isinstance(convolution, nn.Conv1d) else (5, 4, 7, 6)
    batches = [torch.randn(shape), torch.randn(2, *shape[1:])]
    found = moments_of(Patches(convolution), batches)["convolution"]
    found = found if convolution.groups > 1 else found[None]
    weight = convolution.weight.detach().double().flatten(1).unflatten(0, (convolution.groups, -1))
    squares = torch.einsum("gow,gwv,gov->go", weight, found, weight).flatten()
    with torch.no_grad():
        outputs = torch.cat([(convolution(x).movedim(1, -1) - convolution.bias).flatten(0, -2) for x in batches])
    torch.testing.assert_close(squares, outputs.double().square().mean(0), rtol=1e-5, atol=1e-7)


def test_memory_is_told_before_and_refused_above_the_limit(caplog):
    with (
        caplog.at_level(logging.INFO, "remos_hf"),
        pytest.raises(UnsupportedModelError, match="take more than 0.0 GiB"),
    ):
        moments_of(tiny.bert(), tiny.text_batches(), max_bytes=4000)
    assert "Second moments of 12 layers take at most" in caplog.text


def test_what_is_not_finite_is_named():
    batch = torch.randn(4, 5)
    batch[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="input of '0' held NaN"):
        moments_of(tiny.mlp(), [batch])


def test_a_masked_convolution_whose_positions_shrink_is_refused():
    class Shrinking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv1d(4, 4, 3)

        def forward(self, input_ids, attention_mask):
            return functional.gelu(self.layer(torch.sin(input_ids[:, None] * torch.arange(1.0, 5)[:, None])))

    batch = tiny.text_batches(count=1)[0]
    with pytest.raises(UnsupportedModelError, match="'layer' makes 7 positions of 9"):
        moments_of(Shrinking(), [{key: batch[key] for key in ("input_ids", "attention_mask")}])
