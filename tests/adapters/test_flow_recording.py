import pytest
import torch
from torch import nn
from torch.nn import functional

from remos_hf.adapters.flow_recording import flow_of
from remos_hf.errors import UnsupportedModelError
from remos_hf.profiling.reference import profile_reference
from remos_hf.slicing.contributions import contributions
from tests import tiny


class Net(nn.Module):
    """One Linear, whatever is done to its output, and a head."""

    def __init__(self, body, hidden=6):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.head = body, nn.Linear(5, 6), nn.Linear(hidden, 3)
        self.eval()

    def forward(self, given):
        return self.head(self.body(self.first(given)))


def given(samples=4):
    return torch.randn(samples, 5, generator=torch.Generator().manual_seed(1))


def rules(model, batch):
    return [operation.rule for operation in flow_of(model, batch).operations]


class TestWhatRan:
    def test_a_plus_sign_is_an_operation_like_any_other(self):
        flow = flow_of(tiny.ConvNet().eval(), tiny.image_batches()[0])
        assert [one.rule for one in flow.operations].count("add") == 1
        assert flow.names[:2] == ("input", "conv2d stem.weight") and flow.names[-1] == "linear head.weight"
        assert flow.logits.shape == (4, 4)

    @pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.llama])
    def test_transformers_are_followed_through_values_and_mlps_and_not_through_queries(self, make):
        flow = flow_of(make(), tiny.text_batches()[0])
        names = [one.layer.parameter_name for one in flow.operations if one.layer is not None]
        assert not any("query" in name or "q_proj" in name or "key" in name for name in names)
        assert sum(one.rule == "attention" for one in flow.operations) == 2
        assert sum(one.rule == "add" and len(one.inputs) == 2 for one in flow.operations) >= 4
        assert flow.real.shape == (4, 9)

    def test_eager_attention_is_a_product_with_a_frozen_pattern(self):
        model = tiny.bert(layers=1, attn_implementation="eager")
        assert rules(model, tiny.text_batches()[0]).count("mixed") == 1

    def test_images_go_through_a_vit(self):
        flow = flow_of(tiny.vit(), {"pixel_values": tiny.image_batches()[0][0]})
        assert flow.names[1].startswith("conv2d") and flow.logits.shape == (4, 2)

    def test_each_operation_makes_its_value_again(self):
        flow = flow_of(tiny.gpt2(), tiny.text_batches()[0])
        for operation in flow.operations:
            assert torch.allclose(operation.run(flow.values), flow.values[operation.output], atol=1e-6), operation.name

    def test_values_stay_as_they_were_before_they_are_overwritten(self):
        flow = flow_of(Net(lambda one: functional.relu(one, inplace=True).mul_(2)), given())
        assert bool((flow.values[1] < 0).any()) and not bool((flow.values[2] < 0).any())
        assert torch.equal(flow.values[3], 2 * flow.values[2])

    def test_an_operation_that_writes_in_place_can_run_on_other_values_which_stay(self):
        flow = flow_of(Net(lambda one: functional.silu(one, inplace=True)), given())
        (operation,) = (one for one in flow.operations if one.name == "silu")
        values = {number: one.clone() for number, one in flow.values.items()}
        assert torch.allclose(operation.run(values), values[operation.output])
        assert all(torch.equal(one, flow.values[number]) for number, one in values.items())

    @pytest.mark.parametrize(
        "body",
        [
            lambda one: one.unflatten(1, (2, 3)).view_as(one),
            lambda one: one.mean(1, keepdim=True).expand_as(one),
            lambda one: (2 * one).type_as(one),
            lambda one: (2 * one).to(one),
        ],
    )
    def test_a_tensor_whose_shape_or_dtype_alone_is_taken_hands_nothing_down(self, body):
        model = Net(body)
        found = contributions(model, [given()], profile_reference(model, [given()]))
        assert bool(found.weights["first.weight"].any())

    def test_nothing_of_it_stays_in_the_model(self):
        model = tiny.gpt2()
        flow_of(model, tiny.text_batches()[0])
        with pytest.raises(IndexError):
            flow_of(model, {"input_ids": torch.tensor([[tiny.VOCABULARY]])})
        assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
        with torch.overrides.TorchFunctionMode():
            assert torch.overrides._get_current_function_mode_stack()[:-1] == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "named"),
        [
            (lambda one: one.cumsum(1), "cumsum"),
            (lambda one: one.sort(1).values, "sort"),
            (lambda one: torch.fft.fft(one).real, "fft_fft"),
            (lambda one: one / one.mean(1, keepdim=True), "div"),
            (lambda one: one.sort(1).values.cumsum(1), "sort"),  # the first of them
            (lambda one: functional.linear(one, torch.ones(6, 6)), "linear with a weight that is no plain parameter"),
        ],
    )
    def test_an_operation_that_is_not_known_is_refused_by_name(self, body, named):
        with pytest.raises(UnsupportedModelError, match=f"'{named}'"):
            flow_of(Net(body), given())

    def test_a_view_of_what_was_overwritten_is_refused(self):
        def body(one):
            view = one.view(-1, 6)
            one.relu_()
            return view

        with pytest.raises(UnsupportedModelError, match="overwritten in place"):
            flow_of(Net(body), given())

    @pytest.mark.parametrize(
        "write",
        [
            lambda one, into: into.__setitem__(slice(None), one),
            lambda one, into: into[:, :6].__setitem__(slice(None), one),
            lambda one, into: into[:, :6].add_(one),
            lambda one, into: one.__setitem__((slice(None), 0), into[:, 0]),
        ],
        ids=["whole", "part", "view", "flowing"],
    )
    def test_what_flows_into_a_part_of_a_tensor_is_not_missed(self, write):
        def body(one):
            into, kept = torch.zeros(4, 6), one * 1
            write(kept, into)
            return kept + into

        with pytest.raises(UnsupportedModelError, match=r"'(setitem|add)'"):
            flow_of(Net(body), given())

    def test_a_batch_of_no_sample_is_refused(self):
        with pytest.raises(ValueError, match="holds no sample"):
            flow_of(tiny.ConvNet().eval(), torch.zeros(0, 3, 8, 8))

    def test_pixels_that_were_not_converted_are_refused(self):
        with pytest.raises(ValueError, match=r"torch\.uint8, but the model is torch\.float32"):
            flow_of(tiny.ConvNet().eval(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))

    def test_training_mode_is_refused(self):
        with pytest.raises(ValueError, match=r"training mode.*model\.eval"):
            flow_of(tiny.mlp().train(), given())

    def test_a_batch_without_samples_is_refused(self):
        with pytest.raises(ValueError, match=r"holds \['input_ids'\]"):
            flow_of(tiny.bert(layers=1), {"input_ids": "text"})

    def test_samples_of_another_dtype_are_refused(self):
        with pytest.raises(ValueError, match=r"torch\.float64, but the model is torch\.float32"):
            flow_of(tiny.mlp().eval(), given().double())

    def test_probabilities_are_no_logits(self):
        with pytest.raises(UnsupportedModelError, match="end before its softmax"):
            flow_of(nn.Sequential(tiny.mlp(), nn.Softmax(-1)).eval(), given())

    def test_adapters_have_to_be_merged_first(self):
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(tiny.bert(layers=1), LoraConfig(target_modules=["value"], r=2)).eval()
        for model in (wrapped, wrapped.base_model.model):
            with pytest.raises(UnsupportedModelError, match="Merge them first"):
                flow_of(model, tiny.text_batches()[0])

    def test_a_quantised_layer_is_refused(self):
        model = torch.ao.quantization.quantize_dynamic(tiny.mlp().eval(), {nn.Linear}, dtype=torch.qint8).eval()
        with pytest.raises(UnsupportedModelError):
            flow_of(model, given())
