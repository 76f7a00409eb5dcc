import pytest
import torch
from torch.nn import functional

from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.attacked_inputs import Attack, labels_of
from remos_hf.strategies.perturbed_inputs import embedding_rows, token_embedding
from tests import tiny
from tests.strategies.residual_nets import Net

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def attack(model, normalisation=(MEAN, STD), **options):
    sizes = {"eps": 0.1, "step": 0.03, "steps": 4, "text_eps": 0.5, **options}
    return Attack(model, **sizes, normalisation=normalisation)


def images(count=8):
    pixels = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    mean, std = (torch.tensor(one)[:, None, None] for one in (MEAN, STD))
    return (pixels - mean) / std, torch.arange(count) % 4


def in_pixels(values):
    mean, std = (torch.tensor(one)[:, None, None] for one in (MEAN, STD))
    return values * std + mean


def test_images_move_within_the_budget_in_pixels_and_the_loss_rises():
    model, (values, labels) = Net(), images()
    model.train()
    before = [one.clone() for one in model.buffers()]
    with attack(model).attacked(model, (values, labels), torch.Generator()) as (moved, same):
        assert same is labels and model.training
    pixels = in_pixels(moved)
    change = (pixels - in_pixels(values)).abs()
    assert change.max() <= 0.1 + 1e-6 and change.max() > 0.09
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    # Searched in eval mode: no statistic has seen it, and no parameter has a gradient.
    assert all(torch.equal(one, two) for one, two in zip(model.buffers(), before, strict=True))
    assert all(one.requires_grad and one.grad is None for one in model.parameters())
    model.eval()
    assert functional.cross_entropy(model(moved), labels) > functional.cross_entropy(model(values), labels) + 0.05


def test_a_share_of_the_budget_moves_by_that_share():
    model, batch = Net(), images()
    with attack(model).attacked(model, batch, torch.Generator(), 0.25) as (moved, _):
        assert (in_pixels(moved) - in_pixels(batch[0])).abs().max() <= 0.025 + 1e-6


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2], ids=lambda make: make.__name__)
def test_texts_move_in_the_embeddings_of_their_real_tokens_alone(make, no_hooks_left):
    model = make()
    no_hooks_left(model)
    batch = tiny.text_batches(1, size=6)[0]
    embed, real = token_embedding(model), batch["attention_mask"].bool()
    plain = embed(batch["input_ids"]).detach()
    clean = model(**batch).loss
    with attack(model).attacked(model, batch, torch.Generator()) as same:
        assert same is batch
        change, loss = embed(batch["input_ids"]) - plain, model(**batch).loss
    size = 0.5 * embedding_rows(model).square().mean().sqrt()
    assert not change[~real].any() and change.abs().max() <= size + 1e-6 and change.abs().max() > 0.9 * size
    assert loss > clean
    assert torch.equal(embed(batch["input_ids"]), plain)


def test_images_of_16_bits_come_back_as_they_came():
    model, (values, labels) = Net().to(torch.bfloat16), images()
    with attack(model).attacked(model, (values.bfloat16(), labels), torch.Generator()) as (moved, _):
        assert moved.dtype == torch.bfloat16 and not torch.equal(moved, values.bfloat16())


def test_images_of_unknown_normalisation_ask_for_it():
    with (
        pytest.raises(UnsupportedModelError, match=r"Give mean=\(...\) and std="),
        attack(Net(), None).attacked(Net(), images(), torch.Generator()),
    ):
        pass


def test_a_model_that_embeds_patches_of_images_has_no_tokens():
    model = Net()
    model.get_input_embeddings = lambda: model.stem  # as SigLIP's
    assert attack(model).text_eps == 0
    with attack(model).attacked(model, images(), torch.Generator()) as (moved, _):
        assert not torch.equal(moved, images()[0])


def test_numbers_to_be_predicted_are_no_labels():
    (values, labels), model = images(), Net()
    model.head = torch.nn.Linear(8, 1)
    for wanted in (labels.float(), labels):
        with (
            pytest.raises(UnsupportedModelError, match="two labels or more"),
            attack(model).attacked(model, (values, wanted), torch.Generator()),
        ):
            pass
    with (
        pytest.raises(UnsupportedModelError, match="float32"),
        attack(Net()).attacked(Net(), (values, labels.float()), torch.Generator()),
    ):
        pass


def test_what_is_no_classifier_or_has_no_labels_is_refused():
    model, batch = tiny.llama(), tiny.text_batches(1)[0]
    with (
        pytest.raises(UnsupportedModelError, match="is for classifiers"),
        attack(model).attacked(model, {**batch, "labels": batch["input_ids"]}, torch.Generator()),
    ):
        pass
    with pytest.raises(ValueError, match="attacked by their labels"):
        labels_of({"input_ids": batch["input_ids"]})
    assert labels_of(batch) is batch["labels"]
