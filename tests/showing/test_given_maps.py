from remos_hf.showing import given_maps


def test_a_map_without_a_count_says_so():
    png = given_maps.PNG + b"\0" * 16
    assert given_maps.map_of({"title": "a", "png": png})["caption"] == "(n = not given)"
    several = {"teacher": {"value": 0.5, "num_samples": 7}, "student": {"value": None, "num_samples": 0}}
    lines = given_maps.map_of({"title": "a", "png": png, "caption": "n = 7", "share": several})["table"].lines
    assert lines == [["teacher", "50.0", "-", "7", "-"], ["student", "-", "-", "0", "-"]]
