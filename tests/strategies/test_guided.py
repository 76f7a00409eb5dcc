import copy
import dataclasses

import pytest
import torch

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.composed import Composed
from remos_hf.strategies.guided import Guided
from remos_hf.strategies.hardened import Hardened
from remos_hf.strategies.perturbed_inputs import Perturbing, embedding_rows, token_embedding
from tests import tiny
from tests.strategies.test_hardened import image_run, text_run


def held(make, recipe, **options):
    model = make()
    teacher = copy.deepcopy(model).requires_grad_(False)
    return model, teacher, dataclasses.replace(recipe, **options).hold(model, teacher)


def test_half_of_the_images_move_by_the_radius_in_every_value_and_keep_their_labels():
    model, _, hold = held(tiny.ConvNet, Guided(0.1, head=("head",)), seed=1)
    images, labels = tiny.image_batches(1, size=8)[0]
    before, seen = images.clone(), []
    hold.loss(model, (images, labels), image_run(model, seen))
    change = (seen[0][0] - images).flatten(1)
    assert torch.equal(images, before) and seen[0][1] is labels
    moved = change.any(1)
    assert moved.sum() == 4 and torch.equal(hold.clean, ~moved)
    sizes = change[moved].abs()
    assert torch.allclose(sizes[sizes > 0], torch.tensor(0.1), atol=1e-6) and (sizes > 0).float().mean() > 0.95


def test_the_teachers_feature_moves_further_than_by_any_signs():
    def moved_by(change):
        return (body(images + change) - body(images)).norm(dim=1)

    def body(values):
        hidden = teacher.relu(teacher.norm(teacher.stem(values)))
        hidden = hidden + teacher.relu(teacher.conv(hidden))
        return teacher.grouped(teacher.relu(teacher.depthwise(teacher.down(hidden)))).mean((2, 3))

    model, teacher, hold = held(tiny.ConvNet, Guided(0.05, share=1.0, head=("head",)))
    images, labels = tiny.image_batches(1, size=16)[0]
    seen = []
    hold.loss(model, (images, labels), image_run(model, seen))
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, images.shape, generator=generator) * 2 - 1
    with torch.no_grad():
        assert (moved_by(seen[0][0] - images) > 2 * moved_by(0.05 * signs)).float().mean() > 0.8


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.bart], ids=lambda make: make.__name__)
def test_texts_move_in_the_embeddings_of_their_real_tokens_alone(make, no_hooks_left):
    model, teacher, hold = held(make, Guided(0.5, share=1.0))
    no_hooks_left(model), no_hooks_left(teacher)
    batch = tiny.text_batches(1)[0]
    batch["input_ids"][:, 0] = 2 if make is tiny.bart else batch["input_ids"][:, 0]  # bart looks for one end a text
    made = []

    def run(given):
        assert torch.equal(given["input_ids"], batch["input_ids"])
        made.append(token_embedding(model)(given["input_ids"]) - plain)
        outputs = model(**given)
        return outputs.loss, outputs

    plain = token_embedding(model)(batch["input_ids"]).detach()
    hold.loss(model, batch, run)[0].backward()
    real = batch["attention_mask"].bool()
    size = 0.5 * embedding_rows(teacher).square().mean().sqrt()
    assert not made[0][~real].any()
    assert torch.allclose(made[0][real].abs().max(), size, atol=1e-6) and made[0][real].any(-1).all()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_directions_differ_from_step_to_step_and_go_on_after_resuming():
    model, _, hold = held(tiny.ConvNet, Guided(head=("head",)), seed=2)
    batch, seen = tiny.image_batches(1)[0], []
    state = hold.state_dict()
    for _ in range(2):
        hold.loss(model, batch, image_run(model, seen))
    hold.load_state_dict(state)
    hold.loss(model, batch, image_run(model, seen))
    assert not torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][0], seen[2][0])


@pytest.mark.parametrize("order", [1, -1])
def test_beside_other_perturbations_it_takes_samples_that_they_left(order):
    parts = [Hardened(share=0.5, seed=1), Guided(share=0.5, seed=1)][::order]
    model = tiny.bert()
    hold = Composed(tuple(parts)).hold(model, copy.deepcopy(model).requires_grad_(False))
    seen = []
    loss, _ = hold.loss(model, tiny.text_batches(1, size=8)[0], text_run(model, seen))
    loss.backward()
    assert sorted(int(one.clean.sum()) for one in hold.holds) == [2, 4]
    assert isinstance(hold.holds[0], Perturbing) and hold.holds[1].around == hold.holds[:1]


def test_a_teacher_without_a_head_is_refused():
    with pytest.raises(UnsupportedModelError, match="name the head that it has"):
        held(tiny.ConvNet, Guided())


def test_values_that_no_run_could_use_are_refused():
    for options in ({"radius": 0}, {"share": 2}):
        with pytest.raises(ValueError, match="but got"):
            Guided(**options)
    assert adapter_for(tiny.bert(), Guided(head=["classifier"]).head).head == ("classifier",)
