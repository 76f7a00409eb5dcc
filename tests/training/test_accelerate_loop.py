import copy
import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, load_model
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset

from remos_hf.errors import NonFiniteError, UnsupportedModelError
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.refill import reset_outside
from remos_hf.slicing.relevant_slice import RelevantSlice, choose_slice
from remos_hf.strategies.base import Hold, Strategy
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Remos
from remos_hf.training.accelerate_loop import fit
from remos_hf.training.fit_checkpoints import MODEL_FILE
from remos_hf.training.moments import Moments
from remos_hf.training.windows import seed_of

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")

HEAD = ("3",)
SIDECARS = {"remos_config.json", "remos_coverage.safetensors", "remos_slice.safetensors"}


@pytest.fixture(autouse=True)
def _a_state_of_its_own(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # what is promised bit for bit
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def net(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)).eval()


def rows(count=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, generator=generator), n % 3) for n in range(count)]


class Augmented(Dataset):
    """Draws from all three random states, as augmentations do, and notes what was asked for."""

    def __init__(self, count=20):
        self.rows, self.asked = rows(count), []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.asked.append(index)
        inputs, label = self.rows[index]
        return inputs + torch.randn(6) + random.random() + np.random.random(), label  # noqa: NPY002


class Stream(IterableDataset):
    def __init__(self, count=20):
        self.rows = Augmented(count)

    def __iter__(self):
        return (self.rows[index] for index in range(len(self.rows)))


def sgd(model, lr=0.1, momentum=0.0):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def halving(optimizer, steps):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def run(model=None, data=None, **options):
    if "slice_ratio" not in options:
        options.setdefault("strategy", Finetune())
    if "epochs" not in options:
        options.setdefault("max_steps", 2)
    return fit(
        net() if model is None else model,
        rows() if data is None else data,
        **{"optimizer": sgd, "batch_size": 4, "progress": False, **options},
    )


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def close(one, other):
    other = weights(other)
    return all(torch.allclose(value, other[name], atol=1e-6) for name, value in weights(one).items())


def losses(fitted):
    return [entry["loss"] for entry in fitted.history if "loss" in entry]


# What is trained


def test_the_student_is_sliced_before_it_trains_and_trains_from_there():
    fitted = run(slice_ratio=0.6, head=HEAD, optimizer=partial(sgd, lr=0.0))
    by_hand = net()
    profile = profile_coverage(by_hand, DataLoader(rows(), batch_size=4), head=HEAD)
    relevant = choose_slice(by_hand, profile, slice_ratio=0.6, head=HEAD)
    reset_outside(by_hand, relevant)
    assert same(fitted.model, by_hand)
    assert fitted.sidecars.profile == profile
    assert fitted.sidecars.relevant_slice == relevant
    assert "3.weight" not in relevant.kept


def test_the_record_says_how_the_student_was_trained(tmp_path):
    run(max_steps=3, output_dir=tmp_path, scheduler=halving, seed=5)
    found = Sidecars.load(tmp_path).config["training"]
    asked = {"learning_rate": 0.1, "optimizer": "SGD", "batch_size": 4, "seed": 5, "steps": 3, "precision": "fp32"}
    assert asked.items() <= found.items()


def test_the_coverage_is_that_of_the_profile_dataset_where_there_is_one():
    part = rows(7, seed=5)
    ours = run(data=Augmented(), slice_ratio=0.6, head=HEAD, profile_dataset=part)
    profile = profile_coverage(net(), DataLoader(part, batch_size=4), head=HEAD)
    assert ours.sidecars.profile == profile and profile.num_samples == 7
    assert ours.sidecars.relevant_slice == choose_slice(net(), profile, slice_ratio=0.6, head=HEAD)
    assert ours.sidecars.profile != run(data=Augmented(), slice_ratio=0.6, head=HEAD).sidecars.profile


def test_the_profile_dataset_changes_nothing_of_the_training():
    plain = run(data=Augmented(), epochs=1)
    assert same(run(data=Augmented(), epochs=1, profile_dataset=rows(3)).model, plain.model)


def test_the_last_moment_reads_the_profile_dataset_too():
    class Finishing(Strategy):
        def hold(self, student, teacher):
            return FinishingHold()

    class FinishingHold(Hold):
        def finish(self, model, data):
            read.append(sum(len(batch[1]) for batch in data.batches()))

    read = []
    run(strategy=Finishing(), profile_dataset=rows(3))
    run(strategy=Finishing())
    assert read == [3, 20]


@pytest.mark.parametrize(
    ("data", "error", "told"),
    [
        (DataLoader(rows(4)), TypeError, "profile_dataset is the data set itself, but got a DataLoader"),
        ([], ValueError, "profile_dataset holds no sample"),
    ],
)
def test_a_profile_dataset_that_cannot_be_used_is_refused_and_the_model_left_whole(data, error, told):
    model = net()
    with pytest.raises(error, match=told):
        run(model, slice_ratio=0.6, head=HEAD, profile_dataset=data)
    assert same(model, net())


def test_a_search_of_the_ratio_is_refused():
    with pytest.raises(ValueError, match="'auto' with RemosTrainer and attach_remos, but got 'auto'"):
        run(slice_ratio="auto")


def test_training_is_plain_torchs_own_bit_for_bit():
    fitted = run(data=rows(8), epochs=1, batch_size=8, optimizer=partial(sgd, momentum=0.9))
    by_hand = net().train()
    seen = torch.randperm(8, generator=torch.Generator().manual_seed(seed_of(0, 0)))
    inputs, labels = torch.utils.data.default_collate([rows(8)[index] for index in seen.tolist()])
    functional.cross_entropy(by_hand(inputs), labels).backward()
    sgd(by_hand, momentum=0.9).step()
    assert same(fitted.model, by_hand)
    assert fitted.steps == 1


class Recording(Strategy):
    """Notes its moments, puts zeros for the inputs, and adds a hundred to the loss."""

    def __init__(self):
        object.__setattr__(self, "moments", [])

    def prepare(self, student, data):
        self.moments.append(f"prepare {sum(len(labels) for _, labels in data.batches())}")
        student.requires_grad_(True)
        return super().prepare(student, data)

    def hold(self, student, teacher):
        return RecordingHold(self.moments)


class RecordingHold(Hold):
    def __init__(self, moments):
        self.moments = moments

    def loss(self, model, inputs, run):
        assert model.training
        self.moments.append("loss")
        zeros = torch.zeros_like(inputs[0])
        loss, outputs = run([zeros, inputs[1]])
        assert torch.equal(outputs, model(zeros))
        return loss + 100, outputs

    def after_step(self, model):
        self.moments.append("after_step")

    def finish(self, model, data):
        self.moments.append(f"finish {sum(len(labels) for _, labels in data.batches(5))}")


def test_the_moments_come_in_their_order_and_once_for_each_step():
    strategy, student = Recording(), net()
    fitted = run(student, strategy=strategy, batch_size=2, gradient_accumulation_steps=2)
    step = ["loss"] * 2 + ["after_step"]
    assert strategy.moments == ["prepare 20", *step, *step, "finish 5"]
    assert all(100 < loss < 105 for loss in losses(fitted))
    assert torch.equal(student[0].weight, net()[0].weight)  # zeros went in
    assert fitted.model is student
    assert not student.training


class Penal(Strategy):
    def hold(self, student, teacher):
        return PenalHold()


class PenalHold(Hold):
    def loss(self, model, inputs, run):
        loss, outputs = run(inputs)
        return loss + 0.1 * model[3].weight.square().sum(), outputs


@pytest.mark.parametrize("strategy", [Finetune(), Penal()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("size", [4, 3, 1])
def test_accumulating_gives_the_updates_of_large_batches_also_where_the_last_is_not_full(strategy, size):
    options = {"data": rows(17), "epochs": 1, "strategy": strategy}
    large = run(batch_size=12, **options)
    small = run(batch_size=size, gradient_accumulation_steps=12 // size, **options)
    assert large.steps == small.steps == 2
    assert not same(large.model, net())
    assert close(large.model, small.model)
    assert losses(small) == pytest.approx(losses(large), abs=1e-6)


def test_an_incomplete_window_is_the_mean_over_its_samples():
    fitted = run(data=rows(7), max_steps=1, batch_size=3, gradient_accumulation_steps=4)
    by_hand = net()
    inputs, labels = torch.utils.data.default_collate(rows(7))
    loss = functional.cross_entropy(by_hand(inputs), labels)
    loss.backward()
    sgd(by_hand).step()
    assert close(fitted.model, by_hand)
    assert losses(fitted) == pytest.approx([loss.item()])


def test_every_epoch_shows_every_sample_once_in_an_order_of_its_own():
    data = Augmented(10)
    fitted = run(data=data, epochs=2)
    first, second = data.asked[:10], data.asked[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second != sorted(second)
    assert [entry["epoch"] for entry in fitted.history] == [0, 0, 0, 1, 1, 1]


def test_a_loss_of_ones_own_sees_the_models_outputs_and_the_batch():
    def twice(outputs, batch):
        return 2 * functional.cross_entropy(outputs, batch[1])

    assert losses(run(loss=twice, max_steps=1))[0] == pytest.approx(2 * losses(run(max_steps=1))[0])


class Named(nn.Module):
    """Takes a mapping; gives its own loss if it is told the labels."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, pixels, labels=None):
        logits = self.body(pixels)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": 3 * logits.square().mean()}


def test_mappings_run_on_the_models_own_loss_or_without_labels_on_the_callers():
    data = [{"pixels": inputs, "labels": label} for inputs, label in rows(4)]
    logits = net()(torch.stack([row["pixels"] for row in data]))
    own = run(Named(), data, max_steps=1)
    assert losses(own) == pytest.approx([3 * logits.square().mean().item()])
    given = run(Named(), data, max_steps=1, loss=lambda outputs, batch: outputs["logits"].mean() + len(outputs))
    assert losses(given) == pytest.approx([logits.mean().item() + 1])
    with pytest.raises(TypeError, match="should give a 'loss'"):
        run(Named(), [{"pixels": inputs} for inputs, _ in rows(4)])


def test_the_scheduler_steps_once_after_each_optimizer_step_and_knows_their_number():
    known = []

    def scheduler(optimizer, steps):
        known.append(steps)
        return halving(optimizer, steps)

    fitted = run(scheduler=scheduler, epochs=2, batch_size=5, gradient_accumulation_steps=2, optimizer=sgd)
    assert known == [4]
    assert [entry["learning_rate"] for entry in fitted.history] == [0.1, 0.05, 0.025, 0.0125]


def test_gradients_are_clipped_to_the_norm():
    fitted = run(max_steps=1, max_grad_norm=0.01, optimizer=partial(sgd, lr=1.0))
    before = weights(net())
    moved = torch.cat([(value - before[name]).flatten() for name, value in weights(fitted.model).items()])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


# The same bits


def test_two_runs_give_the_same_bits_and_another_seed_gives_others():
    runs = [run(net(dropout=0.5), Augmented(), seed=seed) for seed in (3, 3, 4)]
    assert same(runs[0].model, runs[1].model)
    assert runs[0].history == runs[1].history
    assert not same(runs[0].model, runs[2].model)


def test_loading_in_workers_changes_no_bit():
    alone, helped = (run(net(dropout=0.5), Augmented(), num_workers=n, slice_ratio=0.6, head=HEAD) for n in (0, 2))
    assert alone.sidecars.profile == helped.sidecars.profile
    assert same(alone.model, helped.model)


def test_the_callers_random_state_stays_as_it_was():
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(1), random.random(), np.random.random()  # noqa: NPY002
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    student = copy.deepcopy(_TEACHER)
    run(student, Augmented(), evaluate=lambda model: {"drawn": float(torch.rand(1))})
    assert (torch.rand(1), random.random(), np.random.random()) == expected  # noqa: NPY002


_TEACHER = net(dropout=0.5)


def test_evaluating_is_recorded_after_epochs_and_the_end_and_changes_no_bit():
    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"drawn": float(torch.rand(1)), "some": [1, None]}

    options = {"data": Augmented(), "max_steps": 7}
    evaluated, not_evaluated = run(net(dropout=0.5), evaluate=evaluate, **options), run(net(dropout=0.5), **options)
    assert same(evaluated.model, not_evaluated.model)
    found = [(entry["step"], entry["epoch"]) for entry in evaluated.history if "evaluation" in entry]
    assert found == [(5, 0), (7, 1)]
    assert evaluated.history[-1]["evaluation"]["some"] == [1, None]
    with pytest.raises(TypeError, match="JSON values"):
        run(evaluate=lambda model: {"accuracy": torch.tensor(1.0)})


# Checkpoints


class Interrupted(Strategy):
    """Plain fine-tuning with a hand on the keyboard."""

    stop_at = None

    def hold(self, student, teacher):
        return InterruptedHold()


class InterruptedHold(Hold):
    def after_step(self, model):
        cls = Interrupted
        if cls.stop_at is not None:
            cls.stop_at -= 1
            if cls.stop_at == 0:
                raise KeyboardInterrupt


@pytest.fixture
def stop_at(monkeypatch):
    return lambda step: monkeypatch.setattr(Interrupted, "stop_at", step)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, stop_at, accumulation, stream):
    options = {
        "strategy": Interrupted(),
        "max_steps": 7,
        "batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "optimizer": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05),
        "scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "evaluate": lambda model: {"drawn": float(torch.rand(1))},
        "output_dir": tmp_path,
        "save_steps": 3,
    }
    data = Stream if stream else Augmented
    whole = run(net(dropout=0.5), data(), **{**options, "output_dir": None, "save_steps": None})
    stop_at(5)
    with pytest.raises(KeyboardInterrupt):
        run(net(dropout=0.5), data(), **options)
    stop_at(None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    resumed = run(net(seed=9, dropout=0.5), data(), resume_from_checkpoint=True, **options)
    assert same(resumed.model, whole.model)
    assert resumed.history == whole.history
    assert resumed.steps == 7
    assert resumed.seconds > 0
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-7"}
    from_path = run(net(seed=9, dropout=0.5), data(), resume_from_checkpoint=str(tmp_path / "checkpoint-6"), **options)
    assert from_path.history == whole.history


def test_a_resumed_run_never_slices_again(tmp_path, monkeypatch):
    options = {"slice_ratio": 0.6, "head": HEAD, "save_steps": 1, "output_dir": tmp_path}
    first = run(max_steps=1, **options)
    monkeypatch.setattr(Moments, "start", lambda *_: pytest.fail("sliced again"))
    again = run(max_steps=2, resume_from_checkpoint=True, **options)
    assert again.sidecars.relevant_slice == first.sidecars.relevant_slice
    assert again.steps == 2


def test_finishing_is_part_of_a_resumed_run_too(tmp_path):
    class Doubling(Strategy):
        def hold(self, student, teacher):
            return DoublingHold()

    class DoublingHold(Hold):
        def finish(self, model, data):
            model[3].weight.data *= 2

    options = {"strategy": Doubling(), "output_dir": tmp_path, "save_steps": 2}
    whole = run(**options)
    again = run(resume_from_checkpoint=True, **options)
    assert same(whole.model, again.model)
    saved = load_file(tmp_path / "checkpoint-2" / MODEL_FILE)["3.weight"]
    assert torch.equal(2 * saved, load_file(tmp_path / MODEL_FILE)["3.weight"])


def test_the_student_is_saved_as_safetensors_with_sidecars_beside_it_and_each_checkpoint(tmp_path):
    fitted = run(slice_ratio=0.6, head=HEAD, output_dir=tmp_path, save_steps=1, max_steps=3)
    assert {path.name for path in tmp_path.iterdir()} == SIDECARS | {MODEL_FILE, "checkpoint-2", "checkpoint-3"}
    loaded = net(seed=9)
    load_model(loaded, tmp_path / MODEL_FILE)
    assert same(loaded, fitted.model)
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-3"):
        assert RelevantSlice.from_pretrained(folder) == fitted.sidecars.relevant_slice
        assert Sidecars.load(folder).config["strategy"]["head"] == list(HEAD)


def test_without_save_steps_only_the_student_is_saved(tmp_path):
    run(output_dir=tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {MODEL_FILE, "remos_config.json"}


def test_tied_weights_are_saved_once_and_come_back(tmp_path):
    def tied(seed):
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        return model

    fitted = run(tied(0), output_dir=tmp_path, save_steps=1)
    loaded = tied(1)
    load_model(loaded, tmp_path / MODEL_FILE)
    assert same(loaded, fitted.model)
    again = run(tied(1), output_dir=tmp_path, save_steps=1, max_steps=3, resume_from_checkpoint=True)
    assert again.model[0].weight is again.model[2].weight


# What goes wrong


def test_a_loss_that_is_not_finite_names_its_step_and_harms_nothing(tmp_path):
    calls = []

    def breaking(outputs, batch):
        calls.append(1)
        loss = functional.cross_entropy(outputs, batch[1])
        return loss + float("nan") if len(calls) == 3 else loss  # its gradient is sound

    student = net()
    with pytest.raises(NonFiniteError, match="loss of step 3 is nan"):
        run(student, loss=breaking, max_steps=5, output_dir=tmp_path, save_steps=1, keep_checkpoints=1)
    assert same(student, run(max_steps=2).model)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_gradient_that_is_not_finite_is_not_followed():
    student = net()
    with pytest.raises(NonFiniteError, match="step 1 is .* but its gradient's norm is nan"):
        run(student, loss=lambda outputs, batch: (outputs * 0).sum().sqrt())
    assert same(student, net())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "holds no sample"),
        ({"data": Stream(0)}, "gave no sample for step 1 of epoch 0"),
        ({"batch_size": 0}, "batch_size is a whole number of at least 1, but got 0"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps .* 1.5"),
        ({"max_steps": 0}, "max_steps .* at least 1, but got 0"),
        ({"seed": -1}, "seed .* at least 0"),
        ({"max_steps": None}, "either epochs= or max_steps="),
        ({"epochs": 1, "max_steps": 2}, "either epochs= or max_steps="),
        ({"data": Stream(), "epochs": 1}, "Pass max_steps="),
        ({"strategy": None}, "either slice_ratio= .* or strategy="),
        ({"slice_ratio": 0.9, "strategy": Finetune()}, "either slice_ratio= .* or strategy="),
        ({"slice_ratio": 1.2, "strategy": None}, "got 1.2"),
        ({"strategy": Remos(0.9), "head": HEAD}, "Name the head in the strategy"),
        ({"save_steps": 2}, "needs output_dir"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"mixed_precision": "bf32"}, "got 'bf32'"),
        ({"accelerator": "accumulating"}, "accumulates over 4 steps by itself"),
        ({"accelerator": "plain", "mixed_precision": "bf16"}, "Give one of the two"),
        ({"model": net().requires_grad_(False)}, "requires a gradient"),
    ],
)
def test_wrong_arguments_are_refused_by_name_and_the_model_left_whole(options, message):
    made = {"accumulating": partial(Accelerator, gradient_accumulation_steps=4), "plain": Accelerator}
    if "accelerator" in options:
        options = {**options, "accelerator": made[options["accelerator"]]()}
    student = options.get("model", net())
    with pytest.raises(ValueError, match=message):
        run(**{"model": student, **options})
    assert same(student, net())


def test_bf16_computes_in_bf16_and_keeps_the_weights_and_their_updates_in_fp32():
    seen = []
    student = net()
    student[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    fitted = run(student, mixed_precision="bf16", epochs=2)
    plain = run(epochs=2)
    assert set(seen) == {torch.bfloat16}
    moved = weights(fitted.model)
    assert all(tensor.dtype == torch.float32 for tensor in moved.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in moved.values())
    assert not same(fitted.model, plain.model)
    by_much = max((value - weights(net())[name]).abs().max() for name, value in weights(plain.model).items())
    assert all((value - moved[name]).abs().max() < 0.05 * by_much for name, value in weights(plain.model).items())


def test_fp16_is_refused_on_the_cpu_where_it_would_do_nothing():
    given = Accelerator(mixed_precision="fp16")
    with pytest.raises(ValueError, match="needs a GPU"):
        run(accelerator=given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": DataLoader(rows())}, "Pass loader.dataset"),
        ({"loss": lambda outputs, batch: outputs}, r"scalar tensor.*shape \(4, 3\)"),
        ({"loss": lambda outputs, batch: 1.0}, "got float"),
        ({"data": [torch.ones(6)] * 4}, "Without loss=, a batch is"),
        ({"optimizer": lambda model: "sgd"}, "gave a str"),
    ],
)
def test_what_is_of_no_usable_kind_is_refused(options, message):
    with pytest.raises(TypeError, match=message):
        run(**options)


def test_a_wrapped_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="before it is wrapped"):
        run(nn.DataParallel(net()))


# Accelerate


def test_bfloat16_trains_float32_weights_and_leaves_an_ordinary_model():
    student, plain = net(), run().model
    before = dict(vars(student))
    run(student, mixed_precision="bf16")
    assert vars(student).keys() == before.keys()
    assert student[0].weight.dtype == torch.float32
    assert not same(student, plain)
    assert all(torch.allclose(value, weights(plain)[name], atol=1e-2) for name, value in weights(student).items())
    assert student(rows()[0][0]).dtype == torch.float32
    assert torch.equal(student(rows()[0][0]), copy.deepcopy(student)(rows()[0][0]))
    assert same(run().model, plain)  # the next run in this process has its own precision again


def test_an_interrupted_run_leaves_an_ordinary_model(stop_at):
    student = net()
    before = vars(student).keys()
    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        run(student, strategy=Interrupted(), mixed_precision="bf16")
    assert vars(student).keys() == before
    stop_at(None)


def test_a_model_can_be_fitted_again():
    student = net()
    run(student, max_steps=1)
    first = copy.deepcopy(student)
    run(student, max_steps=1)
    assert not same(student, first)
    assert same(student, run(first, max_steps=1).model)


def test_what_others_left_in_accelerates_shared_state_changes_nothing(monkeypatch):
    expected = run(scheduler=halving)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    Accelerator(gradient_accumulation_steps=4).sync_gradients = False
    assert same(run(scheduler=halving).model, expected.model)


def test_a_given_accelerator_is_used_and_forgets(tmp_path):
    given = Accelerator(mixed_precision="bf16")
    first = run(accelerator=given)
    again = run(accelerator=given, output_dir=tmp_path, save_steps=2)
    assert same(first.model, again.model)
    assert [path.name for path in (tmp_path / "checkpoint-2").glob("*.safetensors")] == [MODEL_FILE]
    assert same(again.model, run(mixed_precision="bf16").model)


def _fit_on_each_process(folder):
    AcceleratorState._reset_state(reset_partial_state=True)  # what the forked parent had
    options = {"slice_ratio": 0.6, "head": HEAD, "batch_size": 2, "save_steps": 2, "keep_checkpoints": 9}
    options |= {"max_steps": 4, "scheduler": halving, "output_dir": folder}
    ours = run(net(), Augmented(9), **options)
    rank = torch.distributed.get_rank()
    place = Path(folder) / f"rank{rank}"
    place.mkdir()
    torch.save(ours.model.state_dict(), place / "weights.pt")
    ours.sidecars.save(place)
    (place / "history.json").write_text(json.dumps([ours.history, torch.distributed.get_world_size()]))
    again = run(net(seed=9), Augmented(9), resume_from_checkpoint=f"{folder}/checkpoint-2", **options)
    assert same(again.model, ours.model)


def test_two_processes_hold_the_slice_of_one_and_take_its_steps(tmp_path):
    debug_launcher(_fit_on_each_process, args=(str(tmp_path),), num_processes=2)
    options = {"slice_ratio": 0.6, "head": HEAD, "scheduler": halving}
    alone = run(net(), Augmented(9), batch_size=2, gradient_accumulation_steps=2, max_steps=4, **options)
    assert [entry["epoch"] for entry in alone.history] == [0, 0, 0, 1]  # the third step has one sample for two
    states = []
    for rank in range(2):
        found = Sidecars.load(tmp_path / f"rank{rank}")
        assert found.profile == alone.sidecars.profile
        assert found.relevant_slice == alone.sidecars.relevant_slice
        history, world = json.loads((tmp_path / f"rank{rank}" / "history.json").read_text())
        assert world == 2
        assert [entry["loss"] for entry in history] == pytest.approx(losses(alone), abs=1e-6)
        assert [entry["learning_rate"] for entry in history] == [e["learning_rate"] for e in alone.history]
        states.append(torch.load(tmp_path / f"rank{rank}" / "weights.pt", weights_only=True))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert all(torch.allclose(value, states[0][name], atol=1e-6) for name, value in weights(alone.model).items())
    saved = net(seed=9)
    load_model(saved, tmp_path / MODEL_FILE)
    assert all(torch.equal(value, states[0][name]) for name, value in weights(saved).items())
