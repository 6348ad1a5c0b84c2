"""Checkpoints: right ones, damaged ones and hostile ones, drawn by number.

Most are copies of the packaged demo checkpoint with one thing changed; some are tiny random models
of other families.
"""

import json
import os
import pickle
import random
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reliability_cases.processes import PRUNE, Case

DEMO_FOLDER = Path(__file__).parents[2] / "tests" / "assets" / "mamba-demo-0.7m"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Who drops this file beside the case's folder has run code that nobody allowed.
PAYLOAD = "open('../payload', 'w').close()"

Damage = Callable[[Path, random.Random], tuple[str, str]]
DAMAGES: list[Damage] = []


def damage(times: int = 1) -> Callable[[Damage], Damage]:
    """Register a change of a checkpoint's folder, which says what it is and what is expected.

    :param times: how many cases of a hundred it gets, drawn differently
    """

    def register(function: Damage) -> Damage:
        DAMAGES.extend([function] * times)
        return function

    return register


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (PAYLOAD,)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = WEIGHTS) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, {"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    """Set fields of config.json; with infinities and NaN bare, as transformers 4 wrote them."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")


def edit_header(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change what a safetensors file says of its bytes, and not the bytes."""
    content = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def some(tensors: dict[str, torch.Tensor], rng: random.Random, ending: str = "") -> str:
    return rng.choice(sorted(name for name in tensors if name.endswith(ending)))


# -- right ones ----------------------------------------------------------------------------


@damage()
def nothing(folder: Path, rng: random.Random) -> tuple[str, str]:
    return "the demo as it is", "works"


@damage()
def half_precision(folder: Path, rng: random.Random) -> tuple[str, str]:
    dtype = rng.choice([torch.bfloat16, torch.float16])
    write(folder, {name: tensor.to(dtype) for name, tensor in tensors_of(folder).items()})
    change_config(folder, dtype=str(dtype).removeprefix("torch."))
    return f"all in {dtype}", "works"


@damage()
def sharded(folder: Path, rng: random.Random) -> tuple[str, str]:
    shards(folder, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    return "two shards with an index", "works"


@damage(3)
def other_family(folder: Path, rng: random.Random) -> tuple[str, str]:
    return family(folder, rng, {}), "works"


@damage()
def bare_infinity(folder: Path, rng: random.Random) -> tuple[str, str]:
    name = family(folder, rng, {"time_step_limit": [0.0, float("inf")]}, "mamba2", "nemotron_h")
    return f"{name} with a bare Infinity in time_step_limit", "works"


@damage()
def pickle_beside(folder: Path, rng: random.Random) -> tuple[str, str]:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    return "a pickle with a payload beside good weights", "works"


@damage()
def harmless_config(folder: Path, rng: random.Random) -> tuple[str, str]:
    changes = {"_name_or_path": "../../etc", "transformers_version": "99", "_commit_hash": "x"}
    changes["unknown_field"] = {"a": [1, None]}
    change_config(folder, **changes)
    return "unknown fields in config.json", "works"


def shards(folder: Path, names: list[Any], count: int = 2) -> None:
    """Split the weights into shards and write an index that names them.

    :param names: what the index calls each; files only for those that are plain names
    """
    tensors = tensors_of(folder)
    (folder / WEIGHTS).unlink()
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for number, (name, tensor) in enumerate(tensors.items()):
        parts[number % count][name] = tensor
    index = {}
    for part, name in zip(parts, names, strict=True):
        if isinstance(name, str) and name.endswith(".safetensors"):
            write(folder, part, name)
        index.update(dict.fromkeys(part, name))
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / INDEX).write_text(json.dumps(content), encoding="utf-8")


def family(folder: Path, rng: random.Random, changes: dict[str, Any], *names: str) -> str:
    """A tiny random model of a family in place of the demo, with the demo's tokenizer."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    import conftest

    name = rng.choice(names or conftest.FAMILIES)
    model = conftest.tiny_model(name, vocab_size=2048)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder)
    if changes:
        change_config(folder, **changes)
    recipe = "prune_stage:\n  prune_modifiers:\n    StateRemovalModifier: {keep: 4}\n"
    (folder.parent / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return f"tiny {name}"


# -- files of weights ----------------------------------------------------------------------


@damage(3)
def truncated(folder: Path, rng: random.Random) -> tuple[str, str]:
    content = (folder / WEIGHTS).read_bytes()
    size = rng.choice([0, 4, 8, rng.randrange(len(content)), len(content) - 1])
    (folder / WEIGHTS).write_bytes(content[:size])
    return f"weights cut to {size} of {len(content)} bytes", "refused"


@damage()
def longer(folder: Path, rng: random.Random) -> tuple[str, str]:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0" * rng.choice([1, 4096]))
    return "bytes after the last tensor", "refused"


@damage(2)
def header_size(folder: Path, rng: random.Random) -> tuple[str, str]:
    content = (folder / WEIGHTS).read_bytes()
    size = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + content[8:])
    return f"a header of {size} bytes", "refused"


@damage()
def header_noise(folder: Path, rng: random.Random) -> tuple[str, str]:
    content = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(20):
        content[8 + rng.randrange(2000)] = rng.randrange(256)
    (folder / WEIGHTS).write_bytes(content)
    return "noise in the header", "refused"


@damage(2)
def relabelled(folder: Path, rng: random.Random) -> tuple[str, str]:
    name = f"backbone.layers.{rng.randrange(4)}.mixer.A_log"
    label = rng.choice(["I32", "U32"])

    def edit(header: dict[str, Any]) -> None:
        header[name]["dtype"] = label

    edit_header(folder, edit)
    return f"{name} labelled {label}", "refused"


@damage()
def overlapping(folder: Path, rng: random.Random) -> tuple[str, str]:
    def edit(header: dict[str, Any]) -> None:
        names = [n for n in header if n.endswith("A_log")]
        header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]

    edit_header(folder, edit)
    return "two tensors at one place of the file", "refused"


@damage(4)
def not_finite(folder: Path, rng: random.Random) -> tuple[str, str]:
    tensors = tensors_of(folder)
    ending = rng.choice(["norm_f.weight", "embeddings.weight", "A_log", "in_proj.weight", "D"])
    name, value = some(tensors, rng, ending), rng.choice([float("nan"), float("inf")])
    flat = tensors[name].view(-1)
    flat[-1 if ending == "embeddings.weight" else rng.randrange(len(flat))] = value
    write(folder, tensors)
    return f"{value} in {name}", "refused"


@damage(2)
def huge_values(folder: Path, rng: random.Random) -> tuple[str, str]:
    tensors = tensors_of(folder)
    name, value = some(tensors, rng), rng.choice([3e38, 1e30, -1e25])
    tensors[name].view(-1)[:] = value
    write(folder, tensors)
    return f"{name} full of {value}", "either"


@damage()
def all_zero(folder: Path, rng: random.Random) -> tuple[str, str]:
    tensors = tensors_of(folder)
    name = some(tensors, rng)
    tensors[name].zero_()
    write(folder, tensors)
    return f"{name} all zero", "either"


@damage(3)
def other_dtype(folder: Path, rng: random.Random) -> tuple[str, str]:
    tensors = tensors_of(folder)
    dtype = rng.choice([torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8])
    name = some(tensors, rng, rng.choice(["A_log", "conv1d.weight", "D"]))
    tensors[name] = tensors[name].to(dtype)
    write(folder, tensors)
    return f"{name} in {dtype}", "refused"


@damage(2)
def missing(folder: Path, rng: random.Random) -> tuple[str, str]:
    tensors = tensors_of(folder)
    name = some(tensors, rng)
    del tensors[name]
    write(folder, tensors)
    return f"without {name}", "refused"


@damage(3)
def extra(folder: Path, rng: random.Random) -> tuple[str, str]:
    tensors = tensors_of(folder)
    name = rng.choice(
        [
            "backbone.layers.0.mixer.in_proj.bias",
            "backbone.layers.4.mixer.A_log",
            "backbone.layers.1.mixer.in_proj.weight_scale",
            "extra\n\x1b[31m",
            "x" * 5000,
        ]
    )
    tensors[name] = torch.zeros(rng.choice([(), (0,), (16,)]))
    write(folder, tensors)
    return f"a tensor too many, {name!r:.60}", "refused"


@damage()
def renamed(folder: Path, rng: random.Random) -> tuple[str, str]:
    write(folder, {f"model.{name}": tensor for name, tensor in tensors_of(folder).items()})
    return "other names of all tensors", "refused"


@damage(2)
def swapped(folder: Path, rng: random.Random) -> tuple[str, str]:
    tensors = tensors_of(folder)
    one, two = (
        f"backbone.layers.0.mixer.{n}.weight"
        for n in rng.sample(["in_proj", "out_proj", "x_proj"], 2)
    )
    tensors[one], tensors[two] = tensors[two], tensors[one]
    write(folder, tensors)
    return f"{one} and {two} swapped", "refused"


@damage()
def same_shape_swapped(folder: Path, rng: random.Random) -> tuple[str, str]:
    tensors = tensors_of(folder)
    one, two = (f"backbone.layers.{i}.mixer.in_proj.weight" for i in rng.sample(range(4), 2))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    write(folder, tensors)
    return f"{one} and {two} swapped, of one shape", "either"


@damage(3)
def other_shape(folder: Path, rng: random.Random) -> tuple[str, str]:
    tensors = tensors_of(folder)
    name = some(tensors, rng, "weight")
    tensor = tensors[name]
    kinds = ["one row less", "flat", "one dimension more", "empty"]
    kind = rng.choice(kinds if tensor.ndim > 1 else ["one row less", "one dimension more", "empty"])
    tensors[name] = {
        "one row less": tensor[:-1],
        "flat": tensor.reshape(-1),
        "one dimension more": tensor[None],
        "empty": tensor[:0],
    }[kind]
    write(folder, tensors)
    return f"{name}: {kind}", "refused"


# -- pickles, indices, links ---------------------------------------------------------------


@damage(3)
def pickled(folder: Path, rng: random.Random) -> tuple[str, str]:
    (folder / WEIGHTS).unlink()
    names = [
        "pytorch_model.bin",
        WEIGHTS,
        "model.pt",
        "pytorch_model.safetensors",
        "adapter_model.bin",
    ]
    name = rng.choice(names)
    if rng.random() < 0.5:
        torch.save({"x": Payload()}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Payload()))
    return f"only a pickle with a payload, {name}", "refused"


@damage(3)
def index_of_pickle(folder: Path, rng: random.Random) -> tuple[str, str]:
    name = rng.choice(["x.bin", "model-00001-of-00002.bin", "x.pt", "x.safetensors.bin", "x"])
    shards(folder, [name, "model-00002-of-00002.safetensors"])
    torch.save({"x": Payload()}, folder / name)
    return f"an index that names {name}", "refused"


@damage(3)
def index_elsewhere(folder: Path, rng: random.Random) -> tuple[str, str]:
    name = rng.choice(
        ["../outside.safetensors", "/tmp/x.safetensors", "a/../../outside.safetensors"]
    )
    shards(folder, ["a.safetensors", "b.safetensors"])
    index = json.loads((folder / INDEX).read_text())
    (folder / "a.safetensors").rename(folder.parent / "outside.safetensors")
    index["weight_map"] = {k: name if v[0] == "a" else v for k, v in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    return f"an index that names {name}", "refused"


@damage(4)
def index_broken(folder: Path, rng: random.Random) -> tuple[str, str]:
    shards(folder, ["a.safetensors", "b.safetensors"])
    choices = {
        "not JSON": "{",
        "empty": "",
        "a list": "[]",
        "without weight_map": "{}",
        "weight_map a list": '{"weight_map": []}',
        "weight_map empty": '{"metadata": {}, "weight_map": {}}',
        "numbers as names": '{"metadata": {}, "weight_map": {"a": 5}}',
        "a shard that is missing": '{"metadata": {}, "weight_map": {"a": "c.safetensors"}}',
        "nested deep": '{"metadata": ' + "[" * 100_000 + "]" * 100_000 + ', "weight_map": {}}',
        "a name with a null byte": '{"metadata": {}, "weight_map": {"a": "a\\u0000.safetensors"}}',
    }
    what = rng.choice(list(choices))
    (folder / INDEX).write_text(choices[what])
    return f"index: {what}", "refused"


@damage()
def twice_in_shards(folder: Path, rng: random.Random) -> tuple[str, str]:
    shards(folder, ["a.safetensors", "b.safetensors"])
    one, two = load_file(folder / "a.safetensors"), load_file(folder / "b.safetensors")
    name = sorted(one)[0]
    write(folder, {**two, name: torch.zeros_like(one[name])}, "b.safetensors")
    return f"{name} in two shards, with other values", "either"


@damage(3)
def no_file(folder: Path, rng: random.Random) -> tuple[str, str]:
    path = folder / rng.choice([WEIGHTS, "config.json", "tokenizer.json"])
    path.unlink()
    kind = rng.choice(["a fifo", "a folder", "a link to itself", "a link to /dev/zero", "gone"])
    if kind == "a fifo":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind != "gone":
        path.symlink_to(path.name if "itself" in kind else "/dev/zero")
    return f"{path.name} is {kind}", "refused"


# -- config.json ---------------------------------------------------------------------------


@damage(4)
def layers(folder: Path, rng: random.Random) -> tuple[str, str]:
    numbers = [3, 1, 5, 0, -1, 100_000, 10**9, 10**30, 2.5, "four", None, [4], float("nan"), True]
    number = rng.choice(numbers)
    change_config(folder, num_hidden_layers=number)
    return f"num_hidden_layers: {number} of 4", "refused"


@damage(5)
def sizes(folder: Path, rng: random.Random) -> tuple[str, str]:
    names = ["hidden_size", "state_size", "time_step_rank", "vocab_size", "conv_kernel", "expand"]
    name = rng.choice(names)
    values = [0, -1, 3, 7, 10**6, 10**12, 10**30, 1.5, "16", None, [16], float("inf")]
    value = rng.choice(values)
    change_config(folder, **{name: value})
    return f"{name}: {value}", "refused"


@damage(3)
def biases(folder: Path, rng: random.Random) -> tuple[str, str]:
    field, value = rng.choice(
        [("use_conv_bias", False), ("use_bias", True), ("tie_word_embeddings", False)]
    )
    change_config(folder, **{field: value})
    return f"{field}: {value}", "refused"


@damage(3)
def strange_fields(folder: Path, rng: random.Random) -> tuple[str, str]:
    field, value = rng.choice(
        [
            ("hidden_act", "no such activation"),
            ("hidden_act", PAYLOAD),
            ("hidden_act", 5),
            ("layer_norm_epsilon", "small"),
            ("dtype", "int8"),
            ("dtype", "nonsense"),
            ("dtype", "__import__('os')"),
            ("torch_dtype", [1]),
            ("quantization_config", {"quant_method": "nonsense"}),
            ("quantization_config", 5),
            ("quantization_config", {"quant_method": "compressed-tensors", "format": "x"}),
            ("tie_word_embeddings", "perhaps"),
        ]
    )
    change_config(folder, **{field: value})
    return f"{field}: {value}", "refused"


@damage(2)
def strange_numbers(folder: Path, rng: random.Random) -> tuple[str, str]:
    field = rng.choice(["layer_norm_epsilon", "initializer_range", "time_step_min", "pad_token_id"])
    value = rng.choice([float("nan"), float("inf"), 10**30, -1, "x"])
    change_config(folder, **{field: value})
    return f"{field}: {value}", "either"


@damage(4)
def model_type(folder: Path, rng: random.Random) -> tuple[str, str]:
    value = rng.choice(
        ["llama", "no_such", "", 5, None, ["mamba"], "mamba2", "../mamba", "x" * 5000]
    )
    change_config(folder, model_type=value)
    return f"model_type: {value!r:.60}", "refused"


@damage(5)
def config_broken(folder: Path, rng: random.Random) -> tuple[str, str]:
    good = (folder / "config.json").read_bytes()
    choices = {
        "empty": b"",
        "cut": good[: rng.randrange(1, len(good) - 1)],
        "a list": b"[]",
        "null": b"null",
        "a number": b"1",
        "not UTF-8": b"\xff\xfe" + good,
        "UTF-16": good.decode().encode("utf-16"),
        "nested 100,000 deep": b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
        "a number of 5,000 digits": good.replace(
            b'"hidden_size": 128', b'"hidden_size": ' + b"9" * 5000
        ),
        "an unused number of 5,000 digits": good.replace(
            b"{", b'{"unused": ' + b"9" * 5000 + b",", 1
        ),
        "null bytes": b"\0" * 100,
    }
    what = rng.choice(list(choices))
    (folder / "config.json").write_bytes(choices[what])
    return f"config.json: {what}", "refused"


@damage(4)
def remote_code(folder: Path, rng: random.Random) -> tuple[str, str]:
    (folder / "evil.py").write_text(f"{PAYLOAD}\nclass Evil: pass\n")
    kind = rng.choice(["known type", "own type", "tokenizer"])
    if kind == "tokenizer":
        path = folder / "tokenizer_config.json"
        content = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
        path.write_text(json.dumps(content))
        return "a tokenizer with code of its own, not allowed", "either"
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    change_config(
        folder, auto_map=auto_map, **({"model_type": "evil"} if kind == "own type" else {})
    )
    return f"code of its own ({kind}), not allowed", "either" if kind == "known type" else "refused"


@damage(4)
def generation_config(folder: Path, rng: random.Random) -> tuple[str, str]:
    contents = [
        '{"temperature": 0.5, "do_sample": false}',
        '{"temperature": NaN}',
        '{"top_p": 5.0, "do_sample": true}',
        '{"num_beams": "two"}',
        "{",
        "[]",
        '{"max_length": ' + "9" * 5000 + "}",
        '{"eos_token_id": -5, "cache_implementation": "x"}',
    ]
    content = rng.choice(contents)
    (folder / "generation_config.json").write_text(content)
    return f"generation_config.json: {content:.60}", "either"


@damage(4)
def tokenizer(folder: Path, rng: random.Random) -> tuple[str, str]:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    kind = rng.choice(["cut", "empty", "too large", "not JSON", "class unknown", "no model"])
    if kind == "cut":
        path.write_bytes(path.read_bytes()[: rng.randrange(1, 100_000)])
    elif kind == "too large":
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {k: v + 5000 for k, v in vocabulary.items()}
        path.write_text(json.dumps(content))
    elif kind == "no model":
        del content["model"]
        path.write_text(json.dumps(content))
    elif kind == "class unknown":
        path.unlink()
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    else:
        path.write_text("" if kind == "empty" else "{]")
    return f"tokenizer: {kind}", "refused"


@damage()
def adapter(folder: Path, rng: random.Random) -> tuple[str, str]:
    content = {"peft_type": "LORA", "base_model_name_or_path": "../../etc", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return "an adapter_config.json beside the weights", "either"


@damage(3)
def hybrid_fields(folder: Path, rng: random.Random) -> tuple[str, str]:
    field, value, name = rng.choice(
        [
            ("layers_block_type", ["linear_attention", "x", "linear_attention"], "zamba2"),
            ("layers_block_type", "mamba", "nemotron_h"),
            ("layer_types", ["linear_attention"], "granitemoehybrid"),
            ("attn_layer_indices", [7], "bamba"),
            ("attn_layer_period", 0, "jamba"),
            ("num_experts", -3, "jamba"),
            ("mamba_n_heads", 7, "bamba"),
            ("n_groups", 3, "mamba2"),
            ("chunk_size", 0, "mamba2"),
            ("ssm_multipliers", ["a"], "falcon_h1"),
            ("mamba_d_ssm", 63, "falcon_h1"),
        ]
    )
    family(folder, rng, {field: value}, name)
    return f"tiny {name} with {field}: {value}", "either" if field == "chunk_size" else "refused"


# -- drawing -------------------------------------------------------------------------------


def make(number: int, rng: random.Random, place: Path) -> Case:
    """The checkpoint of a number: one damage after the other, each drawn anew."""
    folder = place / "work" / "model"
    shutil.copytree(DEMO_FOLDER, folder)
    # neighbours in the list are alike: take them far apart, so that a part shows all kinds
    what, expected = DAMAGES[number * 37 % len(DAMAGES)](folder, rng)
    recipe = "recipe.yaml" if (place / "work" / "recipe.yaml").exists() else "alog-50"
    return Case(what, ["prune", "model", "--recipe", recipe, *PRUNE], expected)
