import pytest
import torch

from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies import recipe
from remos_hf.strategies.recipe import Recipe, Words, chosen
from remos_hf.strategies.short_runs import free_copy
from remos_hf.strategies.student_data import StudentData
from tests import tiny

MASK = 2


def prepared(student, batches=tiny.text_batches, **options):
    options = {"steps": 3, "head_steps": 2, "mask_token": MASK, **options}
    return Recipe(**options).prepare(student, StudentData(lambda samples: batches())).details["recipe"]


@pytest.mark.parametrize(
    ("make", "trained"),
    [
        (tiny.bert, "intermediate.dense"),
        (tiny.gpt2, "mlp.c_fc"),
        (tiny.llama, ("gate_proj", "up_proj")),
        (tiny.bloom, "dense_h_to_4h"),
    ],
)
def test_only_the_first_matrices_of_the_mlps_change(make, trained):
    student, teacher = make(), make().state_dict()
    told = prepared(student)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, teacher[name])}
    assert changed == {name for name in teacher if name.removesuffix(".weight").endswith(trained)} - {
        name for name in teacher if name.endswith("bias")
    }
    assert told["matrices"] == len(changed) and told["steps"] == 3
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_nothing_else_trains_on_the_copy_either(monkeypatch):
    made = []
    monkeypatch.setattr(recipe, "free_copy", lambda student: made.append(free_copy(student)) or made[0])
    prepared(tiny.bert(), norm_weight=0.0)
    teacher = tiny.bert().state_dict()
    changed = {name for name, value in made[0].state_dict().items() if not torch.equal(value, teacher[name])}
    assert changed == {name for name in teacher if name.endswith("intermediate.dense.weight")}


def test_the_norms_shrink_when_they_are_paid_for():
    def norms(weight):
        return prepared(tiny.bert(), steps=8, norm_weight=weight, learning_rate=1e-2)["norms"]

    (before, paid), (_, free) = norms(30.0), norms(0.0)
    assert paid < before and paid < free
    by_hand = sum(block.intermediate.dense.weight.detach().norm().item() for block in tiny.bert().bert.encoder.layer)
    assert before == pytest.approx(by_hand, rel=1e-5)


def test_pre_training_fits_the_texts():
    def repeated():  # one sentence only: its words can be told
        (batch,) = tiny.text_batches(1, padded=False)
        return [{key: value[:1].expand(8, *value.shape[1:]) for key, value in batch.items()}]

    for make in (tiny.bert, tiny.llama):
        first, last = prepared(make(), repeated, steps=30, learning_rate=3e-2, norm_weight=0.0, batch_size=8)["loss"]
        assert last < first


@pytest.mark.parametrize(
    ("make", "objective", "head"),
    [
        (tiny.bert, "masked tokens", "made here, tied to the embeddings"),
        (tiny.gpt2, "next token", "made here, tied to the embeddings"),
        (tiny.llama, "next token", "the student's own"),
    ],
)
def test_the_record_says_what_was_pre_trained_and_with_which_head(make, objective, head):
    told = prepared(make(), mask_token=MASK if make is tiny.bert else None)
    assert (told["objective"], told["head"]) == (objective, head)
    assert told["head_steps"] == (0 if make is tiny.llama else 2)


def test_the_mask_token_comes_from_the_recipe_or_the_data_or_is_asked_for():
    strategy = Recipe(steps=1, head_steps=0)
    with pytest.raises(ValueError, match=r"Recipe\(mask_token=tokenizer.mask_token_id\)"):
        strategy.prepare(tiny.bert(), tiny.student_data())
    students = tiny.bert(), tiny.bert()
    strategy.prepare(students[0], tiny.student_data(mask_token=MASK))
    Recipe(steps=1, head_steps=0, mask_token=MASK).prepare(students[1], tiny.student_data())
    one, other = (student.bert.encoder.layer[0].intermediate.dense.weight for student in students)
    assert torch.equal(one, other)


def test_labels_are_not_looked_at():
    def without():
        return [{key: value for key, value in batch.items() if key != "labels"} for batch in tiny.text_batches()]

    one, other = tiny.bert(), tiny.bert()
    prepared(one), prepared(other, without)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_real_tokens_alone_are_masked_and_some_of_every_sample():
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([chosen(real, 0.3, generator) for _ in range(400)])
    assert not bool((drawn & ~real).any()) and bool(drawn.any(2).all())
    assert 0.3 < float(drawn[:, 2].float().mean()) < 0.36


def test_decoders_are_known_by_what_they_do():
    for make, ahead in ((tiny.bert, True), (tiny.gpt2, False), (tiny.llama, False), (tiny.bloom, False)):
        for left in (False, True):
            assert Words(make(), 0).looks_ahead(tiny.text_batches(1, left=left)[0]) == ahead


@pytest.mark.parametrize(
    ("make", "words"),
    [(tiny.vit, "no embeddings of tokens"), (tiny.t5, "an encoder and a decoder"), (tiny.mlp, "no embeddings")],
)
def test_models_without_one_stack_of_tokens_are_refused(make, words):
    with pytest.raises(UnsupportedModelError, match=words):
        prepared(make())


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"learning_rate": 0.0}, {"norm_weight": -1.0}, {"masked": 1.0}, {"batch_size": 0}]
)
def test_values_that_no_run_could_use_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Recipe(**options)
