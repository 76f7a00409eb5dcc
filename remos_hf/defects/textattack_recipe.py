"""A recipe of TextAttack, built on the teacher, with local files in the places of what it would fetch."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from remos_hf.defects.adversarial_text import AdversarialText
from remos_hf.defects.textattack_errors import MissingStopwords, WrongArgument
from remos_hf.defects.textattack_parts import language_model, thought_vector, word_list

_GLOVE = "textattack_counterfitted_GLOVE_embedding"
# Stands where nltk has no stop words: TextAttack cannot be imported without a list.
NO_STOPWORDS = "remos-hf-no-stop-words"

# What constraints fetch for themselves. As soon as one local file is named nothing is fetched, and these are left out.
_FETCHED = {
    "PartOfSpeech": "nltk's averaged_perceptron_tagger_eng and universal_tagset",
    "UniversalSentenceEncoder": "tensorflow_hub and tfhub.dev/google/universal-sentence-encoder",
    "MultilingualUniversalSentenceEncoder": "tensorflow_hub and a multilingual universal sentence encoder",
    "BERT": "sentence-transformers and one of its models",
    "InferSent": "TextAttack's InferSent model",
    "BERTScore": "bert_score and one of its models",
    "COLA": "a model from the Hub",
    "GoogleLanguageModel": "Google's 1-billion-words language model",
    "Google1BillionWordsLanguageModel": "Google's 1-billion-words language model",
    "LanguageTool": "a LanguageTool server",
}


def build(defect: AdversarialText, teacher: Path, device: str) -> tuple[Any, dict[str, Any]]:
    """Build the recipe on the teacher, with local files in the places of what it would fetch.

    Returns:
        TextAttack's Attack, and what it consists of, for the facts.
    """
    import textattack
    from textattack.goal_functions import ClassificationGoalFunction

    recipe = _recipe_class(defect.recipe)
    replaced: dict[str, str] = {}
    left_out: dict[str, str] = {}
    if defect.is_local:
        _put_local_files(defect, sys.modules[recipe.__module__], device, replaced, left_out)
    built = recipe.build(_model_wrapper(teacher, device, defect.max_length))
    if not isinstance(built.goal_function, ClassificationGoalFunction):
        raise WrongArgument(
            f"{defect.recipe} has the goal {type(built.goal_function).__name__}, but AdversarialText attacks "
            "classifiers. Take a recipe for classification, such as TextFoolerJin2019."
        )
    constraints = [*built.pre_transformation_constraints, *built.constraints]
    kept = [constraint for constraint in constraints if not hasattr(constraint, "why_left_out")]
    for constraint in constraints:
        if constraint not in kept:
            left_out[constraint.name] = constraint.why_left_out
        elif getattr(constraint, "stopwords", None) == {NO_STOPWORDS}:
            raise MissingStopwords()
    goal = built.goal_function
    told_goal = _described(goal)
    if getattr(goal, "target_max_score", None) is not None:
        told_goal = f"{told_goal} below a confidence of {goal.target_max_score}"
        if defect.until_fooled:
            replaced["goal"] = f"{told_goal} -> until the label changes (until_fooled)"
            goal.target_max_score = None
            told_goal = _described(goal)
    if defect.query_budget is not None:
        goal.query_budget = defect.query_budget
    attack = textattack.Attack(goal, kept, built.transformation, built.search_method)
    told = {
        "recipe": defect.recipe,
        "constraints": [_described(constraint) for constraint in kept],
        "constraints_left_out": left_out,
        "replaced": replaced,
        "transformation": _described(built.transformation),
        "search_method": _described(built.search_method),
        "goal_function": told_goal,
        "nothing_downloaded": defect.is_local,
    }
    return attack, told


def _recipe_class(name: str) -> type:
    from textattack import attack_recipes

    known = {
        each: value
        for each, value in vars(attack_recipes).items()
        if isinstance(value, type) and issubclass(value, attack_recipes.AttackRecipe)
    }
    known.pop("AttackRecipe")
    if name not in known:
        raise WrongArgument(
            f"TextAttack has no recipe {name!r}, but {', '.join(sorted(known))}; textfooler and kuleshov for short."
        )
    return known[name]


def _put_local_files(
    defect: AdversarialText, module: ModuleType, device: str, replaced: dict[str, str], left_out: dict[str, str]
) -> None:
    """Put local parts into the recipe's module, under the names by which its `build` asks for the originals."""
    import textattack
    from textattack.constraints import Constraint, PreTransformationConstraint
    from textattack.constraints.grammaticality.language_models import LanguageModelConstraint

    if defect.neighbours is not None:
        neighbours = json.loads(Path(defect.neighbours).read_text(encoding="utf-8"))
        textattack.shared.utils.GLOBAL_OBJECTS[_GLOVE] = word_list(neighbours)
        most = max(map(len, neighbours.values()), default=0)
        replaced["counter-fitted neighbours"] = (
            f"the lists of {Path(defect.neighbours).name}: {len(neighbours)} words with at most {most} neighbours"
        )
    asked_for = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, (Constraint, PreTransformationConstraint))
    }
    for name in defect.keep:
        if name not in asked_for:
            raise WrongArgument(f"keep= names {name!r}, but {defect.recipe} has only {', '.join(asked_for)}.")
    for name, value in asked_for.items():
        if name in defect.keep:
            continue
        if issubclass(value, LanguageModelConstraint) and defect.language_model is not None:
            local = language_model(Path(defect.language_model), device)
            replaced[name] = (
                f"{local.__name__} on {'/'.join(Path(defect.language_model).parts[-2:])}: log-probability of the whole "
                "word after the words before it (TextAttack's GPT2: of its first token)"
            )
        elif name == "ThoughtVector" and defect.word_vectors is not None:
            local = thought_vector(Path(defect.word_vectors))
            replaced[name] = f"{local.__name__}: the vectors of {Path(defect.word_vectors).name}, scaled to length 1"
        else:
            why = _why_left_out(defect, name, issubclass(value, LanguageModelConstraint))
            if why is None:
                continue
            local = _placeholder(name, why)
        setattr(module, name, local)


def _why_left_out(defect: AdversarialText, name: str, is_language_model: bool) -> str | None:
    if is_language_model:
        return "no language_model= was named"
    if name == "ThoughtVector":
        return "no word_vectors= were named"
    if name == "WordEmbeddingDistance" and defect.neighbours is not None:
        return (
            "a list of neighbours has no distances, so its own cut-off stands for this one. Jia et al. 2019 kept the 8 "
            "nearest words within a distance of 0.5 (squared, in TextAttack's port): a cosine of at least 0.75"
        )
    return f"needs {_FETCHED[name]}" if name in _FETCHED else None


def _placeholder(name: str, why: str) -> type:
    """Give a class that takes any arguments and says why the constraint of this name is not there."""
    from textattack.constraints import Constraint

    class LeftOut(Constraint):
        def __init__(self, *_: object, **settings: object) -> None:
            super().__init__(compare_against_original=True)
            told = ", ".join(f"{key}={value}" for key, value in settings.items())
            self.name, self.why_left_out = f"{name}({told})", why

        def _check_constraint(self, *_: object) -> bool:
            return True

    return LeftOut


def _described(part: Any) -> str:  # noqa: ANN401 - any part of an Attack
    """Say in one line what a part of an attack is."""
    settings = {key: getattr(part, key, None) for key in part.extra_repr_keys()}
    told = [
        f"{key}={value if isinstance(value, (str, int, float, set, list, type(None))) else type(value).__name__}"
        for key, value in settings.items()
    ]
    if isinstance(getattr(part, "stopwords", None), set):
        digest = hashlib.sha256("\n".join(sorted(part.stopwords)).encode()).hexdigest()
        told.append(f"{len(part.stopwords)} words with sha256 {digest}")
    return f"{type(part).__name__}({', '.join(told)})"


def _model_wrapper(folder: Path, device: str, max_length: int) -> Any:  # noqa: ANN401 - TextAttack's ModelWrapper
    """Load the teacher as TextAttack wants it.

    Differs from TextAttack's own wrapper: batches are padded to their longest text, not all to the maximum, and give
    probabilities in double precision. TextAttack takes logits that happen to sum to 1 for probabilities, and refuses
    probabilities of 16-bit teachers because their sum is not 1 to 6 digits.
    """
    from textattack.models.wrappers import HuggingFaceModelWrapper

    class Teacher(HuggingFaceModelWrapper):
        def __call__(self, text_input_list: Sequence[str | tuple[str, str]]) -> Tensor:
            batch = self.tokenizer(
                list(text_input_list), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            ).to(device)
            with torch.no_grad():
                return self.model(**batch).logits.double().softmax(-1)

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.model_max_length = max_length
    return Teacher(model.to(device).eval(), tokenizer)
