"""Make the packaged demo checkpoint out of a larger one: a smaller vocabulary, 8 bits a weight.

1. Of the vocabulary the tokens stay that English text and documentation use most. A token goes
   with all the tokens that are merged from it, and its text is then written by its parts, down to
   single bytes, which stay.
2. The model is tuned to the smaller vocabulary on public text that the large model never saw, and
   on docstrings of standard-library modules that the demo neither evaluates nor calibrates on. A
   teacher with the whole vocabulary reads the same text. Where a token of each ends at the same
   character, the probability that the teacher gives to a token counts for the first of the parts
   that stand for it now; elsewhere the text itself is learnt. The last pieces of the text are held
   back and only looked at.
3. Matrices are stored as unscaled float8 (e4m3), which transformers turns into the config's dtype.
   During tuning the forward pass sees the rounded weights.

With ``--minutes 0`` nothing is tuned.
"""

import heapq
import json
import math
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from harness import Configuration, assets
from pydantic import Field
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sparsessm_plugin import fast_forward
from sparsessm_plugin.recipes.demo_texts import docstrings, tuned_on

PIECE = 1400  # characters of a piece of text that both models read
HELD_BACK = 96  # pieces that are not tuned on
FLOAT8 = torch.float8_e4m3fn


# -- the vocabulary ------------------------------------------------------------------------


class SmallVocabulary:
    """The most used tokens of a byte-level BPE tokenizer, as a tokenizer of its own.

    :param file: tokenizer.json
    :param texts: kinds of text with their weights
    :param size: tokens that stay; id 0 and single bytes always do
    """

    def __init__(self, file: Path, texts: list[tuple[list[str], float]], size: int):
        self.whole = Tokenizer.from_file(str(file))
        self.fields = json.loads(file.read_text(encoding="utf-8"))
        self.ids: dict[str, int] = self.fields["model"]["vocab"]
        self.parts: dict[int, tuple[int, int]] = {}
        for left, right in self.fields["model"]["merges"]:
            merged = self.ids[left + right]
            self.parts.setdefault(merged, (self.ids[left], self.ids[right]))
        use: Counter[int] = Counter()
        for documents, weight in texts:
            seen: Counter[int] = Counter()
            for encoding in self.whole.encode_batch(documents, add_special_tokens=False):
                seen.update(encoding.ids)
            for token, count in seen.items():
                use[token] += weight * count / seen.total()
        self.kept = sorted(self._choose(use, size))  # old ids, in the order of the new ones
        self.new = {old: new for new, old in enumerate(self.kept)}

    def _choose(self, use: Counter[int], size: int) -> set[int]:
        kept = set(self.ids.values())
        needed_by = Counter(part for pair in self.parts.values() for part in pair)
        heap = [(use[token], token) for token in self.parts if not needed_by[token]]
        heapq.heapify(heap)
        while len(kept) > size:
            count, token = heapq.heappop(heap)
            if token not in kept or needed_by[token]:
                continue
            if count != use[token]:  # it became a part that is used more
                heapq.heappush(heap, (use[token], token))
                continue
            kept.remove(token)
            for part in self.parts[token]:
                use[part] += count
                needed_by[part] -= 1
                if not needed_by[part] and part in self.parts:
                    heapq.heappush(heap, (use[part], part))
        return kept

    def tokenizer(self) -> dict[str, Any]:
        """Fields of the smaller tokenizer.json."""
        names = {token: name for name, token in self.ids.items()}
        merges = [
            [left, right]
            for left, right in self.fields["model"]["merges"]
            if self.parts[self.ids[left + right]] == (self.ids[left], self.ids[right])
            and self.ids[left + right] in self.new
        ]
        vocab = {names[old]: new for old, new in self.new.items()}
        model = {**self.fields["model"], "vocab": vocab, "merges": merges}
        return {**self.fields, "model": model}

    def first_parts(self) -> Tensor:
        """(whole vocabulary, new one) 1 where a new token is the first part of an old one."""
        firsts = []
        for token in range(len(self.ids)):
            while token not in self.new:
                token = self.parts[token][0]
            firsts.append(self.new[token])
        return F.one_hot(torch.tensor(firsts), len(self.new)).float()


# -- the text ------------------------------------------------------------------------------


def read_corpus() -> list[str]:
    """Documents of the calibration corpus."""
    file = assets() / "data" / "corpus" / "calibration.jsonl"
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def pieces_of(documents: list[str]) -> list[str]:
    """Pieces of about PIECE characters, cut at spaces."""
    pieces = []
    for document in documents:
        start = 0
        while start < len(document):
            end = min(len(document), start + PIECE)
            space = document.rfind(" ", start + PIECE // 2, end)
            if end < len(document) and space > 0:
                end = space
            if end - start >= PIECE // 4:
                pieces.append(document[start:end])
            start = end
    return pieces


class Pieces:
    """Pieces of text as both tokenizers read them, padded with id 0.

    :param ids: (pieces, tokens) of the smaller vocabulary, beginning with the end of text
    :param whole: (pieces, tokens') of the whole one, likewise
    :param aligned: (pieces, tokens) position in ``whole`` that ends at the same character, or -1
    :param real: (pieces, tokens) whether the next token is one of the text
    """

    def __init__(self, texts: list[str], small: Tokenizer, whole: Tokenizer):
        rows: list[list[list[int]]] = [[], [], [], []]
        few = small.encode_batch(texts, add_special_tokens=False)
        many = whole.encode_batch(texts, add_special_tokens=False)
        for ours, theirs in zip(few, many, strict=True):
            ends = {end: i + 1 for i, (_, end) in enumerate(theirs.offsets)}
            rows[0].append([0, *ours.ids])
            rows[1].append([0, *theirs.ids])
            # characters of several bytes end more than one token; the last of them is meant
            last = {end: i for i, (_, end) in enumerate(ours.offsets)}
            at = [ends.get(e, -1) if last[e] == i else -1 for i, (_, e) in enumerate(ours.offsets)]
            rows[2].append([0, *at])
            rows[3].append([1] * len(ours.ids) + [0])
        self.ids, self.whole, self.aligned, self.real = (
            _padded(kind, fill) for kind, fill in zip(rows, (0, 0, -1, 0), strict=True)
        )

    def batch(self, rows: Tensor, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Some of the pieces, without padding that all of them share."""
        length = int(self.real[rows].sum(1).max()) + 1
        wide = int((self.whole[rows] != 0).sum(1).max()) + 1
        cut = (self.ids[rows, :length], self.whole[rows, :wide])
        cut += (self.aligned[rows, :length], self.real[rows, :length].bool())
        return tuple(tensor.to(device) for tensor in cut)  # type: ignore[return-value]


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows))), fill)
    for row, tokens in zip(out, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return out


# -- tuning --------------------------------------------------------------------------------


def is_coarse(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is stored in float8: matrices, but not A_log, which is exponentiated."""
    return tensor.ndim == 2 and "A_log" not in name


def rounded(name: str, tensor: Tensor) -> Tensor:
    """Values that the file can hold."""
    kind = FLOAT8 if is_coarse(name, tensor) else torch.bfloat16
    return tensor.to(kind).to(tensor.dtype)


def loss_of(student: Any, teacher: Any, first: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Nats a token: cross entropy of the text, or of what a teacher predicts."""
    ids, whole, aligned, real = batch
    scores = student(ids, use_cache=False).logits.float().log_softmax(-1)
    following = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    text = -scores.gather(-1, following[..., None])[..., 0]
    with torch.no_grad():
        predicted = teacher(whole, use_cache=False).logits.float().softmax(-1)
        grouped = predicted @ first
    at = aligned.clamp(min=0)[..., None].expand(-1, -1, scores.shape[-1])
    taught = -(grouped.gather(1, at) * scores).sum(-1)
    losses = torch.where(aligned >= 0, 0.7 * taught + 0.3 * text, text)
    return (losses * real).sum() / real.sum()


@torch.no_grad()
def text_loss(model: Any, pieces: Pieces, device: str) -> float:
    """Nats a token of the text, by the model as it is."""
    total, count = 0.0, 0
    for rows in torch.arange(len(pieces.ids)).split(16):
        ids, _, _, real = pieces.batch(rows, device)
        scores = model(ids, use_cache=False).logits.float().log_softmax(-1)
        losses = -scores[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        total += float((losses * real[:, :-1]).sum())
        count += int(real[:, :-1].sum())
    return total / count


def tune(
    student: Any, teacher: Any, first: Tensor, texts: tuple[Pieces, Pieces], options: "Fields"
) -> list[tuple[float, float]]:
    """Adam on all parameters, in float32, forward with rounded weights; the rate falls with time.

    :param first: see :meth:`SmallVocabulary.first_parts`
    :param texts: what is tuned on, and what is held back
    :return: what the held-back text said, in nats a token, with the seconds
    """
    pieces, held = texts
    device = options.device
    names, parameters = zip(*student.named_parameters(), strict=True)
    masters = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=options.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(options.seed)
    history: list[tuple[float, float]] = []
    started, budget, step = time.monotonic(), 60 * options.minutes, 0

    def forward_sees_rounded() -> None:
        with torch.no_grad():
            for name, parameter, master in zip(names, parameters, masters, strict=True):
                parameter.copy_(rounded(name, master))

    def look() -> None:
        with fast_forward(student):
            history.append((time.monotonic() - started, text_loss(student, held, device)))
        print(f"{history[-1][0]:.0f} s, step {step}: {history[-1][1]:.4f} nats", flush=True)

    forward_sees_rounded()
    look()
    order: list[int] = []
    while (spent := (time.monotonic() - started) / budget if budget else 1.0) < 1:
        rate = options.learning_rate * min(1.0, (step + 1) / 20) * math.cos(spent * math.pi / 2)
        optimizer.param_groups[0]["lr"] = rate
        if len(order) < options.batch_size:
            order = torch.randperm(len(pieces.ids), generator=generator).tolist()
        rows = torch.tensor([order.pop() for _ in range(options.batch_size)])
        with fast_forward(student, gradients=True), fast_forward(teacher):
            loss = loss_of(student, teacher, first, pieces.batch(rows, device))
            loss.backward()
        for parameter, master in zip(parameters, masters, strict=True):
            master.grad, parameter.grad = parameter.grad, None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        forward_sees_rounded()
        step += 1
        if step % 200 == 0 or (step == 20 and budget > 30):
            look()
    if step:
        look()
    return history


# -- the folder ----------------------------------------------------------------------------


def save(student: Any, vocabulary: SmallVocabulary, source: Path, output: Path) -> None:
    """Config, tokenizer and weights, as transformers loads them."""
    output.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"vocab_size": len(vocabulary.kept), "dtype": "float32"}
    (output / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    text = json.dumps(vocabulary.tokenizer(), ensure_ascii=False, separators=(",", ":"))
    (output / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(source / "tokenizer_config.json", output / "tokenizer_config.json")
    weights = {
        name: tensor.detach().cpu().to(FLOAT8 if is_coarse(name, tensor) else torch.bfloat16)
        for name, tensor in student.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    # matrices are stored as they are, so nothing else is needed to read them
    save_file(weights, output / "model.safetensors", {"format": "pt", "unscaled_float8": "true"})


class Fields(Configuration):
    """Of the cut and the tuning."""

    output: Path = Field(description="folder to be made")
    source: str = Field("mamba-6m", description="of the assets; is cut")
    teacher: str = Field("mamba-25m", description="of the assets; of one vocabulary")
    vocabulary: int = Field(1520, ge=257, description="tokens: end of text, every byte, and more")
    minutes: float = Field(2.0, description="of tuning")
    learning_rate: float = Field(1e-3, description="at first")
    batch_size: int = Field(32, description="pieces a step")
    pieces: int | None = Field(None, description="of text at most, to see that it runs")
    seed: int = Field(0, description="of the order")
    device: str = Field("cuda" if torch.cuda.is_available() else "cpu", description="where")


def make(options: Fields) -> None:
    """Cut, tune and save."""
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")

    source = assets() / "models" / options.source
    corpus, documentation = read_corpus(), docstrings(tuned_on())
    kinds = [(corpus, 0.4), (documentation, 0.6)]
    vocabulary = SmallVocabulary(source / "tokenizer.json", kinds, options.vocabulary)
    small = Tokenizer.from_str(json.dumps(vocabulary.tokenizer()))
    pieces = pieces_of(corpus)
    held = Pieces(pieces[-HELD_BACK:], small, vocabulary.whole)
    pieces = (pieces[:-HELD_BACK] + pieces_of(documentation))[: options.pieces]
    print(f"{len(vocabulary.kept)} tokens; {len(pieces)} pieces, {sum(map(len, pieces)):,} chars")

    student: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    embeddings = load_file(source / "model.safetensors")["backbone.embeddings.weight"]
    student.resize_token_embeddings(len(vocabulary.kept))
    student.get_input_embeddings().weight.data.copy_(embeddings[vocabulary.kept])
    student.to(options.device).eval()
    teacher: Any = AutoModelForCausalLM.from_pretrained(assets() / "models" / options.teacher)
    teacher.to(options.device).eval().requires_grad_(False)
    texts = Pieces(pieces, small, vocabulary.whole), held
    first = vocabulary.first_parts().to(options.device)
    history = tune(student, teacher, first, texts, options)
    save(student, vocabulary, source, options.output)
    size = sum(file.stat().st_size for file in options.output.iterdir())
    made = {"source": options.source, "teacher": options.teacher, "seed": options.seed}
    made |= {"minutes": options.minutes, "held_back_nats": [list(look) for look in history]}
    (options.output / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"{options.output}: {size:,} bytes")
