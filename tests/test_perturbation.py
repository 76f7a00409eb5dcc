import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from remos_hf.errors import NonFiniteError
from remos_hf.perturbation import ascend, frozen, moved, random_start
from tests import tiny

VALUES = st.floats(-3, 3, width=32)


def images(count=3, seed=1, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def toward(target):
    """Climbs to a point, from everywhere."""
    return lambda x: -(x - target).square().flatten(1).sum(1)


def logit(model, label=0):
    return lambda x: model(x)[:, label]


def reference_linf(x, gradient, eps, step, low, high):
    """One step, value by value."""
    result = []
    for value, slope in zip(x.flatten().tolist(), gradient.flatten().tolist(), strict=True):
        value = np.float32(value)
        moved = np.float32(value + np.float32(step) * np.float32(np.sign(slope)))
        moved = min(max(moved, np.float32(value - np.float32(eps))), np.float32(value + np.float32(eps)))
        result.append(min(max(moved, np.float32(low)), np.float32(high)))
    return torch.tensor(result).view_as(x)


class TestLInf:
    def test_one_step_is_the_step_of_a_slow_reference(self):
        model, x = tiny.ConvNet(), images().clamp(0.1, 0.8)
        with frozen(model):
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(leaf)[:, 2].sum(), leaf)
            for step in (0.02, 0.07):  # within the budget, beyond it
                found = ascend(logit(model, 2), x, eps=0.05, step=step, steps=1, low=0.08, high=0.82)
                expected = reference_linf(x, gradient, 0.05, step, 0.08, 0.82)
                torch.testing.assert_close(found, expected, rtol=0, atol=6e-8)  # one bit, where the budget is rounded
                assert (found != x).float().mean() > 0.99

    def test_many_steps_are_single_steps_one_after_another(self):
        model, x = tiny.ConvNet(), images()
        with frozen(model):
            point = x
            for _ in range(4):
                leaf = point.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
                point = (point + 0.04 * gradient.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
            found = ascend(logit(model), x, eps=0.1, step=0.04, steps=4, low=0.0, high=1.0)
        torch.testing.assert_close(found, point, rtol=0, atol=2e-7)

    def test_the_objective_rises(self):
        model, x = tiny.ConvNet(), images()
        with frozen(model):
            found = ascend(logit(model), x, eps=0.1, step=0.01, steps=10)
            assert (model(found)[:, 0] > model(x)[:, 0]).all()

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(VALUES, min_size=6, max_size=6),
        st.lists(VALUES, min_size=6, max_size=6),
        st.floats(0, 0.5),
        st.floats(1e-6, 0.7),
        st.tuples(VALUES, VALUES).map(sorted),
        st.booleans(),
    )
    def test_no_value_ever_leaves_the_budget_or_the_limits(self, x, target, eps, step, limits, clipped):
        x, target = torch.tensor(x).view(2, 3), torch.tensor(target).view(2, 3)
        low, high = limits if clipped else (None, None)
        found = ascend(toward(target), x, eps=eps, step=step, steps=3, low=low, high=high, start=target)
        if not clipped:
            assert ((found >= x - eps) & (found <= x + eps)).all()
            assert max((found - x).abs().flatten().tolist()) <= eps  # not even by rounding
            return
        assert ((found >= low) & (found <= high)).all()
        near = (x >= low) & (x <= high)
        assert max((found - x).abs()[near].tolist(), default=0) <= eps
        # Where no value is within both, the limits win, and the value is the nearest valid one.
        far = (x + eps < low) | (x - eps > high)
        assert (((found == low) | (found == high)) | ~far).all()

    def test_inputs_beyond_the_limits_are_clipped_by_more_than_the_budget(self):
        found = ascend(toward(torch.tensor([[9.0]])), torch.tensor([[2.64]]), eps=0.1, step=0.01, steps=1, high=2.2)
        assert found.item() == np.float32(2.2)

    def test_budget_step_and_limits_may_differ_by_channel(self):
        x = torch.full((2, 3, 4, 4), 0.5)
        eps, step = torch.tensor([0.1, 0.2, 0.0])[:, None, None], torch.tensor([0.05, 0.5, 0.1])[:, None, None]
        high = torch.tensor([1.0, 0.6, 1.0])[:, None, None]
        found = ascend(toward(torch.ones(1)), x, eps=eps, step=step, steps=1, low=0.0, high=high)
        expected = torch.tensor([0.55, 0.6, 0.5])[:, None, None].expand_as(x)
        torch.testing.assert_close(found, expected)

    def test_without_a_budget_the_clipped_inputs_come_back(self):
        x = images()
        found = ascend(logit(tiny.ConvNet()), x, eps=0.0, step=0.1, steps=3, low=0.2, high=0.7, start=x + 0.3)
        assert torch.equal(found, x.clamp(0.2, 0.7))

    def test_where_nothing_changes_the_objective_nothing_moves(self):
        x = images()
        x[0] = 0.5
        found = ascend(lambda p: (p - 0.5).relu().flatten(1).sum(1) * 0, x, eps=0.1, step=0.1, steps=2)
        assert torch.equal(found, x)


class TestL2:
    def test_a_step_has_the_length_of_the_step(self):
        x = images()
        found = ascend(logit(tiny.ConvNet()), x, eps=10.0, step=0.25, steps=1, norm="l2")
        torch.testing.assert_close((found - x).flatten(1).norm(dim=1), torch.full((3,), 0.25))

    def test_a_step_goes_along_the_gradient(self):
        x = torch.zeros(1, 4)
        target = torch.tensor([[3.0, 0.0, 4.0, 0.0]])
        found = ascend(toward(target), x, eps=10.0, step=1.0, steps=1, norm="l2")
        torch.testing.assert_close(found, target / 5)

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=6),
        st.floats(0, 2, width=32),
        st.floats(2**-10, 3, width=32),
    )
    def test_no_sample_leaves_its_ball(self, target, eps, step):
        x, target = torch.ones(2, 3), torch.tensor(target).view(2, 3)
        found = ascend(toward(target), x, eps=eps, step=step, steps=3, norm="l2", start=target)
        assert ((found - x).norm(dim=1) <= eps * (1 + 1e-5) + 1e-6).all()

    def test_a_point_inside_the_ball_stays_as_it_is(self):
        x, inside = torch.zeros(2, 3), torch.full((2, 3), 0.1)
        assert torch.equal(ascend(toward(x), x, eps=1.0, step=0.1, steps=0, norm="l2", start=inside), inside)

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_gradients_whose_squares_leave_the_range_still_have_a_direction(self, size):
        found = ascend(lambda p: (p * size).sum(1), torch.zeros(1, 4), eps=9.0, step=1.0, steps=1, norm="l2")
        torch.testing.assert_close(found, torch.full((1, 4), 0.5))

    def test_a_gradient_of_zero_moves_nothing(self):
        x = images()
        assert torch.equal(ascend(lambda p: p.flatten(1).sum(1) * 0, x, eps=1.0, step=1.0, steps=2, norm="l2"), x)

    def test_each_sample_may_have_its_own_radius(self):
        x, eps = torch.zeros(2, 3, 2, 2), torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
        found = ascend(toward(torch.full((1,), 9.0)), x, eps=eps, step=5.0, steps=2, norm="l2")
        torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.tensor([0.5, 2.0]))


class TestSamplesAreOnTheirOwn:
    def run(self, rows, norm="linf", **options):
        model = tiny.ConvNet()
        x = images(8)
        generators = [torch.Generator().manual_seed(row) for row in rows]
        options = {"eps": 0.1, "step": 0.02, "steps": 4, "norm": norm, "low": 0.0, "high": 1.0, **options}
        start = random_start(x[rows], eps=options["eps"], generators=generators, norm=norm)
        with frozen(model):
            return ascend(logit(model), x[rows], start=start, **options)

    def test_the_same_bits_in_a_batch_of_one_and_of_eight(self):
        together = self.run(list(range(8)))
        alone = torch.cat([self.run([row]) for row in range(8)])
        assert torch.equal(together, alone)

    def test_with_l2_the_same_values_up_to_rounding(self):
        # A gradient may differ in its last bit in another batch size: its sign hides that, its length does not.
        together = self.run(list(range(8)), "l2")
        alone = torch.cat([self.run([row], "l2") for row in range(8)])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)

    def test_the_order_of_a_batch_does_not_matter(self):
        order = [5, 2, 7, 0, 1, 6, 3, 4]
        assert torch.equal(self.run(order), self.run(list(range(8)))[order])

    def test_gradients_are_not_divided_by_the_batch(self):
        tiny_slope = 1e-42  # a mean over the batch would round it to 0
        found = ascend(lambda p: p.sum(1) * tiny_slope, torch.zeros(4096, 1), eps=1.0, step=0.5, steps=1)
        assert (found == 0.5).all()


class TestKeepBest:
    def test_each_sample_keeps_its_best_point(self):
        # From 0 towards 0.3 in steps of 0.2: 0.2 and 0.4 are equally near, then it goes to and fro.
        x, target = torch.zeros(2, 1), torch.tensor([[0.25], [0.05]])
        last = ascend(toward(target), x, eps=1.0, step=0.2, steps=2)
        best = ascend(toward(target), x, eps=1.0, step=0.2, steps=2, keep_best=True)
        torch.testing.assert_close(last, torch.tensor([[0.4], [0.0]]))
        torch.testing.assert_close(best, torch.tensor([[0.2], [0.0]]))

    def test_the_end_counts_too(self):
        found = ascend(toward(torch.ones(1)), torch.zeros(1, 1), eps=1.0, step=0.2, steps=2, keep_best=True)
        torch.testing.assert_close(found, torch.tensor([[0.4]]))

    def test_among_equals_the_earliest_is_kept(self):
        start = torch.full((1, 1), 0.5)
        found = ascend(
            lambda p: p.sum(1) - p.detach().sum(1), start, eps=1.0, step=0.2, steps=2, start=start, keep_best=True
        )
        assert torch.equal(found, start)


class TestStart:
    def test_a_start_is_clipped_like_every_point(self):
        x = torch.full((1, 2), 0.5)
        found = ascend(toward(x), x, eps=0.1, step=0.1, steps=0, high=0.55, start=torch.tensor([[0.0, 9.0]]))
        torch.testing.assert_close(found, torch.tensor([[0.4, 0.55]]))

    def test_random_starts_fill_the_cube(self):
        x = torch.zeros(4, 3, 16, 16)
        eps = torch.tensor([0.1, 0.2, 0.0])[:, None, None]
        start = random_start(x, eps=eps, generators=torch.Generator().manual_seed(0))
        lowest, highest = start.amin((0, 2, 3)), start.amax((0, 2, 3))
        assert (highest <= eps.flatten()).all() and (lowest >= -eps.flatten()).all()
        assert (highest >= 0.98 * eps.flatten()).all() and (lowest <= -0.98 * eps.flatten()).all()
        assert start.mean((0, 2, 3)).abs().max() < 0.01

    def test_random_starts_fill_the_ball(self):
        start = random_start(torch.zeros(4000, 2), eps=2.0, generators=torch.Generator().manual_seed(0), norm="l2")
        radius = start.norm(dim=1)
        assert radius.max() <= 2.0001
        assert abs((radius < 1).float().mean() - 0.25) < 0.03  # half the radius holds a quarter of the disc
        assert start.mean(0).abs().max() < 0.05

    def test_a_sample_with_its_own_generator_starts_alike_in_every_batch(self):
        x = images(4)

        def drawn(rows):
            return random_start(x[rows], eps=0.1, generators=[torch.Generator().manual_seed(r) for r in rows])

        assert torch.equal(drawn([0, 1, 2, 3])[2:], drawn([2, 3]))
        assert not torch.equal(drawn([0])[0] - x[0], drawn([1])[0] - x[1])

    def test_generators_and_samples_are_as_many(self):
        with pytest.raises(ValueError, match="3 samples, but 1 generators"):
            random_start(images(), eps=0.1, generators=[torch.Generator()])


class TestTheModelStaysAsItIs:
    def test_no_parameter_gets_a_gradient(self):
        model = tiny.ConvNet()
        with frozen(model):
            ascend(logit(model), images(), eps=0.1, step=0.1, steps=2)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_modes_and_gradients_are_put_back_even_after_an_error(self):
        model = tiny.ConvNet().train()
        model.norm.eval()
        model.stem.weight.requires_grad_(False)
        with pytest.raises(RuntimeError, match="inside"), frozen(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            raise RuntimeError("inside")
        assert model.training and model.conv.training and not model.norm.training
        assert not model.stem.weight.requires_grad
        assert all(p.requires_grad for name, p in model.named_parameters() if name != "stem.weight")

    def test_statistics_of_batches_are_not_counted(self):
        model = tiny.ConvNet().train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with frozen(model):
            ascend(logit(model), images(), eps=0.1, step=0.1, steps=2)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_the_inputs_stay_as_they_are_and_the_result_has_no_graph(self):
        model, x = tiny.ConvNet(), images().requires_grad_()
        before = x.detach().clone()
        found = ascend(logit(model), x, eps=0.1, step=0.1, steps=2)
        assert torch.equal(x, before) and x.grad is None and not found.requires_grad

    @pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
    def test_it_works_where_the_caller_wants_no_gradients(self, without):
        model, x = tiny.ConvNet(), images()
        expected = ascend(logit(model), x, eps=0.1, step=0.1, steps=2)
        with without():
            assert torch.equal(ascend(logit(model), x, eps=0.1, step=0.1, steps=2), expected)


class TestWrongInput:
    def climb(self, x=None, objective=None, **options):
        x = torch.rand(2, 3, 4, 4) if x is None else x
        objective = objective or (lambda p: p.flatten(1).sum(1))
        return ascend(objective, x, **{"eps": 0.1, "step": 0.1, "steps": 1, **options})

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
    def test_whole_numbers_are_refused(self, dtype):
        with pytest.raises(TypeError, match="Divide bytes by 255"):
            self.climb(torch.ones(1, 3, 2, 2).to(dtype))
        with pytest.raises(TypeError, match="Divide bytes by 255"):
            random_start(torch.ones(1, 2).to(dtype), eps=0.1, generators=torch.Generator())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_coarse_numbers_are_refused(self, dtype):
        with pytest.raises(TypeError, match="too coarse"):
            self.climb(torch.ones(1, 2).to(dtype))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"eps": -0.1}, "eps is a finite size, at least 0, but got -0.1"),
            ({"eps": float("nan")}, "eps is a finite size"),
            ({"eps": float("inf")}, "eps is a finite size"),
            ({"eps": torch.tensor([0.1, -0.1, 0.1])[:, None, None]}, "eps is a finite size"),
            ({"step": 0.0}, "step is a finite size, above 0, but got 0.0"),
            ({"step": -1}, "step is a finite size, above 0"),
            ({"steps": -1}, "steps is a whole number, at least 0, but got -1"),
            ({"steps": 1.5}, "steps is a whole number"),
            ({"norm": "l1"}, "norm is 'linf' or 'l2', but got 'l1'"),
            ({"low": 1.0, "high": 0.0}, "low is at most high, but got 1.0 and 0.0"),
            ({"high": float("nan")}, "high is a number"),
            ({"eps": torch.rand(3)}, "One number for each channel"),
            ({"eps": torch.rand(5, 2, 3, 4, 4)}, "broadcasts against the inputs"),
            ({"start": torch.rand(1, 3, 4, 4)}, "start has the inputs' shape"),
            ({"eps": torch.rand(3, 1, 1), "norm": "l2"}, r"one for each sample with the shape \(2, 1, 1, 1\)"),
        ],
    )
    def test_arguments_out_of_range_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.climb(**options)

    def test_an_objective_of_the_whole_batch_is_refused(self):
        with pytest.raises(ValueError, match="one value for each of 2 samples.*Do not average"):
            self.climb(objective=lambda p: p.mean())

    @pytest.mark.parametrize(
        "objective",
        [lambda p: p.detach().flatten(1).sum(1), lambda p: nn.Parameter(torch.ones(2))],
        ids=["detached", "elsewhere"],
    )
    def test_an_objective_without_a_gradient_is_refused(self, objective):
        with pytest.raises(ValueError, match="The objective has no gradient"):
            self.climb(objective=objective)

    def test_a_gradient_that_is_not_finite_names_its_step_and_samples(self):
        def breaks(p):
            # The root of 0 has an infinite slope: at the second point of samples 1 and 3.
            return (torch.tensor([[9.0], [1.1], [9.0], [1.1]]) - p).sqrt().sum(1) * -1

        x = torch.ones(4, 1)
        with pytest.raises(NonFiniteError, match=r"sample \[1, 3\] of the batch was NaN or infinite at step 1 "):
            ascend(breaks, x, eps=1.0, step=torch.tensor(1.1) - 1, steps=3)

    def test_inputs_that_are_not_finite_are_found_at_the_first_step(self):
        x = torch.rand(3, 2)
        x[1, 0] = float("nan")
        with pytest.raises(NonFiniteError, match=r"sample \[1\] .* at step 0 "):
            self.climb(x, lambda p: p.square().sum(1), steps=2)


def test_rows_move_along_their_own_gradients_and_stay_in_their_balls():
    centre, gradient = torch.tensor([1.0, 1.0]), torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0]])
    point = centre.repeat(3, 1)
    near = moved(point, gradient, centre=centre, eps=2.0, step=0.5)
    assert torch.allclose(near - centre, torch.tensor([[0.3, 0.4], [0.0, 0.0], [0.5, 0.0]]))
    far = moved(near, gradient, centre=centre, eps=0.75, step=0.5)
    assert torch.allclose((far - centre).norm(dim=1), torch.tensor([0.75, 0.0, 0.75]))
    broken = gradient.index_fill(0, torch.tensor([1]), float("nan"))
    assert torch.equal(moved(near, broken, centre=centre, eps=2.0, step=0.5), near)
