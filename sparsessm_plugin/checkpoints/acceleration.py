"""Run 2:4 pruned Linear layers on a GPU's sparse tensor cores, where that is faster.

torch keeps a 2:4 weight as a semi-structured sparse tensor, half of its values and two bits for
where each stood, and multiplies with cuSPARSELt or CUTLASS. Whether that beats the dense
multiplication depends on the layer's shape, on the tokens of a call and on the GPU, so each shape
is measured first.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsessm_plugin.backends.lanes import warming_up
from sparsessm_plugin.errors import SparseSSMError
from sparsessm_plugin.families import iter_mixers

# Microseconds a call, of several calls made one after the other.
Timer = Callable[[Sequence[Callable[[], Any]]], float]
# From a padded weight to the same weight as a sparse tensor.
Pack = Callable[[Tensor], Tensor]

_DTYPES = (torch.bfloat16, torch.float16)
_ROWS = 32  # outputs are filled up to a multiple, as both libraries need it
_COLUMNS = 16  # what must divide the inputs; CUTLASS wants more, and is left out where it does
_CAPABILITY = (8, 0)  # the first GPUs with sparse tensor cores
_ROUNDS = 5  # dense and sparse take turns, and the medians count
_LEAST_CALLS = 16  # of a round
_MOST_COPIES = 32
_TOLERANCE = 0.02  # relative error of the outputs; half precision makes a tenth of it
_NOT_2_OF_4 = "not 2 zeros in every 4 inputs"


class SemiStructuredLinear(nn.Module):
    """A Linear layer for inference whose 2:4 weight is kept without its zeros.

    Its state dict holds the dense weight, so that a model with such layers is saved as it was.

    :param linear: the layer to stand in for
    :param pack: makes the sparse tensor
    """

    def __init__(self, linear: nn.Linear, pack: Pack):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        filling = -linear.out_features % _ROWS
        weight = F.pad(linear.weight.detach(), (0, 0, 0, filling)).contiguous()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor")
            self.weight = nn.Parameter(pack(weight), requires_grad=False)
        bias = linear.bias
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(F.pad(bias.detach(), (0, filling)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        # mixers hand over transposed tensors, whose strides the libraries do not take
        rows = x.reshape(-1, self.in_features).contiguous()
        y = F.linear(rows, self.weight, self.bias)
        return y.reshape(*x.shape[:-1], -1)[..., : self.out_features]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}weight"] = self.weight.to_dense()[: self.out_features]
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias[: self.out_features]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


@dataclass(frozen=True)
class ShapeTiming:
    """What layers of one shape take, dense and sparse.

    :param out_features: outputs
    :param in_features: inputs
    :param bias: whether there is one
    :param tokens: token counts that were measured: batch x length
    :param dense_us: microseconds a call at each
    :param sparse_us: likewise by library
    :param failed: libraries that could not multiply, and why
    :param layers: names of the layers
    """

    out_features: int
    in_features: int
    bias: bool
    tokens: tuple[int, ...]
    dense_us: tuple[float, ...]
    sparse_us: Mapping[str, tuple[float, ...]]
    failed: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    def ratios(self, library: str) -> tuple[float, ...]:
        """How many times as fast as dense, at each token count."""
        pairs = zip(self.dense_us, self.sparse_us[library], strict=True)
        return tuple(dense / sparse for dense, sparse in pairs)

    def ratio(self, library: str) -> float:
        """Geometric mean over the token counts, so that each counts alike."""
        return statistics.geometric_mean(self.ratios(library))

    @property
    def fastest(self) -> str | None:
        """The library with the highest ratio; None if none could multiply."""
        return max(self.sparse_us, key=self.ratio, default=None)

    @property
    def choice(self) -> str:
        """The library to use, or ``dense`` where no library is faster."""
        fastest = self.fastest
        return fastest if fastest is not None and self.ratio(fastest) > 1.0 else "dense"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a report."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "bias": self.bias,
            "tokens": list(self.tokens),
            "dense_us": list(self.dense_us),
            "sparse_us": {name: list(times) for name, times in self.sparse_us.items()},
            "ratio": {name: self.ratio(name) for name in self.sparse_us},
            "choice": self.choice,
            "failed": dict(self.failed),
            "layers": list(self.layers),
        }

    def __str__(self) -> str:
        name = f"{self.out_features} x {self.in_features}, {len(self.layers)} layers: "
        if self.fastest is None:
            return f"{name}dense; " + "; ".join(f"{k}: {v}" for k, v in self.failed.items())
        times = ", ".join(
            f"{tokens} tokens {dense:.1f} us dense, {sparse:.1f} us sparse"
            for tokens, dense, sparse in zip(
                self.tokens, self.dense_us, self.sparse_us[self.fastest], strict=True
            )
        )
        return f"{name}{self.choice} ({times}; x {self.ratio(self.fastest):.2f})"


@dataclass(frozen=True)
class AccelerationReport:
    """What :func:`accelerate` did.

    :param shapes: every shape of 2:4 layers, measured
    :param left_dense: Linear layers that were not measured, and why
    """

    shapes: tuple[ShapeTiming, ...]
    left_dense: Mapping[str, str]

    @property
    def accelerated(self) -> tuple[str, ...]:
        """Names of the layers that are sparse now."""
        return tuple(n for s in self.shapes if s.choice != "dense" for n in s.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a report."""
        return {
            "shapes": [shape.to_dict() for shape in self.shapes],
            "left_dense": dict(self.left_dense),
        }

    def __str__(self) -> str:
        lines = [str(shape) for shape in self.shapes]
        reasons = list(self.left_dense.values())
        lines += [f"dense: {reasons.count(r)} layers: {r}" for r in dict.fromkeys(reasons)]
        return "\n".join(lines)


@torch.no_grad()
def accelerate(
    model: nn.Module,
    tokens: Sequence[int] = (4096,),
    *,
    cuda_graphs: bool = False,
    timer: Timer | None = None,
) -> AccelerationReport:
    """Replace 2:4 Linear layers by semi-structured sparse ones where these are faster.

    For inference, after pruning (``mask_structure: "2:4"``) and loading: the model is put into eval
    mode and changed in place. dt_proj stays dense, since transformers reads its weight without
    calling it; so do quantized layers, shared weights and whatever has other zeros.

    :param model: on a CUDA device, in bfloat16 or float16
    :param tokens: batch x length of the calls to choose for; in decoding, the batch alone. With
        several, the geometric mean of the ratios decides
    :param cuda_graphs: measure without the time that launching a kernel from Python takes, which is
        what a call costs inside a CUDA graph. Outside, torch may make cuSPARSELt's plan anew for
        every call, which takes about half a millisecond
    :param timer: measures in place of this module's own, for tests
    :return: the measurements of every shape, and what was left dense
    :raises SparseSSMError: no such device, or no layer that could be sparse
    """
    tokens = tuple(tokens)
    if not tokens or not all(isinstance(count, int) and count > 0 for count in tokens):
        raise SparseSSMError(f"tokens must be whole numbers above 0, got {list(tokens)}")
    check_support(model)
    names, left_dense = _two_of_four_layers(model)
    groups: dict[tuple[Any, ...], list[nn.Linear]] = {}
    for linear in names:
        weight = linear.weight
        key = (*weight.shape, linear.bias is not None, weight.dtype, weight.device)
        groups.setdefault(key, []).append(linear)
    model.eval()
    shapes = []
    for linears in groups.values():
        layers = tuple(name for linear in linears for name in names[linear])
        device = linears[0].weight.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            timing, packs = measure(linears[0], tokens, cuda_graphs, timer, layers)
        shapes.append(timing)
        if timing.choice == "dense":
            continue
        for linear in linears:
            sparse = SemiStructuredLinear(linear, packs[timing.choice])
            for name in names[linear]:
                model.set_submodule(name, sparse)
    return AccelerationReport(tuple(shapes), left_dense)


def check_support(model: nn.Module) -> None:
    """Refuse a device without sparse tensor cores.

    :raises SparseSSMError: naming the device and what is needed
    """
    need = "2:4 layers are faster on CUDA GPUs of compute capability 8.0 and newer only"
    devices = {parameter.device for parameter in model.parameters()}
    for device in devices:
        if device.type != "cuda" or torch.version.hip is not None:
            raise SparseSSMError(f"the model is on {device}; {need}")
        capability = torch.cuda.get_device_capability(device)
        if capability < _CAPABILITY:
            raise SparseSSMError(
                f"{torch.cuda.get_device_name(device)} has compute capability "
                f"{capability[0]}.{capability[1]}; {need}"
            )


def is_two_of_four(weight: Tensor) -> bool:
    """Whether every 4 consecutive inputs of every output hold at least 2 zeros.

    :param weight: (out, in)
    """
    if weight.shape[-1] % 4:
        return False
    return bool(((weight == 0).unflatten(-1, (-1, 4)).sum(-1) >= 2).all())


def measure(
    linear: nn.Linear,
    tokens: Sequence[int],
    cuda_graphs: bool = False,
    timer: Timer | None = None,
    layers: tuple[str, ...] = (),
) -> tuple[ShapeTiming, dict[str, Pack]]:
    """Time a layer dense and by every library that can multiply it.

    Weights are read from memory and not from the GPU's cache, as in a model whose other layers
    come between two calls.

    :param linear: a 2:4 layer
    :param tokens: see :func:`accelerate`; likewise the rest
    :param layers: names for the report
    :return: the timing, and how to make the sparse weight for each library
    """
    timer = timer or (time_graph if cuda_graphs else time_calls)
    weight = linear.weight
    factory: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    inputs = [torch.randn(count, linear.in_features, **factory) for count in tokens]
    copies = _copies(weight)
    variants: dict[str, list[nn.Module]] = {"dense": [_copy(linear) for _ in range(copies)]}
    packs: dict[str, Pack] = {}
    failed: dict[str, str] = {}
    for x in inputs:
        timer(_calls(variants["dense"], x))  # the first does not count
    for library, prepare in LIBRARIES.items():
        try:
            pack = prepare(linear, max(inputs, key=len))
            modules: list[nn.Module] = [SemiStructuredLinear(linear, pack) for _ in range(copies)]
            for x in inputs:
                _check_agreement(linear, modules[0], x)
                timer(_calls(modules, x))
        except Exception as error:  # a library may be missing, old, or refuse the shape
            failed[library] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        else:
            packs[library], variants[library] = pack, modules
    times: dict[str, list[float]] = {name: [] for name in variants}
    for x in inputs:
        rounds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(_ROUNDS):
            for name, modules in variants.items():
                rounds[name].append(timer(_calls(modules, x)))
        for name, measured in rounds.items():
            times[name].append(statistics.median(measured))
    timing = ShapeTiming(
        out_features=linear.out_features,
        in_features=linear.in_features,
        bias=linear.bias is not None,
        tokens=tuple(tokens),
        dense_us=tuple(times.pop("dense")),
        sparse_us={name: tuple(measured) for name, measured in times.items()},
        failed=failed,
        layers=layers,
    )
    return timing, packs


def time_calls(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds a call, launched one after the other on the current CUDA device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end) / len(calls)


def time_graph(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds a call, replayed from a CUDA graph on the current CUDA device."""
    with warming_up(torch.device("cuda")):  # workspaces are made before the capture
        calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return time_calls([graph.replay]) / len(calls)


# -- libraries ---------------------------------------------------------------------------


def _cusparselt(linear: nn.Linear, x: Tensor) -> Pack:
    return partial(_compressed, 0)


def _cusparselt_searched(linear: nn.Linear, x: Tensor) -> Pack:
    """With the algorithm that cuSPARSELt's own search finds fastest for these tokens."""
    weight: Any = SemiStructuredLinear(linear, partial(_compressed, 0)).weight
    filled = F.pad(x, (0, 0, 0, -len(x) % 8))  # as torch does before it multiplies
    algorithm = torch._cslt_sparse_mm_search(weight.packed, filled.t(), transpose_result=True)
    return partial(_compressed, int(algorithm))


def _compressed(algorithm: int, weight: Tensor) -> Tensor:
    """For cuSPARSELt, with outputs token by token and not transposed."""
    sparse: Any = torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(weight)
    # torch 2.11 takes neither as an argument, and 2.13 always multiplies the first way
    sparse.fuse_transpose_cusparselt = True
    sparse.alg_id_cusparselt = algorithm
    return sparse


def _cutlass(linear: nn.Linear, x: Tensor) -> Pack:
    return torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense


LIBRARIES: dict[str, Callable[[nn.Linear, Tensor], Pack]] = {
    "cusparselt": _cusparselt,
    "cusparselt, searched": _cusparselt_searched,
    "cutlass": _cutlass,
}


# -- which layers ------------------------------------------------------------------------


def _two_of_four_layers(model: nn.Module) -> tuple[dict[nn.Linear, list[str]], dict[str, str]]:
    """The layers that could be sparse, with all their names, and why the others could not.

    :raises SparseSSMError: there is none
    """
    read_by_weight = {f"{name}.dt_proj" for name, _ in iter_mixers(model)}
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    found: dict[nn.Linear, list[str]] = {}
    left_dense: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear):
            continue
        reason = _why_not(module)
        if reason is None and name in read_by_weight:
            reason = "its weight is read without calling it"
        elif reason is None and len(owners[id(module.weight)]) > 1:
            reason = "shares its weight with another module"
        if reason is None:
            found.setdefault(module, []).append(name)
        else:
            left_dense[name] = reason
    if not found:
        blocked = next(((n, r) for n, r in left_dense.items() if r != _NOT_2_OF_4), None)
        why = f"{blocked[0]}: {blocked[1]}" if blocked else f"every one: {_NOT_2_OF_4}"
        raise SparseSSMError(
            f"no Linear layer of {type(model).__name__} can be made semi-structured sparse "
            f'({why}); prune with mask_structure "2:4" and load in bfloat16'
        )
    return found, left_dense


def _why_not(linear: nn.Linear) -> str | None:
    """Why a layer cannot be sparse, from itself alone."""
    if hasattr(linear, "quantization_scheme"):  # its weight may be packed
        return "it is quantized"
    if not is_two_of_four(linear.weight):
        return _NOT_2_OF_4
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__} may compute something else"
    if linear.weight.dtype not in _DTYPES:
        dtype = str(linear.weight.dtype).removeprefix("torch.")
        return f"{dtype} weights; bfloat16 or float16 are needed"
    if linear.in_features % _COLUMNS:
        return f"{linear.in_features} inputs, which {_COLUMNS} does not divide"
    return None


def _copy(linear: nn.Linear) -> nn.Linear:
    copy = nn.Linear(1, 1, device="meta")
    copy.in_features, copy.out_features = linear.in_features, linear.out_features
    copy.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    copy.bias = linear.bias
    return copy


def _copies(weight: Tensor) -> int:
    """So many that together they do not fit into the GPU's cache."""
    if weight.device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(weight.device).L2_cache_size
    return min(_MOST_COPIES, math.ceil(2 * cache / (weight.numel() * weight.element_size())))


def _calls(modules: Sequence[nn.Module], x: Tensor) -> Sequence[Callable[[], Any]]:
    """Every module in turn, as often as a round needs."""
    return [partial(m, x) for m in modules] * math.ceil(_LEAST_CALLS / len(modules))


def _check_agreement(dense: nn.Linear, sparse: nn.Module, x: Tensor) -> None:
    expected, found = dense(x).float(), sparse(x).float()
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    if not error < _TOLERANCE:
        raise RuntimeError(f"its outputs differ from the dense ones by {error:.1%}")
