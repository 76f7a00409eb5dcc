"""Every command refuses a hostile teacher by name, and runs nothing of it. What the guard refuses: tests/adapters."""

import shutil

import pytest

from tests.adapters.hostile import CONFIG_KEYS, WEIGHTS_AND_FILES, name_of


@pytest.mark.parametrize("damage", [*WEIGHTS_AND_FILES, CONFIG_KEYS[2], CONFIG_KEYS[-1]], ids=name_of)
def test_no_command_lets_a_hostile_teacher_pass(remos, teacher, data, tmp_path, damage):
    place = shutil.copytree(teacher, tmp_path / "public")
    named = damage(place)
    common = ("--output", tmp_path / "out", "--max-length", 8)
    for argv in (
        ("profile", place, "--data", data, *common),
        ("slice", place, "--rule", "top_magnitude", "--slice-ratio", 0.9, "--output", tmp_path / "out"),
        ("train", place, "--train-data", data, "--slice-ratio", 0.9, *common),
        ("audit", place, "--data", data, "--plan", *common),
    ):
        result = remos(*argv)
        said = result.stderr.splitlines()[-1]
        assert result.exit_code == 1 and said.startswith(f"remos {argv[0]}: ") and named in said
        assert "was not expected" not in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()
