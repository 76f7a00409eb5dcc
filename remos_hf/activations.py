"""A model while it is looked at: hooks and eval mode that last as long as a `with` block.

The only file that registers hooks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

See = Callable[[str, Tensor, Tensor], None]


@contextmanager
def watch(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Show `see(name, input, output)` every call of the modules while the block runs.

    Args:
        modules: Modules by the name under which they are reported.
        see: Called right after each module's forward, with the first tensor it was given and the one it returned.
            It must not keep them.

    Yields:
        Nothing. All hooks are removed at the end of the block, whether it returned or raised.
    """
    with ExitStack() as hooks:
        for name, module in modules.items():
            handle = module.register_forward_hook(_reporter(name, see), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


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


def _reporter(name: str, see: See) -> Callable[..., None]:
    def report(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:  # noqa: ANN401 - whatever forward returns
        given = _first_tensor((*args, *kwargs.values()))
        made = output if isinstance(output, Tensor) else _first_tensor(tuple(output))
        if given is None or made is None:
            raise TypeError(
                f"'{name}' was called without a tensor or returned none "
                f"(arguments {[type(a).__name__ for a in args]}, result {type(output).__name__})."
            )
        see(name, given, made)

    return report


def _first_tensor(values: tuple) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor)), None)
