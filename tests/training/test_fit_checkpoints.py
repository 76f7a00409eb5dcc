from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from remos_hf.errors import CorruptFileError, RemosError
from remos_hf.training.fit_checkpoints import MODEL_FILE, PROGRESS_FILE
from tests.training.test_accelerate_loop import _a_state_of_its_own, halving, net, rows, run, same  # noqa: F401


def test_a_kill_while_writing_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    options = {"output_dir": tmp_path, "save_steps": 2, "max_steps": 6, "keep_checkpoints": 1}
    save_state = Accelerator.save_state

    def killed_at_the_second(self, folder):
        save_state(self, folder)
        if "checkpoint-4" in folder:
            (Path(folder) / "optimizer.bin").write_bytes(b"half")
            raise KeyboardInterrupt

    monkeypatch.setattr(Accelerator, "save_state", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(**options)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", ".checkpoint-4.writing"}
    resumed = run(net(seed=9), resume_from_checkpoint=True, **options)
    assert same(resumed.model, run(max_steps=6).model)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", MODEL_FILE, "remos_config.json"}


def test_checkpoints_of_a_run_that_was_taken_up_earlier_are_written_anew(tmp_path):
    options = {"output_dir": tmp_path, "save_steps": 1, "max_steps": 3, "keep_checkpoints": 3}
    run(**options)
    (tmp_path / "checkpoint-2" / "mark").write_text("old")
    run(resume_from_checkpoint=tmp_path / "checkpoint-1", **options)
    assert {path.name for path in tmp_path.glob("*check*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert not (tmp_path / "checkpoint-2" / "mark").exists()
    assert not list(tmp_path.glob(".*"))


def test_checkpoints_hold_nothing_that_must_be_unpickled(tmp_path, monkeypatch):
    options = {"output_dir": tmp_path, "save_steps": 1, "scheduler": halving}
    run(max_steps=1, **options)
    load, asked = torch.load, []

    def noting(*args, **kwargs):
        asked.append(kwargs["weights_only"])
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", noting)
    run(max_steps=2, resume_from_checkpoint=True, **options)
    assert len(asked) >= 3
    assert all(asked)


def test_a_checkpoint_is_resumed_with_the_same_batches_and_strategy_or_not_at_all(tmp_path):
    options = {"output_dir": tmp_path, "save_steps": 1, "resume_from_checkpoint": True}
    run(output_dir=tmp_path, save_steps=1, max_steps=1)
    with pytest.raises(ValueError, match="batch_size was 4 and is 5"):
        run(batch_size=5, **options)
    with pytest.raises(ValueError, match="num_samples was 20 and is 19"):
        run(data=rows(19), **options)
    student = net(seed=9)
    with pytest.raises(RemosError, match="Finetune.*Remos"):
        run(student, slice_ratio=0.5, **options)
    assert same(student, net(seed=9))
    with pytest.raises(ValueError, match="checkpoints of another run .checkpoint-1"):
        run(output_dir=tmp_path)
    (tmp_path / "checkpoint-1" / PROGRESS_FILE).write_text("{")
    with pytest.raises(CorruptFileError, match=PROGRESS_FILE):
        run(**options)


def test_random_states_that_cannot_be_read_are_not_passed_over(tmp_path):
    run(output_dir=tmp_path, save_steps=1, max_steps=1)
    (tmp_path / "checkpoint-1" / "random_states_0.pkl").unlink()
    with pytest.raises(FileNotFoundError, match="random_states_0"):
        run(output_dir=tmp_path, resume_from_checkpoint=True)


@pytest.mark.parametrize("resume", [True, "there"])
def test_resuming_without_a_checkpoint_is_refused_before_slicing(tmp_path, resume):
    (tmp_path / "there").mkdir()
    resume = resume if resume is True else tmp_path / resume
    student = net()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run(student, slice_ratio=0.5, output_dir=tmp_path, resume_from_checkpoint=resume)
    assert same(student, net())
