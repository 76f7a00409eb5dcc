import pytest
import torch
from accelerate import debug_launcher

from remos_hf.adapters.flow_recording import flow_of
from remos_hf.errors import NonFiniteError, RemosError
from remos_hf.profiling.reference import FlowMeans, Reference, deviating, profile_reference
from tests import tiny


def at(flow, name):
    """The number of what the operation of this name reads."""
    return next(one.inputs[0] for one in flow.operations if one.name == name)


class TestMeans:
    def test_it_is_the_mean_of_a_channel_over_samples_and_positions(self):
        model, batches = tiny.ConvNet().eval(), tiny.image_batches()
        reference = profile_reference(model, batches)
        flow = flow_of(model, batches[0])
        number = at(flow, "conv2d conv.weight")
        seen = torch.cat([flow_of(model, one).values[number] for one in batches])
        found = reference.of(flow, number)
        assert torch.allclose(found[2, :, 3, 1], seen.mean((0, 2, 3)), atol=1e-6) and found.shape == (4, 8, 8, 8)
        assert reference.num_samples == 12

    def test_padding_never_counts(self):
        model, (batch, *_) = tiny.bert(), tiny.text_batches()
        longer = {name: torch.nn.functional.pad(one, (0, 4)) for name, one in batch.items() if name != "labels"}
        one, other = (profile_reference(model, [some]) for some in (batch, longer))
        assert one.names == other.names
        for number, means in one.means.items():
            assert torch.allclose(means, other.means[number], atol=1e-6)

    def test_one_by_position_is_the_mean_over_samples(self):
        model, batches = tiny.ConvNet().eval(), tiny.image_batches()
        flow = flow_of(model, batches[0])
        reference = profile_reference(model, batches, kind="position")
        seen = torch.cat([one[0] for one in batches])
        assert torch.allclose(reference.of(flow, 0)[1], seen.mean(0), atol=1e-6)

    def test_one_by_position_counts_at_every_position_the_samples_that_are_real_there(self):
        model, (batch, *_) = tiny.bert(), tiny.text_batches()
        batch = {key: value for key, value in batch.items() if key != "labels"}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1:, 4:] = 0
        first = {key: value[:1] for key, value in batch.items()}
        both, alone = (profile_reference(model, [some], kind="position") for some in (batch, first))
        flow = flow_of(model, first)
        for number in deviating(flow):
            mean, one = both.of(flow, number), alone.of(flow, number)
            if mean.dim() == 3:
                assert torch.allclose(mean[:, 4:], one[:, 4:], atol=1e-6)

    @pytest.mark.parametrize("size", [1e-12, 1e-8, 1.0, 1.7e9, 1e12])
    @pytest.mark.parametrize("kind", ["global", "class", "position"])
    def test_means_of_small_and_large_values_are_exact(self, size, kind):
        model, samples = tiny.mlp().eval(), size * (1 + torch.rand(512, 5, dtype=torch.float64)).float()
        found = profile_reference(model, samples.split(100), kind=kind).means[0][-1]
        assert torch.allclose(found, samples.double().mean(0).float(), rtol=1e-6, atol=0)

    def test_values_beyond_what_means_are_taken_of_are_refused(self):
        with pytest.raises(RemosError, match="1e.16 on this data"):
            profile_reference(tiny.mlp().eval(), [torch.full((2, 5), 1e16)])

    def test_one_by_class_is_that_of_the_predicted_class(self):
        model, batches = tiny.ConvNet().eval(), tiny.image_batches()
        flows = [flow_of(model, one) for one in batches]
        predicted = torch.cat([one.logits.argmax(-1) for one in flows])
        reference = profile_reference(model, batches, kind="class")
        images = torch.cat([one[0] for one in batches])
        mine = predicted[0]
        assert torch.allclose(
            reference.of(flows[0], 0)[0, :, 0, 0], images[predicted == mine].mean((0, 2, 3)), atol=1e-6
        )

    def test_it_adds_over_batches_whatever_their_cut(self):
        model, batches = tiny.mlp().eval(), [torch.randn(8, 5) for _ in range(2)]
        whole = profile_reference(model, batches)
        cut = profile_reference(model, [part for one in batches for part in one.split(3)])
        for number, means in whole.means.items():
            assert torch.allclose(means, cut.means[number], rtol=0, atol=1e-7)

    def test_zero_needs_no_data(self):
        flow = flow_of(tiny.mlp().eval(), torch.randn(3, 5))
        assert all(not bool(Reference().of(flow, number).any()) for number in deviating(flow))


class TestRefusals:
    def test_the_reference_of_another_model_is_refused(self):
        reference = profile_reference(tiny.mlp().eval(), [torch.randn(3, 5)])
        with pytest.raises(ValueError, match="runs other operations"):
            reference.check(flow_of(tiny.ConvNet().eval(), tiny.image_batches()[0]))

    def test_a_class_without_a_sample_is_named(self):
        model = tiny.mlp().eval()
        samples = 10 * torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        predicted = model(samples).argmax(-1)
        missing = int(predicted[0])
        reference = profile_reference(model, [samples[predicted != missing]], kind="class")
        with pytest.raises(ValueError, match=f"predicts class {missing} here"):
            reference.check(flow_of(model, samples))

    def test_one_by_position_needs_one_size(self):
        batches = [tiny.text_batches(1, length=length)[0] for length in (9, 7)]
        with pytest.raises(ValueError, match="batches of one size"):
            profile_reference(tiny.llama(), batches, kind="position")

    def test_nan_is_refused(self):
        with pytest.raises(NonFiniteError):
            profile_reference(tiny.mlp().eval(), [torch.full((2, 5), float("nan"))])

    def test_another_kind_is_refused(self):
        with pytest.raises(ValueError, match="'median'"):
            FlowMeans("median")


def _on_each_process(path):
    batches = tiny.text_batches()
    mine = batches[torch.distributed.get_rank() :: 2]
    found = profile_reference(tiny.bert(), mine, across_processes=True)
    alone = profile_reference(tiny.bert(), batches)
    assert found.num_samples == alone.num_samples == 12
    assert all(torch.equal(means, alone.means[number]) for number, means in found.means.items())


def test_two_processes_find_the_means_of_one(tmp_path):
    debug_launcher(_on_each_process, args=(str(tmp_path),), num_processes=2)
