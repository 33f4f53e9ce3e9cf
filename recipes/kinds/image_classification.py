"""Pictures with a class each."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthoft.recipes.data import Row
from orthoft.recipes.kinds.kind import Batch, Example, class_indices, class_names
from orthoft.recipes.kinds.probed import Probed
from orthoft.recipes.task_schema import ImageClassification as Words


class ImageClassification(Probed[Words]):
    """Features are the mean over the patches of the last hidden states, or over the places of a feature map.

    Pictures are decoded once to see that they are sound, and then batch by batch.
    """

    reader = "AutoImageProcessor"

    def load_processor(self, base: Path) -> Any:
        pillow()
        return super().load_processor(base)

    def columns(self) -> list[str]:
        return [self.task.data.image, self.task.data.label]

    def text_columns(self) -> list[str]:
        return [self.task.data.label]

    def classes(self, rows: Sequence[Row]) -> list[str]:
        return class_names([row[self.task.data.label] for row in rows])

    def examples(self, rows: Sequence[Row], classes: Sequence[str], split: str) -> list[Example]:
        where, data = f"{self.task.name} {split}", self.task.data
        labels = class_indices([row[data.label] for row in rows], classes, where)
        file = {"train": data.train, "tuning": data.tuning, "test": data.test}[split] or data.train
        folder = Path(file).parent if data.dataset is None else Path()
        pictures = [encoded(row[data.image], folder) for row in rows]
        for picture in pictures:
            try:
                opened(picture)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        return [{"image": picture, "labels": label} for picture, label in zip(pictures, labels, strict=True)]

    def collate(self, examples: Sequence[Example]) -> Batch:
        pictures = [opened(example["image"]) for example in examples]
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"]  # (b, 3, height, width)
        return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}

    def reading(self) -> dict[str, Any]:
        return {"pooling": "mean over patches"}

    def inputs(self, model: Any, batch: Mapping[str, Tensor]) -> Batch:
        """Return the pictures in the model's own type: convolutional nets take no other."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return {"pixel_values": batch["pixel_values"].to(dtype)}

    def features(self, encoder: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        read = self.inputs(encoder, inputs)
        hidden: Tensor = encoder(**read).last_hidden_state.float()  # (b, t, d), (b, d, h, w) of a convolutional net
        return hidden.mean(1) if hidden.ndim == 3 else hidden.flatten(2).mean(-1)


def pillow() -> Any:
    """Return Pillow's module, or say how to install it."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ValueError("tasks of pictures need Pillow: pip install 'orthoft[vision]'") from None
    return Image


def encoded(value: Any, folder: Path) -> Any:
    """Return a picture's file, its bytes, or the picture: what a path from ``folder`` or a cell of `datasets` holds."""
    if isinstance(value, Mapping):  # as `datasets` keeps pictures
        value = value.get("bytes") or value.get("path")
    return folder / value if isinstance(value, str) else value


def opened(picture: Any) -> Any:
    """Return a picture, of which there is a file, its bytes or itself, in RGB and turned upright.

    Raises:
        ValueError: it is not there, or not sound.
    """
    Image = pillow()
    from PIL import ImageOps

    name = f"{len(picture)} bytes" if isinstance(picture, bytes) else str(picture)
    try:
        if isinstance(picture, Path | bytes):
            picture = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
        if not isinstance(picture, Image.Image):
            raise ValueError("expected a path, or the bytes of a file")
        return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no such picture: {name}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name[:200]} cannot be read as a picture: {' '.join(str(error).split())}") from None
