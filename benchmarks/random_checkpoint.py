"""Checkpoints of published shapes with random weights, written layer by layer.

No more than one layer is in memory, so that a checkpoint may be larger than that.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from harness import ROOT
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from sparsessm_plugin.recipes.pruning import DEMO_MODEL, ModelSource

CONFIGS = ROOT / "tests" / "data" / "published_configs.json"
INDEX = "model.safetensors.index.json"


def config_of(model: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a published config.json with other values in some fields.

    :param model: name on the hub, one of those in ``tests/data``
    """
    configs = json.loads(CONFIGS.read_text(encoding="utf-8"))
    if model not in configs:
        raise SystemExit(f"no config of {model} here; there are {', '.join(configs)}")
    found = {**configs[model], **changes}
    found.pop("auto_map", None)  # transformers has the family itself
    return found


def skeleton_of(config: Mapping[str, Any], folder: Path) -> Any:
    """The model of a config on the meta device.

    :param folder: where the config is written
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ModelSource(str(folder)).load_skeleton().to(torch.bfloat16)


def write_checkpoint(config: Mapping[str, Any], folder: Path, seed: int, device: str) -> int:
    """Write a model of random weights in bfloat16, a file for each layer, with a tokenizer.

    Weights are as transformers makes them anew, so that activations stay numbers.

    :param seed: of the weights
    :param device: that makes them
    :return: bytes of all weights
    """
    torch.manual_seed(seed)
    model = skeleton_of(config, folder)
    model.config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    total = 0
    pieces = list(_pieces(model))
    for number, (names, modules) in enumerate(pieces, 1):
        file = f"model-{number:05}-of-{len(pieces):05}.safetensors"
        tensors = revert_weight_conversion(model, _made(model, names, modules, device))
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    for file in Path(ModelSource(DEMO_MODEL).path).glob("tokenizer*"):
        shutil.copy(file, folder)
    return total


def _pieces(model: Any) -> Iterator[tuple[list[str], list[nn.Module]]]:
    """Names of the tensors of each layer, or of a module beside the layers, and its modules."""
    layers = {
        f"{path}.{child}": layer
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and ".layers." not in f".{path}"
        for child, layer in module.named_children()
    }
    held = list(model.state_dict())
    tied = set(model.all_tied_weights_keys)  # stand once
    for path, layer in layers.items():
        names = [name for name in held if name.startswith(f"{path}.") and name not in tied]
        yield names, list(layer.modules())
    within = {id(m) for layer in layers.values() for m in layer.modules()}
    for path, module in model.named_modules():
        own = [n for n in held if n.rpartition(".")[0] == path and n not in tied]
        if id(module) not in within and own:
            yield own, [module]


@torch.no_grad()
def _made(model: Any, names: list[str], modules: list[nn.Module], device: str) -> dict[str, Tensor]:
    """Random tensors of these names, which leave the model as it was."""
    for module in modules:
        module.to_empty(device=device, recurse=False)
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model._init_weights(module)
    found = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        found[name] = getattr(model.get_submodule(path), leaf).detach().cpu().contiguous()
    for module in modules:
        module.to_empty(device="meta", recurse=False)
    return found
