"""Rows for the recipes: images in folders, lines of text, and small sets that are made up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adamix.errors import InputError
from adamix.images import open_images, pixel_digest
from adamix.storage import one_line, require


class ImageFolder:
    """`(image, label)` rows of a folder with a subfolder of images per class: float32 [3, size, size] in [-1, 1].

    Images are enlarged or reduced to the size, cut in the middle, and scaled as those of ViT.

    Raises:
        InputError: there are none, or they are of a class that the public rows do not have.
    """

    def __init__(self, name: str, path: str, size: int, class_names: Sequence[str] | None = None) -> None:
        try:
            self._images = open_images(path)
        except InputError as error:
            raise InputError(f"{name}: {str(error).removeprefix('source: ')}") from error
        self.class_names = tuple(self._images.class_names if class_names is None else class_names)
        if unknown := [label for label in self._images.class_names if label not in self.class_names]:
            raise InputError(
                f"{name}: class {unknown[0]!r} is not among the public classes ({', '.join(self.class_names)}); add "
                "public images of it, or remove it"
            )
        self._labels = [self.class_names.index(self._images.class_names[label]) for label in self._images.y]
        self._size = size
        self._fit = require("PIL.ImageOps", "pillow", "reading images").fit

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._fit(self._images.read(index), (self._size, self._size))
        pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)
        return pixels / 127.5 - 1, self._labels[index]

    def digest(self, index: int) -> str:
        """Of the pixels before they are scaled."""
        return pixel_digest(self._images.read(index))


@dataclass(frozen=True)
class Tokenizer:
    """`encode` a line to numbers below `size`; `end` comes after it and fills up."""

    encode: Callable[[str], list[int]]
    end: int
    size: int


def open_tokenizer(path: str | None) -> Tokenizer:
    """That of transformers in a folder, or with None bytes: 256 of them, and an end.

    Raises:
        InputError: there is none.
    """
    if path is None:
        return Tokenizer(lambda line: list(line.encode()), 256, 257)
    check_folder("tokenizer", path)
    transformers = require("transformers", "adamix[deep]", "a tokenizer")
    try:
        found = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        end = found.eos_token_id if found.eos_token_id is not None else found.pad_token_id
    except Exception as error:  # transformers raises many types
        raise InputError(f"tokenizer: {path!r} holds none that can be read ({one_line(error)})") from error
    if end is None:
        raise InputError(f"tokenizer: {path!r} has no token for the end of a text; set eos_token")
    return Tokenizer(lambda line: found.encode(line, add_special_tokens=False), int(end), len(found))


def check_folder(name: str, path: str) -> None:
    """Of transformers, which would look for any other name on the network."""
    if not Path(path).is_dir():
        raise InputError(f"{name}: {path!r} is no folder; name one that save_pretrained of transformers wrote")


class TextLines:
    """Dicts of `input_ids` and `labels`, int64 [length], one a line: its first tokens, then ends with labels of -100.

    A line is a record: it is protected as one, whoever wrote others.
    """

    def __init__(self, name: str, lines: Sequence[str], tokenizer: Tokenizer, length: int) -> None:
        self._lines = [line for line in lines if line.strip()]
        if not self._lines:
            raise InputError(f"{name}: has no line of text; pass a file, or a folder with .txt files")
        self._tokenizer, self._length = tokenizer, length

    @classmethod
    def read(cls, name: str, path: str, tokenizer: Tokenizer, length: int) -> TextLines:
        """Of a file, or of all .txt files under a folder, in the order of their names."""
        root = Path(path)
        files = sorted(p for p in root.rglob("*.txt") if p.is_file()) if root.is_dir() else [root]
        lines: list[str] = []
        for file in files:
            try:
                lines += file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{name}: {file} cannot be read as UTF-8 text ({one_line(error)})") from error
        return cls(name, lines, tokenizer, length)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = [*self._tokenizer.encode(self._lines[index]), self._tokenizer.end][: self._length]
        filled = torch.full((self._length,), self._tokenizer.end)
        filled[: len(tokens)] = torch.tensor(tokens)
        labels = torch.where(torch.arange(self._length) < len(tokens), filled, -100)
        return {"input_ids": filled, "labels": labels}


def made_up_images(count: int, size: int, name: str) -> list[tuple[Tensor, int]]:
    """Noise in one of three colours: float32 [3, size, size]."""
    generator = torch.Generator().manual_seed(_seed(name))
    labels = torch.arange(count) % 3
    images = 4.0 * torch.randn(count, 3, size, size, generator=generator) + torch.eye(3)[labels][:, :, None, None]
    return list(zip(images, labels.tolist(), strict=True))


def made_up_lines(count: int, length: int, name: str) -> list[str]:
    """Letters of which each follows the one before by one of two rules."""
    generator = np.random.default_rng(_seed(name))
    lines = []
    for _ in range(count):
        letters = [int(generator.integers(26))]
        while len(letters) < length:
            letters.append((3 * letters[-1] + 1 + int(generator.integers(2))) % 26)
        lines.append("".join(chr(97 + letter) for letter in letters))
    return lines


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
