"""A model while it is looked at: hooks and eval mode that last as long as a `with` block.

The only file that registers hooks and modes, or has a module give what it did not compute.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

See = Callable[[str, Tensor, Tensor], None]
SeeCall = Callable[[str, tuple, dict, Any], None]
RunFunction = Callable[[Callable, tuple, dict], Any]

# Products of an activation with a weight, which comes second.
_LINEAR = nn.functional.linear
_PRODUCTS = frozenset(
    {_LINEAR, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}
)


@contextmanager
def watch(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Show `see(name, input, output)` every call of the modules while the block runs.

    Args:
        modules: Modules by the name under which they are reported.
        see: Called right after each module's forward, with the first tensor it was given and the one it returned,
            which may stand in a tuple or a mapping. It must not keep them.

    Yields:
        Nothing. All hooks are removed at the end of the block, whether it returned or raised.

    Raises:
        TypeError: A module was called without a tensor, or returned none.
    """

    def report(name: str, args: tuple, kwargs: dict, output: Any) -> None:  # noqa: ANN401 - whatever forward returns
        given = _first_tensor((*args, *kwargs.values()))
        made = output if isinstance(output, Tensor) else _first_tensor(_values(output))
        if given is None or made is None:
            raise TypeError(
                f"'{name}' was called without a tensor or returned none "
                f"(arguments {[type(a).__name__ for a in args]}, result {type(output).__name__})."
            )
        see(name, given, made)

    with watch_calls(modules, report):
        yield


@contextmanager
def watch_calls(modules: Mapping[str, nn.Module], see: SeeCall) -> Iterator[None]:
    """Show `see(name, args, kwargs, output)` every call of the modules while the block runs.

    Args:
        modules: Modules by the name under which they are reported.
        see: Called right after each module's forward. It must not keep what it is shown.

    Yields:
        Nothing. All hooks are removed at the end of the block, whether it returned or raised.
    """

    def reporter(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs, output: see(name, args, kwargs, output)

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(reporter(name), with_kwargs=True).remove)
        yield


@contextmanager
def watch_products(weights: Mapping[str, Tensor], see: Callable[[str, Tensor, Tensor, bool], None]) -> Iterator[None]:
    """Show every product of an activation with one of the weights, wherever it is computed, while the block runs.

    For weights that no module of their own multiplies, as those of stacked experts.

    Args:
        weights: The weights, or views into them, by the name under which they are reported.
        see: Called with the name, the activation, the product and whether a bias was already added to it.

    Yields:
        Nothing.
    """
    with _Products({_place(weight): name for name, weight in weights.items()}, see):
        yield


class _Products(TorchFunctionMode):
    def __init__(self, names: dict[tuple[int, int], str], see: Callable[[str, Tensor, Tensor, bool], None]) -> None:
        super().__init__()
        self.names, self.see = names, see

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ANN401, ARG002, E501 - torch's own signature
        made = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and len(args) > 1:
            name = self.names.get(_place(args[1]))
            if name is not None:
                self.see(name, args[0], made, func is _LINEAR)
        return made


@contextmanager
def watch_functions(run: RunFunction, whole: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have `run(function, args, kwargs)` do every call of a torch function or tensor method while the block runs.

    Args:
        run: Calls the function and gives what stands for its result. What it calls itself is not shown.
        whole: Modules that count as one function each, without what is called within them. None lies in another.

    Yields:
        Nothing. All hooks are removed at the end of the block, whether it returned or raised.
    """
    mode = _Functions(run)

    def enter(*_: object) -> None:
        mode.within = True

    def leave(module: nn.Module, args: tuple, output: Any) -> Any:  # noqa: ANN401 - whatever forward returns
        made = [output]

        def call(*given: Any) -> Any:  # noqa: ANN401 - as forward
            return made.pop() if made else module.forward(*given)

        call.__name__ = type(module).__name__
        result = run(call, args, {})
        mode.within = False
        return result

    with ExitStack() as hooks:
        for module in whole.values():
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        with mode:
            yield


class _Functions(TorchFunctionMode):
    def __init__(self, run: RunFunction) -> None:
        super().__init__()
        self.run, self.within = run, False

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ANN401, ARG002, E501 - torch's own signature
        return func(*args, **(kwargs or {})) if self.within else self.run(func, args, kwargs or {})


def _place(weight: Tensor) -> tuple[int, int]:
    # A view of one expert starts where no other view of its size does.
    return weight.data_ptr(), weight.numel()


@contextmanager
def capture(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Keep the latest output of each module, with its graph, while the block runs.

    Args:
        modules: Modules by the name under which their output is kept.

    Yields:
        The outputs by name, filled as the modules run. The dict is the caller's and outlives the block.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _: Tensor, output: Tensor) -> None:
        outputs[name] = output

    with watch(modules, keep):
        yield outputs


@contextmanager
def alter(modules: Mapping[str, nn.Module], change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Have `change(name, output)` take the place of each module's output while the block runs.

    Args:
        modules: Modules by the name under which their output is given.
        change: Gives what takes its place; of several outputs, or of a mapping, that of the first tensor.

    Yields:
        Nothing. All hooks are removed at the end of the block, whether it returned or raised.

    Raises:
        TypeError: A module returned no tensor.
    """

    def replacer(name: str) -> Callable[..., Any]:
        def replace(_: nn.Module, args: tuple, output: Any) -> Any:  # noqa: ANN401 - whatever forward returns
            if isinstance(output, Tensor):
                return change(name, output)
            values = _values(output)
            place = next((place for place, one in enumerate(values) if isinstance(one, Tensor)), None)
            if place is None:
                raise TypeError(f"'{name}' returned no tensor to change (result {type(output).__name__}).")
            if isinstance(output, Mapping):  # as the outputs of transformers' models are
                changed, key = copy.copy(output), list(output)[place]
                changed[key] = change(name, output[key])
                return changed
            return (*values[:place], change(name, values[place]), *values[place + 1 :])

        return replace

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(replacer(name)).remove)
        yield


@contextmanager
def standing_in(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Have modules give what they are said to, without running, while the block runs.

    Args:
        outputs: What each module returns, whatever it is called with. The very object: what changes it in place
            changes the next call's.

    Yields:
        Nothing. Every module runs again at the end of the block, whether it returned or raised.
    """
    before = {module: module.__dict__.get("forward") for module in outputs}
    try:
        for module, output in outputs.items():
            module.__dict__["forward"] = lambda *_, _output=output, **__: _output
        yield
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode while the block runs.

    Args:
        model: The model.

    Yields:
        Nothing. Every module's own mode is put back, whether the block returned or raised.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode  # train() would also change the children


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Keep torch's own Transformer layers from computing everything in one kernel that calls none of their modules."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def precision_in_force(device: str) -> AbstractContextManager:
    """Give the mixed precision, or none, that is in force on a kind of device, to be taken up again."""
    return torch.autocast(device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))


def recomputes(model: nn.Module) -> bool:
    """Whether any part of a model runs a second time in the backward pass, when hooks may be gone.

    Source: the flags of transformers' (`gradient_checkpointing`) and timm's (`grad_checkpointing`) own modules.
    """
    flags = ("gradient_checkpointing", "grad_checkpointing")
    return any(getattr(module, flag, False) is True for module in model.modules() for flag in flags)


def _values(output: Any) -> tuple:  # noqa: ANN401 - whatever forward returns
    values = output.values() if isinstance(output, Mapping) else output
    return tuple(values) if isinstance(values, Iterable) else ()


def _first_tensor(values: tuple) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor)), None)
