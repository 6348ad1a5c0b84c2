"""Tensors in the types in which the checkpoint that they come from stores them.

A checkpoint may store some tensors in 16 bits where its config says float32; transformers loads all
of them in the config's type and would save them so, in up to twice the bytes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsessm_plugin.checkpoints.loading import INDEX, read_header
from sparsessm_plugin.files import write_bytes

HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
_PLACE = "_stored_at"  # instance attribute of a layer


def note_places(model: nn.Module) -> None:
    """Let every layer know its place in the checkpoint, which the removal of others changes.

    :param model: as it was loaded
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for place, layer in enumerate(module):
                vars(layer)[_PLACE] = place


def at_new_places(model: nn.Module, types: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Types by the names that tensors have once layers before them are gone.

    :param model: whose layers :func:`note_places` has seen
    :param types: by the names of the checkpoint that it was loaded from
    """
    from compressed_tensors.quantization.quant_config import _map_to_checkpoint_names

    names = dict(types)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and m]
    # lists within layers come after the list of layers, and have its new numbers in their names
    firsts = _map_to_checkpoint_names(model, [f"{name}.0" for name, _ in lists])
    for first, (_, layers) in zip(firsts, lists, strict=True):
        prefix = first.removesuffix("0")
        places = {vars(layer).get(_PLACE, i): i for i, layer in enumerate(layers)}
        renamed = {}
        for name, kind in names.items():
            place, dot, rest = name.removeprefix(prefix).partition(".")
            if not (name.startswith(prefix) and dot and place.isdecimal()):
                renamed[name] = kind
            elif int(place) in places:  # and not of a layer that is gone
                renamed[f"{prefix}{places[int(place)]}.{rest}"] = kind
        names = renamed
    return names


@torch.no_grad()
def round_weights(model: Any, types: Mapping[str, torch.dtype]) -> None:
    """Round float32 weights, in place, to what their checkpoint's types can say.

    So that what is measured afterwards is what :func:`store_as` stores. Quantized modules keep
    their weights, which lie on a grid already; a value that would overflow lets its tensor be.

    :param model: transformers model
    :param types: by the names of the checkpoint
    """
    from compressed_tensors.offload import update_offload_parameter
    from compressed_tensors.quantization.quant_config import _map_to_checkpoint_names

    from sparsessm_plugin.families.in_turn import parameter_names

    names = parameter_names(model)
    stored_names = _map_to_checkpoint_names(model, names)
    for name, stored in zip(names, stored_names, strict=True):
        kind = types.get(stored, types.get(name))
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        quantized = getattr(module, "quantization_scheme", None) is not None
        if kind is None or quantized:
            continue
        weight = getattr(module, leaf)
        if weight.dtype != torch.float32 or weight.is_meta:
            continue
        rounded = weight.to(kind).to(weight.dtype)
        if torch.isfinite(rounded).all() and not torch.equal(rounded, weight):
            update_offload_parameter(module, leaf, rounded)


def store_as(folder: Path, types: Mapping[str, torch.dtype]) -> None:
    """Store float32 tensors of a saved model in these types, where that changes no value.

    :param folder: with safetensors files, written anew one after the other
    :param types: by the names of the checkpoint
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    saved = 0
    for file in sorted(folder.glob("*.safetensors")):
        header = read_header(file)
        wanted = {n for n, entry in header.items() if entry["dtype"] == "F32" and n in types}
        if wanted:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
            tensors = load_file(file)
            for name in wanted:
                smaller = tensors[name].to(types[name])
                if torch.equal(smaller.to(torch.float32), tensors[name]):
                    saved += tensors[name].nbytes - smaller.nbytes
                    tensors[name] = smaller
            part = file.with_name(f"{file.name}.part")
            save_file(tensors, part, metadata)
            os.replace(part, file)
    index = folder / INDEX
    if saved and index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        if "total_size" in content.get("metadata", {}):
            content["metadata"]["total_size"] -= saved
            write_bytes(index, json.dumps(content, indent=2).encode() + b"\n")
