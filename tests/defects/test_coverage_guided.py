import numpy as np
import pytest
import torch
from torch import nn

from remos_hf.activations import watch
from remos_hf.defects.adversarial_images import seeds_of
from remos_hf.defects.coverage_guided import CoverageGuided, hooked_layers, lots
from remos_hf.errors import UnsupportedModelError
from tests import tiny
from tests.defects import pictures

SMALL = {"eps": 0.1, "step": 0.03, "steps": 4, "neurons": 5, "top_k": 2}
KEYS = tuple("abcdef")
ALL = [(c, s) for c in ("nc", "tknc", "snac") for s in ("deepxplore", "dlfuzz", "dlfuzz_rr")]


@pytest.fixture(scope="module")
def teacher():
    return pictures.Residual()


@pytest.fixture(scope="module")
def pixels():
    return pictures.clean_pixels(pictures.data())


def read_after_the_pass(teacher, pixels):
    """Outputs of all Conv2d and BatchNorm2d, looked at when the forward pass is through."""
    kept = {}
    layers = {name: one for name, one in teacher.named_modules() if isinstance(one, (nn.Conv2d, nn.BatchNorm2d))}
    with watch(layers, lambda name, _, made: kept.update({name: made})):
        teacher(pictures.READING.normalised(pixels))
    return [(layers[name], kept[name]) for name in layers]


def covered_by(criterion, output):
    """Which channels of one image a criterion covers, channel by channel."""
    values = output.detach().numpy()
    means = [float(np.float32(torch.tensor(channel).mean())) for channel in values]
    if values.max() == values.min():
        return [False] * len(means)
    if criterion == "nc":
        span = float(values.max()) - float(values.min())
        return [(mean - float(values.min())) / span > 0.5 for mean in means]
    if criterion == "snac":
        return [mean > max(means) - (max(means) - min(means)) / 2 for mean in means]
    best = sorted(range(len(means)), key=lambda place: (-means[place], place))[:2]
    return [place in best for place in range(len(means))]


def splitmix(state, count):
    """The published generator: the count-th number after this state."""
    state = (state + count * 0x9E3779B97F4A7C15) % 2**64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


def slow(teacher, pixels, criterion, selection, neurons=5, steps=4, eps=0.1, step=0.03, seed=0, keys=KEYS):
    """One image after another, one neuron after another. Gives the images and the neurons picked at each step."""
    heavy = []
    for layer, _ in read_after_the_pass(teacher, pixels[:1]):
        for channel in range(layer.out_channels if isinstance(layer, nn.Conv2d) else layer.num_features):
            heavy.append(1.0 if layer.weight is None else float(layer.weight[channel].detach().mean()))
    heavy = sorted(range(len(heavy)), key=lambda place: (-heavy[place], place))[: int(len(heavy) * 0.1)]
    images, picks = [], []
    for row, key in enumerate(keys):
        clean = pixels[row : row + 1]
        point, times, picked_at = clean, None, []
        for number in range(steps):
            leaf = point.clone().requires_grad_()
            means, covered = [], []
            for _, output in read_after_the_pass(teacher, leaf):
                means += list(output[0].mean((1, 2)))
                covered += covered_by(criterion, output[0])
            times = [0] * len(means) if times is None else times
            times = [before + now for before, now in zip(times, covered, strict=True)]
            rule = selection
            if selection == "dlfuzz_rr":
                rule = ["dlfuzz", "rare", "heavy"][number % 3]
            stream = splitmix(seeds_of(seed, "neurons", [key])[0] + number * 0x9E3779B97F4A7C15, 1)
            lot = [splitmix(stream, place + 1) >> 1 for place in range(len(means))]
            able = list(range(len(means)))
            if rule == "dlfuzz":
                able.sort(key=lambda place: (-times[place], place))
            elif rule == "rare":
                able.sort(key=lambda place: (times[place], place))
            else:
                able = [place for place in able if (times[place] == 0 if rule == "deepxplore" else place in heavy)]
                able.sort(key=lambda place: -lot[place])
            able = able[:neurons]
            picked_at.append(able)
            loss = sum((means[place] for place in able), leaf.sum() * 0)
            (gradient,) = torch.autograd.grad(loss, leaf)
            point = (point + step * gradient.sign()).clamp(clean - eps, clean + eps).clamp(0, 1)
        images.append(point)
        picks.append(picked_at)
    return torch.cat(images), picks


def fast(teacher, pixels, criterion, selection, keys=KEYS, **fields):
    """The search itself, and the neurons that it picked."""
    attack = CoverageGuided(**{**SMALL, **fields}, criterion=criterion, selection=selection)
    picks = [[] for _ in keys]
    start = attack.search

    def recorded(*given):
        search = start(*given)
        pick = search.pick

        def noted(covered_at):
            picked, able = pick(covered_at)
            for row in range(len(picked)):
                picks[row].append(picked[row][able[row]].tolist())
            return picked, able

        search.pick = noted
        return search

    object.__setattr__(attack, "search", recorded)
    found, measured = attack.perturbed(pixels, teacher=teacher, images=pictures.READING, keys=keys)
    return found, picks, measured


class TestAgainstTheSlowReference:
    @pytest.mark.parametrize(("criterion", "selection"), ALL)
    def test_the_same_neurons_and_the_same_images(self, teacher, pixels, criterion, selection):
        expected, expected_picks = slow(teacher, pixels, criterion, selection)
        found, picks, _ = fast(teacher, pixels, criterion, selection)
        assert picks == expected_picks
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)
        assert (found != pixels).float().mean() > 0.5

    def test_where_nothing_is_written_in_place_the_norms_own_outputs_count(self, pixels):
        teacher = pictures.Residual(inplace=False)
        expected, expected_picks = slow(teacher, pixels, "tknc", "dlfuzz")
        found, picks, _ = fast(teacher, pixels, "tknc", "dlfuzz")
        assert picks == expected_picks
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)
        inplace, _, _ = fast(pictures.Residual(), pixels, "tknc", "dlfuzz")
        assert not torch.equal(found, inplace)


class TestSelection:
    def test_deepxplore_picks_uncovered_neurons_without_repeats(self, teacher, pixels):
        _, picks, _ = fast(teacher, pixels, "nc", "deepxplore")
        assert all(len(set(at)) == len(at) for image in picks for at in image)

    def search(self, teacher, selection, keys=("a", "b", "c"), **fields):
        attack = CoverageGuided(**{**SMALL, "selection": selection, **fields})
        return attack.search(teacher, pictures.READING, keys)

    def test_an_image_with_few_uncovered_neurons_takes_none_from_the_others(self, teacher):
        covered_at = torch.ones(3, 12, dtype=torch.int64)
        covered_at[0, :8], covered_at[1, 3] = 0, 0
        covered_at[2] = 0
        picked, able = self.search(teacher, "deepxplore").pick(covered_at)
        assert able.sum(1).tolist() == [5, 1, 5]
        assert picked[1][able[1]].tolist() == [3]
        assert set(picked[0].tolist()) <= set(range(8))

    def test_every_uncovered_neuron_is_as_likely(self, teacher):
        covered_at = torch.zeros(1, 10, dtype=torch.int64)
        covered_at[0, 7] = 1
        search, times = self.search(teacher, "deepxplore", keys=["a"], neurons=3), torch.zeros(10)
        for step in range(3000):
            search.step = step
            times[search.pick(covered_at)[0][0]] += 1
        assert times[7] == 0
        assert (times[times > 0] / 3000 - 1 / 3).abs().max() < 0.04

    def test_the_cycle_is_most_rarest_heavy(self, teacher):
        covered_at = torch.arange(30)[None].repeat(3, 1)
        search = self.search(teacher, "dlfuzz_rr", neurons=2)
        search._heavy = torch.zeros(30, dtype=torch.bool)
        search._heavy[[11, 12]] = True
        picks = []
        for step in range(6):
            search.step = step
            picked, able = search.pick(covered_at)
            picks.append(sorted(picked[0].tolist()))
            assert able.all()
        assert picks == [[28, 29], [0, 1], [11, 12]] * 2

    def test_heavy_neurons_have_large_signed_mean_weights_and_a_norm_without_weights_has_ones(self, pixels):
        class Body(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 10, 1), nn.BatchNorm2d(10, affine=False)
                with torch.no_grad():
                    self.conv.weight.fill_(0.1)
                    self.conv.weight[3] = torch.tensor([-1.0, 2.0, 5.0])[:, None, None]  # mean 2
                    self.conv.weight[4] = -9.0

            def forward(self, x):
                return self.norm(self.conv(x)).mean((2, 3))

        _, picks, _ = fast(Body().eval(), pixels, "nc", "dlfuzz_rr", neurons=7)
        assert [sorted(image[2]) for image in picks] == [[3, 10]] * 6  # a tenth of 20, the first among equals

    def test_among_equals_the_first_are_picked(self, teacher):
        equal = torch.full((1, 30), 2)
        assert self.search(teacher, "dlfuzz", keys=["a"]).pick(equal)[0].tolist() == [[0, 1, 2, 3, 4]]

    def test_more_neurons_than_there_are_picks_them_all(self, teacher, pixels):
        _, picks, _ = fast(teacher, pixels, "nc", "dlfuzz", neurons=1000)
        assert sorted(picks[0][0]) == list(range(30))


class TestLots:
    def test_they_are_the_published_generator(self):
        # The first numbers that SplitMix64 gives from state 0 and 1234567, as its authors' program prints them.
        assert splitmix(0, 1) == 0xE220A8397B1DCDAF
        assert splitmix(1234567, 1) == 6457827717110365317
        for seed in (0, 5, 2**63 - 1):
            stream = splitmix(seed + 2 * 0x9E3779B97F4A7C15, 1)
            expected = [splitmix(stream, place + 1) >> 1 for place in range(50)]
            assert lots(torch.tensor([seed]), 2, 50)[0].tolist() == expected

    def test_they_depend_on_sample_step_and_place(self):
        numbers = torch.cat([lots(torch.tensor([1, 2, 3]), step, 100).flatten() for step in range(5)])
        assert numbers.unique().numel() == 1500
        assert (numbers >= 0).all()
        assert torch.equal(lots(torch.tensor([3]), 4, 20), lots(torch.tensor([1, 3]), 4, 100)[1:, :20])


class TestSamplesAreOnTheirOwn:
    @pytest.mark.parametrize(("criterion", "selection"), [("nc", "deepxplore"), ("tknc", "dlfuzz_rr")])
    def test_alone_or_in_a_batch_in_any_order(self, teacher, pixels, criterion, selection):
        together, picks, _ = fast(teacher, pixels, criterion, selection)
        order = [3, 0, 5]
        some, some_picks, _ = fast(teacher, pixels[order], criterion, selection, keys=[KEYS[row] for row in order])
        assert some_picks == [picks[row] for row in order]
        assert torch.equal(some, together[order])
        alone, alone_picks, _ = fast(teacher, pixels[2:3], criterion, selection, keys=KEYS[2:3])
        assert alone_picks == picks[2:3]
        assert torch.equal(alone, together[2:3])

    def test_the_seed_decides_what_is_drawn(self, teacher, pixels):
        assert fast(teacher, pixels, "nc", "deepxplore", seed=1)[1] != fast(teacher, pixels, "nc", "deepxplore")[1]


class TestTheExposedSet:
    def made(self, teacher=None, **fields):
        attack = CoverageGuided(**{**SMALL, **fields})
        teacher = teacher or pictures.Residual()
        return attack.exposed_set(pictures.data(), teacher=teacher, images=pictures.READING)

    def test_batches_do_not_matter_and_facts_tell_the_coverage(self):
        exposed = self.made(batch_size=4)
        assert torch.equal(pictures.pixels_of(exposed), pictures.pixels_of(self.made(batch_size=6)))
        assert exposed.facts["num_layers"] == 5
        assert 0 < exposed.facts["mean_covered_first"] < exposed.facts["mean_covered_ever"] < 1
        assert exposed.facts["largest_change"] <= 0.1
        assert exposed.target_label is None

    def test_coverage_is_of_the_clean_image_and_of_all_visited_points(self, teacher, pixels):
        _, _, measured = fast(teacher, pixels, "nc", "dlfuzz", steps=1)
        covered = []
        for row in range(6):
            outputs = read_after_the_pass(teacher, pixels[row : row + 1])
            flags = [one for _, output in outputs for one in covered_by("nc", output[0])]
            covered.append(sum(flags) / len(flags))
        assert measured["covered_first"].tolist() == pytest.approx(covered)
        assert torch.equal(measured["covered_first"], measured["covered_ever"])
        _, _, measured = fast(teacher, pixels, "nc", "dlfuzz", eps=0.0)  # the same point at every step
        assert torch.equal(measured["covered_first"], measured["covered_ever"])

    def test_no_hook_stays_even_after_an_error(self, no_hooks_left):
        teacher = pictures.Residual()
        self.made(teacher)
        no_hooks_left(teacher)
        broken = pictures.Residual()
        broken.fc = nn.Linear(7, 4)
        with pytest.raises(RuntimeError):
            self.made(broken)
        no_hooks_left(broken)

    def test_the_paper(self):
        attack = CoverageGuided.paper(criterion="snac")
        assert (attack.eps, attack.step, attack.steps, attack.neurons) == (0.1, 0.01, 40, 20)
        assert (attack.units, attack.low, attack.high, attack.criterion) == ("normalised", None, None, "snac")
        assert (attack.threshold, attack.top_k, attack.strong_k) == (0.5, 10, 2.0)
        exposed = self.made(**{name: getattr(attack, name) for name in ("eps", "step", "units")}, steps=2)
        assert exposed.facts["eps_in_pixels"] == pytest.approx([0.02, 0.025, 0.03], abs=1e-6)

    def test_a_layer_that_never_runs_has_no_neurons(self, pixels):
        teacher = pictures.Residual()
        expected = fast(teacher, pixels, "nc", "dlfuzz_rr")
        teacher.spare = nn.Conv2d(3, 50, 1)
        found = fast(teacher, pixels, "nc", "dlfuzz_rr")
        assert found[1] == expected[1] and torch.equal(found[0], expected[0])


class TestWrongInput:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"criterion": "kmnc"}, "criterion is 'nc', 'tknc' or 'snac', but got 'kmnc'"),
            ({"selection": "random"}, "selection is 'deepxplore', 'dlfuzz' or 'dlfuzz_rr', but got 'random'"),
            ({"neurons": 0}, "neurons is the number picked for each image and step, at least 1, but got 0"),
            ({"threshold": 1.0}, "threshold is compared"),
            ({"criterion": "tknc", "top_k": 0}, "k is the number of covered neurons"),
            ({"criterion": "snac", "strong_k": 0.5}, "k divides the range"),
        ],
    )
    def test_fields_out_of_range_are_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            CoverageGuided(**fields)

    def test_a_teacher_without_convolutions_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="Sequential has neither"):
            hooked_layers(tiny.mlp())

    def test_outputs_that_do_not_tell_images_apart_are_refused(self):
        class Windows(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 1)

            def forward(self, x):
                return self.conv(x.unflatten(-1, (2, 4)).movedim(-2, 1).flatten(0, 1)).mean((2, 3))

        with pytest.raises(UnsupportedModelError, match=r"'conv' gave an output of shape \(12, 4, 8, 4\) for 6 images"):
            CoverageGuided(**SMALL).exposed_set(pictures.data(), teacher=Windows(), images=pictures.READING)
