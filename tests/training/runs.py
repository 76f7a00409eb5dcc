"""Short Trainer runs that several tests share."""

from transformers import TrainingArguments

from remos_hf.training.trainer import RemosTrainer
from tests import tiny


def arguments(folder, **options):
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_only_model": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def trainer(folder, kind=RemosTrainer, model=None, train_dataset=None, options=None, **remos):
    return kind(
        model=tiny.bert() if model is None else model,
        args=arguments(folder, **(options or {})),
        train_dataset=tiny.dataset() if train_dataset is None else train_dataset,
        eval_dataset=tiny.dataset(8, seed=9),
        **{"data_collator": tiny.pad, **remos},
    )
