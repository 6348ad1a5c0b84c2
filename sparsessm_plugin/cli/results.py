"""The folder that a command leaves."""

import time
from pathlib import Path
from typing import Any

from sparsessm_plugin.cli.console import show
from sparsessm_plugin.cli.options import not_the_model, of_option
from sparsessm_plugin.cli.stopping import check_signals, will_write


def check_output(output: Path, model: str) -> None:
    """Refuse a folder that cannot be written to, before the work.

    :raises SparseSSMError: saying why
    """
    from sparsessm_plugin.files import check_output_directory

    with of_option("--output"):
        check_output_directory(output)
    will_write(output)
    not_the_model(output, model)


def warn_of_more_bytes(source: Any, folder: Path) -> None:
    """Say so where what was saved takes more bytes than what was loaded, unless that was asked for.

    :param source: :class:`sparsessm_plugin.recipes.pruning.ModelSource`
    :param folder: where the result was saved
    """
    before = source.stored_bytes()
    after = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if source.dtype == "auto" and after > 1.1 * before + 2**20:  # headers and scales aside
        show(
            "warning",
            f"the result takes {after:,} bytes, more than the {before:,} of {source.name}, whose "
            "tensors are stored in other types than its config says; --dtype chooses one",
        )


def warn_of_lost_zeros(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Say so where zeros of an earlier run are gone, which one recipe would be refused for.

    More than were removed along with their columns.

    :param before: inventory of the model as it was, as a report has it
    :param after: of the result
    """
    for kind, part in before["components"].items():
        now = after["components"].get(kind)
        if now is None:
            continue
        # not below 0: a quantization adds scales
        removed = max(0, part["parameters"] - now["parameters"])
        if part["zeros"] - removed - now["zeros"] > part["zeros"] / 100:
            show(
                "warning",
                f"{kind}: of {part['zeros']:,} zeros that the model had {now['zeros']:,} are left, "
                "as its weights were fitted again; remove first, then prune, or write "
                "compensate: none",
            )


def write_result(
    folder: Path,
    pruned: Any,
    tokenizer: Any,
    before: dict[str, Any],
    fields: dict[str, Any],
    types: Any = None,
) -> dict[str, Any]:
    """Save a model and its report.

    :param folder: that exists
    :param pruned: the result of :func:`sparsessm_plugin.recipes.pruning.prune`
    :param tokenizer: the model's tokenizer
    :param before: inventory of the dense model
    :param fields: of the report, beside what all have; ``seconds`` among them, by what took them
    :param types: of tensors that are stored in 16 bits
    :return: the report
    """
    from sparsessm_plugin.evaluation.components import take_inventory
    from sparsessm_plugin.files import REPORT_NAME, list_files, write_json
    from sparsessm_plugin.recipes.pruning import save
    from sparsessm_plugin.recipes.versions import versions

    inventory = take_inventory(pruned.model)
    started = time.perf_counter()
    check_signals()
    save(pruned.model, tokenizer, folder, types)
    report = {
        **fields,
        "seconds": {**fields["seconds"], "save": round(time.perf_counter() - started, 3)},
        "before": before,
        "after": inventory.to_dict(),
        "modifiers": pruned.reports,
        "peak_memory_bytes": pruned.peak_memory_bytes,
        "versions": versions(),
        "files": list_files(folder),
    }
    write_json(folder / REPORT_NAME, report)
    return report
