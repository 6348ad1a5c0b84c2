"""``sparsessm export``."""

from typing import Annotated

import typer
from rich.markup import escape

from sparsessm_plugin.cli.console import out, print_json, quiet
from sparsessm_plugin.cli.inputs import source_of
from sparsessm_plugin.cli.options import (
    AsJson,
    Dtype,
    ModelArgument,
    Result,
    Trust,
    Unused,
    Verbose,
    choice,
)
from sparsessm_plugin.cli.results import check_output


def export(
    model: ModelArgument,
    output: Result,
    format_: Annotated[
        str, typer.Option("--format", help="mamba_ssm, the authors' own runtime.")
    ] = "mamba_ssm",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    allow_unused_tensors: Unused = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write a Mamba or Mamba-2 model, without tokenizer, in another runtime's layout."""
    quiet(verbose)
    from sparsessm_plugin.checkpoints.export import FORMATS, check_mamba_ssm, export_mamba_ssm
    from sparsessm_plugin.files import (
        REPORT_NAME,
        list_files,
        output_directory,
        write_json,
    )
    from sparsessm_plugin.recipes.versions import versions

    choice("--format", format_, FORMATS)
    source = source_of(model, trust_remote_code, dtype, "cpu", allow_unused_tensors)
    check_output(output, model)
    check_mamba_ssm(source.load_skeleton())
    with output_directory(output) as folder:
        export_mamba_ssm(source.load(), folder)
        report = {
            "model": model,
            "format": format_,
            "versions": versions(),
            "files": list_files(folder),
        }
        write_json(folder / REPORT_NAME, report)
    if as_json:
        print_json({"output": str(output), **report})
        return
    out.print(
        f"saved to {escape(str(output))}; load it with sparsessm_plugin.load_mamba_ssm, "
        f"the tokenizer is still that of {escape(model)}",
        soft_wrap=True,
    )
