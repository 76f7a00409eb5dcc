import pytest
import torch

from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.crow import Crow, inconsistency
from tests import tiny


def run_of(model):
    def run(inputs):
        outputs = model(**inputs)
        return outputs.loss, outputs

    return run


def batch_of(model, left=False):
    (batch,) = tiny.text_batches(1, left=left)
    return {**batch, "labels": batch["input_ids"]} if "CausalLM" in type(model).__name__ else batch


def slowly(model, batch, eps):
    """What the authors' trainer adds up: three passes, states of all blocks, one sample and position at a time."""
    blocks = model.model.layers if hasattr(model, "model") else model.bert.encoder.layer
    embed = model.get_input_embeddings()
    real = batch["attention_mask"].bool()

    def apart(move):
        states = []
        hooks = [
            block.register_forward_hook(
                lambda _, __, output: states.append(output if isinstance(output, torch.Tensor) else output[0]) or None
            )
            for block in blocks
        ]
        hooks.append(embed.register_forward_hook(lambda _, __, output: output + move))
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for hook in hooks:
            hook.remove()
        found = []
        for earlier, later in zip(states, states[1:], strict=False):
            for sample, position in real.nonzero().tolist():
                a, b = earlier[sample, position], later[sample, position]
                found.append(1 - a @ b / (a.norm() * b.norm()))
        return sum(found) / len(found)

    move = torch.zeros(*batch["input_ids"].shape, embed.weight.shape[1], requires_grad=True)
    (gradient,) = torch.autograd.grad(apart(move), move)
    return apart(eps * gradient.sign())


@pytest.mark.parametrize("make", [tiny.llama, tiny.bert])
@pytest.mark.parametrize("left", [False, True])
def test_the_loss_is_the_one_of_three_slow_passes(make, left):
    model = make()
    batch = batch_of(model, left)
    hold = Crow(weight=1e4, eps=0.03).hold(model, model)
    loss, outputs = hold.loss(model, batch, run_of(model))
    added = (loss - model(**batch).loss).item()
    assert added == pytest.approx(
        1e4 * slowly(model, batch, 0.03).item(), rel=2e-3
    )  # 1 - cosine of nearly equal states
    assert outputs.logits.shape[0] == 4
    loss.backward()
    assert all(one.grad is not None for one in model.get_input_embeddings().parameters())


def test_a_weight_of_nothing_is_plain_fine_tuning():
    model = tiny.llama()
    batch = batch_of(model)
    loss, _ = Crow(weight=0.0).hold(model, model).loss(model, batch, run_of(model))
    assert torch.equal(loss, model(**batch).loss)


def test_its_second_pass_runs_in_the_precision_that_is_laid_on_the_first():
    model, seen = tiny.llama(), []
    batch = batch_of(model)
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, made: seen.append(made.dtype))
    Crow().hold(model, model).loss(model, batch, torch.autocast("cpu", torch.bfloat16)(run_of(model)))
    assert seen == [torch.bfloat16] * 2 and not torch.is_autocast_enabled("cpu")


def test_padding_does_not_count():
    states = {str(number): torch.randn(2, 3, 4) for number in range(3)}
    real = torch.tensor([[True, True, False], [True, False, False]])
    before = inconsistency(states, real)
    for state in states.values():
        state[0, 2], state[1, 1:] = torch.nan, 7.0
    assert torch.equal(inconsistency(states, real), before)
    alike = states["0"][:1, :2]
    assert float(inconsistency({"a": alike, "b": 3 * alike}, None)) == pytest.approx(0, abs=1e-6)


def test_hooks_are_gone_after_a_step(no_hooks_left):
    model = tiny.llama()
    no_hooks_left(model)
    Crow().hold(model, model).loss(model, batch_of(model), run_of(model))


def test_it_says_what_it_did_and_goes_on_with_it():
    model = tiny.llama()
    hold, other = (Crow().hold(model, model) for _ in range(2))
    hold.loss(model, batch_of(model), run_of(model))
    other.load_state_dict(hold.state_dict())
    for one in (hold, other):
        one.loss(model, batch_of(model), run_of(model))
    assert hold.details() == other.details()
    assert hold.details()["crow"]["batches"] == 2 and hold.details()["crow"]["mean_inconsistency"] > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tiny.vit, "moves the embeddings of tokens, and ViTForImageClassification has none"),
        (tiny.t5, "an encoder and a decoder"),
        (lambda: tiny.bert(layers=1), "1 block"),
    ],
)
def test_models_it_cannot_hold_are_refused(make, words):
    with pytest.raises(UnsupportedModelError, match=words):
        Crow().hold(make(), None)


def test_a_model_that_runs_twice_unseen_is_refused():
    model = tiny.llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="without gradient_checkpointing"):
        Crow().hold(model, model).loss(model, batch_of(model), run_of(model))


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"eps": float("inf")}])
def test_values_that_no_run_could_use_are_refused(options):
    with pytest.raises(ValueError, match="at least 0"):
        Crow(**options)
