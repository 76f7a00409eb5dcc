import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from transformers import SwinConfig, SwinForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from remos_hf.activations import capture
from remos_hf.errors import NonFiniteError, UnsupportedModelError
from remos_hf.evaluation.measures import bootstrap_interval
from remos_hf.showing.maps import TriggerShare, activation_map, grad_cam, mean_share, resized_mass, share_in_trigger
from tests import tiny

needs_grad_cam = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_grad_cam") is None, reason="grad-cam is not installed"
)


class Pooled(nn.Module):
    """conv, in-place ReLU, mean over positions, linear: gradients that one can work out on paper."""

    def __init__(self, channels=5, labels=3, wrap=False):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(channels, labels)
        self.unused = nn.Linear(2, 2)
        self.wrap = wrap

    def forward(self, pixel_values):
        logits = self.head(self.drop(self.relu(self.conv(pixel_values)).mean((2, 3))))
        return ImageClassifierOutput(logits=logits) if self.wrap else logits


class Tokens(nn.Module):
    """Patches as tokens after some of another kind; every token has a say in the logits."""

    def __init__(self, patch=4, prefix=1, width=6):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.extra = nn.Parameter(torch.randn(1, prefix, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, pixel_values):
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.extra.expand(len(patches), -1, -1), patches], dim=1)
        return self.head(self.norm(tokens).mean(1))


class Says(nn.Module):
    """A layer that gives what the test says, whatever it reads."""

    def __init__(self, output, inside=None):
        super().__init__()
        self.layer = nn.Identity() if inside is None else inside
        self.layer.forward = lambda _: output

    def forward(self, pixel_values):
        self.layer(pixel_values)
        return pixel_values.mean((2, 3))


def twice():
    conv = nn.Conv2d(3, 3, 1)
    return nn.Sequential(conv, conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def images(count=4, height=8, width=8, seed=1):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def maps(count=5, rows=3, columns=4, seed=2):
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))


def corner(height=10, width=9, side=3):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[-side:, -side:] = True
    return mask


# --- activation maps ---


def test_an_activation_map_is_the_channel_mean_of_what_the_layer_gave_before_an_in_place_relu():
    model, inputs = Pooled(), images()
    found = activation_map(model, "conv", inputs)
    assert torch.allclose(found, model.conv(inputs).mean(1)) and (found < 0).any()
    assert found.shape == (4, 4, 4) and found.dtype == torch.float32 and not found.requires_grad
    assert torch.allclose(activation_map(model, "relu", inputs), model.conv(inputs).relu().mean(1))


@pytest.mark.parametrize("training", [True, False])
def test_modes_come_back_and_no_hook_stays(training, no_hooks_left):
    model = tiny.ConvNet().train(training)
    model.norm.train(not training)
    no_hooks_left(model)
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    activation_map(model, "conv", images())
    with pytest.raises(RuntimeError):
        activation_map(model, "conv", torch.randn(2, 5, 8, 8))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_maps_do_not_depend_on_dropout_or_on_the_batch():
    model, inputs = tiny.ConvNet().train(), images(6)
    apart = torch.cat([activation_map(model, "down", part) for part in inputs.split(2)])
    assert torch.allclose(activation_map(model, "down", inputs), apart, atol=1e-6)


def test_half_precision_is_averaged_in_single():
    model = Pooled(channels=64).bfloat16()
    found = activation_map(model, "conv", images().bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, model.conv(images().bfloat16()).float().mean(1))


@pytest.mark.parametrize(("prefix", "patch"), [(0, 2), (1, 2), (2, 2), (5, 2), (0, 4), (1, 4), (2, 4)])
def test_tokens_before_the_patches_are_dropped_and_the_rest_is_a_grid(prefix, patch):
    model, inputs = Tokens(patch, prefix), images()
    patches = model.patches(inputs)
    expected = model.norm(patches.permute(0, 2, 3, 1)).mean(-1)
    assert torch.allclose(activation_map(model, "norm", inputs), expected, atol=1e-6)


def test_tokens_of_an_oblong_image_keep_its_rows_and_columns():
    model, inputs = Tokens(patch=4, prefix=1), images(height=8, width=12)
    expected = model.norm(model.patches(inputs).permute(0, 2, 3, 1)).mean(-1)
    assert expected.shape == (4, 2, 3)
    assert torch.allclose(activation_map(model, "norm", inputs), expected, atol=1e-6)


def test_a_vit_of_transformers_gives_its_patches():
    model, inputs = tiny.vit(), images()
    with torch.no_grad():
        hidden = model(inputs, output_hidden_states=True).hidden_states[1]
    # The path to the blocks is another one in transformers 5.
    (name,) = [name for name, _ in model.named_modules() if name.endswith("1.layernorm_before")]
    found = activation_map(model, name, inputs)
    assert torch.allclose(found, model.get_submodule(name)(hidden)[:, 1:].mean(-1).view(4, 2, 2), atol=1e-6)


def test_a_swin_of_transformers_gives_tokens_without_a_class_token():
    torch.manual_seed(0)
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=4, depths=[1, 1], num_heads=[1, 1], window_size=2)
    model, inputs = SwinForImageClassification(config).eval(), images(height=16, width=16)
    with capture({"made": model.swin.layernorm}) as kept, torch.no_grad():
        model(inputs)
    found = activation_map(model, "swin.layernorm", inputs)
    assert torch.allclose(found, kept["made"].mean(-1).view(4, 4, 4), atol=1e-6)


@pytest.mark.timm
@pytest.mark.parametrize(
    ("name", "layer", "prefix", "more"),
    [
        ("vit_tiny_patch16_224", "blocks.0", 1, {}),
        ("vit_tiny_patch16_224", "patch_embed", 0, {}),
        ("deit_tiny_distilled_patch16_224", "blocks.0", 2, {}),
        ("vit_tiny_patch16_224", "blocks.0", 7, {"reg_tokens": 6}),  # 16 tokens, which could be 4 x 4 patches
    ],
)
def test_timm_says_how_many_tokens_come_before_the_patches(name, layer, prefix, more):
    import timm

    options = {"embed_dim": 8, "num_heads": 2, "img_size": 24, "patch_size": 8, **more}
    model = timm.create_model(name, depth=1, num_classes=3, **options).eval()
    inputs = images(height=24, width=24)
    with capture({"made": model.get_submodule(layer)}) as kept, torch.no_grad():
        model(inputs)
    expected = kept["made"][:, prefix:].mean(-1).view(4, 3, 3)
    assert torch.allclose(activation_map(model, layer, inputs), expected, atol=1e-6)


@pytest.mark.timm
def test_a_swin_of_timm_has_its_channels_last_also_where_the_shape_alone_does_not_tell():
    import timm

    options = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "window_size": 2}
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, num_classes=3, **options).eval()
    inputs = images(height=32, width=32)
    with capture({"made": model.layers[0]}) as kept, torch.no_grad():
        model(inputs)
    assert kept["made"].shape == (4, 8, 8, 8)
    assert torch.allclose(activation_map(model, "layers.0", inputs), kept["made"].mean(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "size", "axis"),
    [
        ((2, 12, 4, 4), (8, 8), 1),
        ((2, 4, 4, 12), (8, 8), 3),
        ((2, 12, 4, 6), (8, 12), 1),
        ((2, 4, 6, 12), (8, 12), 3),
        ((2, 4, 3, 5), (96, 150), 1),  # strides round up: 96 / 32, 150 / 32
    ],
)
def test_the_channel_axis_is_the_one_that_leaves_the_images_proportions(shape, size, axis):
    output = torch.randn(shape)
    found = activation_map(Says(output), "layer", images(2, *size))
    assert torch.allclose(found, output.mean(axis))


@pytest.mark.parametrize(("inside", "axis"), [(nn.Conv2d(3, 8, 1), 1), (nn.LayerNorm(8), 3), (nn.Linear(8, 8), 3)])
def test_where_both_axes_fit_the_layers_inside_decide(inside, axis):
    output = torch.randn(2, 8, 8, 8)
    assert torch.allclose(activation_map(Says(output, inside), "layer", images(2)), output.mean(axis))


def test_where_nothing_tells_the_channel_axis_the_map_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"\(2, 8, 8, 8\), whose channels may lie on axis 1"):
        activation_map(Says(torch.randn(2, 8, 8, 8)), "layer", images(2))
    both = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LayerNorm(8))
    with pytest.raises(UnsupportedModelError, match="may lie on axis 1"):
        activation_map(Says(torch.randn(2, 8, 8, 8), both), "layer", images(2))


@pytest.mark.parametrize("shape", [(2, 7), (2, 40, 3), (2, 3, 3), (8, 4, 3), (1, 3, 4, 4), (2, 3, 4, 4, 1)])
def test_what_is_no_map_of_the_images_is_refused(shape):
    with pytest.raises(UnsupportedModelError, match=r"no map of them"):
        activation_map(Says(torch.randn(shape)), "layer", images(2))


def test_a_layer_that_runs_twice_or_never_is_refused():
    with pytest.raises(UnsupportedModelError, match="'1' ran 2 times"):
        activation_map(twice(), "1", images())
    with pytest.raises(UnsupportedModelError, match="'unused' ran 0 times"):
        activation_map(Pooled(), "unused", images())


@pytest.mark.parametrize("layer", ["", "convolution", "conv.weight"])
def test_a_layer_that_is_not_there_is_named(layer):
    with pytest.raises(ValueError, match=rf"inside Pooled, but got '{layer}'.*'conv', 'relu'"):
        activation_map(Pooled(), layer, images())


def test_inputs_that_are_no_images_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        activation_map(Pooled(), "conv", torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="shape"):
        activation_map(Pooled(), "conv", torch.zeros(3, 8, 8))


# --- Grad-CAM ---


@needs_grad_cam
@pytest.mark.parametrize("wrap", [False, True])
def test_grad_cam_is_what_one_works_out_on_paper(wrap):
    model, inputs, labels = Pooled(wrap=wrap).train(), images(6), torch.tensor([0, 1, 2, 2, 0, 1])
    weight = model.head.weight.detach()[labels] / 16  # d logit / d activation of each of the 4 x 4 positions
    before = model.conv(inputs).detach()
    after = before.relu()
    expected = (weight[:, :, None, None] * after).sum(1).relu()
    assert torch.allclose(grad_cam(model, "relu", inputs, labels), expected, atol=1e-6)
    # Before the ReLU only positions that pass it have a gradient, and what it cut off is negative still.
    passing = weight * (before > 0).float().mean((2, 3))
    expected = (passing[:, :, None, None] * before).sum(1).relu()
    found = grad_cam(model, "conv", inputs, labels)
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found >= 0).all() and (found > 0).any() and found.dtype == torch.float32


@needs_grad_cam
def test_grad_cam_of_tokens_leaves_out_those_before_the_patches():
    model, inputs, labels = Tokens(patch=2, prefix=2), images(), torch.tensor([2, 0, 1, 1])
    patches = model.norm(model.patches(inputs).permute(0, 2, 3, 1)).detach()
    weight = model.head.weight.detach()[labels] / 18  # 16 patches and 2 more
    expected = (weight[:, None, None] * patches).sum(-1).relu()
    assert torch.allclose(grad_cam(model, "norm", inputs, labels), expected, atol=1e-6)


@needs_grad_cam
def test_grad_cam_leaves_the_model_as_it_was(no_hooks_left):
    model = Pooled().train()
    model.drop.eval()
    no_hooks_left(model)
    model.conv.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    modes = {name: module.training for name, module in model.named_modules()}
    inputs, labels = images(), torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        grad_cam(model, "conv", inputs, labels)
    with pytest.raises(UnsupportedModelError) as error:
        grad_cam(model, "unused", inputs, labels)
    # While the error is held, and with it all that it passed through.
    assert error.tb and not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.conv.bias.grad is None and not inputs.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not model.conv.weight.requires_grad and model.conv.bias.requires_grad


@needs_grad_cam
def test_grad_cam_works_where_all_weights_are_frozen_and_in_half_precision():
    model, labels = Pooled(), torch.tensor([0, 1, 2, 2])
    expected = grad_cam(model, "conv", images(), labels)
    assert torch.equal(grad_cam(model.requires_grad_(False), "conv", images(), labels), expected)
    half = grad_cam(model.bfloat16(), "conv", images().bfloat16(), labels)
    assert half.dtype == torch.float32 and (half - expected).abs().sum() < 0.05 * expected.sum()


@needs_grad_cam
def test_grad_cam_names_what_it_cannot_do():
    model, inputs, labels = Pooled(), images(), torch.tensor([0, 1, 2, 2])
    for wrong in (labels.float(), labels[:2], labels[None], labels.bool()):
        with pytest.raises(ValueError, match=r"one an image, shape \(4,\)"):
            grad_cam(model, "conv", inputs, wrong)
    for wrong in (labels + 1, labels - 1):
        with pytest.raises(ValueError, match="from 0 to 2"):
            grad_cam(model, "conv", inputs, wrong)
    with pytest.raises(UnsupportedModelError, match="'1' ran 2 times"):
        grad_cam(twice(), "1", inputs, labels)
    with pytest.raises(UnsupportedModelError, match="No gradient of the logits reaches '0.layer'"):
        grad_cam(nn.Sequential(Says(torch.randn(4, 3, 4, 4)), nn.Linear(3, 3)), "0.layer", inputs, labels)
    with pytest.raises(UnsupportedModelError, match="logits of shape"):
        grad_cam(nn.Sequential(nn.Conv2d(3, 2, 1)), "0", inputs, labels)
    with pytest.raises(UnsupportedModelError, match="returns tuple"):
        grad_cam(Says((torch.randn(4, 3, 4, 4),), nn.Linear(1, 1)), "layer", inputs, labels)
    with pytest.raises(UnsupportedModelError, match="no parameter"):
        grad_cam(Says(torch.randn(4, 3, 4, 4)), "layer", inputs, labels)


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    model = Pooled().train()
    with pytest.raises(ImportError, match=r"remos_hf\[plots\]"):
        grad_cam(model, "conv", images(), torch.zeros(4, dtype=torch.int64))
    assert model.training


# --- the share inside the trigger ---


def slow_mass(one, height, width):
    """Bilinear interpolation between the centres of cells, pixel by pixel."""
    rows, columns = one.shape
    laid = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            down = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
            right = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = int(down), int(right)
            for row in {top, min(top + 1, rows - 1)}:
                for column in {left, min(left + 1, columns - 1)}:
                    weight = (1 - abs(down - row)) * (1 - abs(right - column))
                    laid[y, x] += weight * max(float(one[row, column]), 0)
    return laid


def slow_share(one, mask):
    laid = slow_mass(one, *mask.shape)
    inside = sum(laid[y, x] for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x])
    return inside / laid.sum() if laid.sum() else math.nan


def test_mass_is_the_positive_part_laid_over_the_image():
    found = resized_mass(maps(), 10, 9)
    assert np.allclose(found, [slow_mass(one, 10, 9) for one in maps()]) and found.dtype == torch.float64


def test_the_share_is_that_of_a_slow_loop():
    expected = [slow_share(one, corner()) for one in maps()]
    assert np.allclose(share_in_trigger(maps(), corner()), expected)
    apart = torch.stack([corner().roll(place, 1) for place in range(5)])
    expected = [slow_share(one, mask) for one, mask in zip(maps(), apart, strict=True)]
    assert np.allclose(share_in_trigger(maps(), apart), expected) and len(set(expected)) == 5


def test_a_flat_map_has_the_share_of_the_area_and_one_inside_the_trigger_has_all():
    flat, inside = torch.full((1, 3, 3), 0.25), torch.zeros(1, 10, 9)
    inside[0, -2:, -2:] = 5
    assert share_in_trigger(flat, corner()).item() == pytest.approx(9 / 90)
    assert share_in_trigger(inside, corner()).item() == 1.0
    assert share_in_trigger(1 - corner()[None].float(), corner()).item() == 0.0


def test_shares_do_not_depend_on_the_scale_of_a_map_and_tiny_ones_keep_theirs():
    whole = share_in_trigger(maps(), corner())
    assert torch.allclose(share_in_trigger(maps() * 1e-40, corner()), whole, atol=1e-3)
    assert torch.allclose(share_in_trigger(maps() * 1e30, corner()), whole)


def test_a_map_without_mass_has_no_share():
    found = share_in_trigger(torch.stack([torch.zeros(3, 3), -torch.ones(3, 3), torch.ones(3, 3)]), corner())
    assert found.isnan().tolist() == [True, True, False]


def test_wrong_masks_and_maps_are_refused():
    with pytest.raises(TypeError, match="float32"):
        share_in_trigger(maps(), corner().float())
    with pytest.raises(ValueError, match="False everywhere"):
        share_in_trigger(maps(), torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="False everywhere"):
        share_in_trigger(maps(2), torch.stack([corner(), corner() & False]))
    for mask in (corner().expand(3, -1, -1), corner()[0], corner()[None, None]):
        with pytest.raises(ValueError, match="5 maps"):
            share_in_trigger(maps(), mask)
    with pytest.raises(ValueError, match=r"\(samples, rows, columns\)"):
        share_in_trigger(maps()[0], corner())
    with pytest.raises(TypeError, match="int64"):
        share_in_trigger(maps().long(), corner())
    for value in (math.nan, math.inf):
        with pytest.raises(NonFiniteError):
            share_in_trigger(torch.full((1, 2, 2), value), corner())


def test_the_mean_is_over_all_samples_with_mass_and_stands_beside_chance():
    held = torch.cat([maps(7), torch.zeros(2, 3, 4), maps(4, seed=5)])
    shares = np.array([slow_share(one, corner()) for one in held])
    found = mean_share(iter(held.split(4)), corner(), seed=3, resamples=200)
    counted = shares[~np.isnan(shares)]
    low, high = bootstrap_interval(counted, statistic=lambda one: one.mean(-1), seed=3, resamples=200)
    assert (found.num_samples, found.num_without_mass) == (11, 2)
    assert (found.value, found.low, found.high) == pytest.approx((counted.mean(), low, high))
    assert found.low < found.value < found.high
    assert found.chance == pytest.approx(9 / 90)


def test_the_mean_does_not_depend_on_batches():
    held = maps(9)
    assert mean_share(held.split(2), corner()) == mean_share([held], corner())
    masks = torch.stack([corner().roll(place, 0) for place in range(9)])
    assert mean_share(held.split(2), masks.split(2)) == mean_share([held], [masks])


def test_masks_of_single_samples_have_their_own_chance():
    held, masks = torch.ones(3, 2, 2), torch.stack([corner(side=side) for side in (1, 2, 9)])
    held[2] = 0
    found = mean_share([held], [masks])
    # What the third one would add is not counted on either side.
    assert found.chance == pytest.approx((1 + 4) / 2 / 90) and found.value == pytest.approx(found.chance)
    assert found.to_dict()["num_without_mass"] == 1


def test_maps_without_any_mass_have_no_mean():
    assert mean_share([torch.zeros(3, 2, 2)], corner()) == TriggerShare(None, None, None, None, 0, 3)


def test_a_mean_of_nothing_or_of_what_does_not_pair_is_refused():
    with pytest.raises(ValueError, match="no map to average"):
        mean_share([], corner())
    for sizes in ((2, 1), (1, 2)):
        with pytest.raises(ValueError, match="ended before the other"):
            mean_share([maps(1)] * sizes[0], [corner()[None]] * sizes[1])
    with pytest.raises(ValueError, match="One mask for all samples"):
        mean_share([maps(2)], corner().expand(2, -1, -1))


@needs_grad_cam
def test_a_student_that_looks_at_the_trigger_has_a_share_above_chance():
    model, mask = Pooled(channels=1, labels=2), corner(8, 8, 2)
    with torch.no_grad():
        for weight in (model.conv.weight, model.head.weight):
            weight.fill_(1.0)
        model.conv.bias.fill_(-20.0)
    inputs = 0.1 * images(6).abs()
    shown = inputs + 5.0 * mask
    labels = torch.ones(6, dtype=torch.int64)
    for maps_of in (
        lambda batch: activation_map(model, "relu", batch),
        lambda batch: grad_cam(model, "relu", batch, labels[: len(batch)]),
    ):
        found = mean_share((maps_of(batch) for batch in shown.split(4)), mask)
        assert found.low > 3 * found.chance and found.num_samples == 6
        assert mean_share((maps_of(batch) for batch in inputs.split(4)), mask).num_without_mass == 6
