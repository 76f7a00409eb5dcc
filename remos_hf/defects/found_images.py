"""Images searched batch by batch: what is finished is kept on disk, so that a killed run goes on from there."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Array3D, Dataset, Features, Value, concatenate_datasets
from datasets.features.features import FeatureType
from torch import Tensor
from tqdm.auto import tqdm

from remos_hf.defects.base import CLEAN_INDEX, FOOLED, PIXELS
from remos_hf.defects.image_samples import PreparedImages
from remos_hf.errors import CorruptFileError
from remos_hf.profiling.sidecar_file import read_tensors, write_tensors

logger = logging.getLogger(__name__)

_FILE_KIND = "remos_hf adversarial images 1"

# Gives what was found from a batch of pixels and what tells its samples apart: `PIXELS`, and one number a sample for
# each name besides; on the CPU.
SearchBatch = Callable[[Tensor, Sequence[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class Gallery:
    """The images that are searched.

    Attributes:
        pictures: How they are read.
        label_column: Name of the labels' column in what is found.
        label_feature: Its type.
        workers: Threads that decode.
    """

    pictures: PreparedImages
    label_column: str
    label_feature: FeatureType
    workers: int

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Decode these rows. float32, shape (rows, channels, height, width)."""
        if self.workers == 1:
            return torch.stack([self.pictures.pixels(row) for row in rows])
        with ThreadPoolExecutor(self.workers) as threads:
            return torch.stack(list(threads.map(self.pictures.pixels, rows)))

    def digests(self) -> list[str]:
        """Fingerprint the pixels of each image. All of them are decoded once: damaged ones are found now."""
        found, total = [], len(self.pictures)
        for start in tqdm(range(0, total, 64), desc="Reading images", unit="batch", delay=2):
            for one in self.pixels(range(start, min(start + 64, total))):
                found.append(hashlib.sha256(memoryview(one.contiguous().numpy()).cast("B")).hexdigest())
        return found

    def searched(
        self, digests: Sequence[str], search: SearchBatch, *, batch_size: int, unfinished: Path | None, title: str
    ) -> tuple[Dataset, dict[str, Any]]:
        """Search every image that is not finished, then put all results together.

        Args:
            digests: Of the images.
            search: Searches one batch.
            batch_size: Images of a batch.
            unfinished: A folder for the batches so far; None to keep none.
            title: Of the progress bar.

        Returns:
            One row an image, in order: `pixels`, the label, `clean_index` and, where it was noticed, `fooled`; and what
            was noticed of all of them as JSON values.
        """
        parts: list[tuple[Sequence[int], Dataset]] = []
        noted: list[dict[str, Tensor]] = []

        def keep(rows: Sequence[int], tensors: dict[str, Tensor]) -> None:
            parts.append((rows, self._table(rows, tensors)))
            noted.append({name: one for name, one in tensors.items() if name != PIXELS})

        for rows, tensors in _finished(unfinished):
            keep(rows, tensors)
        missing = sorted(set(range(len(self.pictures))).difference(*(rows for rows, _ in parts)))
        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        for rows in tqdm(batches, desc=title, unit="batch", delay=2):
            tensors = search(self.pixels(rows), [digests[row] for row in rows])
            if unfinished is not None:
                place = unfinished / f"rows-{rows[0]:08d}-{rows[-1]:08d}.safetensors"
                write_tensors(place, {**tensors, "rows": torch.tensor(rows)}, _FILE_KIND, {})
            keep(rows, tensors)
        table = concatenate_datasets([part for _, part in parts])
        order = [row for rows, _ in parts for row in rows]
        if order != sorted(order):
            table = table.select(sorted(range(len(order)), key=order.__getitem__))
        return table, {**_summed(noted), "num_clean": len(order), "num_resumed": len(order) - len(missing)}

    def _table(self, rows: Sequence[int], tensors: Mapping[str, Tensor]) -> Dataset:
        columns = {
            PIXELS: tensors[PIXELS].numpy(),
            self.label_column: [self.pictures.labels[row] for row in rows],
            CLEAN_INDEX: list(rows),
        }
        features = {
            PIXELS: Array3D(shape=tuple(tensors[PIXELS].shape[1:]), dtype="float32"),
            self.label_column: self.label_feature,
            CLEAN_INDEX: Value("int64"),
        }
        if FOOLED in tensors:
            columns[FOOLED], features[FOOLED] = tensors[FOOLED].tolist(), Value("bool")
        return Dataset.from_dict(columns, features=Features(features))


def _summed(noted: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    names = dict.fromkeys(name for one in noted for name in one)
    joined = {name: torch.cat([one[name] for one in noted if name in one]) for name in names}
    fooled = joined.pop(FOOLED, None)
    facts: dict[str, Any] = {
        "num_fooled": None if fooled is None else int(fooled.sum()),
        "largest_change": float(joined.pop("largest_change").max()),
        "lowest": float(joined.pop("lowest").min()),
        "highest": float(joined.pop("highest").max()),
    }
    for name, values in joined.items():
        facts[name if name.startswith("mean_") else f"mean_{name}"] = float(values.double().mean())
    return facts


def _finished(unfinished: Path | None) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Read the batches so far. Files appear whole; what cannot be read is announced and made again."""
    seen: set[int] = set()
    for path in sorted(unfinished.glob("rows-*.safetensors")) if unfinished is not None else ():
        try:
            tensors, _ = read_tensors(path, _FILE_KIND, ())
        except CorruptFileError as error:
            logger.warning("%s is not whole (%s); its images are searched again.", path, error)
            path.unlink()
            continue
        rows = tensors.pop("rows").tolist()
        if seen.isdisjoint(rows):  # two runs with other batch sizes may have searched a sample twice
            seen.update(rows)
            yield rows, tensors
