import copy
import logging

import pytest
import torch
from torch import nn

from remos_hf.applications.class_pruning import prune_outside
from remos_hf.applications.mean_inputs import profile_mean_inputs
from remos_hf.applications.weight_ranking import highest_scoring, weight_scores
from remos_hf.errors import LayerMismatchError, NonFiniteError
from tests import tiny


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.norm.running_mean.normal_()
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).mean((2, 3)))


def pruned(model, batches, share=0.4):
    means = profile_mean_inputs(model, batches)
    kept = highest_scoring(model, weight_scores(model, "random"), share, head=())
    return prune_outside(copy.deepcopy(model), kept, means=means)


def test_the_mean_of_what_a_layer_makes_stays_though_it_is_padded_and_has_no_bias():
    model = Normed().eval()
    batches = tiny.image_batches(3, pixels=9)
    after = pruned(model, batches)
    images = torch.cat([one for one, _ in batches])
    with torch.no_grad():
        before, now = (one.norm(one.conv(images)) for one in (model, after))
    assert not torch.equal(before, now)
    assert torch.allclose(before.mean((0, 2, 3)), now.mean((0, 2, 3)), atol=1e-5)
    assert torch.equal(model.norm.running_var, after.norm.running_var)


def test_a_bias_takes_it_in_grouped_and_plain_layers_and_batches_add():
    model, batches = tiny.ConvNet().eval(), tiny.image_batches(3)
    whole, parts = profile_mean_inputs(model, [torch.cat([one for one, _ in batches])]), profile_mean_inputs(
        model, batches
    )  # fmt: skip
    for name, columns in whole.columns.items():
        assert torch.allclose(columns, parts.columns[name], atol=1e-6)
    assert whole.num_samples == parts.num_samples == 12
    kept = highest_scoring(model, weight_scores(model, "random"), 0.4, head=())
    for name in ("down", "grouped", "depthwise"):
        layer, seen = dict(model.named_modules())[name], []
        hook = layer.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        model(torch.cat([one for one, _ in batches]))
        hook.remove()
        after = dict(prune_outside(copy.deepcopy(model), kept, means=whole).named_modules())[name]
        with torch.no_grad():
            before, now = layer(seen[0]).mean((0, 2, 3)), after(seen[0]).mean((0, 2, 3))
        assert torch.allclose(before, now, atol=1e-5), name


def test_padding_of_texts_does_not_count():
    model, (batch, *_) = tiny.bert(), tiny.text_batches()
    longer = {name: nn.functional.pad(one, (0, 5)) for name, one in batch.items() if name != "labels"}
    short, long = (profile_mean_inputs(model, [one]).columns for one in (batch, longer))
    assert short.keys() == long.keys()
    assert all(torch.allclose(one, long[name], atol=1e-5) for name, one in short.items())


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2])
def test_what_makes_the_pattern_of_attention_gets_its_mean_too(make):
    model, batches = make(), tiny.text_batches(padded=False)
    means = profile_mean_inputs(model, batches)
    assert weight_scores(model, "magnitude").keys() <= means.columns.keys()
    name = next(one for one in means.columns if "query.weight" in one or "c_attn.weight" in one)
    layer, seen = dict(model.named_modules())[name.removesuffix(".weight")], []
    hook = layer.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(0, 1)))
    for batch in batches:
        model(**batch)
    hook.remove()
    assert torch.allclose(means.columns[name][0], torch.cat(seen).double().mean(0), atol=1e-6)


def test_a_layer_that_nothing_makes_up_for_is_told(caplog):
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)).eval()
    with caplog.at_level(logging.WARNING):
        pruned(model, [torch.randn(8, 5) + 1])
    assert "0.weight" in caplog.text and "2.weight" not in caplog.text


def test_a_norm_that_is_not_alone_to_read_takes_nothing():
    class Forked(Normed):
        def forward(self, images):
            made = self.conv(images)
            return self.head((self.norm(made) + made).mean((2, 3)))

    assert profile_mean_inputs(Normed().eval(), tiny.image_batches(1)).norms == {"conv.weight": "norm.running_mean"}
    assert profile_mean_inputs(Forked().eval(), tiny.image_batches(1)).norms == {}


def test_means_of_another_model_and_no_sample_are_refused():
    model = tiny.mlp().eval()
    kept = highest_scoring(model, weight_scores(model, "magnitude"), 0.5, head=())
    other = profile_mean_inputs(tiny.mlp(sizes=(4, 7, 6, 3)).eval(), [torch.randn(2, 4)])
    with pytest.raises(LayerMismatchError, match=r"0\.weight"):
        prune_outside(model, kept, means=other)
    with pytest.raises(ValueError, match="no sample"):
        profile_mean_inputs(model, [])
    before = model[0].bias.clone()
    partly = profile_mean_inputs(model, [torch.randn(2, 5)])
    partly.columns["4.weight"] = partly.columns["4.weight"][:, 1:]
    with pytest.raises(LayerMismatchError, match=r"4\.weight"):
        prune_outside(model, kept, means=partly)
    assert torch.equal(model[0].bias, before)


def test_data_that_has_no_mean_is_refused():
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        profile_mean_inputs(tiny.mlp().eval(), [torch.full((2, 5), float("nan"))])


def test_a_norm_of_two_layers_and_a_layer_that_runs_without_its_norm_take_nothing():
    class Twice(Normed):
        def __init__(self):
            super().__init__()
            self.other = nn.Conv2d(3, 6, 1, stride=2, bias=False)

        def forward(self, images):
            return self.head((self.norm(self.conv(images)) + self.norm(self.other(images))).mean((2, 3)))

    class Bare(Normed):
        def forward(self, images):
            return self.head((self.norm(self.conv(images)) + self.conv(images.flip(3))).mean((2, 3)))

    class Again(Normed):
        def forward(self, images):
            return self.head((self.norm(self.conv(images)) + self.norm(self.conv(images.flip(3)))).mean((2, 3)))

    images = tiny.image_batches(1)
    assert profile_mean_inputs(Twice().eval(), images).norms == {}
    assert profile_mean_inputs(Bare().eval(), images).norms == {}
    assert profile_mean_inputs(Again().eval(), images).norms == {"conv.weight": "norm.running_mean"}
