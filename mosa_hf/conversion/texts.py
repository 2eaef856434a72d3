"""Texts by name: files of text, JSON lines and Parquet, and data sets of the Hub."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..arguments import check_argument, checked
from .windows import Chat, is_chat

MOST_CHARACTERS = 4_000_000  # that are read of a file of rows, or of a data set
ROWS = {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".parquet": "Parquet"}


@dataclass(frozen=True)
class Text:
    """
    What routers are fitted on, or something is measured on.

    Args:
        documents: texts, and chats as lists of messages.
        name: what it is called in model cards and tables.
    """

    documents: Sequence[str | Chat]
    name: str

    def __post_init__(self) -> None:
        is_list = isinstance(self.documents, Sequence) and not isinstance(self.documents, str)
        if not is_list or not all(isinstance(each, str) or is_chat(each) for each in self.documents):
            raise ValueError(
                "`documents` must be a list of texts, and of chats: lists of messages with `role` and `content`."
            )

    @property
    def sha256(self) -> str:
        """Of the documents."""
        return hashlib.sha256(json.dumps([*self.documents], default=str).encode()).hexdigest()

    @property
    def num_characters(self) -> int:
        return sum(map(_length, self.documents))

    @checked()
    def as_string(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """
        All documents, one after the other, chats as the tokenizer's template writes them.

        Raises:
            ValueError: for chats without a chat template.
        """
        parts = []
        for each in self.documents:
            if isinstance(each, str):
                parts.append(each)
                continue
            if tokenizer.chat_template is None:
                raise ValueError(f"{self.name} has chats, but the tokenizer has no `chat_template`.")
            parts.append(cast(str, tokenizer.apply_chat_template([dict(message) for message in each], tokenize=False)))
        return "\n\n".join(parts)


@checked()
def read_text(names: str | os.PathLike | Iterable[str | os.PathLike], most_characters: int = MOST_CHARACTERS) -> Text:
    """
    A text by name, or several as one.

    Args:
        names: each of a file: JSON lines (`.jsonl`, `.ndjson`) and Parquet (`.parquet`) have rows, any other is one
            document of UTF-8 text. Or of a data set, as `datasets` knows it by name or folder: `name`,
            `name:configuration` or `name:configuration:split` (the split is `train` if none is named); it is
            streamed. A row has a `text`, or `messages`: a chat, each message with `role` and `content`.
        most_characters: after which no more rows are read, of each name.

    Raises:
        FileNotFoundError: if a name is neither a file nor a data set.
        ImportError: for Parquet and data sets without the extra `datasets`.
        ValueError: for files that cannot be read, rows without `text` or `messages`, and what has none at all.
    """
    if most_characters < 1:
        raise ValueError(f"`most_characters` must be at least 1, got {most_characters}.")
    given = [names] if isinstance(names, str | os.PathLike) else list(names)
    check_argument("names", given, list[str | os.PathLike], "name files or data sets")
    listed = [os.fspath(each) for each in given]
    documents: list[str | Chat] = []
    for name in listed:
        own = list(_limited(_documents(name), most_characters))
        if not any(map(_length, own)):
            raise ValueError(f"{name} has no text.")
        documents += own
    return Text(documents, ", ".join(Path(name).name if Path(name).exists() else name for name in listed))


def _documents(name: str) -> Iterator[str | Chat]:
    path = Path(name)
    if not path.is_file():
        is_folder = Path(name.partition(":")[0]).is_dir()
        if not is_folder and (
            path.is_absolute() or len(path.parts) > 2 or name.startswith(".") or path.suffix in (*ROWS, ".txt", ".md")
        ):
            raise FileNotFoundError(f"{name} does not exist: name a file of text, JSON lines or Parquet.")
        yield from _of_rows(name, _data_set(name))
    elif path.suffix == ".parquet":
        yield from _of_rows(name, _parquet(path))
    elif path.suffix in ROWS:
        yield from _of_rows(name, _json_lines(path))
    else:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is no UTF-8 text ({error}).") from error


def _of_rows(name: str, rows: Iterable[Any]) -> Iterator[str | Chat]:
    """The document of each row."""
    for number, row in enumerate(rows):
        if isinstance(row, Mapping):
            chat, text = row.get("messages"), row.get("text")
            if chat is not None and is_chat(chat):
                yield [dict(message) for message in chat]
                continue
            if isinstance(text, str):
                yield text
                continue
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"{name}: row {number} has {has or 'nothing'}; each must have `text`, or `messages`: a list of messages "
            "with `role` and `content`."
        )


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}, is no JSON: {error}") from error


def _parquet(path: Path) -> Iterator[Any]:
    _check_installed("pyarrow", str(path))
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = [name for name in ("text", "messages") if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns or None, batch_size=1024):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error


def _data_set(name: str) -> Iterator[Any]:
    _check_installed("datasets", name)
    from datasets import load_dataset

    parts = name.split(":")
    if len(parts) > 3:
        raise ValueError(f"{name}: a data set is `name`, `name:configuration` or `name:configuration:split`.")
    repository, configuration, split = parts + [""] * (3 - len(parts))
    try:
        yield from load_dataset(repository, configuration or None, split=split or "train", streaming=True)
    except Exception as error:  # `datasets` raises many kinds
        raise FileNotFoundError(f"{name} is neither a file nor a data set that can be read: {error}") from error


def _check_installed(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{name}: Parquet and data sets are read with `datasets`, which is not installed: "
            "`pip install 'mosa-hf[datasets]'`, or name a file of text or JSON lines."
        )


def _limited(documents: Iterable[str | Chat], most_characters: int) -> Iterator[str | Chat]:
    """As many as come before the first beyond `most_characters`, and that one."""
    total = 0
    for each in documents:
        yield each
        total += _length(each)
        if total >= most_characters:
            return


def _length(document: str | Chat) -> int:
    """Characters."""
    if isinstance(document, str):
        return len(document.strip())
    return sum(len(str(message.get("content") or "")) for message in document)
