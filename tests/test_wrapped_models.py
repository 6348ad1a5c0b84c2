"""Models with something around them, models with code of their own, and models nobody needs."""

import copy
import gc
import json
import weakref

import pytest
import torch
from conftest import DEMO, Loader, batches, state, stock_process, tiny_model, without_gpu
from llmcompressor import active_session, oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import save_file
from transformers import AutoTokenizer

from sparsessm_plugin import (
    ChannelRemovalModifier,
    GradientMagnitudeModifier,
    SensitivitySparseGPTModifier,
    SparseGPTQModifier,
    SparseSSMModifier,
    StateRemovalModifier,
)
from sparsessm_plugin.checkpoints.loading import check_unwrapped
from sparsessm_plugin.cli import app
from sparsessm_plugin.recipes.pruning import ModelSource

OURS = {
    "states": lambda: StateRemovalModifier(keep=4),
    "channels": lambda: ChannelRemovalModifier(sparsity=0.5, multiple_of=8),
    "projections": lambda: SensitivitySparseGPTModifier(sparsity=0.5),
    "all": lambda: GradientMagnitudeModifier(sparsity=0.5),
    "A_log": lambda: SparseSSMModifier(sparsity=0.5),
    "quantized": lambda: SparseGPTQModifier(
        targets=["Linear"], scheme="W8A8", ignore=["lm_head", "re:.*dt_proj$"]
    ),
}
UPSTREAM = {
    "SparseGPT": lambda: SparseGPTModifier(
        sparsity=0.5, targets=["re:.*in_proj$"], ignore=["lm_head"]
    ),
    "W8A8": lambda: QuantizationModifier(
        targets=["Linear"], scheme="W8A8", ignore=["lm_head", "re:.*dt_proj$"]
    ),
}


def run(model, modifier, **options):
    oneshot(model=model, recipe=modifier, dataset=Loader(batches()), **options)


def with_adapters(model):
    """As PEFT leaves a model; its tests need no PEFT."""
    model.peft_config = {"default": object()}
    return model


def with_a_layer_of_peft(model):
    class Linear(torch.nn.Linear):
        __module__ = "peft.tuners.lora.layer"

    model.backbone.layers[1].mixer.in_proj = Linear(32, 128, bias=False)
    return model


def compiled_in_place(model):
    model.compile()
    return model


def on_meta(model):
    return copy.deepcopy(model).to("meta")


WRAPPED = {
    "on meta": (on_meta, "the model stands on the meta device"),
    "adapters": (with_adapters, "merge the adapters first"),
    "a layer": (with_a_layer_of_peft, "backbone.layers.1.mixer.in_proj is one of them"),
    "compiled": (torch.compile, "the model is compiled by torch.compile"),
    "compiled in place": (compiled_in_place, "the model is compiled by torch.compile"),
}


@pytest.mark.parametrize("modifier", OURS)
@pytest.mark.parametrize("wrapping", WRAPPED)
def test_what_is_around_a_model_is_named_before_anything_changes(wrapping, modifier):
    wrap, said = WRAPPED[wrapping]
    model = tiny_model("mamba")
    wrapped = wrap(model)
    before = state(model)
    with pytest.raises(ValueError, match=said) as caught:
        run(wrapped, OURS[modifier]())
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_adapters_of_peft_itself():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["in_proj"], r=2)
    wrapped = peft.get_peft_model(tiny_model("mamba"), config)
    injected = tiny_model("mamba")
    injected.add_adapter(config)
    for model in (wrapped, injected):
        with pytest.raises(ValueError, match="merge the adapters first"):
            run(model, StateRemovalModifier(keep=4))
    check_unwrapped(wrapped.merge_and_unload())


def test_a_folder_of_adapters(tmp_path):
    tiny_model("mamba").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds PEFT adapters; merge the adapters first"):
        ModelSource(str(tmp_path)).load()


@pytest.mark.parametrize("pipeline", ["sequential", "basic", "datafree", "independent"])
def test_models_are_let_go(pipeline):
    """LLM Compressor's session holds the last model; all before it are nobody's."""
    makers = {**OURS, **UPSTREAM}
    if pipeline == "datafree":
        makers = {"A_log": lambda: SparseSSMModifier(sparsity=0.5, saliency="magnitude")}
    models = {}
    for name, make in makers.items():
        model = tiny_model("mamba")
        models[name] = weakref.ref(model)
        run(model, make(), pipeline=pipeline)
        del model
    # without a modifier of ours it is the next run with one that lets go
    run(tiny_model("mamba"), SparseSSMModifier(sparsity=0.5, saliency="magnitude"))
    active_session().reset()
    gc.collect()
    assert [name for name, model in models.items() if model() is not None] == []


CUSTOM = """
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, GenerationMixin


class CustomConfig(MambaConfig):
    model_type = "custom_mamba"


class CustomForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = CustomConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = MambaForCausalLM(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, use_cache=None, **kwargs):
        return self.inner(input_ids, attention_mask=attention_mask, use_cache=use_cache)
"""


@pytest.fixture
def custom(tmp_path):
    """A folder with a model whose classes stand in a file of its own and hold a Mamba."""
    folder = tmp_path / "custom"
    model = tiny_model("mamba", vocab_size=2048, tie_word_embeddings=False)
    tensors = {f"inner.{name}": value for name, value in model.state_dict().items()}
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "custom_mamba",
        "architectures": ["CustomForCausalLM"],
        "auto_map": {
            "AutoConfig": "custom.CustomConfig",
            "AutoModelForCausalLM": "custom.CustomForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text(CUSTOM)
    return folder


RELOAD = """
import json, sys
from transformers import AutoModelForCausalLM
found = []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    mixer = model.inner.backbone.layers[0].mixer
    assert model(model.dummy_inputs["input_ids"]).logits.isfinite().all()
    zeros = int((mixer.A_log == 0).sum())
    found.append([type(model).__name__, list(mixer.A_log.shape), zeros])
print(json.dumps(found))
"""


def test_models_with_code_of_their_own_are_pruned_and_saved(custom, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Some words to calibrate on, and some more of them. " * 60)
    expected = {"alog-50": [[64, 8], 256], "state-50": [[64, 4], 0]}
    for recipe in expected:
        arguments = ["--recipe", recipe, "--calibration", text, "--output", tmp_path / recipe]
        arguments += ["--num-samples", 4, "--max-seq-length", 32, "--trust-remote-code"]
        with pytest.raises(SystemExit) as done:
            app(["prune", str(custom), *map(str, arguments)])
        assert done.value.code == 0, capsys.readouterr().err
    places = [tmp_path / recipe for recipe in expected]
    found = stock_process(RELOAD, *places, **without_gpu("cpu"))
    assert found == [["CustomForCausalLM", *sizes] for sizes in expected.values()]
