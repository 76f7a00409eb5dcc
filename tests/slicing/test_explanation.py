import pytest
import torch
from torch import nn

from remos_hf.errors import CorruptFileError, UnsupportedModelError
from remos_hf.profiling.reference import Reference, profile_reference
from remos_hf.slicing.contributions import contributions, input_contributions
from remos_hf.slicing.explanation import Explanation, explain
from tests import tiny


def one_text(row=1):
    return {key: value[row : row + 1] for key, value in tiny.text_batches()[0].items()}


def one_image():
    return tiny.image_batches()[0][0][:1]


def plain_sum():
    """One Linear whose second output is 2 a - b + c."""
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0, 0], [2, -1, 1]]))
    return model


class TestWhatFlows:
    @pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.llama])
    def test_layers_hold_what_contributions_say_of_the_same_text(self, make):
        model, batch = make(), one_text()
        reference = profile_reference(model, tiny.text_batches())
        whole, found = contributions(model, [batch], reference), explain(model, batch, reference)
        assert [one.name for one in found.layers] == list(whole.weights)
        for one in found.layers:
            assert one.in_slice == int(whole.weights[one.name].count_nonzero())
            assert one.positive + one.negative == int(whole.neurons[one.name].sum())
            assert (one.weights, one.neurons) == (whole.weights[one.name].numel(), len(whole.neurons[one.name]))

    def test_the_strongest_neurons_come_first_and_are_apart_by_sign(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).eval()
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 1], [1, 0], [0, 0]]))
            model[1].weight.copy_(torch.tensor([[3.0, -1, 5]]))
            model[0].bias.zero_()
        first, _ = explain(model, torch.ones(1, 2), Reference(), theta=0, strongest=3).layers
        assert [(one.neuron, one.positive, one.negative) for one in first.strongest] == [(0, 1, 0), (1, 0, -1)]
        assert (first.positive, first.negative, first.reached, first.neurons) == (1, -1, 2, 3)
        (alone, *_) = explain(model, torch.ones(1, 2), Reference(), theta=0, strongest=1).layers
        assert [one.neuron for one in alone.strongest] == [0]

    def test_what_flows_through_a_neuron_is_strong_whatever_its_sign(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(4, 1, bias=False)).eval()
        with torch.no_grad():
            model[0].weight.fill_(1)
            model[2].weight.copy_(torch.tensor([[1, 0, -0.5, -0.3]]))
        first, _ = explain(model, torch.ones(1, 1, 1, 2), Reference(), theta=0).layers
        assert [(one.neuron, one.positive, one.negative) for one in first.strongest] == [(1, 0, -2), (0, 1, 0)]

    def test_what_flows_through_a_layer_that_runs_twice_adds_up(self):
        twice = nn.Linear(3, 3)
        model = nn.Sequential(twice, nn.ReLU(), twice).eval()
        given = torch.tensor([[1.0, 2, 3]])
        whole, (found,) = contributions(model, [given], Reference()), explain(model, given, Reference()).layers
        assert found.positive + found.negative == int(whole.neurons["0.weight"].sum()) and found.positive > 1
        assert found.in_slice == int(whole.weights["0.weight"].count_nonzero())

    def test_the_logit_is_told_beside_what_the_head_makes_of_the_reference(self):
        model, usual = plain_sum(), profile_reference(plain_sum(), [torch.tensor([[1.0, 1, 1]])])
        found = explain(model, torch.tensor([[2.0, 1, 0]]), usual, outputs=1)
        assert found.relative_logit == pytest.approx(1.0) and (found.label, found.position) == (1, None)
        assert found.logits == pytest.approx(model(torch.tensor([[2.0, 1, 0]]))[0].tolist())
        assert explain(model, torch.tensor([[0.0, 1, 1]]), usual, outputs=1).relative_logit == pytest.approx(-2.0)

    def test_logits_that_were_picked_from_others_are_followed_to_the_sum_that_made_them(self):
        model = tiny.gpt2()  # picks the last real token's
        found = explain(model, one_text(), Reference())
        assert found.relative_logit == pytest.approx(found.logits[found.label], abs=1e-5)

    def test_of_logits_at_every_position_those_of_the_last_are_asked_about(self):
        found = explain(tiny.llama(), {"input_ids": torch.tensor([[4, 5, 6]])}, Reference())
        assert found.position == 2 and len(found.logits) == tiny.VOCABULARY


class TestInputs:
    def test_pixels_are_added_up_over_channels(self):
        model, image = tiny.ConvNet().eval(), one_image()
        found = explain(model, image, Reference(), outputs=2).inputs
        (whole,) = input_contributions(model, image, Reference(), outputs=2)
        assert list(found) == ["input"] and found["input"].tolist() == whole.sum(1)[0].tolist()

    def test_grey_images_keep_their_rows_and_columns(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 3, 2)).eval()
        found = explain(model, torch.randn(1, 1, 6, 5), Reference()).inputs["input"]
        assert found.shape[-2:] == (6, 5)

    def test_features_without_positions_stay_apart(self):
        found = explain(plain_sum(), torch.tensor([[2.0, 1, 1]]), Reference(), outputs=1, theta=0)
        assert found.inputs["input"].tolist() == [1, -1, 1]

    def test_tokens_are_named_by_the_embedding_that_gave_them(self):
        model, batch = tiny.bert(), one_text()
        found = explain(model, batch, profile_reference(model, tiny.text_batches())).inputs
        assert set(found) == {
            f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")
        }
        assert all(one.shape == batch["input_ids"].shape[1:] for one in found.values())

    def test_one_token_alone_keeps_its_position(self):
        found = explain(tiny.gpt2(), {"input_ids": torch.tensor([[5]])}, Reference()).inputs
        assert found["transformer.wte.weight"].shape == (1,)

    def test_an_embedding_that_is_read_twice_is_two_inputs(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

            def forward(self, input_ids):
                return self.head(self.words(input_ids).sum(1) + self.words(input_ids + 1).sum(1))

        found = explain(Twice().eval(), {"input_ids": torch.tensor([[1, 2, 3]])}, Reference(), theta=0).inputs
        assert list(found) == ["words.weight", "words.weight, read again"]


@pytest.mark.parametrize("make", [lambda: tiny.ConvNet(), lambda: tiny.mlp()])
def test_a_model_in_half_precision_is_explained(make):
    model = make().eval().to(torch.bfloat16)
    sample = (one_image() if isinstance(model, tiny.ConvNet) else torch.randn(1, 5)).to(torch.bfloat16)
    found = explain(model, sample, Reference())
    with torch.no_grad():
        moved = model(sample)[0, found.label] - model(sample * 0)[0, found.label]
    assert found.relative_logit == pytest.approx(float(moved), abs=0.3)


@pytest.mark.parametrize("strongest", [-1, True, 2.0])
def test_how_many_neurons_are_told_is_a_whole_number(strongest):
    with pytest.raises(ValueError, match="strongest is a number of neurons"):
        explain(plain_sum(), torch.randn(1, 3), Reference(), strongest=strongest)


def test_what_was_saved_is_read_again(tmp_path):
    model = tiny.bert()
    reference = profile_reference(model, tiny.text_batches())
    found = explain(model, one_text(), reference, labels=["bad", "good"], theta=0.1)
    read = Explanation.load(found.save(tmp_path / "explanation.json"))
    assert read.layers == found.layers and read.labels == ("bad", "good") and read.logits == found.logits
    assert {name: one.tolist() for name, one in read.inputs.items()} == {
        name: one.tolist() for name, one in found.inputs.items()
    }
    assert (read.theta, read.reference, read.reference_samples) == (0.1, "global", reference.num_samples)
    for broken in ("no JSON", "[]", '{"format": "another"}', '{"format": "remos_hf.explanation.v1"}'):
        (tmp_path / "explanation.json").write_text(broken)
        with pytest.raises(CorruptFileError, match="is no explanation"):
            Explanation.load(tmp_path / "explanation.json")


def test_logits_that_no_sum_makes_lie_at_no_distance_from_the_reference():
    found = explain(nn.Flatten().eval(), torch.randn(1, 3), Reference())
    assert found.relative_logit is None and found.layers == ()


class TestRefusals:
    def test_training_mode(self):
        with pytest.raises(ValueError, match=r"training mode.*model\.eval"):
            explain(tiny.mlp().train(), torch.randn(1, 5), Reference())

    def test_adapters_that_are_not_merged(self):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(tiny.bert(layers=1), LoraConfig(target_modules=["value"], r=2)).eval()
        with pytest.raises(UnsupportedModelError, match="Merge them first"):
            explain(model, one_text(), Reference())

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_a_quantised_layer(self):
        model = torch.ao.quantization.quantize_dynamic(tiny.mlp().eval(), {nn.Linear}, dtype=torch.qint8).eval()
        with pytest.raises(UnsupportedModelError):
            explain(model, torch.randn(1, 5), Reference())

    @pytest.mark.parametrize("label", [3, -1])
    def test_an_output_that_does_not_exist(self, label):
        with pytest.raises(ValueError, match="the model has 3 labels, 0 to 2"):
            explain(tiny.mlp().eval(), torch.randn(1, 5), Reference(), outputs=label)

    def test_an_operation_that_is_not_known(self):
        class Sorted(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(5, 2)

            def forward(self, given):
                return self.head(given.sort(-1).values)

        with pytest.raises(UnsupportedModelError, match="'sort'"):
            explain(Sorted().eval(), torch.randn(1, 5), Reference())

    def test_several_samples(self):
        with pytest.raises(ValueError, match="batch holds 2"):
            explain(tiny.mlp().eval(), torch.randn(2, 5), Reference())

    def test_theta_outside_its_range(self):
        with pytest.raises(ValueError, match=r"in \[0, 1\)"):
            explain(tiny.mlp().eval(), torch.randn(1, 5), Reference(), theta=1)

    def test_the_reference_of_another_model(self):
        reference = profile_reference(tiny.ConvNet().eval(), tiny.image_batches())
        with pytest.raises(ValueError, match="runs other operations"):
            explain(tiny.mlp().eval(), torch.randn(1, 5), reference)
