import torch
from accelerate import debug_launcher

from remos_hf.profiling.processes import added_up, in_processes, on_main_process, told_by_all


def _add(folder):
    rank = torch.distributed.get_rank()
    state = {"both": torch.tensor([rank + 1, 2**40])}
    if rank:
        state["second"] = torch.ones(2, 2, dtype=torch.float64)
    torch.save((added_up(state, torch.device("cpu")), told_by_all(rank), on_main_process()), f"{folder}/{rank}.pt")


def test_sums_are_those_of_all_processes_also_of_what_one_lacks(tmp_path):
    debug_launcher(_add, args=(str(tmp_path),), num_processes=2)
    for rank in range(2):
        sums, told, main = torch.load(tmp_path / f"{rank}.pt")
        assert sums["both"].tolist() == [3, 2**41]
        assert sums["second"].tolist() == [[1, 1], [1, 1]]
        assert (told, main) == ([0, 1], rank == 0)


def test_a_process_without_a_group_speaks_for_all():
    assert on_main_process()
    assert not in_processes()
