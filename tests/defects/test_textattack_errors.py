import re

import pytest

from remos_hf.defects.textattack_errors import MissingStopwords, missing_resource
from remos_hf.errors import RemosError
from tests.defects.attacked import attacked, needs_textattack

# Every attack starts processes that import TextAttack: seconds each, and more on a busy machine.
pytestmark = pytest.mark.timeout(400)


@needs_textattack
def test_missing_word_vectors_are_named_with_what_to_do(world, monkeypatch, tmp_path):
    monkeypatch.setenv("TA_CACHE_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there: offline, on every machine
    with pytest.raises(RemosError, match="word_embeddings/paragramcf.*textattack.s3.*neighbours="):
        attacked(world, neighbours=None, word_vectors=None, language_model=None)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LookupError("Resource \x1b[93momw\x1b[0m not found."), r"needs nltk's 'omw'.*nltk.downloader omw"),
        (LookupError("Resource stopwords not found."), "corpora/stopwords/english is not on this machine"),
        (MissingStopwords(), "stopwords=$|stopwords=."),
        (ModuleNotFoundError("No module named 'bert_score'"), "a package that is not installed .*bert_score"),
        (OSError("We couldn't connect to 'https://huggingface.co'"), "from the Hub.*language_model="),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(error, told):
    assert re.search(told, missing_resource(error, "TextFoolerJin2019"))


@pytest.mark.parametrize("error", [LookupError("x"), OSError("disk full"), KeyError("a")])
def test_other_errors_are_left_as_they_are(error):
    assert missing_resource(error, "TextFoolerJin2019") is None
