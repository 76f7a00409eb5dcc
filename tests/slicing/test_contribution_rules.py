import pytest
import torch
from torch import nn
from torch.nn import functional

from remos_hf.adapters.flow_recording import flow_of
from remos_hf.errors import UnsupportedModelError
from remos_hf.profiling.reference import Reference, profile_reference
from remos_hf.slicing.contribution_rules import RULES, Analysis, relative_output
from remos_hf.slicing.contributions_kept import kept_signs
from tests import tiny
from tests.adapters.test_flow_recording import Net, given

ZERO = Reference()


def parts(model, batch, rule, contrib=None, theta=0.0, reference=None):
    """CONTRIB that the first operation of a rule hands down, if every output has 1, and what it looked at."""
    flow = flow_of(model, batch)
    operation = next(one for one in flow.operations if one.rule == rule)
    analysis = Analysis(flow, reference or profile_reference(model, [batch]), theta, lambda *_: None)
    made = torch.ones_like(flow.values[operation.output], dtype=torch.int32) if contrib is None else contrib
    return dict(RULES[rule](operation, made, analysis)), operation, analysis


class TestEffectsAddUpToTheRelativeOutput:
    """Of linear operations, whatever the reference."""

    @pytest.mark.parametrize("kind", ["global", "position"])
    def test_of_convolutions(self, kind):
        model, batch = tiny.ConvNet().eval(), tiny.image_batches()[0]
        flow = flow_of(model, batch)
        analysis = Analysis(flow, profile_reference(model, [batch], kind=kind), 0, None)
        for operation in flow.operations:
            if operation.rule in ("weighted", "total"):
                alone = operation.run({operation.inputs[0]: analysis.deviation(operation.inputs[0])})
                if operation.layer is not None and operation.layer.bias is not None:
                    bias = operation.layer.bias
                    alone = alone - bias.view(-1, *(1,) * (alone.dim() - 2))
                assert torch.allclose(relative_output(operation, analysis), alone, atol=1e-5), operation.name

    def test_of_residuals(self):
        model, batch = tiny.ConvNet().eval(), tiny.image_batches()[0]
        flow = flow_of(model, batch)
        analysis = Analysis(flow, profile_reference(model, [batch]), 0, None)
        operation = next(one for one in flow.operations if one.rule == "add")
        both = sum(analysis.deviation(number) for number in operation.inputs)
        assert torch.allclose(relative_output(operation, analysis), both, atol=1e-6)

    def test_of_attention_with_its_pattern_frozen(self):
        model, batch = tiny.llama(), tiny.text_batches()[0]
        flow = flow_of(model, batch)
        analysis = Analysis(flow, profile_reference(model, [batch]), 0, None)
        operation = next(one for one in flow.operations if one.rule == "attention")
        alone = operation.run({operation.inputs[0]: analysis.deviation(operation.inputs[0])})
        assert torch.allclose(relative_output(operation, analysis), alone, atol=1e-5)

    def test_of_gates_exactly(self):
        model, batch = tiny.llama(), tiny.text_batches()[0]
        flow = flow_of(model, batch)
        analysis = Analysis(flow, profile_reference(model, [batch]), 0, None)
        operation = next(one for one in flow.operations if one.rule == "multiply" and len(one.inputs) == 2)
        gate, up = ((analysis.value(one), analysis.reference.of(flow, one)) for one in operation.inputs)
        split = (gate[0] - gate[1]) * (up[0] + up[1]) / 2 + (up[0] - up[1]) * (gate[0] + gate[1]) / 2
        assert torch.allclose(relative_output(operation, analysis), split, atol=1e-6)


class TestRules:
    def test_a_closed_relu_hands_nothing_down(self):
        found, operation, analysis = parts(Net(functional.relu), given(), "relu")
        assert torch.equal(found[operation.inputs[0]], (analysis.value(operation.inputs[0]) > 0).int())

    def test_a_falling_curve_turns_contributions_around(self):
        found, operation, analysis = parts(Net(lambda one: torch.exp(-one)), given(), "curve")
        assert bool((found[operation.inputs[0]] == 1).all())  # exp rises
        found, operation, analysis = parts(Net(lambda one: one.abs()), given(), "curve")
        before, usual = analysis.value(operation.inputs[0]), analysis.reference.of(analysis.flow, operation.inputs[0])
        expected = (before.abs() - usual.abs()).sign() * (before - usual).sign()
        assert torch.equal(found[operation.inputs[0]], expected.int()) and bool((expected < 0).any())

    def test_what_is_subtracted_works_the_other_way(self):
        found, operation, _ = parts(Net(lambda one: one - 2 * one), given(), "add")
        whole, doubled = operation.inputs
        assert bool((found[whole] == -1).all()) and bool((found[doubled] == 1).all())

    def test_a_factor_of_what_is_subtracted_from_is_its_own(self):
        def body(one):
            return torch.rsub(one, 2 * one, alpha=4)  # 2 one - 4 one

        found, operation, _ = parts(Net(body), given(), "add")
        whole, doubled = operation.inputs
        assert bool((found[whole] == 1).all()) and bool((found[doubled] == -1).all())

    @pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU6, nn.Hardswish, nn.ELU], ids=lambda one: one.__name__)
    def test_a_curve_in_place_is_the_same_curve(self, act):
        found, other = (parts(Net(act(inplace=inplace)), given(), "curve")[0] for inplace in (False, True))
        assert torch.equal(found[1], other[1])

    def test_what_moves_in_place_hands_down_too(self):
        found, operation, analysis = parts(Net(lambda one: (1 * one).masked_fill_(one > 0, 0.0)), given(), "moved")
        assert torch.equal(found[operation.inputs[0]], (analysis.value(operation.inputs[0]) <= 0).int())

    def test_a_gate_of_a_whole_channel_adds_up_what_its_positions_hand_down(self):
        contrib = torch.ones(4, 6, 3, dtype=torch.int32)
        body = lambda one: one[..., None].expand(-1, -1, 3) * one.mean(1, keepdim=True)[..., None]  # noqa: E731
        found, operation, _ = parts(Net(lambda one: body(one).sum(2)), given(), "multiply", contrib, reference=ZERO)
        whole, gate = operation.inputs
        assert found[gate].shape == (4, 1, 1) and found[gate].dtype == found[whole].dtype == torch.int32
        assert bool((found[gate] == 18).all())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_another_dtype_rounds_no_contribution(self, dtype):
        contrib = 2049 * torch.ones(4, 6, dtype=torch.int32)
        found, operation, _ = parts(Net(lambda one: one.to(dtype).float()), given(), "moved", contrib)
        assert operation.name == "to" and torch.equal(found[operation.inputs[0]], contrib)

    def test_a_factor_of_zero_hands_nothing_down(self):
        mask = torch.tensor([1.0, 0, 1, -1, 0, 1])
        found, operation, _ = parts(Net(lambda one: one * mask), given(), "multiply")
        assert found[operation.inputs[0]].tolist() == [[1, 0, 1, 1, 0, 1]] * 4

    def test_a_shared_input_adds_up_its_copies(self):
        found, operation, _ = parts(Net(lambda one: one[:, None].expand(-1, 3, -1).flatten(1), 18), given(), "moved")
        flow = flow_of(Net(lambda one: one[:, None].expand(-1, 3, -1).flatten(1), 18), given())
        assert [one.name for one in flow.operations][1:4] == ["getitem", "expand", "flatten"]
        assert operation.name == "getitem" and bool((found[operation.inputs[0]] == 1).all())

    def test_concatenated_parts_get_their_own(self):
        contrib = torch.arange(48, dtype=torch.int32).view(4, 12)
        found, operation, _ = parts(Net(lambda one: torch.cat([one, one], 1), 12), given(), "moved", contrib)
        assert torch.equal(found[operation.inputs[0]], contrib.view(4, 2, 6).sum(1).int())

    def test_a_maximum_hands_down_to_all_that_are_largest(self):
        model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 2)).eval()
        image = torch.tensor([[[[3.0, 1.0], [3.0, 2.0]]]])
        found, operation, _ = parts(model, image, "max_pool", torch.full((1, 1, 1, 1), -2, dtype=torch.int32))
        assert found[0].flatten().tolist() == [-2, 0, -2, 0]

    def test_attention_hands_down_to_no_padding_and_to_nothing_ahead(self):
        model, batch = tiny.gpt2(), tiny.text_batches()[0]
        contrib = torch.zeros(4, 2, 9, 8, dtype=torch.int32)
        contrib[:, :, 1] = 1
        found, operation, _ = parts(model, batch, "attention", contrib)
        assert bool(found[operation.inputs[0]][:, :, :2].any()) and not bool(found[operation.inputs[0]][:, :, 2:].any())

    def test_key_and_value_heads_that_are_shared_add_up(self):
        query, value = torch.randn(1, 4, 3, 2), nn.Linear(12, 12)

        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.value, self.head = value, nn.Linear(24, 2)

            def forward(self, rows):
                heads = self.value(rows).view(-1, 2, 3, 2)
                mixed = functional.scaled_dot_product_attention(query, query[:, :2], heads, enable_gqa=True)
                return self.head(mixed.flatten(1))

        found, operation, analysis = parts(Shared().eval(), torch.randn(1, 12), "attention")
        pattern = (query @ query[:, :2].repeat_interleave(2, 1).transpose(-1, -2) / 2**0.5).softmax(-1)
        deviation = analysis.deviation(operation.inputs[0]).repeat_interleave(2, 1)
        effects = pattern[..., None] * deviation[:, :, None]
        rows = effects.movedim(-2, -1).flatten(0, -2)
        signs = kept_signs(rows.clone(), 0.0).view(1, 4, 3, 2, 3).movedim(-1, -2)
        expected = signs.sum(2).view(1, 2, 2, 3, 2).sum(2)
        assert torch.equal(found[operation.inputs[0]], expected.int())

    @pytest.mark.parametrize(
        "pool", [nn.AdaptiveAvgPool2d(3), nn.AvgPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(3, 2, ceil_mode=True)]
    )
    def test_windows_of_unequal_size_are_refused(self, pool):
        model = nn.Sequential(nn.Conv2d(3, 2, 1), pool, nn.Flatten(), nn.LazyLinear(2)).eval()
        image = torch.randn(1, 3, 8, 8)
        model(image)
        rule = "max_pool" if isinstance(pool, nn.MaxPool2d) else "average_pool"
        with pytest.raises(UnsupportedModelError, match=r"unequal size|ceil_mode"):
            parts(model, image, rule, reference=Reference())
