import logging
import shutil
from pathlib import Path

import pytest
import torch

from remos_hf.errors import CorruptFileError
from remos_hf.strategies.slice_and_reset import Random
from remos_hf.training.half_written import check_whole, is_whole, last_whole_checkpoint
from tests.training.runs import trainer
from tests.training.test_moments import Noisy

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    ours = trainer(tmp_path_factory.mktemp("run"), strategy=[Random(0.9), Noisy()])
    ours.train()
    return ours


def copied(finished, folder):
    shutil.copytree(finished.args.output_dir, folder, dirs_exist_ok=True)
    return folder / "checkpoint-4"


def written(finished):
    """The files of a checkpoint in the order in which they were written."""
    return sorted(
        (path.stat().st_mtime_ns, path.name) for path in (Path(finished.args.output_dir) / "checkpoint-4").iterdir()
    )


def test_trainers_state_is_the_last_file_and_ours_are_there_before_the_weights(finished):
    names = [name for _, name in written(finished)]
    assert names[-1] == "trainer_state.json"
    assert names.index("remos_config.json") < names.index("model.safetensors")
    assert names.index("remos_hold.safetensors") < names.index("model.safetensors")


@pytest.mark.parametrize("cut", range(6))
def test_a_run_killed_at_any_write_goes_on_by_itself(finished, tmp_path, caplog, cut):
    place = copied(finished, tmp_path)
    names = [name for _, name in written(finished)]
    kept = len(names) * cut // 6
    for name in names[kept:]:
        (place / name).unlink()
    resumed = trainer(tmp_path, strategy=[Random(0.9), Noisy()])
    with caplog.at_level(logging.WARNING, logger="remos_hf"):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4 was left half written" in caplog.text and "checkpoint-2 is gone on with" in caplog.text
    for mine, theirs in zip(resumed.model.parameters(), finished.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert is_whole(place)


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "rng_state.pth", "model.safetensors"])
def test_a_file_that_was_cut_off_makes_half_a_checkpoint(finished, tmp_path, name):
    place = copied(finished, tmp_path)
    assert is_whole(place)
    content = (place / name).read_bytes()
    (place / name).write_bytes(content[: len(content) // 2])
    assert not is_whole(place)
    with pytest.raises(CorruptFileError, match="no whole checkpoint of Trainer"):
        trainer(tmp_path, strategy=[Random(0.9), Noisy()]).train(resume_from_checkpoint=str(place))


def test_a_run_killed_in_its_first_checkpoint_starts_anew_and_says_so(finished, tmp_path, caplog):
    (copied(finished, tmp_path) / "trainer_state.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint-2")
    with caplog.at_level(logging.WARNING, logger="remos_hf"):
        assert last_whole_checkpoint(tmp_path) is None
    assert "the run starts anew" in caplog.text
    assert not (tmp_path / "checkpoint-4").exists()


def test_without_any_checkpoint_it_is_refused_and_other_folders_stay(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        last_whole_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        last_whole_checkpoint(tmp_path / "nowhere")
    assert (tmp_path / "checkpoint-best").is_dir()
    check_whole(tmp_path / "nowhere")  # what is not there is refused by who reads it
