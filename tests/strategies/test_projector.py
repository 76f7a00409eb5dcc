import pytest
import torch
from accelerate import debug_launcher

from remos_hf.strategies.feature_distance import MEAN_SQUARES
from remos_hf.strategies.projector import Projector


def features(width, wanted, samples=16):
    generator = torch.Generator().manual_seed(1)
    return tuple(
        {
            "maps": torch.randn(samples, channels, 3, 3, generator=generator),
            "rows": torch.randn(samples, channels, generator=generator),
        }
        for channels in (width, wanted)
    )


def away(projector, made, wanted):
    return MEAN_SQUARES(projector(made, wanted), wanted, [])


def test_it_maps_one_width_to_another_and_learns_to_lessen_the_distance():
    made, wanted = features(3, 5)
    projector = Projector(rate=0.1, seed=0)
    before = away(projector, made, wanted)
    for _ in range(60):
        projector(made, wanted)
        projector.see(made, lambda mapped: MEAN_SQUARES(mapped, wanted, []))
        projector.step(torch.device("cpu"))
    assert projector.maps["maps"].shape == (5, 3)
    best = torch.linalg.lstsq(made["rows"], wanted["rows"]).solution.T
    assert away(projector, made, wanted) < 0.9 * before
    assert torch.allclose(projector.maps["rows"], best, atol=0.15)


def test_its_gradient_is_that_of_the_loss_and_its_step_that_of_sgd_with_momentum():
    made, wanted = features(3, 5)
    projector, maps = Projector(rate=0.1, seed=0), {}
    projector(made, wanted)
    maps = {name: torch.nn.Parameter(one.clone()) for name, one in projector.maps.items()}
    optimizer = torch.optim.SGD(maps.values(), 0.1, momentum=0.9)
    for _ in range(3):
        rows = torch.nn.functional.linear(made["rows"], maps["rows"])
        mapped = {"maps": torch.einsum("nchw,dc->ndhw", made["maps"], maps["maps"]), "rows": rows}
        optimizer.zero_grad()
        MEAN_SQUARES(mapped, wanted, []).backward()
        optimizer.step()
        for _ in range(2):  # batches of one step are averaged
            projector.see(made, lambda mapped: MEAN_SQUARES(mapped, wanted, []))
        projector.step(torch.device("cpu"))
    assert all(torch.allclose(projector.maps[name], one, atol=1e-6) for name, one in maps.items())


def test_the_student_learns_through_it():
    made, wanted = features(3, 5)
    made["maps"].requires_grad_()
    away(Projector(rate=0.1, seed=0), made, wanted).backward()
    assert made["maps"].grad.any()


def test_it_starts_by_its_seed_and_goes_on_from_its_state():
    made, wanted = features(3, 5)
    one, other = Projector(0.1, seed=0), Projector(0.1, seed=0)
    assert away(one, made, wanted) == away(other, made, wanted) != away(Projector(0.1, seed=1), made, wanted)
    for number in range(4):
        if number == 2:
            state, other = one.state_dict(), Projector(0.1, seed=5)
            other.load_state_dict(state)
        for projector in (one, other) if number >= 2 else (one,):
            projector(made, wanted)
            projector.see(made, lambda mapped: MEAN_SQUARES(mapped, wanted, []))
            projector.step(torch.device("cpu"))
    assert away(one, made, wanted).item() == pytest.approx(away(other, made, wanted).item(), rel=0)


def test_a_batch_that_overflows_is_no_part_of_any_step():
    made, wanted = features(3, 5)
    found = []
    for overflows in (False, True):
        projector = Projector(rate=0.1, seed=0)
        projector(made, wanted)
        if overflows:  # the student skips this step, so its hold takes none
            for given in (made, {**made, "rows": made["rows"] * torch.inf}):
                projector.see(given, lambda mapped: MEAN_SQUARES(mapped, wanted, []))
        projector.see(made, lambda mapped: MEAN_SQUARES(mapped, wanted, []))
        projector.step(torch.device("cpu"))
        found.append(projector.maps)
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


def _later_on_one_process(folder):
    rank = torch.distributed.get_rank()
    made, wanted = features(3, 5)
    projector = Projector(rate=0.1, seed=0)
    for number in range(3):
        if number or rank == 0:  # the first batch of the other process shows it nothing
            projector(made, wanted)
            projector.see(made, lambda mapped: MEAN_SQUARES(mapped, wanted, []))
        projector.step(torch.device("cpu"))
    alone = Projector(rate=0.1, seed=0)
    alone(made, wanted)
    torch.save({"found": projector.maps, "start": alone.maps}, f"{folder}/{rank}")


def test_processes_take_their_steps_together_from_when_all_have_seen_something(tmp_path):
    debug_launcher(_later_on_one_process, args=(str(tmp_path),), num_processes=2)
    one, other = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for name, found in one["found"].items():
        assert torch.equal(found, other["found"][name]) and not torch.equal(found, one["start"][name])
