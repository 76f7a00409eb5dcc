import pytest
import torch
from transformers import Trainer

from remos_hf.strategies.plain import Finetune
from remos_hf.training.loss_scale import is_share_of_all, settle_loss_scale
from tests import tiny
from tests.training.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def causal_rows():
    """Sentences of very unequal length: the mean over tokens is not the mean of means."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (9, 3, 8, 2, 7, 4, 9, 5):
        ids = torch.randint(3, tiny.VOCABULARY, (9,), generator=generator)
        real = torch.arange(9) < length
        rows.append({"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)})
    return rows


CAUSAL = {"make": tiny.llama, "train_dataset": causal_rows(), "data_collator": None}
# Its head takes further arguments and passes over them.
CLASSES = {"make": tiny.gpt2, "train_dataset": tiny.dataset(8)}


def made(folder, *, make, steps, size, ours=True, **options):
    given = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": size, "max_steps": 1}
    given |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    kind = {"strategy": Finetune()} if ours else {"kind": Trainer}
    model = make()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return trainer(folder, model=model, options={**given, "save_strategy": "no"}, **kind, **options)


def update(folder, **options):
    one = made(folder, **options)
    before = [parameter.detach().clone() for parameter in one.model.parameters()]
    one.train()
    return torch.cat(
        [(now - then).detach().flatten() for now, then in zip(one.model.parameters(), before, strict=True)]
    )


@pytest.mark.parametrize("task", [CAUSAL, CLASSES], ids=["causal", "classes"])
def test_four_accumulated_batches_give_the_step_of_one_and_that_of_trainer(tmp_path, task):
    theirs = update(tmp_path, steps=1, size=8, ours=False, **task)
    assert theirs.abs().max() > 1e-3
    assert torch.allclose(update(tmp_path, steps=1, size=8, **task), theirs, atol=1e-6)
    assert torch.allclose(update(tmp_path, steps=4, size=2, **task), theirs, atol=1e-5)


def test_a_language_models_step_is_trainers_own_bit_for_bit(tmp_path):
    theirs = update(tmp_path, steps=4, size=2, ours=False, **CAUSAL)
    assert torch.equal(update(tmp_path, steps=4, size=2, **CAUSAL), theirs)


def test_settling_leaves_random_state_modes_and_weights_alone(tmp_path):
    one = made(tmp_path, steps=4, size=2, **CAUSAL)
    one.model.train()
    state, weight = torch.get_rng_state(), one.model.lm_head.weight.detach().clone()
    settle_loss_scale(one)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.model.training and torch.equal(one.model.lm_head.weight, weight)
    assert one.model.lm_head.weight.grad is None


class Rows(torch.utils.data.IterableDataset):
    def __iter__(self):
        raise AssertionError("a stream may not be read twice")


@pytest.mark.parametrize(("task", "counts"), [(CAUSAL, True), (CLASSES, False)], ids=["causal", "classes"])
def test_a_stream_is_not_read_for_it(tmp_path, task, counts):
    one = made(tmp_path, steps=4, size=2, **task)
    one.train_dataset = Rows()
    settle_loss_scale(one)
    assert one.model_accepts_loss_kwargs is counts


def test_what_trainer_declares_itself_goes_first(tmp_path):
    one = made(tmp_path, steps=4, size=2, **CAUSAL)
    assert is_share_of_all(one, 3) and not is_share_of_all(one, None)
    one.loss_is_scaled_for_ga = False
    assert not is_share_of_all(one, 3)
