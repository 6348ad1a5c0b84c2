"""Tiny random models of every family, calibration batches, and where assets lie."""

import atexit
import functools
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
    NemotronHConfig,
    OlmoHybridConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Zamba2Config,
    ZambaConfig,
)

from sparsessm_plugin.families import find_mixers
from sparsessm_plugin.recurrence import scan
from sparsessm_plugin.recurrence.quantities import (
    DeltaQuantities,
    HeadQuantities,
    MixerQuantities,
)

# Files of about a minute and more begin first: at the end one would keep a worker by itself.
LONG = ("test_distributed.py", "test_interpreter.py", "test_registration.py", "test_cli.py")
VOCAB = 96
# Where transformers' own forward runs: with CUDA kernels installed it refuses tensors on the CPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAMBA1 = ("mamba", "falcon_mamba", "jamba", "zamba")
MAMBA2 = ("mamba2", "bamba", "zamba2", "granitemoehybrid", "falcon_h1", "nemotron_h")
FAMILIES = MAMBA1 + MAMBA2  # of the selective recurrence
# of these, experts that were stored one by one are multiplied from other memory when reloaded
MOE = ("qwen3_5_moe", "qwen3_next")
MOE_ROUNDING = 1e-6
# Of the largest logit: a GPU's libraries choose their kernels, and with them the order of sums, by
# where weights lie and by what a process has bound. On the CPU there is no such choice.
GPU_ROUNDING = 5e-6
# The same where modules round what they multiply: what another order of sums puts on the other side
# of the middle between two values moves by a whole step, in 8 bits by 1/127 of a token's largest,
# and what later layers make of it moves others.
GPU_STEPS = 0.03
# Of sums of products, relative: a GPU makes them, and what they are made of, of numbers that TF32
# has rounded by up to 2^-11, a few times one after the other.
GPU_SUMS = 10 * 2.0**-11
DELTA = ("qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid")  # gated delta nets
DEMO = Path(__file__).parent / "assets" / "mamba-demo-0.7m"


# no example is wrong because a machine was busy
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


def _takes(kernel, x):
    """Whether a fused kernel computes such a tensor: on a GPU, in rows of whole vectors."""
    if not x.is_cuda:
        return False
    if not kernel.__name__.startswith("causal_conv1d_fn"):
        return True
    by_channel = x.stride(1) == 1 and (x.stride(0) % 8 or x.stride(2) % 8)
    return x.shape[1] % 8 == 0 and not by_channel


def _with_torch_beside(kernel, reference):
    @functools.wraps(kernel)
    def chosen(*args, **kwargs):
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        return (kernel if _takes(kernel, x) else reference)(*args, **kwargs)

    return chosen


def _let_kernels_be_left_out():
    """Let transformers use torch for what fused kernels refuse: tiny models and the CPU.

    It binds the kernels when it is imported, for all tensors, and keeps them in closures.
    """
    for family in FAMILIES + DELTA:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for function in vars(module).values():
            code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", 0)
            if not code or not closure:
                continue
            cells = dict(zip(code.co_freevars, closure, strict=True))
            if {"implementation", "torch_function", "is_new_implementation"} <= set(cells):
                kernel = cells["implementation"].cell_contents
                reference = cells["torch_function"].cell_contents
                if kernel is not reference:
                    cells["implementation"].cell_contents = _with_torch_beside(kernel, reference)


if DEVICE == "cuda":
    _let_kernels_be_left_out()


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
# 6 value heads of 12 read 2 key heads of 8
_DELTA = {
    **_HIDDEN,
    **_ATTENTION,
    "num_hidden_layers": 3,
    "layer_types": _LAYERS,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "eos_token_id": 0,
}
_DELTA_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 24,
}
_CONFIGS = {
    "qwen3_5": (Qwen3_5TextConfig, {**_DELTA, "head_dim": 8, "intermediate_size": 48}),
    "qwen3_5_moe": (Qwen3_5MoeTextConfig, {**_DELTA, **_DELTA_EXPERTS, "head_dim": 8}),
    "qwen3_next": (
        Qwen3NextConfig,
        {
            **_DELTA,
            **_DELTA_EXPERTS,
            "head_dim": 8,
            "intermediate_size": 48,
            "mlp_only_layers": [0],
        },
    ),
    "olmo_hybrid": (OlmoHybridConfig, {**_DELTA, "intermediate_size": 48}),
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


def tiny_config(family: str, **changes):
    """The config of :func:`tiny_model`."""
    config, settings = _CONFIGS[family]
    return config(**{**settings, **changes})


def tiny_model(family: str, seed: int = 0, **changes):
    """A random two- to four-layer model whose mixers are not at their initial values."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
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
    return _from_a_folder(model).eval()


def _from_a_folder(model):
    """oneshot() reads the config once more from where the model claims to come from."""
    folder = tempfile.mkdtemp(prefix=f"tiny-{model.config.model_type}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.config.save_pretrained(folder)
    model.config._name_or_path = model.name_or_path = folder
    return model


def with_images(family="qwen3_5", **changes):
    """A language model beside an image encoder."""
    from transformers import AutoModelForImageTextToText, Qwen3_5Config, Qwen3_5MoeConfig

    text = tiny_model(family, **changes).config
    encoder = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    encoder |= {"out_hidden_size": 32, "patch_size": 4}
    tokens = ("image", "video", "vision_start", "vision_end")
    config = {"qwen3_5": Qwen3_5Config, "qwen3_5_moe": Qwen3_5MoeConfig}[family](
        text_config=text.to_dict(),
        vision_config=encoder,
        **{f"{name}_token_id": 90 + i for i, name in enumerate(tokens)},
    )
    model = AutoModelForImageTextToText.from_config(config)
    model.config.architectures = [type(model).__name__]
    return _from_a_folder(model).eval()


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


def without_gpu(device):
    """The environment of a process that computes on this device as this one does.

    Without a GPU in sight transformers binds no fused kernels, which refuse tensors on the CPU.
    """
    return {} if torch.device(device).type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}


def logits_beside(loaded, expected, ids):
    """What a loaded model computes where the expected logits were computed."""
    with torch.no_grad():
        return loaded.to(expected.device)(ids.to(expected.device), use_cache=False).logits


def may_be_off(logits, away=0.0, model=None):
    """How far logits computed anew may be from these: not at all on the CPU.

    :param away: what they may be off there, too
    :param model: that they are of, if it may be quantized
    """
    if not logits.is_cuda:
        return away
    of_largest = GPU_STEPS if model is not None and rounds_inputs(model) else GPU_ROUNDING
    return max(away, of_largest * max(1.0, float(logits.abs().max())))


def rounds_inputs(model):
    """Whether a module is quantized together with what it multiplies."""
    schemes = (getattr(module, "quantization_scheme", None) for module in model.modules())
    return any(scheme is not None and scheme.input_activations is not None for scheme in schemes)


def same_logits(found, expected, model=None):
    """Bit by bit on the CPU, on a GPU within :func:`may_be_off`."""
    return float((found - expected).abs().max()) <= may_be_off(expected, model=model)


def assert_same_sums(found, expected, tolerance):
    """Sums of products, entry by entry on the CPU, and as a whole on a GPU; see GPU_SUMS."""
    if DEVICE == "cpu":
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    else:
        assert found.shape == expected.shape
        assert relative(found.cpu(), expected.cpu()) < GPU_SUMS


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


STOCK = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # in which torch does not import the package
# Imports torch and transformers, which takes seconds, and runs each script in a fork of itself.
FORKS = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    script, arguments, environment, *outputs = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in enumerate(outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.environ.update(environment)
        sys.argv[1:] = arguments
        exec(script, {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _forks():
    command = [sys.executable, "-c", FORKS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **STOCK}, **pipes)


def stock_process(script, *arguments, **environment):
    """:func:`fresh_process` with torch and stock transformers, without the package.

    Nothing but their import is shared with other such processes.
    """
    if DEVICE == "cuda":  # a fork cannot use what its parent has looked at
        return fresh_process(script, *arguments, **environment, **STOCK)
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place, name) for name in ("stdout", "stderr")]
        request = [script, arguments, environment, *map(str, outputs)]
        print(json.dumps(request), file=_forks().stdin, flush=True)
        code = int(_forks().stdout.readline())
        stdout, stderr = (path.read_text(encoding="utf-8") for path in outputs)
    assert code == 0, stderr
    return json.loads(stdout.splitlines()[-1])


RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids, expected = torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval().to(ids.device)
with torch.no_grad():
    logits = model(ids).logits
away = (logits - expected).abs().max()
assert away <= float(sys.argv[3]), away
{more}
print(json.dumps("sparsessm_plugin.modifiers" in sys.modules))
"""


def check_reload(model, saved, more="", away=0.0):
    """A process without the package gets the model's logits, bit by bit, from what was saved.

    :param more: further statements of that process, which has ids and the model
    :param away: how far a logit may be off on the CPU
    """
    ids = torch.randint(1, VOCAB, (2, 15)).to(model.device)
    expected = saved.with_name("expected.pt")
    with torch.no_grad():
        logits = model(ids).logits
    # an offloaded model lies elsewhere than it computes
    torch.save((ids.to(logits.device), logits), expected)
    script, most = RELOAD.replace("{more}", more), may_be_off(logits, away, model)
    assert stock_process(script, saved, expected, most, **without_gpu(logits.device)) is False


RELOAD_ALL = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
for path in sorted(Path(sys.argv[1]).glob("*/config.json")):
    folder = path.parent
    ids, expected, most = torch.load(folder.with_suffix(".pt"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval().to(ids.device)
    with torch.no_grad():
        away = (model(ids, use_cache=False).logits - expected).abs().max()
        assert away <= most, (folder.name, away, most)
        cached = model.generate(ids[:1], max_new_tokens=3, do_sample=False)
        steps = ids[:1]
        for _ in range(cached.shape[1] - steps.shape[1]):
            last = model(steps, use_cache=False).logits[:, -1:]
            steps = torch.cat([steps, last.argmax(-1)], 1)
    assert torch.equal(cached, steps), folder.name
print(json.dumps("sparsessm_plugin.modifiers" in sys.modules))
"""


def save_with_logits(model, folder):
    """Save a model, and beside it what :func:`check_reload_all` compares."""
    model.save_pretrained(folder)
    ids = torch.randint(1, VOCAB, (2, 15), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(ids.to(model.device), use_cache=False).logits
    most = may_be_off(logits, model=model)
    torch.save((ids.to(logits.device), logits, most), folder.with_suffix(".pt"))


def check_reload_all(folder):
    """One process without the package gets the logits of all models, and generates with a cache."""
    assert stock_process(RELOAD_ALL, folder) is False


def logits_of(model, ready):
    """(b, L, vocabulary) of the first of some batches, without a mask."""
    with torch.no_grad():
        return model(input_ids=ready[0]["input_ids"], use_cache=False).logits


# -- helpers of several files -----------------------------------------------------------------


def run(model, modifier, ready=None, **kwargs):
    from llmcompressor import oneshot

    dataset = Loader(ready if ready is not None else batches())
    kwargs.setdefault("processor", tokenizer())
    return oneshot(model=model, recipe=modifier, dataset=dataset, **kwargs)


def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


def nothing_left_behind(model):
    for adapter in find_mixers(model):
        assert not adapter.mixer._forward_pre_hooks
        forward = getattr(vars(adapter.mixer).get("forward"), "__func__", None)
        assert "sparsessm" not in type(forward).__module__
    for file in {type(module).__module__ for module in model.modules()}:
        assert "output_hidden_states" not in vars(sys.modules[file])
    return True


def hooked(model, module_name, ready, output=False):
    """What goes into a module that transformers does call, or what comes out: (b, L, n) each.

    On the CPU, as oneshot() may have moved the model.
    """
    seen = []

    def hook(module, args, result):
        seen.append((result if output else args[0]).detach().cpu())

    handle = model.get_submodule(module_name).register_forward_hook(hook)
    with torch.no_grad():
        for batch in ready:
            model(**batch, use_cache=False)
    handle.remove()
    return seen


def record(monkeypatch, solver="sparsegpt"):
    """What the solver is given, call by call: weight, Hessian, sparsity; copies on the CPU."""
    from sparsessm_plugin.solvers.projections import SOLVERS

    calls, real = [], SOLVERS[solver]

    def wrapped(weight, hessian, sparsity, structure="0:0", **kwargs):
        calls.append((weight.detach().cpu().clone(), hessian.cpu().clone(), sparsity))
        return real(weight, hessian, sparsity, structure, **kwargs)

    monkeypatch.setitem(SOLVERS, solver, replace(real, solve=wrapped))
    return calls


def divergence_from(dense, model, ready):
    """Mean over the real tokens, by torch's own formula."""
    total = count = 0.0
    with torch.no_grad():
        for batch in ready:
            batch = {k: v.to(model.device) for k, v in batch.items()}
            p, q = (
                m(**batch).logits.double().log_softmax(-1) for m in (dense.to(model.device), model)
            )
            each = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
            mask = batch["attention_mask"].bool()
            total, count = total + float(each[mask].sum()), count + int(mask.sum())
    return total / count


def saved_tiny_model(folder, family="mamba", model=None, **changes):
    """A random model on disk, with the demo's tokenizer, whose vocabulary is larger."""
    model = tiny_model(family, **changes) if model is None else model
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder)
    return model


@pytest.fixture
def sparsessm(monkeypatch, capsys):
    """Run the command in this process; returns exit code, stdout and stderr."""
    monkeypatch.setattr("sparsessm_plugin.progress.LINE_EVERY", math.inf)  # whatever runs beside

    from sparsessm_plugin import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparsessm", *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # and not pytest's
        code = 0
        handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(sparsessm, tmp_path):
    """Run the command, check that it fails as it should, return its message."""

    def run(*arguments):
        before = sorted(os.listdir(tmp_path))
        code, stdout, stderr = sparsessm(*arguments)
        assert code not in (0, None)
        assert stdout == ""
        assert sorted(os.listdir(tmp_path)) == before
        lines = [line for line in stderr.splitlines() if line.strip()]
        assert lines[-1].startswith("error: ")
        assert all(line.startswith("warning: ") for line in lines[:-1]), stderr  # of ours
        return lines[-1]

    return run


@pytest.fixture(scope="module")
def demo():
    """The packaged checkpoint and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(DEMO).to(DEVICE).eval()
    return model, AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="session")
def text_file(topics, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics[key] for key in sorted(topics)[:12]), encoding="utf-8")
    return path


STATISTICS = ("state_energy", "transition", "output_error")


def relative(a, b):
    return float(torch.linalg.norm((a - b).double()) / torch.linalg.norm(b.double()))


def random_quantities(batch, length, channels, states, seed=0, masked=False):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    mask = None
    u = normal(batch, length, channels)
    if masked:
        mask = torch.rand(batch, length, generator=g) > 0.3
        mask[0, 0] = False  # never all real
        u = u * mask[..., None]
    return MixerQuantities(
        u=u,
        dt=normal(batch, length, channels).exp() * 0.1,
        A=-normal(channels, states).exp() * 2,
        B=normal(batch, length, states),
        C=normal(batch, length, states),
        D=normal(channels),
        z=normal(batch, length, channels),
        mask=mask,
    )


class Guarded:
    """A Triton kernel that may touch nothing around the tensors it is given.

    Each tensor is copied into the middle of a buffer of NaN (of 255, if whole numbers), which also
    fill what lies between its rows. After the launch they must still be there, and what was read of
    them shows in the result.
    """

    AROUND = 1024  # elements, before and behind

    def __init__(self, kernel):
        self._kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            fenced = {}
            for x in args:
                if isinstance(x, torch.Tensor):
                    fenced[id(x)] = (x, *self._fence(x))
            own = [fenced[id(x)][2] if id(x) in fenced else x for x in args]
            self._kernel[grid](*own, **options)
            for x, buffer, inside in fenced.values():
                x.data.copy_(inside)  # autograd counts what a kernel writes as little as this
                inside.fill_(self._filler(x))
                untouched = buffer.isnan() if x.is_floating_point() else buffer == self._filler(x)
                assert untouched.all()

        return launch

    @staticmethod
    def _filler(x):
        return float("nan") if x.is_floating_point() else 255

    def _fence(self, x):
        if x.dtype == torch.bool:
            raise TypeError("give kernels masks as bytes")
        extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        size = extent + 2 * self.AROUND
        buffer = torch.full((size,), self._filler(x), dtype=x.dtype, device=x.device)
        inside = buffer.as_strided(x.shape, x.stride(), self.AROUND)
        inside.copy_(x.detach())
        return buffer, inside


SCAN_LEAVES = ("u", "dt", "A", "B", "C", "D")


def scan_gradients(scan, quantities, dtype=torch.float32):
    """y, and what each input of the recurrence gets from a loss that weighs every output."""
    leaves = {
        name: getattr(quantities, name).detach().to(dtype, copy=True).requires_grad_(True)
        for name in SCAN_LEAVES
    }
    y = scan(type(quantities)(**leaves, z=quantities.z, mask=quantities.mask))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    (y * weights).sum().backward()
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def random_heads(batch, length, groups=2, per_group=2, P=4, N=5, seed=0, masked=False):
    """The same for the Mamba-2 layout: `groups` times `per_group` heads of P channels."""
    H = groups * per_group
    q = random_quantities(batch, length, H * P, N, seed, masked)
    g = torch.Generator().manual_seed(seed + 1)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    real = 1 if q.mask is None else q.mask[..., None, None]
    return HeadQuantities(
        u=q.u,
        dt=normal(batch, length, H).exp() * 0.1,
        A=-normal(H).exp() * 2,
        B=normal(batch, length, groups, N) * real,
        C=normal(batch, length, groups, N) * real,
        D=normal(H),
        z=q.z,
        mask=q.mask,
    )


def random_delta(batch=2, length=21, G=2, heads=2, dk=5, dv=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    H = G * heads
    return DeltaQuantities(
        q=normal(batch, length, G, dk),
        k=normal(batch, length, G, dk),
        v=normal(batch, length, H, dv),
        beta=normal(batch, length, H).sigmoid(),
        g=-normal(batch, length, H).exp() * 0.3,
        z=normal(batch, length, H * dv),
    )


def one_step_at_a_time(q):
    """The recurrence of the Mamba-2 layout in float64: y and every state, (b, L, D, N)."""
    u, dt, A, B, C, D = (getattr(q, name).double() for name in ("u", "dt", "A", "B", "C", "D"))
    batch, length, channels = u.shape
    H, G = A.shape[0], B.shape[2]
    u = u.view(batch, length, H, channels // H)
    h = u.new_zeros(batch, H, channels // H, B.shape[3])
    outputs, states = [], []
    for t in range(length):
        rows = []
        for i in range(H):
            group = i // (H // G)
            drive = dt[:, t, i, None, None] * u[:, t, i, :, None] * B[:, t, group, None, :]
            rows.append(torch.exp(dt[:, t, i] * A[i])[:, None, None] * h[:, i] + drive)
        h = torch.stack(rows, dim=1)
        read = C[:, t].repeat_interleave(H // G, dim=1)  # (b, H, N)
        y = (h * read[:, :, None]).sum(-1) + D[:, None] * u[:, t]
        outputs.append(y.flatten(1))
        states.append(h.flatten(1, 2))
    return torch.stack(outputs, 1), torch.stack(states, 1)


def module_output(adapter, hidden_states, attention_mask=None):
    """What the module itself computes, on the CPU again."""
    mixer = adapter.mixer.to(DEVICE)
    mask = None if attention_mask is None else attention_mask.to(DEVICE)
    try:
        with torch.no_grad():
            return mixer(hidden_states.to(DEVICE), attention_mask=mask).cpu()
    finally:
        mixer.cpu()


def recomputed(adapter, hidden_states, attention_mask=None, backend=None):
    """The same through the adapter and the scan."""
    with torch.no_grad():
        quantities = adapter.quantities(hidden_states, attention_mask)
        return adapter.output(quantities, scan(quantities, backend=backend))
