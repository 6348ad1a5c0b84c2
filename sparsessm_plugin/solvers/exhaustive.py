"""The best support of a projection with few inputs, by looking at all: a depthwise conv1d has four.

Without the entries P a row w costs at least ``w_P [(H^-1)_PP]^-1 w_P^T`` (Optimal Brain Surgeon
for several weights at once), and the weights that reach it follow in closed form. What is left is
which row gets how many.
"""

from itertools import product

import torch
from torch import Tensor

from sparsessm_plugin.selection.masks import parse_structure
from sparsessm_plugin.solvers.objective import InverseCholesky

MOST_INPUTS = 4


def best_support(
    weight: Tensor,
    inverse: InverseCholesky,
    sparsity: float,
    structure: str,
    allowed: Tensor,
) -> tuple[Tensor, Tensor]:
    """Minimise the dampened objective over all supports.

    Exact for n:m. Unstructured, the rows share what stays along the lower convex hulls of their
    errors: exact but for one row, which may end within a segment of its hull.

    :param weight: (..., out, in) dense, in at most ``MOST_INPUTS``
    :param inverse: of the dampened Hessians (..., in, in)
    :param sparsity: share of zeros over all problems; n:m decides it alone
    :param structure: ``"0:0"`` or ``"n:m"``
    :param allowed: (..., out, in) bool; False for entries that must be zero, which count
    :return: weight and mask, (..., out, in) both
    """
    size = weight.shape[-1]
    dense = weight.double()
    H_inverse = inverse.factor.mT @ inverse.factor
    kept = torch.tensor(list(product((False, True), repeat=size)), device=weight.device)  # (S, in)
    pruned = (~kept).to(dense)
    # (S, ..., in, in): [(H^-1)_PP]^-1 at P, zero elsewhere
    shape = (len(kept), *[1] * (H_inverse.ndim - 2), size, size)
    both = (pruned[:, :, None] * pruned[:, None, :]).view(shape)
    unit = H_inverse.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    within = both * H_inverse / unit + torch.diag_embed(1 - pruned).view(shape)
    K = both * torch.linalg.inv(within) / unit
    errors = ((dense @ K) * dense).sum(-1)  # (S, ..., out)
    forbidden = (kept.view(len(kept), *[1] * (weight.ndim - 1), size) & ~allowed).any(-1)
    errors = errors.masked_fill(forbidden, torch.inf).flatten(1)  # (S, rows)
    n, m = parse_structure(structure)
    if m:
        enough = ((~kept).view(len(kept), -1, m).sum(-1) >= n).all(-1)
        chosen = errors.masked_fill(~enough[:, None], torch.inf).argmin(0)
    else:
        stays = weight.numel() - round(sparsity * weight.numel())
        chosen = _share(errors, kept.sum(-1), min(stays, int(allowed.sum())))
    mask = kept[chosen].view_as(weight)
    K, H_inverse = K.reshape(len(kept), -1, size, size), H_inverse.reshape(-1, size, size)
    problem = torch.arange(len(H_inverse), device=weight.device)
    problem = problem.repeat_interleave(weight.shape[-2])  # of each row
    flat = dense.flatten(0, -2)[:, None]  # (rows, 1, in)
    found = flat - flat @ K[chosen, problem] @ H_inverse[problem]
    return found.view_as(dense).masked_fill(~mask, 0.0), mask


def _share(errors: Tensor, sizes: Tensor, stays: int) -> Tensor:
    """Which support each row gets, so that all together keep a number of entries.

    :param errors: (S, rows) of each support, inf where it is not allowed
    :param sizes: (S,) entries that each keeps
    :param stays: entries that all rows keep
    :return: (rows,) indices of supports
    """
    most = int(sizes.max())
    best = [errors.masked_fill((sizes != k)[:, None], torch.inf).min(0) for k in range(most + 1)]
    values = torch.stack([b.values for b in best])  # (most + 1, rows)
    hull = values.clone()
    for low in range(most + 1):
        for high in range(low + 2, most + 1):
            for k in range(low + 1, high):
                share = (k - low) / (high - low)
                line = values[low] + share * (values[high] - values[low])
                hull[k] = torch.minimum(hull[k], line)
    # what one more entry of a row saves falls with every entry; nothing where none is allowed
    saved = hull[:-1] - hull[1:]
    saved = torch.where(saved.isfinite(), saved.clamp(min=0.0), -torch.inf)
    # of rows that save as much, the last get the entry: what stands first is pruned first
    order = saved.flatten().argsort(stable=True)[max(0, saved.numel() - stays) :]
    counts = torch.zeros(errors.shape[1], dtype=torch.long, device=errors.device)
    rows = order % errors.shape[1]
    counts.scatter_add_(0, rows, torch.ones_like(rows))
    return torch.stack([b.indices for b in best]).gather(0, counts[None])[0]
