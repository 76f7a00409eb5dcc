"""What every strategy of the package must do with every trainer. Strategies are found, not listed."""

import dataclasses
import importlib
import json
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import debug_launcher
from transformers import Trainer

import remos_hf
from remos_hf import strategies
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.composed import strategy_from_dict
from remos_hf.training.accelerate_loop import fit
from remos_hf.training.attach import attach_remos
from tests import tiny
from tests.training.runs import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weights tie at the threshold:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*the optimizer's weight decay pulls:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# What a kind needs that has no default, or one that is too much for tiny models.
NEEDED = {
    "slice_ratio": 0.8,
    "strategies": ({"name": "Remos", "slice_ratio": 0.8}, {"name": "L2SP"}),
    "steps": 2,
    "head_steps": 2,
    "mask_token": 2,
    "k": 2,
}


def kinds():
    """Every strategy of the package that a user can make."""
    for module in pkgutil.walk_packages(strategies.__path__, "remos_hf.strategies."):
        importlib.import_module(module.name)
    found, left = [], [Strategy]
    while left:
        children = left.pop().__subclasses__()
        left += children
        found += [one for one in children if one.__module__.startswith("remos_hf.")]
    return sorted((one for one in found if not one.__subclasses__()), key=lambda one: one.__name__)


KINDS = kinds()


def made(kind):
    return kind(**{one.name: NEEDED[one.name] for one in dataclasses.fields(kind) if one.name in NEEDED})


def fields_of_names(kind):
    return [one.name for one in dataclasses.fields(kind) if "tuple[str" in str(one.type)]


def fields_of_numbers(kind):
    """Those that hold a number or None, by name, with a number that fits."""
    typed = {one.name: (str(one.type), getattr(made(kind), one.name)) for one in dataclasses.fields(kind)}
    typed = {name: value for name, (of, value) in typed.items() if re.search(r"int|float", of) and "tuple" not in of}
    usual = {"seed": 3, "ridge": 0.1, "k": 2, "mask_token": 2, "max_samples": 8}
    return {name: usual[name] if value is None else value for name, value in typed.items() if value or name in usual}


def by_remos_trainer(folder, strategy, resume):
    ours = trainer(folder, strategy=strategy)
    ours.train(resume_from_checkpoint=resume)
    return ours.model


def by_attached_trainer(folder, strategy, resume):
    theirs = trainer(folder, kind=Trainer)
    attach_remos(theirs, strategy=strategy, resume_from_checkpoint=resume)
    theirs.train(resume_from_checkpoint=resume)
    return theirs.model


def by_fit(folder, strategy, resume):
    return fit(
        tiny.bert(), tiny.dataset(), strategy=strategy, collate_fn=tiny.pad, batch_size=4, max_steps=4, progress=False,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), 1e-2), output_dir=folder, save_steps=2,
        resume_from_checkpoint=resume,
    ).model  # fmt: skip


TRAINERS = {"RemosTrainer": by_remos_trainer, "attach_remos": by_attached_trainer, "fit": by_fit}


def weights(model):
    return torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])


def test_all_strategies_of_the_package_live_in_their_room():
    package = Path(remos_hf.__file__).parent
    elsewhere = [
        path
        for path in package.rglob("*.py")
        if "(Strategy)" in path.read_text() and path.parent != package / "strategies"
    ]
    assert not elsewhere
    assert {"Finetune", "Retrain", "Remos", "L2SP", "Renofeation", "Composed"} <= {kind.__name__ for kind in KINDS}


def test_fields_of_names_are_found():
    found = {name for kind in KINDS for name in fields_of_names(kind)}
    assert found == {"head", "layers", "units"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
class TestEveryStrategy:
    def test_its_description_makes_it_again(self, kind):
        assert strategy_from_dict(made(kind).with_seed(3).to_dict()) == made(kind).with_seed(3)

    def test_names_come_in_tuples_and_one_string_is_refused(self, kind):
        for name in fields_of_names(kind):
            with pytest.raises(ValueError, match=rf"{name} is a tuple of names, .* 'fc': write \('fc',\)\."):
                dataclasses.replace(made(kind), **{name: "fc"})
            for others in (3, (3,)):
                with pytest.raises(ValueError, match=f"{name} is a tuple of names, but got"):
                    dataclasses.replace(made(kind), **{name: others})
            assert getattr(dataclasses.replace(made(kind), **{name: ["fc"]}), name) == ("fc",)

    def test_numbers_of_numpy_are_recorded_as_plain_ones(self, kind):
        for name, value in fields_of_numbers(kind).items():
            numpys = np.int64(value) if isinstance(value, int) else np.float64(value)
            recipe = dataclasses.replace(made(kind), **{name: numpys})
            written = json.loads(json.dumps(recipe.to_dict(), allow_nan=False))
            assert written == json.loads(json.dumps(dataclasses.replace(made(kind), **{name: value}).to_dict()))
            assert type(recipe.to_dict()[name]) is type(value)

    def test_a_seed_of_numpy_is_a_plain_one_in_training_and_what_is_none_is_refused(self, kind):
        if not any(one.name == "seed" for one in dataclasses.fields(kind)):
            return
        seeded = dataclasses.replace(made(kind), seed=np.int64(5)).with_seed(3)
        assert type(seeded.seed) is int and seeded == dataclasses.replace(made(kind), seed=5)
        for other in (True, "3", 2.5):
            with pytest.raises(ValueError, match="seed is a whole number"):
                dataclasses.replace(made(kind), seed=other).with_seed(3)

    def test_what_is_no_number_is_refused_before_anything_is_loaded(self, kind):
        for name in fields_of_numbers(kind).keys() - {"seed"}:  # a seed is given to generators as it is
            for other in (True, "0.1", object(), float("nan")):
                with pytest.raises(ValueError, match=name):
                    dataclasses.replace(made(kind), **{name: other})

    @pytest.mark.parametrize("by", TRAINERS)
    def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(self, tmp_path, kind, by):
        whole = weights(TRAINERS[by](tmp_path, made(kind), None))
        assert whole.isfinite().all()
        resumed = weights(TRAINERS[by](tmp_path, made(kind), str(tmp_path / "checkpoint-2")))
        assert torch.equal(resumed, whole)

    def test_it_trains_adapters_or_says_that_it_cannot(self, tmp_path, kind):
        from peft import LoraConfig

        config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
        strategy = made(kind)
        if strategy.refuses_adapters:
            with pytest.raises(ValueError, match=rf"{kind.__name__}.* cannot train adapters: it|\+ .* cannot train"):
                trainer(tmp_path, strategy=strategy, peft_config=config)
            return
        ours = trainer(tmp_path, strategy=strategy, peft_config=config, options={"save_strategy": "no"})
        ours.train()
        assert any(bool(value.any()) for name, value in ours.model.named_parameters() if "lora_B" in name)


def _on_each_process(folder):
    for kind in KINDS:
        strategy = made(kind)
        # What holds a student differs between trainers and must resume; a start without a hold is the same function.
        for by, run in TRAINERS.items() if strategy.holds else [("RemosTrainer", by_remos_trainer)]:
            place = Path(folder) / kind.__name__ / by
            whole = weights(run(place, strategy, None))
            others = [torch.empty_like(whole) for _ in range(2)]
            torch.distributed.all_gather(others, whole)
            assert torch.equal(*others), f"{kind.__name__} by {by} differs between processes"
            # Trainer of transformers 4 cannot load its own optimizer on the CPU in several processes.
            if strategy.holds and (by == "fit" or transformers.__version__ >= "5"):
                resumed = weights(run(place, strategy, str(place / "checkpoint-2")))
                assert torch.equal(resumed, whole), f"{kind.__name__} by {by} resumed otherwise"
    torch.distributed.barrier()
    (Path(folder) / f"done{torch.distributed.get_rank()}").touch()


def test_two_processes_train_one_student_and_resume_it(tmp_path):
    debug_launcher(_on_each_process, args=(str(tmp_path),), num_processes=2)
    assert {"done0", "done1"} <= {path.name for path in tmp_path.iterdir()}
