import pytest
import torch

from remos_hf.profiling.criteria import threshold_coverage, top_k_coverage
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.strategies.student_data import StudentData
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")


@pytest.fixture
def asked():
    return []


@pytest.fixture
def data(asked):
    return StudentData(lambda samples: asked.append(samples) or tiny.text_batches(), seed=3, max_samples=7)


def test_all_batches_are_given_unless_a_number_is_named(data, asked):
    data.batches(), data.batches(5)
    assert asked == [None, 5]


def test_the_profile_is_that_of_the_runs_samples_unless_a_number_is_named(data, asked):
    found = data.profile(tiny.bert(), criterion=threshold_coverage())
    assert found == profile_coverage(tiny.bert(), tiny.text_batches(), criterion=threshold_coverage())
    data.profile(tiny.bert(), criterion=threshold_coverage(), max_samples=2)
    assert asked == [7, 2]


def test_an_equal_student_is_not_profiled_twice(data, asked):
    one = data.profile(tiny.bert(), criterion=threshold_coverage())
    assert data.profile(tiny.bert(), criterion=threshold_coverage()) is one
    assert len(asked) == 1


def test_another_student_or_criterion_is_profiled_anew(data, asked):
    student = tiny.bert()
    first = data.profile(student, criterion=threshold_coverage())
    with torch.no_grad():
        student.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
    assert data.profile(student, criterion=threshold_coverage()).teacher_hash != first.teacher_hash
    data.profile(student, criterion=top_k_coverage(3))
    assert len(asked) == 3


def test_a_profile_says_whether_there_were_more_samples_than_it_looked_at():
    def capped(**options):
        data = StudentData(lambda samples: tiny.text_batches(), **options)
        return data.profile(tiny.bert(), criterion=threshold_coverage()).capped

    assert capped(max_samples=12, num_samples=40)
    assert capped(max_samples=12, is_stream=True)  # there may be more
    assert not capped(max_samples=12, num_samples=12)
    assert not capped(max_samples=13, num_samples=40)  # the data ended before
    assert not capped()
