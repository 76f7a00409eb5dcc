import pytest
import torch

from remos_hf.activations import alter
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.operator_norm import OperatorNorm, baked, computed
from remos_hf.strategies.residual_mix import apply_mix, end_mix, mix_of, proven, read_through_norms
from tests import tiny
from tests.strategies.residual_nets import Net, Post, Pre

BLOCKS = ["layer1.1", "layer2.0", "layer2.1"]
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def halved(model, images=IMAGES):
    blocks = {name: model.get_submodule(name) for name in BLOCKS}
    with alter(blocks, lambda _, made: made / 2):
        return model(images)


def mixed(model):
    mix = mix_of(model, BLOCKS, ["norm", "head"] if hasattr(model, "norm") else ["head"])
    read_through_norms(model, mix)
    apply_mix(model, mix)
    return mix


@pytest.mark.parametrize("block", [Post, Pre], ids=lambda block: block.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_the_plain_network_computes_the_mean_of_shortcut_and_residual(block, training):
    plain, model = Net(block).train(training), Net(block)
    mixed(model.train(training))
    assert torch.allclose(model(IMAGES), halved(plain), atol=1e-5)


@pytest.mark.parametrize("block", [Post, Pre], ids=lambda block: block.__name__)
def test_baked_it_is_a_plain_network_that_still_computes_it(block):
    plain, model = Net(block), Net(block)
    mix = mixed(model)
    baked(model)
    end_mix(model, mix)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(one.eps == two.eps for one, two in zip(model.modules(), plain.modules(), strict=True)
               if isinstance(one, torch.nn.BatchNorm2d))  # fmt: skip
    fresh = Net(block, seed=9)
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(fresh(IMAGES), halved(plain), atol=1e-5)


def test_with_bounded_operators_a_mixed_block_expands_no_distance():
    """On blocks whose norms do nothing; the shortcut is the identity, so that the plain block could double it."""
    model = Net(Post)
    block = model.layer1[1]
    for norm in (block.bn1, block.bn2):
        norm.reset_parameters()
        norm.eps = 0.0
    for layer in (block.conv1, block.conv2):
        torch.nn.init.dirac_(layer.weight)
        computed(layer, "weight", OperatorNorm(layer, 1.0, (6, 8, 8), torch.Generator().manual_seed(0)))
    one, other = torch.rand(2, 32, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    apart = (one - other).flatten(1).norm(dim=1)
    plain = (block(one) - block(other)).flatten(1).norm(dim=1)
    assert (plain > 1.5 * apart).all() and (plain / 2 <= apart * (1 + 1e-4)).all()


@pytest.mark.parametrize("block", [Post, Pre], ids=lambda block: block.__name__)
def test_a_block_of_a_known_form_is_proven_on_a_batch(block):
    model = Net(block)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    mix = mix_of(model, BLOCKS, ["norm", "head"] if block is Pre else ["head"])
    proven(adapter_for(model, ("head",)), mix, IMAGES)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


class Silu(Post):
    def forward(self, x):
        added = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.nn.functional.silu(added + (x if self.downsample is None else self.downsample(x)))


class NoSum(Post):
    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


@pytest.mark.parametrize("kind", [Silu, NoSum], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("blocks", [["layer2.1"], ["layer2.0", "layer2.1"]], ids=len)
def test_a_block_of_another_form_is_refused_by_name(kind, blocks):
    model = Net(kind)
    with pytest.raises(UnsupportedModelError, match=rf"is a {kind.__name__}: (it is no such sum|written)"):
        proven(adapter_for(model, ("head",)), mix_of(model, blocks, ["head"]), IMAGES)


def test_blocks_of_other_layers_are_refused_by_name():
    bert = tiny.bert()
    with pytest.raises(UnsupportedModelError, match="'bert.encoder.layer.0' is a BertLayer: .* is neither"):
        mix_of(bert, list(adapter_for(bert).blocks()), ["bert.pooler"])
