from remos_hf.judging.words import TERMS
from remos_hf.showing.terms import FirstUses


def test_a_term_is_explained_where_it_is_used_first_and_never_again():
    uses = FirstUses(TERMS)
    assert [term for term, _ in uses.among(["The DIR of students", "benign floor %"])] == [
        "student",
        "DIR",
        "benign floor",
    ]
    assert uses.among(["DIR", "Students", "floor"]) == []
    assert uses.among(["excess DIR"]) == [("excess", TERMS["excess"])]


def test_a_term_is_a_whole_word_and_an_abbreviation_is_in_capitals():
    uses = FirstUses({"ACC": "accuracy", "student": "model"})
    assert uses.among(["according to acc, studentship, mega-student"]) == []
    assert uses.among(["ACC % (by seed)"]) == [("ACC", "accuracy")]


def test_what_tables_shorten_is_explained_too():
    used = [term for term, _ in FirstUses(TERMS).among(["dev ACC may fall by", "floor %"])]
    assert used == ["benign floor", "ACC", "dev accuracy"]


def test_terms_are_explained_in_one_short_sentence():
    assert all(means.endswith(".") and len(means) < 200 for means in TERMS.values())
