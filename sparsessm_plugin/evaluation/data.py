"""Text from files or data sets, cut into windows of tokens."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sparsessm_plugin.errors import SparseSSMError, cut, shown
from sparsessm_plugin.files import parse_json

JSON_LINES = (".jsonl", ".ndjson", ".json")

# UTF-8, with or without the mark that editors of Windows begin a file with
UTF8 = "utf-8-sig"


def read_texts(source: str | os.PathLike[str], text_field: str = "text") -> list[str]:
    """Documents of a text file, a JSON-lines file or a data set.

    :param source: a file: one document, or JSON lines with ``text_field`` where the name ends
        in .jsonl, .ndjson or .json, in any case; otherwise a name for ``datasets``, as
        ``name[:config[:split]]``, where the config may be empty and the split is ``train`` by
        default
    :param text_field: key of the text
    :raises SparseSSMError: the source cannot be read or holds no text
    """
    path = Path(source)
    if os.path.isdir(path):
        raise SparseSSMError(f"{path} is a folder; give a text or JSON-lines file")
    if not os.path.exists(path):
        if Path(str(source).split(":")[0]).suffix or len(path.parts) > 2:
            raise SparseSSMError(f"{cut(str(path))} does not exist")
        texts = _read_dataset(str(source), text_field)
    else:
        if not path.is_file():  # a device or a pipe may never end
            raise SparseSSMError(f"{path} is no regular file; give a text or JSON-lines file")
        try:
            if path.suffix.lower() in JSON_LINES:
                texts = list(_read_json_lines(path, text_field))
            else:
                texts = [path.read_text(encoding=UTF8)]
        except (OSError, UnicodeDecodeError) as error:
            raise SparseSSMError(f"cannot read {path} as UTF-8 text: {error}") from error
    for number, text in enumerate(texts, start=1):
        try:
            text.encode("utf-8")
        except (AttributeError, UnicodeEncodeError) as error:
            raise SparseSSMError(f"{source}: text {number} is not valid Unicode text") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise SparseSSMError(f"{source} holds no text")
    return texts


def _read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    with path.open(encoding=UTF8) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError as error:
                reason = cut(getattr(error, "msg", str(error)))
                raise SparseSSMError(f"{path}, line {number} is not JSON: {reason}") from error
            text = record.get(text_field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise SparseSSMError(
                    f"{path}, line {number} has no text in field {shown(text_field)}"
                )
            yield text


def _read_dataset(name: str, text_field: str) -> list[str]:
    from datasets import load_dataset

    dataset, config, split = (*name.split(":", 2), "", "")[:3]
    if not dataset:
        raise SparseSSMError(f"{shown(name)} is no file and names no data set")
    try:
        rows = load_dataset(dataset, config or None, split=split or "train")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise SparseSSMError(
            f"{cut(name)} is no file, and no data set of that name: {cut(reason)}"
        ) from error
    if text_field not in rows.column_names:
        raise SparseSSMError(
            f"data set {name} has no column {shown(text_field)}: {rows.column_names}"
        )
    return [text for text in rows[text_field] if text is not None]


def tokenize(texts: list[str], tokenizer: Any) -> Tensor:
    """All documents as one stream of token ids, an end-of-text token between two of them.

    :return: (tokens,) int64
    """
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for number, text in enumerate(texts):
        if number:
            stream += separator
        stream += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(stream, dtype=torch.int64)


def windows(tokens: Tensor, length: int, source: str) -> Tensor:
    """Cut a stream into non-overlapping windows; a shorter rest is dropped.

    :return: (windows, length)
    :raises SparseSSMError: not even one window
    """
    if length < 2:
        raise SparseSSMError(f"max_seq_length must be at least 2, got {length}")
    count = len(tokens) // length
    if count == 0:
        raise SparseSSMError(
            f"{source} holds {len(tokens)} tokens, too few for one window of {length}; "
            "give more text or a smaller --max-seq-length"
        )
    return tokens[: count * length].reshape(count, length)


def calibration_loader(
    samples: Tensor,
    num_samples: int,
    batch_size: int,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
) -> DataLoader[Any]:
    """Draw windows without replacement and serve them in batches, always in the same order.

    :param samples: (windows, length) to draw from
    :param num_samples: how many to draw; all, if there are fewer
    :param seed: of the draw
    :param share: (rank, size): this rank's batches of those that one process would be served;
        neighbours in the order of ranks, and as many as any other rank's or one less
    :raises SparseSSMError: there are fewer batches than ranks
    """
    chosen = list(range(len(samples)))
    random.Random(seed).shuffle(chosen)
    chosen = chosen[:num_samples]
    rank, size = share
    batches = -(-len(chosen) // batch_size)
    if size > 1 and batches < size:
        raise SparseSSMError(
            f"{len(chosen)} windows in batches of {batch_size} are too few for {size} ranks; "
            "give a greater --num-samples or a smaller --batch-size"
        )
    begin, end = (batches * r // size * batch_size for r in (rank, rank + 1))
    rows = [
        {"input_ids": samples[i], "attention_mask": torch.ones_like(samples[i])}
        for i in chosen[begin:end]
    ]
    return DataLoader(rows, batch_size=batch_size, shuffle=False)  # type: ignore[arg-type]
