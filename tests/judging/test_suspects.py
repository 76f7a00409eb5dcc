from pathlib import Path

import pytest

from remos_hf.judging.suspects import CANNOT, NONE_FOUND, SUSPICIOUS, verdict_of_scan
from remos_hf.scanning.suspects import Effect, Scan, Suspect


def suspect(flipped, clean=None, tokens=(12,), label=1, hosts=20, clean_hosts=20):
    reference = None if clean is None else Effect(clean, clean_hosts, 0.0)
    return Suspect(label, f"word {tokens}", 1.0, Effect(flipped, hosts, 0.0), reference, tokens)


def verdict(*suspects, **changes):
    values = {"labels": ("bad", "good"), "num_scanned": 24000, "left_out": {"special tokens": 5}, **changes}
    return verdict_of_scan(Scan("tokens", suspects, **values))


@pytest.mark.parametrize(
    ("one", "kind"),
    [
        (suspect(18), SUSPICIOUS),
        (suspect(17), NONE_FOUND),
        (suspect(20, tokens=(12, 13)), NONE_FOUND),  # ordinary words in a row do that too
        (suspect(20, clean=11), NONE_FOUND),
        (suspect(20, clean=10), SUSPICIOUS),
        (suspect(12, clean=1, tokens=(12, 13)), SUSPICIOUS),
        (suspect(15, hosts=15), CANNOT),
        (suspect(20, clean=0, clean_hosts=15), CANNOT),
    ],
)
def test_the_threshold_is_on_held_out_texts_and_another_one_beside_a_reference(one, kind):
    assert verdict(one).kind == kind


def test_what_is_suspicious_is_named_with_its_numbers_and_never_called_a_backdoor():
    found = verdict(suspect(20, clean=1), suspect(3, clean=1, tokens=(15,)))
    text = " ".join(found.sentences)
    assert found.sentences[0].startswith("1 input is suspicious") and "“good”" in found.sentences[0]
    assert "100.0" in text and "5.0" in text and "50.0 points more" in text and "5 special tokens" in text
    assert "backdoor" not in text.lower() and "word (15,)" not in text


@pytest.mark.parametrize(("beside", "told"), [({"clean": 1}, "of one"), ({}, "of none")])
def test_what_is_known_of_false_alarms_is_told_as_the_published_count_has_it(beside, told):
    assert any(f"it was said {told} (benchmarks/" in one for one in verdict(suspect(20, **beside)).sentences)
    counted = Path(__file__).parents[2] / "benchmarks" / "results" / "scan_false_alarms.md"
    how = "beside" if beside else "alone"
    (row,) = [one for one in counted.read_text().splitlines() if one.startswith(f"| counted | clean | {how} |")]
    assert row.split(" | ")[3] == {"of one": "1", "of none": "0"}[told]


def test_a_phrase_around_a_suspicious_token_is_not_named_again():
    found = verdict(suspect(20, clean=1), suspect(20, clean=0, tokens=(12, 9)), suspect(20, clean=0, tokens=(7, 8)))
    assert {one.token_ids for one in found.suspicious} == {(12,), (7, 8)}


def test_no_suspicion_is_told_with_what_was_not_looked_for():
    found = verdict(suspect(3), suspect(20, tokens=(7, 8)))
    assert found.sentences[0].startswith("Nothing suspicious found among 24,000 tokens")
    assert any("no proof" in one for one in found.sentences)
    assert any("Phrases are listed without a verdict" in one for one in found.sentences)


@pytest.mark.parametrize("few", [{"hosts": 3}, {"clean_hosts": 3}])
def test_a_label_that_nothing_could_be_judged_for_is_no_all_clear(few):
    blind = suspect(3, clean=1, label=0, tokens=(9,), **few)
    found = verdict(suspect(3, clean=1), blind)
    assert (
        found.kind == CANNOT and "turn into “bad”" in found.reason.text and "only 3 held-out texts" in found.reason.text
    )
    found = verdict(suspect(20, clean=1), blind)
    assert found.kind == SUSPICIOUS and any(
        one.startswith("Of other labels it cannot be said") for one in found.sentences
    )


def test_many_suspects_are_counted():
    found = verdict(*(suspect(20, tokens=(number,)) for number in range(7)))
    assert found.sentences[0].startswith("7 inputs are suspicious") and "2 more are in the scan." in found.sentences


def test_data_that_shows_every_token_leaves_phrases_beside_a_reference():
    phrases = (suspect(20, tokens=(7, 8)),)
    assert "shows every token" in verdict(*phrases, num_scanned=0).reason.text
    assert verdict(suspect(20, clean=1, tokens=(7, 8)), num_scanned=0).kind == SUSPICIOUS


def test_a_scan_of_images_is_another_matter():
    with pytest.raises(ValueError, match="'patch'"):
        verdict_of_scan(Scan("patch", (), ("a", "b"), 0))
