"""The room of families: what its catalog says without torch, and what it takes to add one."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from sparsessm_plugin.checkpoints import experts
from sparsessm_plugin.checkpoints.runtimes import runtime_support
from sparsessm_plugin.families import catalog, delta_net, mamba1, mamba2, model, registry
from sparsessm_plugin.families.registry import known_mixers

ADAPTERS = {adapter.family: adapter for adapter in registry._ADAPTERS.values()}


def test_the_catalog_has_the_families_that_have_adapters():
    assert catalog.FAMILIES.keys() == ADAPTERS.keys()
    assert catalog.FAMILIES.keys() == {adapter.family for adapter in model._MODELS.values()}


@pytest.mark.parametrize("name", catalog.FAMILIES)
def test_the_catalog_says_what_adapters_and_transformers_say(name):
    family, adapter = catalog.FAMILIES[name], ADAPTERS[name]
    layouts = {
        "mamba1": mamba1.Mamba1Adapter,
        "mamba2": mamba2.Mamba2Adapter,
        "delta": delta_net.DeltaNetAdapter,
    }
    assert issubclass(adapter, layouts[family.layout])
    assert adapter.state_size_field == family.state_size_field
    theirs = import_module(f"transformers.models.{name}.modeling_{name}")
    (base_class,) = (
        cls
        for cls in vars(theirs).values()
        if inspect.isclass(cls)
        and cls.__module__ == theirs.__name__
        and cls.__name__.endswith("PreTrainedModel")
    )
    # NemotronH looks for the parameter by name, and passes over loaded ones
    reads = "module.out_proj.weight" in inspect.getsource(base_class._init_weights)
    assert family.initialiser == (base_class.__name__ if reads else None)
    # beside an image encoder, transformers goes by the language model's own type
    mappings = map(get_checkpoint_conversion_mapping, (name, f"{name}_text"))
    merging = next(filter(None, mappings), [])
    assert any(map(experts._merges_experts, merging)) == (family.experts == "single")
    assert (family.experts is not None) == ("Experts" in inspect.getsource(theirs))


def test_the_catalog_is_read_without_torch():
    code = (
        "import sys\n"
        "from sparsessm_plugin.families.catalog import FAMILIES\n"
        "assert 'mamba' in FAMILIES and not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"MambaMixer", "Zamba2MambaMixer"} <= set(known_mixers())


def test_a_family_in_the_catalog_is_known_to_every_runtime(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    from torch import ones

    (tmp_path / "config.json").write_text('{"model_type": "toy", "toy_states": 2}')
    save_file({"layers.0.mixer.A_log": ones(4, 2)}, tmp_path / "model.safetensors")
    assert {found.answer for found in runtime_support(tmp_path)} == {"unknown", "no"}
    toy = catalog.Family("mamba1", "toy_states")
    monkeypatch.setitem(catalog.FAMILIES, "toy", toy)
    answers = [found.answer for found in runtime_support(tmp_path)]
    # vLLM on the CPU has no Mamba-1; llama.cpp and mlx-lm know their families by name
    assert answers == ["yes", "yes", "yes", *["no"] * 8]
    (tmp_path / "config.json").write_text('{"model_type": "toy", "toy_states": 3}')
    assert "states 3 states" in runtime_support(tmp_path)[0].reasons[0]
