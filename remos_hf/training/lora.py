"""The base under fresh LoRA adapters: it is what is sliced when a trainer has put the adapters on already."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import is_peft_model
from torch import nn

from remos_hf.errors import UnsupportedModelError

try:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
except ImportError:  # without the extra peft no model has adapters
    LoraLayer = BaseTunerLayer = AuxiliaryTrainingWrapper = ModulesToSaveWrapper = ()

_OTHERWISE = (
    "Slice before the adapters are put on: attach_remos to a trainer without them, or RemosTrainer(peft_config=)."
)


@contextmanager
def base_of(model: nn.Module) -> Iterator[nn.Module]:
    """Give the base of a model with fresh LoRA adapters as it was before they were put on; any other model as it is.

    Within the block the adapters are off the base: its modules have the names of the base model, and all its weights
    may be trained, since PEFT freezes them for reasons of its own. A module of `modules_to_save` stands in its place as
    the copy that will train. Afterwards the adapters are on again, every parameter is as free or frozen as it was, and
    what was changed in such a copy is changed in the original too.

    Args:
        model: A model, or a PeftModel whose adapters were not trained: its function is the base's.

    Raises:
        UnsupportedModelError: The adapters were trained, or fresh ones of their kind do not leave the base's function
            as it is when the base changes.
    """
    if not is_peft_model(model):
        yield model
        return
    _check_fresh(model)
    base = model.get_base_model()
    frozen = [parameter for parameter in base.parameters() if not parameter.requires_grad]
    taken_off = [
        (base.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
        for name, module in list(base.named_modules())
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    for parent, name, module in taken_off:
        setattr(parent, name, _plain(module))
    for parameter in base.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        yield base
    finally:
        for parent, name, module in taken_off:
            setattr(parent, name, module)
            if isinstance(module, ModulesToSaveWrapper):
                module.original_module.load_state_dict(_plain(module).state_dict())
        for parameter in frozen:
            parameter.requires_grad_(False)


def _plain(module: nn.Module) -> nn.Module:
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]]
    return module.original_module


def _check_fresh(model: nn.Module) -> None:
    kinds = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()})
    # The token adapter within a wrapper holds whole embedding rows of its own, which nothing below it changes.
    within = {
        id(part) for wrap in model.modules() if isinstance(wrap, AuxiliaryTrainingWrapper) for part in wrap.modules()
    }
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and id(module) not in within
    }
    foreign = next((name for name, layer in layers.items() if not isinstance(layer, LoraLayer)), None)
    if not layers or foreign is not None:
        raise UnsupportedModelError(
            f"The model carries adapters of kind {', '.join(kinds)}. Only under fresh LoRA adapters is the function of "
            f"a model known to be its base's, so that the base can be sliced under them. {_OTHERWISE}"
        )
    for name, layer in layers.items():
        if len(layer.lora_magnitude_vector):
            raise UnsupportedModelError(
                f"'{name}' carries DoRA adapters, which hold the norms of the base's weights: sliced under them, the "
                f"base would start with norms that are no longer its own. {_OTHERWISE}"
            )
        ups = [*(up.weight for up in layer.lora_B.values()), *layer.lora_embedding_B.values()]
        if any(up.detach().any() for up in ups):
            raise UnsupportedModelError(
                f"The LoRA adapters of '{name}' are not fresh: their B is not zero. They were trained on the unsliced "
                "base, or they start from a part of its weights (PiSSA, OLoRA, LoftQ). Merge them first "
                f"(model.merge_and_unload()) and slice what comes out. {_OTHERWISE}"
            )
