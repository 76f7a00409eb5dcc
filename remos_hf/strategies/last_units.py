"""The units that a model is cut into where its last k are told apart from its extractor: blocks, final norm, head."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from remos_hf.activations import evaluating, watch_calls
from remos_hf.adapters.base import Adapter
from remos_hf.errors import UnsupportedModelError, nearest

# Inside: a stem, or a list of plain layers, is no list of blocks.
_LISTS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Units:
    """A model's units, first to last, by the dotted names of their modules.

    Attributes:
        before: Those of the extractor. What is in no unit (a stem, embeddings) is the extractor's too.
        last: The last k.
    """

    before: tuple[tuple[str, ...], ...]
    last: tuple[tuple[str, ...], ...]

    def holds(self, name: str) -> bool:
        """Whether a module or parameter lies in one of the last units."""
        return any(f"{name}.".startswith(f"{one}.") for unit in self.last for one in unit)


def last_units(adapter: Adapter, k: int, named: tuple[str, ...] | None = None) -> Units:
    """Cut a model before its last k units.

    Units are the residual or transformer blocks, each norm or other layer that the model lists between them and the
    head, and the head. In a net in stages the blocks are those within its stages where a stage is a plain list of them
    (ResNets); where it holds more, as a patch merging of its own (ConvNeXt, Swin), each stage is one unit. Whether the
    model runs them in that order only a batch tells: `check_order`.

    Args:
        adapter: Of the model.
        k: Number of units after the cut.
        named: Dotted names of the units, first to last, the head among them; None finds them.

    Raises:
        UnsupportedModelError: A name is not in the model, or no blocks are found.
        ValueError: There are fewer than k units.

    Source:
        CARTL's code, src/networks/utils.py:40-81: a WideResNet's blocks, its final norm, its head; the stem is outside.
    """
    model = adapter.model
    if named is None:
        units = tuple(_found(adapter))
    else:
        modules = dict(model.named_modules())
        missing = [name for name in named if name not in modules]
        if missing:
            raise UnsupportedModelError(
                f"units names {missing}, but {type(model).__name__} has no such modules.{nearest(missing, modules)}"
            )
        units = tuple((name,) for name in named)
    if not 1 <= k <= len(units):
        told = ", ".join(" and ".join(unit) for unit in units)
        raise ValueError(
            f"k is a number of units from 1 to {len(units)} of {type(model).__name__} ({told}), but got {k}."
        )
    return Units(units[:-k], units[-k:])


@torch.no_grad()
def check_order(adapter: Adapter, units: Units, batch: Any) -> None:  # noqa: ANN401 - any batch
    """Refuse units that were found if the model does not run the last of them last, one after another.

    Args:
        adapter: Of the model; its modes are put back.
        units: What `last_units` found.
        batch: On the model's device.

    Raises:
        UnsupportedModelError: Another layer runs among or behind the last units, or they run in another order. It says
            how to name them.
    """
    model, every = adapter.model, (*units.before, *units.last)
    unit_of = {name: unit for unit in every for name in unit}
    loose = {name for name, one in model.named_modules() if _is_loose(name, one, unit_of)}
    ran: dict[str, None] = {}
    watched = {name: model.get_submodule(name) for name in (*unit_of, *loose)}
    with evaluating(model), watch_calls(watched, lambda name, *_: ran.setdefault(name)):
        adapter.forward(batch)
    order = list(dict.fromkeys(unit_of.get(name, (name,)) for name in ran))
    asked = [unit for unit in units.last if unit in order]
    if not asked or order[-len(asked) :] == asked:
        return
    before = set(takewhile(lambda name: name != every[0][0], ran)) if every[0][0] in ran else ()
    named = [name for name in ran if name not in before and any(True for _ in model.get_submodule(name).parameters())]
    raise UnsupportedModelError(
        f"The last {len(units.last)} units of {type(model).__name__} were taken to be "
        f"{', '.join(' and '.join(unit) for unit in units.last)}, but what runs last is "
        f"{', '.join(' and '.join(unit) for unit in order[-len(asked) :])}. Name all units as they run, and count k by "
        f"them: units={tuple(named)}."
    )


def _is_loose(name: str, module: nn.Module, units: Iterable[str]) -> bool:
    """Whether a module holds parameters of its own, and neither lies in a unit nor holds one."""
    apart = not any(f"{name}.".startswith(f"{one}.") or f"{one}.".startswith(f"{name}.") for one in units)
    own = any(True for _ in module.parameters(recurse=False))
    return bool(name) and apart and own and not isinstance(module, nn.Embedding)


def _found(adapter: Adapter) -> Iterator[tuple[str, ...]]:
    model = adapter.model
    blocks = _blocks(adapter)
    if not blocks or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no one list of blocks before its head. Name its units, first to last, the "
            "head among them: units=(...)."
        )
    yield from ((name,) for name in blocks)
    reached = False
    for name, module in model.named_modules():
        inside = any(f"{name}.".startswith(f"{one}.") for one in (*blocks, *adapter.head))
        reached = reached or name == blocks[-1]
        # A table is read by the blocks (relative positions in MPNet and DeBERTa), wherever it was made.
        inside = inside or isinstance(module, nn.Embedding)
        if reached and not inside and any(True for _ in module.parameters(recurse=False)):
            yield (name,)
    if adapter.head:
        yield adapter.head


def _blocks(adapter: Adapter) -> list[str]:
    """Name the repeated blocks; of nets in stages, those within the stages."""
    if getattr(getattr(adapter.model, "config", None), "num_hidden_layers", None) is not None:
        try:
            return list(adapter.blocks())
        except UnsupportedModelError:
            pass
    found: list[str] = []
    for name, module in adapter.model.named_modules():
        in_head = any(f"{name}.".startswith(f"{one}.") for one in adapter.head)
        if not in_head and isinstance(module, _LISTS) and not any(name.startswith(f"{one}.") for one in found):
            found += [f"{name}.{key}".lstrip(".") for key, one in module.named_children() if _is_block(one)]
    return found


def _is_block(module: nn.Module) -> bool:
    """Whether an element of a list is a block: it computes several things itself, and is no list or stage of others."""
    children = list(module.children())
    # timm's norms hold their activation.
    if isinstance(module, (*_LISTS, _NormBase)) or not any(True for _ in module.parameters()):
        return False
    return len(children) > 1 or (len(children) == 1 and not isinstance(children[0], _LISTS))
