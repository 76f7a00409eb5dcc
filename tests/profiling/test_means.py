import pytest
import torch
from accelerate import debug_launcher

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError
from remos_hf.profiling.data_pass import observe
from remos_hf.profiling.means import InputMeans
from remos_hf.profiling.observers import Activation, Padding, Slot
from tests import tiny


def inputs_by_hand(model, batches):
    """Every vector that each Linear or convolution reads at a real position, from copies."""
    layers = adapter_for(model).layers()
    read = {name: [] for name in layers}
    for batch in batches:
        mapping = isinstance(batch, dict)
        handles = []
        for name, layer in layers.items():

            def keep(module, given, made, name=name, layer=layer):
                values = given[0].double().movedim(layer.neuron_axis, -1)
                mask = batch["attention_mask"].bool() if mapping else None  # noqa: B023 - used at once
                read[name].append(values[mask] if mask is not None else values.reshape(-1, values.shape[-1]))

            handles.append(layer.module.register_forward_hook(keep))
        with torch.no_grad():
            model(**{k: v for k, v in batch.items() if k != "labels"}) if mapping else model(batch[0])
        for handle in handles:
            handle.remove()
    return {name: torch.cat(some) for name, some in read.items()}


@pytest.mark.parametrize(
    ("make", "batches"), [(tiny.bert, tiny.text_batches), (tiny.ConvNet, tiny.image_batches)], ids=["bert", "conv"]
)
def test_means_are_those_of_all_real_positions(make, batches):
    model, batches = make().eval(), batches()
    means = InputMeans()
    observe(model, batches, [means])
    expected = inputs_by_hand(model, batches)
    assert means.means().keys() == expected.keys()
    for name, mean in means.means().items():
        torch.testing.assert_close(mean, expected[name].mean(0), rtol=1e-5, atol=1e-6)


def _activation(values, real):
    activation = Activation(False, Padding(real), True, values.shape[1])
    activation.hold(values, values)
    return activation


def test_what_stands_at_padding_does_not_matter_and_what_is_real_does():
    values, real = torch.ones(1, 2, 3), torch.tensor([[True, False]])
    values[0, 1] = float("nan")
    means = InputMeans()
    means.see(Slot("layer", "input"), _activation(values, real))
    means.close_batch()
    assert means.means()["layer"].tolist() == [1, 1, 1]
    values[0, 0, 1] = float("nan")
    means.see(Slot("layer", "input"), _activation(values, real))
    means.close_batch()
    with pytest.raises(NonFiniteError, match="input of 'layer' held NaN"):
        means.means()


def test_a_batch_that_is_dropped_does_not_count():
    means = InputMeans()
    means.see(Slot("layer", "input"), _activation(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)))
    means.drop_batch()
    means.close_batch()
    assert means.means() == {}


def _share_of_means(folder):
    rank = torch.distributed.get_rank()
    means = InputMeans()
    observe(tiny.bert(), tiny.text_batches()[rank::2], [means], across_processes=True)
    torch.save(means.means(), f"{folder}/{rank}.pt")


def test_two_processes_add_up_to_one(tmp_path):
    debug_launcher(_share_of_means, args=(str(tmp_path),), num_processes=2)
    alone = InputMeans()
    observe(tiny.bert(), tiny.text_batches(), [alone])
    for rank in range(2):
        for name, mean in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(mean, alone.means()[name], rtol=1e-12, atol=1e-12)
