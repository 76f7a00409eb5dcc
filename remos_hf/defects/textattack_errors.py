"""What a recipe of TextAttack lacks on this machine, said so that the reader can fetch or replace it."""

import re


class WrongArgument(ValueError):
    """The caller asked for what TextAttack does not have."""


class MissingStopwords(LookupError):
    """The recipe spares nltk's stop words, and there are none."""


def missing_resource(error: BaseException, recipe: str) -> str | None:
    """Say which file is missing, where it comes from and which argument takes a local one; None if none is missing."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"Resource '?(\w+)'? not found", text)
    if isinstance(error, MissingStopwords) or (found and found[1] == "stopwords"):
        return (
            f"{recipe} spares nltk's English stop words, and the file nltk_data/corpora/stopwords/english is not on "
            "this machine. Online, 'python -m nltk.downloader stopwords' fetches it. Or name a file with one word a "
            "line: stopwords=."
        )
    if isinstance(error, LookupError) and found:
        return (
            f"{recipe} needs nltk's {found[1]!r}, which is not on this machine. Online, 'python -m nltk.downloader "
            f"{found[1]}' fetches it into nltk_data. Where only a constraint needs it, naming a local file "
            "(neighbours=) leaves that constraint out."
        )
    if "textattack.s3.amazonaws.com" in text or "textattack.s3" in str(
        getattr(getattr(error, "request", None), "url", "")
    ):
        return _missing_download(error, recipe)
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{recipe} needs a package that is not installed ({text.splitlines()[0]}). Install it, or name neighbours= "
            "to leave out the constraints that fetch something."
        )
    if isinstance(error, OSError) and "huggingface.co" in text:
        return (
            f"{recipe} needs a model from the Hub that is not on this machine ({text.splitlines()[0]}). Fetch it with "
            "'hf download' while online. Where it is a constraint's language model, language_model= names a local one."
        )
    return None


def _missing_download(error: BaseException, recipe: str) -> str:
    url = str(getattr(getattr(error, "request", None), "url", "")) or "https://textattack.s3.amazonaws.com"
    name = url.partition("amazonaws.com/")[2]
    takes = (
        "the lists of neighbours= (and, for ThoughtVector, word_vectors=)" if "paragramcf" in name else "a local file"
    )
    return (
        f"{recipe} needs {name or 'a file'}, which is not on this machine and could not be fetched from {url}. Fetch "
        f"it once while online: TextAttack keeps it as ~/.cache/textattack/{name} (or below TA_CACHE_DIR). Or do with "
        f"{takes} in its place."
    )
