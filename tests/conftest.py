"""Tiny random models of every family, calibration batches, and where assets lie."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
    NemotronHConfig,
    Zamba2Config,
    ZambaConfig,
)

import sparsessm_plugin
from sparsessm_plugin.families import find_mixers

VOCAB = 96
# Where transformers' own forward runs: with CUDA kernels installed it refuses tensors on the CPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAMBA1 = ("mamba", "falcon_mamba", "jamba", "zamba")
MAMBA2 = ("mamba2", "bamba", "zamba2", "granitemoehybrid", "falcon_h1", "nemotron_h")
FAMILIES = MAMBA1 + MAMBA2
DEMO = Path(sparsessm_plugin.__file__).parent / "assets" / "mamba-demo-0.7m"


_HIDDEN = {"vocab_size": VOCAB, "hidden_size": 32}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
# the Mamba-2 part as Bamba and the families after it name it: 8 heads of 8, in 2 groups
_HEADS = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
}
_CONFIGS = {
    "mamba": (
        MambaConfig,
        {**_HIDDEN, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    ),
    "falcon_mamba": (
        FalconMambaConfig,
        {**_HIDDEN, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    ),
    "jamba": (
        JambaConfig,
        {
            **_HIDDEN,
            **_ATTENTION,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "use_mamba_kernels": False,
        },
    ),
    "zamba": (
        ZambaConfig,
        {
            **_HIDDEN,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            # transformers takes a shared block for granted
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "n_mamba_heads": 2,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "mamba2": (
        Mamba2Config,
        {
            **_HIDDEN,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "bamba": (
        BambaConfig,
        {
            **_HIDDEN,
            **_ATTENTION,
            **_HEADS,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
        },
    ),
    "zamba2": (
        Zamba2Config,
        {
            **_HIDDEN,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 2,
            "chunk_size": 16,
            "use_mamba_kernels": False,
        },
    ),
    "granitemoehybrid": (
        GraniteMoeHybridConfig,
        {
            **_HIDDEN,
            **_ATTENTION,
            **_HEADS,
            "intermediate_size": 48,
            "shared_intermediate_size": 48,
            "num_local_experts": 2,
            "num_hidden_layers": 3,
            "layer_types": _LAYERS,
        },
    ),
    "falcon_h1": (
        FalconH1Config,
        {
            **_HIDDEN,
            **_ATTENTION,
            **_HEADS,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "mamba_d_ssm": 64,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "ssm_in_multiplier": 0.8,
            "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        },
    ),
    "nemotron_h": (
        NemotronHConfig,
        {
            **_HIDDEN,
            **_ATTENTION,
            "head_dim": 8,
            "intermediate_size": 48,
            "layers_block_type": ["linear_attention", "full_attention", "linear_attention", "mlp"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "use_mamba_kernels": False,
        },
    ),
}


# experts in the families that have them; granitemoehybrid has some in every layer
EXPERTS = {
    "granitemoehybrid": {},
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
        "n_group": 1,
        "topk_group": 1,
    },
}


def state(model):
    """Weights and buffers by name, on the CPU, wherever oneshot() has left the model."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def tiny_model(family: str, seed: int = 0, **changes):
    """A random two- to four-layer model whose mixers are not at their initial values."""
    torch.manual_seed(seed)
    config, settings = _CONFIGS[family]
    model = AutoModelForCausalLM.from_config(config(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", ".D", "dt_proj.bias", "_bias", "norm.weight")):
                parameter += 0.3 * torch.randn_like(parameter)
            elif name.endswith("x_proj_weight"):  # made so small that states would hardly count
                parameter.normal_().div_(parameter.shape[-1] ** 0.5)
            elif parameter.ndim > 1:
                parameter += 0.2 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and not parameter.any():  # as transformers makes them
                parameter += 0.3 * torch.randn_like(parameter)
    # oneshot() reads the config once more from where the model claims to come from
    folder = tempfile.mkdtemp(prefix=f"tiny-{family}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.config.save_pretrained(folder)
    model.config._name_or_path = model.name_or_path = folder
    return model.eval()


def projections(model):
    """Every projection of the mixers by the name that reports give it; each has a ``weight``."""
    return {
        f"{adapter.name}.{projection.path}": projection
        for adapter in find_mixers(model)
        for projection in map(adapter.projection, adapter.projections)
    }


def x_projs(mixer):
    """What makes dt, B and C in the Mamba-1 layout: (R + 2 N, channels) for each head."""
    stacked = getattr(mixer, "x_proj_weight", None)
    return [mixer.x_proj.weight] if stacked is None else list(stacked)


def silence_states(adapter, states):
    """Let states of the Mamba-1 layout add nothing."""
    R, N = adapter.sizes.time_step_rank, adapter.sizes.state_size
    for i in states:
        x_projs(adapter.mixer)[i // N][[R + i % N, R + N + i % N]] = 0


def silence_channels(adapter, channels):
    """Let channels of the Mamba-1 layout add nothing."""
    of_heads = x_projs(adapter.mixer)
    for i in channels:
        width = of_heads[0].shape[1]
        of_heads[i // width][:, i % width] = 0
        adapter.mixer.out_proj.weight[:, i] = 0


def batches(count: int = 3, batch: int = 2, length: int = 24, seed: int = 1, padded: bool = False):
    """Calibration batches; padded ones have real tokens first and padding after."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(1, VOCAB, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            for row in range(batch):
                cut = int(torch.randint(length // 2, length, (1,), generator=generator))
                mask[row, cut:] = 0
                ids[row, cut:] = 0
        result.append({"input_ids": ids, "attention_mask": mask})
    return result


class Loader(torch.utils.data.DataLoader):
    """Serves ready-made batches to oneshot."""

    def __init__(self, ready):
        super().__init__(ready, batch_size=None)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=MAMBA1)
def mamba1_family(request):
    """The families with an entry of A_log for every channel and state."""
    return request.param


@pytest.fixture(params=MAMBA2)
def mamba2_family(request):
    """The families with one A_log a head."""
    return request.param


@pytest.fixture(scope="session")
def assets():
    """The folder with trained checkpoints and texts, or a skip."""
    root = Path(os.environ.get("SPARSESSM_ASSETS", Path(__file__).parents[2] / "shared"))
    if not (root / "models").is_dir():
        pytest.skip(f"no checkpoints in {root}; set SPARSESSM_ASSETS to run this test")
    return root


@pytest.fixture(scope="session")
def topics():
    """Documentation topics of the running interpreter: text that is always there."""
    from pydoc_data.topics import topics

    return topics


def fresh_process(script, *arguments, **environment):
    """What a script prints last in a process of its own, read as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
ids, expected = torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval().to(ids.device)
with torch.no_grad():
    logits = model(ids).logits
assert torch.equal(logits, expected), (logits - expected).abs().max()
{more}
assert "sparsessm_plugin.modifiers" not in sys.modules
"""


def check_reload(model, saved, more=""):
    """A process without the package gets the model's logits, bit by bit, from what was saved.

    :param more: further statements of that process, which has ids and the model
    """
    ids = torch.randint(1, VOCAB, (2, 15)).to(model.device)
    expected = saved.with_name("expected.pt")
    with torch.no_grad():
        torch.save((ids, model(ids).logits), expected)
    subprocess.run(
        [sys.executable, "-c", RELOAD.replace("{more}", more), str(saved), str(expected)],
        check=True,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
