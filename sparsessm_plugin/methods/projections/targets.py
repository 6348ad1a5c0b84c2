"""Which weights of a model are pruned: projections of mixers, and Linear layers elsewhere."""

import re

from compressed_tensors.utils import match_named_modules
from compressed_tensors.utils.match import match_name
from torch import nn

from sparsessm_plugin.errors import SparseSSMError, shown
from sparsessm_plugin.families import check_not_quantized, find_mixers, router_names
from sparsessm_plugin.families.prunable import (
    PrunableWeight,
    prunable_weights,
    vocabulary_names,
)
from sparsessm_plugin.families.shared_weights import weight_holders
from sparsessm_plugin.methods.projections.settings import ProjectionSettings
from sparsessm_plugin.selection.masks import check_structure, parse_structure


def matching_projections(
    model: nn.Module, settings: ProjectionSettings, who: str
) -> list[PrunableWeight]:
    """What ``targets`` and ``ignore`` leave, checked against the settings, in model order.

    Looks at names and shapes only, so a model on the meta device will do.

    :param model: to look in
    :param settings: with the targets
    :param who: what messages call the method
    :raises SparseSSMError: a target without a projection, the embeddings or lm_head among the
        targets, or settings that do not fit a projection's shape
    """
    check_not_quantized(model)
    adapters = find_mixers(model)
    known = {p.name: p for p in prunable_weights(model)}
    shared = {other: name for name, p in known.items() for other, _ in p.others}
    by_mixer = {a.name: {n for n, p in known.items() if p.mixer == a.name} for a in adapters}

    def named(pattern: str) -> tuple[set[str], set[str]]:
        """Names of projections that a pattern stands for, and of all that it matches."""
        matched = {name for name, _ in match_named_modules(model, [pattern])}
        found = {shared.get(name, name) for name in matched if name in known or name in shared}
        found |= {n for n, p in known.items() if _stands_alone(p, pattern)}
        for name in matched & by_mixer.keys():
            found |= by_mixer[name]
        bare = {n for n, p in known.items() if p.adapter and p.kind == pattern}
        return found | bare, matched

    ignored: set[str] = set()
    for pattern in settings.ignore:
        found, matched = named(pattern)
        if not found and not matched:
            raise SparseSSMError(f"{who}.ignore: {shown(pattern)} matches nothing in the model")
        if not found:
            holders = (m for m in matched if any(n.startswith(f"{m}.") for n in known))
            if name := min(holders, default=None):
                raise SparseSSMError(
                    f"{who}.ignore: {shown(pattern)} matches {name}, which is no projection; for "
                    f"all below it write 're:{re.escape(name)}[.].*'"
                )
        ignored |= found | matched
    names: set[str] = set()
    if not settings.targets:
        # no kernel skips zeros of a depthwise convolution, and n:m costs most there
        dense = ("conv1d",) if parse_structure(settings.mask_structure)[1] else ()
        names = {n for n, p in known.items() if p.adapter and p.kind not in dense}
    never = vocabulary_names(model) if settings.targets else set()
    for target in settings.targets:
        found, matched = named(target)
        vocabulary = never & (matched - ignored)
        if vocabulary:
            name = min(vocabulary)
            raise SparseSSMError(
                f"{who}.targets: {shown(target)} matches {name}, which embeds or predicts "
                f"tokens and is never pruned; add {name!r} to ignore"
            )
        found -= never
        if not found:
            routers = matched & router_names(model)
            if routers:
                raise SparseSSMError(
                    f"{who}.targets: {shown(target)} matches {min(routers)}, which chooses "
                    "experts and is never pruned"
                )
            raise SparseSSMError(
                f"{who}.targets: {shown(target)} matches no projection of a mixer and no "
                f"Linear layer; projections are {', '.join(adapters[0].projections)} of "
                f"{adapters[0].name} and so on"
            )
        names |= found
    projections = [p for name, p in known.items() if name in names - ignored]
    if not projections:
        raise SparseSSMError(f"{who}.ignore: {settings.ignore} leaves no projection")
    _check_fit(model, projections, settings, who)
    return projections


def _check_fit(
    model: nn.Module, projections: list[PrunableWeight], settings: ProjectionSettings, who: str
) -> None:
    holders = weight_holders(model)
    for projection in projections:
        others = set(holders.get(projection.name, ())) - projection.uses.keys()
        if others:
            raise SparseSSMError(
                f"{who}: {projection.name} shares its weight with {min(others)}, which is no "
                f"Linear layer that is pruned; add {projection.name!r} to ignore"
            )
        try:
            check_structure(settings.mask_structure, projection.shape[-1], settings.share)
        except SparseSSMError as error:
            raise SparseSSMError(
                f"{who}: {error} in {projection.name}; add {projection.name!r} to ignore"
            ) from error


def _stands_alone(projection: PrunableWeight, pattern: str) -> bool:
    """Whether a pattern names a projection that is a parameter and no module.

    Such as x_proj_weight of Zamba, which patterns for x_proj of other families name, too.
    """
    if projection.adapter is None or projection.attribute == "weight":
        return False
    names = (projection.name, f"{projection.adapter.name}.{projection.kind}")
    return any(match_name(name, pattern) for name in names)
