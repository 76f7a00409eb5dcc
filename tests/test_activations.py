import dataclasses

import pytest
import torch
import transformers
from torch import nn

from remos_hf.activations import (
    alter,
    capture,
    evaluating,
    recomputes,
    standing_in,
    watch,
    watch_functions,
    watch_products,
    without_fast_path,
)
from tests import tiny


def test_watch_sees_inputs_and_outputs_while_it_lasts(no_hooks_left):
    model = tiny.mlp()
    no_hooks_left(model)
    seen = {}
    with watch({"first": model[0]}, lambda name, given, made: seen.update({name: (given, made)})):
        inputs = torch.randn(2, 5)
        model(inputs)
    given, made = seen["first"]
    assert given is inputs
    assert torch.equal(made, model[0](inputs))
    seen.clear()
    model(inputs)
    assert not seen


def test_no_hook_outlives_a_forward_that_raises(no_hooks_left):
    model = tiny.mlp()
    no_hooks_left(model)
    with pytest.raises(RuntimeError), watch(dict(model.named_modules()), lambda *_: None):
        model(torch.randn(2, 4))


def test_no_hook_stays_when_a_module_cannot_be_hooked(no_hooks_left):
    model = tiny.mlp()
    no_hooks_left(model)
    with pytest.raises(AttributeError), watch({"0": model[0], "none": None}, lambda *_: None):
        pytest.fail("the block must not run")


def test_capture_keeps_outputs_with_their_graph(no_hooks_left):
    model = tiny.mlp()
    no_hooks_left(model)
    with capture({"first": model[0]}) as outputs:
        model(torch.randn(2, 5))
    outputs["first"].sum().backward()
    assert model[0].weight.grad is not None


def test_tensors_given_by_keyword_are_seen():
    seen = []
    layer = nn.Linear(3, 2)
    with watch({"layer": layer}, lambda name, given, made: seen.append(given.shape)):
        layer(input=torch.randn(4, 3))
    assert seen == [(4, 3)]


def test_a_call_without_tensors_is_an_error_that_names_the_module():
    class Silent(nn.Module):
        def forward(self, x):
            return ()

    module = Silent()
    with pytest.raises(TypeError, match="'silent' was called"), watch({"silent": module}, lambda *_: None):
        module(torch.ones(1))


def test_modes_are_put_back_module_by_module_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_outputs_are_altered_only_within_the_block():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    inputs = torch.randn(3, 2)
    plain = net(inputs)
    with alter({"first": net[0]}, lambda name, output: output * (2 if name == "first" else 0)):
        assert torch.equal(net(inputs), net[1](2 * nn.functional.linear(inputs, net[0].weight, net[0].bias)))
    assert torch.equal(net(inputs), plain)


def test_of_several_outputs_the_first_tensor_is_altered_after_it_was_captured():
    class Pair(nn.Module):
        def forward(self, inputs):
            return None, inputs, "rest"

    pair = Pair()
    with capture({"pair": pair}) as seen, alter({"pair": pair}, lambda _, output: output + 1):
        assert pair(torch.zeros(1)) == (None, torch.ones(1), "rest")
    assert seen["pair"] == 0


@dataclasses.dataclass
class Made(transformers.utils.ModelOutput):
    told: str = "before"
    features: torch.Tensor | None = None
    more: torch.Tensor | None = None


class Wrapped(nn.Module):
    """Gives what a layer makes in another form."""

    def __init__(self, form):
        super().__init__()
        self.layer, self.form = nn.Linear(3, 2), form

    def forward(self, given):
        self.made = self.form(self.layer(given))
        return self.made


@pytest.mark.parametrize(
    "form",
    [lambda one: {"told": "before", "features": one, "more": one}, lambda one: Made(features=one, more=one)],
    ids=["dict", "ModelOutput"],
)
def test_of_a_mapping_the_first_tensor_is_seen_and_altered_and_the_rest_stays(form):
    module, given = Wrapped(form), torch.ones(1, 3)
    with capture({"it": module}) as made, alter({"it": module}, lambda _, one: one + 1):
        changed = module(given)
    assert torch.equal(made["it"], module.layer(given)) and type(changed) is type(module.made)
    assert torch.equal(changed["features"], made["it"] + 1) and torch.equal(changed["more"], made["it"])
    assert changed["told"] == "before" and torch.equal(module.made["features"], made["it"])
    assert isinstance(changed, dict) and getattr(changed, "features", changed["features"]) is changed["features"]


@pytest.mark.parametrize("form", [lambda _: None, lambda _: {}, lambda _: ("text",), lambda _: 3])
def test_a_module_that_returns_no_tensor_is_an_error_that_names_it(form):
    module = Wrapped(form)
    with pytest.raises(TypeError, match="'it' was called without a tensor or returned none"), capture({"it": module}):
        module(torch.ones(1, 3))
    with pytest.raises(TypeError, match="'it' returned no tensor"), alter({"it": module}, lambda _, one: one):
        module(torch.ones(1, 3))


def test_products_with_a_view_of_a_weight_are_shown_wherever_they_are_computed():
    stack, x, seen = torch.randn(2, 4, 4), torch.randn(3, 4), []
    with watch_products({"second": stack[1]}, lambda name, given, made, biased: seen.append((name, made, biased))):
        _ = nn.functional.linear(x, stack[torch.tensor(0)])
        products = [nn.functional.linear(x, stack[torch.tensor(1)]), x @ stack[1], torch.matmul(x, stack[1].T)]
    assert [name for name, _, _ in seen] == ["second"] * 3
    assert all(torch.equal(made, product) for (_, made, _), product in zip(seen, products, strict=True))
    assert [biased for _, _, biased in seen] == [True, False, False]
    _ = x @ stack[1]
    assert len(seen) == 3


def test_torchs_fast_path_is_put_back():
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError), without_fast_path():
        assert not torch.backends.mha.get_fastpath_enabled()
        raise RuntimeError
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_a_module_that_is_stood_in_for_does_not_run_and_runs_again_afterwards():
    model, inputs = tiny.mlp(), torch.randn(2, 5)
    whole = model(inputs)
    own = lambda given: given + 1  # noqa: E731 - what accelerate puts over a module's own forward
    model[1].forward = own
    with standing_in({model[0]: torch.zeros(2, 7), model[1]: torch.ones(2, 7)}):
        made = model(None)
    assert torch.equal(made, model[2:](torch.ones(2, 7)))
    assert model[1].forward is own and "forward" not in model[0].__dict__
    del model[1].forward
    with pytest.raises(ZeroDivisionError), standing_in({model[0]: torch.zeros(2, 7)}):
        raise ZeroDivisionError
    assert torch.equal(model(inputs), whole)


def test_a_model_of_transformers_that_runs_parts_of_itself_again_is_known():
    model = tiny.llama()
    assert not recomputes(model)
    model.gradient_checkpointing_enable()
    assert recomputes(model)
    model.gradient_checkpointing_disable()
    assert not recomputes(model)


def test_so_is_one_of_timm():
    model = pytest.importorskip("timm").create_model("resnet18")
    assert not recomputes(model)
    model.set_grad_checkpointing()
    assert recomputes(nn.ModuleDict({"body": model}))


def test_functions_are_run_for_the_model_and_whole_modules_as_one(no_hooks_left):
    model = tiny.mlp()
    no_hooks_left(model)
    names = []

    def run(function, args, kwargs):
        names.append(function.__name__)
        made = function(*args, **kwargs)
        return made + 1 if function.__name__ == "ReLU" else made

    inputs = torch.randn(2, 5)
    with watch_functions(run, {"1": model[1], "3": model[3]}):
        made = model(inputs)
    assert names == ["linear", "ReLU", "linear", "ReLU", "linear"]
    assert torch.allclose(made, model[4](model[3](model[2](model[1](model[0](inputs)) + 1)) + 1))
