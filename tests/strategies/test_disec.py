import numpy as np
import pytest
import torch

from remos_hf.strategies.disec import DiSec, averaged, outlier_rows, residual
from remos_hf.strategies.student_data import StudentData
from tests import tiny


def slowly(matrix, components, deviations):
    """As the paper's script says it: an SVD, lengths, z-scores by column, the largest of a row."""
    u, s, _ = np.linalg.svd(matrix, full_matrices=False)
    lengths = np.abs(u * s)[:, :components]
    scores = ((lengths - lengths.mean(0)) / lengths.std(0)).max(1)
    return scores > scores.mean() + deviations * scores.std()


@pytest.mark.parametrize("shape", [(40, 7), (12, 30)])
@pytest.mark.parametrize("components", [1, 3])
def test_outliers_are_those_of_a_singular_value_decomposition(shape, components):
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        matrix = torch.randn(shape, generator=generator)
        matrix[3] *= 6
        found = outlier_rows(matrix, components=components, deviations=2.0)
        assert np.array_equal(found.numpy(), slowly(matrix.double().numpy(), components, 2.0))
        assert bool(found[3])


def test_the_residual_is_at_right_angles_to_the_weights():
    gradient, rows = torch.randn(5, 4), torch.randn(5, 4)
    left = residual(gradient, rows)
    assert abs(float((left * rows).sum())) < 1e-5
    assert torch.allclose(residual(3 * rows, rows), torch.zeros(5, 4), atol=1e-6)
    assert torch.equal(residual(gradient, torch.zeros(5, 4)), gradient)


def test_rows_that_are_out_become_the_mean_of_those_that_stay():
    rows = torch.arange(12.0).view(1, 4, 3)
    made = averaged(rows, torch.tensor([[False, True, False, False]]))
    assert torch.equal(made[0, 1], rows[0, [0, 2, 3]].mean(0))
    assert torch.equal(made[0, [0, 2, 3]], rows[0, [0, 2, 3]])


def test_only_the_last_blocks_change_and_the_record_says_which_rows():
    student, teacher = tiny.bert(layers=3), tiny.bert(layers=3)
    done = DiSec(last_blocks=1, head_steps=2).prepare(student, tiny.student_data())
    told = done.details["disec"]
    changed = {}
    for name, weight in student.state_dict().items():
        rows = (weight != teacher.state_dict()[name]).flatten(1).any(1) if weight.dim() > 1 else weight != weight
        if bool(rows.any()):
            changed[name] = int(rows.sum())
    assert changed == {name: rows for name, rows in told["by_parameter"].items() if rows}
    assert all(name.startswith("bert.encoder.layer.2.") for name in told["by_parameter"])
    assert told["rows"] == sum(changed.values()) > 0 and told["blocks"] == ["bert.encoder.layer.2"]


def test_a_row_planted_in_the_gradient_is_given_up():
    student = tiny.mlp(sizes=(6, 40, 5, 2))
    with torch.no_grad():
        student[2].weight[:, 11] *= 40  # so the loss asks much of neuron 11
        student[2].weight[:] = student[2].weight.abs()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(8, 6, generator=generator) + 1, torch.tensor([0, 1] * 4)) for _ in range(3)]
    before = student[0].weight.clone()
    DiSec(last_blocks=9, components=1, head_steps=0, head=("4",)).prepare(student, StudentData(lambda _: batches))
    changed = (student[0].weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == [11]


def test_it_takes_the_stages_of_a_convolutional_net_grouped_convolutions_too():
    student, batches = tiny.ConvNet(), [(one, labels.long()) for one, labels in tiny.image_batches()]
    done = DiSec(last_blocks=9, head_steps=2, head=("head",)).prepare(student, StudentData(lambda _: batches))
    assert "grouped.weight" in done.details["disec"]["by_parameter"]
    assert done.details["disec"]["by_parameter"]["depthwise.weight"] == 0  # one row a group: none stands out
    assert all(parameter.isfinite().all() for parameter in student.parameters())


@pytest.mark.parametrize("options", [{"last_blocks": 0}, {"components": 0}, {"deviations": 0.0}, {"head_steps": -1}])
def test_values_that_no_run_could_use_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DiSec(**options)
