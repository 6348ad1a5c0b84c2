"""What is added by one file: registered here, used through a recipe, and taken out again."""

import pytest
import torch
from conftest import batches, projections, run, tiny_model
from pydantic import ValidationError

from sparsessm_plugin import SensitivitySparseGPTModifier, SparseSSMModifier, find_mixers
from sparsessm_plugin.criteria.channels import CHANNEL_CRITERIA, register_channel_criterion
from sparsessm_plugin.criteria.scores import SALIENCIES, register_saliency
from sparsessm_plugin.criteria.states import STATE_CRITERIA, register_state_criterion
from sparsessm_plugin.families.mamba import MambaAdapter
from sparsessm_plugin.families.registry import _ADAPTERS, register_adapter
from sparsessm_plugin.recipes import parse_recipe
from sparsessm_plugin.registry import Registry
from sparsessm_plugin.selection.masks import choose_mask
from sparsessm_plugin.solvers.objective import check, finish
from sparsessm_plugin.solvers.projections import SOLVERS, register_solver

RECIPE = "prune_stage:\n  prune_modifiers:\n    {modifier}: {{sparsity: 0.5, {fields}}}\n"


def of_recipe(modifier, fields):
    """The modifier of a recipe, as it is read from YAML."""
    (found,) = parse_recipe(RECIPE.format(modifier=modifier, fields=fields), "a test").modifiers
    return found


def test_a_solver():
    @register_solver(updates=False, needs_hessian=False)
    def largest(weight, hessian, sparsity, structure="0:0", *, keep=None, **_):
        """Prune the largest weights: nobody would, so nothing else can have done it."""
        check(weight, hessian, keep)
        mask = choose_mask(weight.abs().max() - weight.abs(), sparsity, structure, keep=keep)
        return finish(weight, weight, mask, hessian)

    try:
        modifier = of_recipe("SensitivitySparseGPTModifier", "solver: largest")
        assert modifier.allocation == "uniform"
        assert modifier.target_output == "own"
        assert not modifier.requires_calibration_data
        model = tiny_model("mamba")
        dense = {name: m.weight.detach().clone() for name, m in projections(model).items()}
        run(model, modifier, batches())
        for name, module in projections(model).items():
            pruned = module.weight.detach().cpu()
            gone = dense[name][pruned == 0].abs()
            assert len(gone) == round(0.5 * dense[name].numel())
            assert gone.min() >= pruned.abs().max()
        with pytest.raises(ValidationError, match="needs new weights"):
            SensitivitySparseGPTModifier(sparsity=0.5, solver="largest", target_output="mixer")
    finally:
        del SOLVERS["largest"]
    with pytest.raises(ValidationError, match="'largest' is not known; known: alps, magnitude"):
        SensitivitySparseGPTModifier(sparsity=0.5, solver="largest")


def test_a_criterion_for_A_log():
    @register_saliency("fastest", source="a test")
    def fastest(inputs):
        """The states that forget fastest go."""
        return -inputs.A_log

    try:
        modifier = of_recipe("SparseSSMModifier", "saliency: fastest")
        assert not modifier.requires_calibration_data
        model = tiny_model("mamba")
        dense = [a.A_log.detach().clone() for a in find_mixers(model)]
        run(model, modifier, batches())
        for before, adapter in zip(dense, find_mixers(model), strict=True):
            kept = adapter.A_log.detach().cpu() == before
            assert int((~kept).sum()) == round(0.5 * before.numel())
            assert before[~kept].min() >= before[kept].max()
        with pytest.raises(ValidationError, match="has no meaning for saliency 'fastest'"):
            SparseSSMModifier(sparsity=0.5, saliency="fastest", aggregation="mean")
    finally:
        del SALIENCIES["fastest"]
    with pytest.raises(ValidationError, match="'fastest' is not known; known: hessian"):
        SparseSSMModifier(sparsity=0.5, saliency="fastest")


@pytest.mark.parametrize("of", ["states", "channels"])
def test_a_criterion_for_what_is_removed(of):
    """The first index goes whatever the weights are."""
    table = STATE_CRITERIA if of == "states" else CHANNEL_CRITERIA
    if of == "states":

        @register_state_criterion("in_order")
        def in_order(inputs):
            return torch.arange(inputs.B_norm.shape[1]).expand_as(inputs.B_norm)

        text = ("StateRemovalModifier", "saliency: in_order, compensate: none")
    else:

        @register_channel_criterion("in_order")
        def in_order(adapter, axis):
            return torch.arange(adapter.axis_length(axis))

        text = ("ChannelRemovalModifier", "saliency: in_order, compensate: none, multiple_of: 8")

    try:
        modifier = of_recipe(*text)
        assert not modifier.requires_calibration_data
        model = tiny_model("mamba")
        dense = [a.A_log.detach().clone() for a in find_mixers(model)]
        run(model, modifier, batches())
        for before, adapter in zip(dense, find_mixers(model), strict=True):
            D, N = before.shape
            rest = before[:, N // 2 :] if of == "states" else before[D // 2 :]
            assert torch.equal(adapter.A_log.detach().cpu(), rest)
    finally:
        del table["in_order"]
    with pytest.raises(ValidationError, match="'in_order' is not known; known: "):
        type(modifier)(sparsity=0.5, saliency="in_order")


def test_a_family():
    """A mixer of a class of its own, whose adapter stands in one class."""
    class_name, seen = "ToyMixer", []

    @register_adapter
    class ToyAdapter(MambaAdapter):
        family = "toy"
        mixer_class = class_name

        def quantities(self, hidden_states, attention_mask=None):
            seen.append(self.name)
            return super().quantities(hidden_states, attention_mask)

    try:
        model = tiny_model("mamba")
        mixers = [a.mixer for a in find_mixers(model)]
        toy = type(class_name, (type(mixers[0]),), {})
        for mixer in mixers:
            mixer.__class__ = toy
        assert {a.family for a in find_mixers(model)} == {"toy"}
        modifier = of_recipe("SparseSSMModifier", "saliency: output_error")
        run(model, modifier, batches())
        assert set(seen) == {layer["name"] for layer in modifier.report()["layers"]}
        for adapter in find_mixers(model):
            assert int((adapter.A_log == 0).sum()) >= adapter.A_log.numel() // 2
    finally:
        del _ADAPTERS[class_name]


def test_files_of_a_folder_register_themselves(tmp_path, monkeypatch):
    """One new file is enough, and a second entry of one name is refused."""
    folder = tmp_path / "toy_entries"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "one.py").write_text(
        "from toy_entries import table\ntable.TABLE.register('one', 1)\n"
    )
    (folder / "heavy.py").write_text("raise RuntimeError('must be skipped')\n")
    (folder / "table.py").write_text(
        "from sparsessm_plugin.registry import Registry\n"
        "TABLE = Registry('number', 'toy_entries', frozenset({'heavy'}))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from toy_entries.table import TABLE  # type: ignore[import-not-found]

    assert isinstance(TABLE, Registry)
    assert dict(TABLE) == {"one": 1}
    with pytest.raises(ValueError, match="there is a number 'one' already"):
        TABLE.register("one", 2)
    with pytest.raises(ValueError, match="number 'two' is not known; known: one"):
        TABLE.check("two")


def test_what_solvers_say_of_themselves():
    """What is said of updates and of the Hessian is so."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 16, generator=g), torch.randn(64, 16, generator=g)
    x[:, 3] *= 30
    for name, solver in SOLVERS.items():
        solved = solver(weight, x.T @ x, 0.5)
        kept = torch.equal(solved.weight[solved.mask], weight[solved.mask])
        assert kept == (not solver.updates), name
        blind = torch.equal(solved.mask, solver(weight, torch.eye(16), 0.5).mask)
        assert blind == (not solver.needs_hessian), name
