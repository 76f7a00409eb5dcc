from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

from remos_hf.errors import RemosError, TeacherMismatchError
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Hold, Preparation, Strategy
from remos_hf.strategies.composed import Composed, as_strategy
from remos_hf.strategies.delta import Delta
from remos_hf.strategies.distilled import Distilled
from remos_hf.strategies.guided import Guided
from remos_hf.strategies.hardened import Hardened
from remos_hf.strategies.l2sp import L2SP
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.renofeation import Renofeation
from remos_hf.strategies.slice_and_reset import Random
from remos_hf.training.attach import attach_remos
from remos_hf.training.moments import HOLD_FILE, Moments, check_adapters
from tests import tiny
from tests.training.runs import trainer
from tests.training.test_loss_scale import causal_rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@dataclass(frozen=True)
class Noisy(Strategy):
    """Weighs every loss by a number that it draws, and keeps an average of the head."""

    strength: float = 0.5
    seed: int | None = None
    needs_teacher: bool = False

    def hold(self, student, teacher):
        return NoisyHold(self, student)


class NoisyHold(Hold):
    def __init__(self, recipe, student):
        self.strength, self.needs_teacher = recipe.strength, recipe.needs_teacher
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.average, self.steps = torch.zeros(2, 16, dtype=torch.float64), 0

    def loss(self, model, inputs, run):
        loss, outputs = run(inputs)
        return loss * (1 + self.strength * torch.rand((), generator=self.generator)), outputs

    def after_step(self, model):
        self.steps += 1
        self.average += model.classifier.weight.detach().double()

    def finish(self, model, data):
        model.classifier.weight.data.copy_(self.average / self.steps)

    def state_dict(self):
        kept = {"average": self.average, "list": [self.generator.get_state(), None, 0.1]}
        return {"steps": self.steps, "kept": kept}

    def load_state_dict(self, state):
        self.steps, self.average = state["steps"], state["kept"]["average"]
        assert state["kept"]["list"][1:] == [None, 0.1]
        self.generator.set_state(state["kept"]["list"][0])


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("strategy", [Noisy(), [Random(0.9), Noisy(), Noisy(seed=5)]], ids=["one", "list"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, strategy):
    whole = trainer(tmp_path, strategy=strategy)
    whole.train()
    resumed = trainer(tmp_path, strategy=strategy)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert (tmp_path / "checkpoint-2" / HOLD_FILE).is_file()


def test_what_a_hold_draws_depends_on_the_runs_seed_unless_its_recipe_names_one(tmp_path):
    def noise(place, seed, named=None):
        options = {"seed": seed, "data_seed": 1, "max_steps": 1, "save_strategy": "no"}
        ours = trainer(tmp_path / place, strategy=Noisy(seed=named), options=options)
        ours.train()
        return ours.moments.hold.generator.initial_seed()

    assert [noise("a", 1), noise("b", 2), noise("c", 2, named=7)] == [1, 2, 7]


def test_the_record_names_the_seed_that_was_used(tmp_path):
    trainer(tmp_path, strategy=Random(0.9), options={"max_steps": 2, "seed": 11}).train()
    assert Sidecars.load(tmp_path / "checkpoint-2").config["strategy"]["seed"] == 11


def test_a_record_that_named_another_seed_is_gone_on_with(tmp_path):
    whole = trainer(tmp_path, strategy=Random(0.9, seed=0))
    whole.train()
    resumed = trainer(tmp_path, strategy=Random(0.9))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    with pytest.raises(RemosError, match="made by"):
        trainer(tmp_path, strategy=Random(0.9, seed=1)).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_strategy_is_refused(tmp_path):
    trainer(tmp_path, strategy=Noisy(0.5)).train()
    for other in (Noisy(0.4), Finetune(), [Finetune(), Noisy(0.5)]):
        with pytest.raises(RemosError, match="made by"):
            trainer(tmp_path, strategy=other).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_lost_the_state_of_its_hold_is_refused(tmp_path):
    trainer(tmp_path, strategy=Noisy()).train()
    (tmp_path / "checkpoint-4" / HOLD_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="what Noisy kept of its student is lost"):
        trainer(tmp_path, strategy=Noisy()).train(resume_from_checkpoint=True)


def test_a_hold_that_needs_its_teacher_is_refused_another(tmp_path):
    trainer(tmp_path, strategy=Noisy(needs_teacher=True)).train()
    other = trainer(tmp_path, strategy=Noisy(needs_teacher=True), model=tiny.bert(seed=1))
    with pytest.raises(TeacherMismatchError, match="Give the model that the run was started with"):
        other.train(resume_from_checkpoint=True)


BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 0.1}  # fmt: skip


@pytest.mark.parametrize(
    "strategy", [Renofeation(), [Finetune(), Renofeation(average_decay=None)]], ids=["one", "list"]
)
def test_an_average_that_would_overwrite_the_best_checkpoint_is_refused_before_anything_is_written(tmp_path, strategy):
    before = weights(tiny.bert())
    ours, theirs = trainer(tmp_path, strategy=strategy, options=BEST), trainer(tmp_path, kind=Trainer, options=BEST)
    for model, start in ((ours.model, ours.train), (theirs.model, lambda: attach_remos(theirs, strategy=strategy))):
        with pytest.raises(ValueError, match="load_best_model_at_end=False, or .*average_decay=0"):
            start()
        assert torch.equal(weights(model), before)


def test_the_best_checkpoint_is_the_student_where_nothing_takes_its_place(tmp_path):
    ours = trainer(tmp_path, strategy=[Renofeation(average_decay=0), Finetune()], options=BEST)
    ours.train()
    number = ours.state.best_global_step
    saved = load_file(tmp_path / f"checkpoint-{number}" / "model.safetensors")
    assert number < 3 and all(torch.equal(one, saved[name]) for name, one in ours.model.state_dict().items())


@pytest.mark.parametrize(
    "strategy", [Delta(0.1, attention="none", head=("head",)), Guided(head=("head",)), L2SP(head=("head",))], ids=str
)
def test_a_list_resumes_under_a_teacher_of_another_head_as_its_parts_do_and_under_no_other_body(tmp_path, strategy):
    def resumed(by, change):
        student = tiny.ConvNet()
        with torch.no_grad():
            student.get_parameter(change).add_(1)
        Moments(as_strategy(by), tiny.student_data(tiny.image_batches)).resume(student, tmp_path)

    for by in (strategy, [strategy, Hardened()], [Finetune(), Distilled(head=("head",)), strategy]):
        moments = Moments(as_strategy(by), tiny.student_data(tiny.image_batches))
        moments.start(tiny.ConvNet()).save(tmp_path)
        moments.save(tmp_path)
        resumed(by, "head.weight")
        with pytest.raises(TeacherMismatchError, match="Give the model"):
            resumed(by, "down.weight")


def test_the_teacher_is_copied_only_for_a_strategy_that_holds(monkeypatch):
    student = tiny.bert()
    monkeypatch.setattr(type(student), "__deepcopy__", lambda *_: pytest.fail("copied"), raising=False)
    moments = Moments(Finetune(), tiny.student_data())
    moments.start(student)
    assert moments.hold is None


def test_neither_the_start_nor_the_end_moves_the_random_state():
    class Drawing(Strategy):
        def prepare(self, student, data):
            torch.rand(3)
            return super().prepare(student, data)

        def hold(self, student, teacher):
            torch.rand(3)
            return DrawingHold()

    class DrawingHold(Hold):
        def finish(self, model, data):
            torch.rand(3)

    state = torch.get_rng_state()
    moments, student = Moments(Drawing(), tiny.student_data()), tiny.bert()
    after = torch.get_rng_state()
    moments.start(student)
    moments.finish(student)
    assert torch.equal(torch.get_rng_state(), after) or torch.equal(state, after)


def test_a_state_that_no_file_can_hold_is_refused_by_name(tmp_path):
    class Strange(Strategy):
        def hold(self, student, teacher):
            return StrangeHold()

    class StrangeHold(Hold):
        def state_dict(self):
            return {"kept": {"generator": torch.Generator()}}

    moments = Moments(Strange(), tiny.student_data())
    moments.start(tiny.bert())
    with pytest.raises(TypeError, match="'kept/generator' is a Generator.*get_state"):
        moments.save(tmp_path)


def test_a_hold_that_gives_no_pair_is_refused(tmp_path):
    class Alone(Strategy):
        def hold(self, student, teacher):
            return AloneHold()

    class AloneHold(Hold):
        def loss(self, model, inputs, run):
            return run(inputs)[0]

    with pytest.raises(TypeError, match=r"AloneHold\.loss gives \(a scalar loss, outputs\), but gave Tensor"):
        trainer(tmp_path, strategy=Alone()).train()


@dataclass(frozen=True)
class Penal(Strategy):
    def hold(self, student, teacher):
        return PenalHold()


class PenalHold(Hold):
    def loss(self, model, inputs, run):
        loss, outputs = run(inputs)
        return loss + 0.1 * model.lm_head.weight.square().sum(), outputs


def update(folder, strategy, steps, size):
    """What one step of SGD by a rate of 1 adds to the weights of a causal language model."""
    options = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": size, "max_steps": 1}
    options |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    kind = {} if strategy is None else {"strategy": strategy}
    ours = trainer(folder, model=tiny.llama(), train_dataset=causal_rows(), options={**options, "save_strategy": "no"},
                   data_collator=None, **({"kind": Trainer} if strategy is None else kind))  # fmt: skip
    before = weights(ours.model)
    ours.train()
    return weights(ours.model) - before


def test_what_a_hold_adds_does_not_grow_with_the_batches_that_are_accumulated(tmp_path):
    penalty = 0.1 * 2 * tiny.llama().lm_head.weight.detach()
    for steps, size in ((1, 8), (4, 2)):
        added = update(tmp_path, Penal(), steps, size) - update(tmp_path, Finetune(), steps, size)
        expected = torch.zeros_like(added)
        expected[-penalty.numel() :] = -penalty.flatten()
        assert torch.allclose(added, expected, atol=1e-5)


def test_adapters_are_refused_where_a_strategy_cannot_do_with_them():
    @dataclass(frozen=True)
    class Whole(Strategy):
        refuses_adapters = "It trains every weight."

    with pytest.raises(ValueError, match="Whole cannot train adapters: It trains every weight. Train the whole model"):
        check_adapters(Whole())
    with pytest.raises(ValueError, match="Finetune \\+ Whole cannot"):
        check_adapters(Composed((Finetune(), Whole())))
    check_adapters(Finetune())


def test_modules_that_are_no_transformers_can_be_held():
    moments = Moments(Penal(), tiny.student_data(tiny.image_batches))
    moments.start(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    assert moments.hold is not None


class FailingOnOne(Strategy):
    def prepare(self, student, data):
        if torch.distributed.get_rank() == 1:
            raise ValueError("no such luck")
        return super().prepare(student, data)


def _start_on_each_process(folder):
    found = Path(folder) / f"rank{torch.distributed.get_rank()}"
    try:
        Moments(FailingOnOne(), tiny.student_data()).start(tiny.bert())
    except (RemosError, ValueError) as error:
        found.write_text(f"{type(error).__name__}: {error}")


def test_a_process_that_fails_to_start_does_not_leave_the_others_waiting(tmp_path):
    debug_launcher(_start_on_each_process, args=(str(tmp_path),), num_processes=2)
    told = "RemosError: Process 1 failed while it started the student: ValueError: no such luck"
    assert (tmp_path / "rank0").read_text() == told
    assert (tmp_path / "rank1").read_text() == "ValueError: no such luck"


@dataclass(frozen=True)
class Uneven(Strategy):
    def hold(self, student, teacher):
        return UnevenHold()


class UnevenHold(Hold):
    """Keeps what differs between processes."""

    def __init__(self):
        self.rank, self.same = torch.full((2,), float(torch.distributed.get_rank())), "same"

    def state_dict(self):
        return {"rank": self.rank}

    def load_state_dict(self, state):
        self.rank = state["rank"]


def _save_on_each_process(folder):
    rank = torch.distributed.get_rank()
    for kind, strategy in (("uneven", Uneven()), ("even", Noisy(seed=1))):
        place = Path(folder) / kind
        moments, again = (Moments(strategy, tiny.student_data()) for _ in range(2))
        moments.start(tiny.bert())
        moments.save(place)
        if rank == 0:
            moments.sidecars.save(place)
        torch.distributed.barrier()
        again.resume(tiny.bert(), place)
        if kind == "uneven":
            (Path(folder) / f"read{rank}").write_text(str(again.hold.rank.tolist()))


def test_processes_whose_state_differs_write_their_own_and_others_do_not(tmp_path):
    debug_launcher(_save_on_each_process, args=(str(tmp_path),), num_processes=2)
    assert [(tmp_path / f"read{rank}").read_text() for rank in range(2)] == ["[0.0, 0.0]", "[1.0, 1.0]"]
    assert {path.name for path in (tmp_path / "uneven").glob("remos_hold*")} == {HOLD_FILE, "remos_hold_1.safetensors"}
    assert {path.name for path in (tmp_path / "even").glob("remos_hold*")} == {HOLD_FILE}


@dataclass(frozen=True)
class Telling(Finetune):
    """Says what it did at the start and at the end."""

    def prepare(self, student, data):
        return Preparation(details={"telling": {"kept": 3}})

    def hold(self, student, teacher):
        return TellingHold()


class TellingHold(Hold):
    rows = 0

    def finish(self, model, data):
        self.rows = 2

    def details(self):
        return {"telling": {"rows": self.rows}}


def test_what_a_strategy_says_of_its_start_and_its_end_stands_in_the_record(tmp_path):
    ours = trainer(tmp_path, strategy=Telling())
    ours.train()
    ours.save_model(str(tmp_path / "student"))
    config = Sidecars.load(tmp_path / "student").config
    assert config["start"] == {"telling": {"kept": 3}} and config["finish"] == {"telling": {"rows": 2}}


def test_what_two_parts_of_one_kind_did_stands_side_by_side_once_the_student_is_trained(tmp_path):
    blocks = [(f"bert.encoder.layer.{block}",) for block in range(2)]
    held = [Delta(0.1 * (1 + block), attention="none", layers=blocks[block]) for block in range(2)]
    ours = trainer(tmp_path, strategy=[*held, Hardened(seed=1), Hardened(seed=2)])
    ours.train()
    told = ours.moments.sidecars.config["finish"]
    assert list(told) == ["hardened", "hardened_2", "delta", "delta_2"]
    assert [(told[word]["layers"], told[word]["weight"]) for word in ("delta", "delta_2")] == [
        (list(one.layers), one.weight) for one in held
    ]
    assert told["hardened"] != told["hardened_2"] and told["delta"]["steps"] == told["delta_2"]["steps"] == 4


@dataclass(frozen=True)
class Begun(Strategy):
    def hold(self, student, teacher):
        return BegunHold()


class BegunHold(Hold):
    begun = 0

    def begin(self, student, data):
        self.begun += 1 + len(list(data.batches()))

    def details(self):
        return {"begun": self.begun}

    def state_dict(self):
        return {"begun": self.begun}

    def load_state_dict(self, state):
        self.begun = state["begun"]


def test_a_hold_begins_once_on_the_data_and_not_again_in_a_resumed_run(tmp_path):
    for resume in (None, str(tmp_path / "checkpoint-2")):
        ours = trainer(tmp_path, strategy=Composed((Finetune(), Begun())))
        ours.train(resume_from_checkpoint=resume)
        assert ours.moments.sidecars.config["finish"] == {"begun": 7}
