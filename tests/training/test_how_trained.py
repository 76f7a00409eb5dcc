import json

from transformers import Trainer

from remos_hf.training.how_trained import described_loop, described_trainer, last_evaluation
from tests.training.runs import trainer


def test_a_trainer_is_described_by_what_it_was_asked_for_and_the_steps_it_took(tmp_path):
    options = {"max_steps": 2, "save_strategy": "no", "lr_scheduler_type": "cosine", "warmup_steps": 1, "bf16": True}
    one = trainer(tmp_path, kind=Trainer, options=options)
    assert described_trainer(one)["steps"] == 0
    one.train()
    found = described_trainer(one)
    assert (found["steps"], found["planned_steps"], found["precision"]) == (2, 2, "bf16")
    assert (found["lr_scheduler"], found["warmup_steps"], found["batch_size"]) == (
        "cosine",
        1,
        one.args.per_device_train_batch_size,
    )
    assert "best_step" not in found and json.loads(json.dumps(found)) == found


def test_where_the_best_checkpoint_was_taken_back_its_step_is_told(tmp_path):
    options = {
        "max_steps": 2,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 1,
        "eval_steps": 1,
        "load_best_model_at_end": True,
    }
    one = trainer(tmp_path, kind=Trainer, options=options)
    one.train()
    if hasattr(one.state, "best_global_step"):
        assert described_trainer(one)["best_step"] == one.state.best_global_step


def test_a_loop_is_described_in_the_same_words():
    history = [
        {"step": 1, "epoch": 0, "loss": 1.0, "learning_rate": 0.1},
        {"step": 1, "epoch": 0, "evaluation": {"accuracy": 0.5}},
        {"step": 2, "epoch": 1, "loss": 1.0, "learning_rate": 0.2},
    ]
    rest = {"batch_size": 4, "gradient_accumulation_steps": 1, "processes": 1, "seed": 3, "planned_steps": 2}
    found = described_loop(history, optimizer="SGD", precision="no", max_grad_norm=None, **rest)
    own = {"learning_rate": 0.2, "optimizer": "SGD", "epochs": 2, "precision": "fp32", "steps": 2}
    assert found == {**own, **rest}


def test_the_last_evaluation_is_found_without_the_time_that_it_took():
    history = [
        {"eval_accuracy": 0.5, "epoch": 1},
        {"eval_accuracy": 0.7, "eval_runtime": 2.0, "eval_samples_per_second": 9.0, "epoch": 2},
        {"train_loss": 0.1},
    ]
    assert last_evaluation(history) == {"accuracy": 0.7}
    assert last_evaluation([{"loss": 1.0}]) is None
