"""The commands ``slimtrain config``: check a pipeline file, and describe what may stand in one."""

from __future__ import annotations

import json

import click
from rich.table import Table

from slimtrain.core import PipelineError, load_pipeline, pipeline_schema, to_short, to_yaml
from slimtrain.core.pipeline import changed_arguments
from slimtrain.proto.printing import CHECK_FAILED, fail, print_table


@click.group("config")
def config() -> None:
    """Pipeline files: what is compressed, in PyTorch and TensorFlow alike."""


@config.command("check")
@click.argument("pipeline")
@click.option("--yaml", "as_yaml", is_flag=True, help="Print the pipeline as a file instead of a table.")
@click.option("--short", "as_short", is_flag=True, help="Print the pipeline as one line instead of a table.")
def check_command(pipeline: str, as_yaml: bool, as_short: bool) -> None:
    """Check PIPELINE, a file or one line like "prune:simd_oc,sparsity=0.6;quantize:lsq", and show it.

    Exit status 1 and one line that names the place and the mend where it cannot work.
    """
    try:
        loaded = load_pipeline(pipeline)
        if as_yaml or as_short:
            click.echo(to_yaml(loaded).rstrip() if as_yaml else to_short(loaded))
            return
    except (PipelineError, ValueError) as error:
        fail(error, CHECK_FAILED)
    table = Table("", "stage", "algorithm", "class", "arguments")
    for number, stage in enumerate((*loaded.stages, loaded.export), start=1):
        arguments = ", ".join(f"{name}={value}" for name, value in changed_arguments(stage).items())
        table.add_row(str(number), stage.KIND.value, stage.ALGORITHM, stage.OBJECT, arguments)
    print_table(table)


@config.command("schema")
def schema_command() -> None:
    """Print the JSON schema of pipeline files, for editors."""
    click.echo(json.dumps(pipeline_schema(), indent=2, allow_nan=False))
