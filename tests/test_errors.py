import pytest

from remos_hf import errors


@pytest.mark.parametrize(
    "kind",
    ["LayerMismatchError", "TeacherMismatchError", "UnsupportedModelError", "NonFiniteError", "CorruptFileError"],
)
def test_every_error_can_be_caught_as_remos_error(kind):
    assert issubclass(getattr(errors, kind), errors.RemosError)
