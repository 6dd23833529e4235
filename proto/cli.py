"""The command ``slimtrain``: look into files, convert, verify."""

from __future__ import annotations

import logging
import os
from typing import Any, Optional

import click
from rich.console import Console
from rich.status import Status

from slimtrain.core import CoverageError, SlimtrainError, load_report
from slimtrain.proto import report
from slimtrain.proto.arrays import load_inputs, load_simulation
from slimtrain.proto.cli_config import config
from slimtrain.proto.cli_offline import import_qdq_command, quantize_command
from slimtrain.proto.converter import convert
from slimtrain.proto.doctor import doctor
from slimtrain.proto.mnnfile import inspect_model
from slimtrain.proto.options import ConvertOptions
from slimtrain.proto.params import params_to_json, read_params
from slimtrain.proto.printing import BAD_FILE, CHECK_FAILED, fail, print_json, print_table
from slimtrain.proto.report_page import write_page
from slimtrain.proto.report_table import report_table
from slimtrain.proto.sparsity import estimate_sparse
from slimtrain.proto.verification import Verification, verify
from slimtrain.proto.version import VERSION

_EXIT_STATUS = """\b
Exit status:
  0  done, and every check passed
  1  a check failed: coverage below what was asked for, SQNR below --min-sqnr
  2  wrong usage
  3  a file is missing or broken, or the converter or the runtime failed
"""
_SPARSE_NOTE = (
    "--sparse without --weight-bits makes a layer smaller only above 60 % zeros (above 30 % in blocks of 4 "
    "channels), with --weight-bits 8 from about 30 %; full int8 layers are always stored dense."
)
_PATH = click.Path()


class _Commands(click.Group):
    """Turns the errors of this package into the documented exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CoverageError as error:
            fail(error, CHECK_FAILED)
        except (SlimtrainError, OSError) as error:
            fail(error, BAD_FILE)


@click.group(cls=_Commands, epilog=_EXIT_STATUS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="slimtrain")
@click.option("-v", "--verbose", is_flag=True, help="Log what the converter says.")
def cli(verbose: bool) -> None:
    """Compressed models: look into parameter files and .mnn models, convert, verify."""
    level = logging.DEBUG if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")


@cli.command("inspect", epilog=_EXIT_STATUS)
@click.argument("file", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; of parameters, what the converter reads.")
def inspect_command(file: str, as_json: bool) -> None:
    """Show the layers in FILE: parameters (.bin, .json) or a converted model (.mnn)."""
    if not file.endswith(".mnn"):
        pipeline = read_params(file)
        if as_json:
            click.echo(params_to_json(pipeline), nl=False)
        else:
            print_table(report.params_table(pipeline))
        return
    with _spinner(f"reading {file}"):
        model = inspect_model(file)
    size = os.path.getsize(file)
    if as_json:
        print_json({"path": file, "bytes": size, "layers": report.model_rows(model)})
    else:
        print_table(report.model_table(model))
        click.echo(f"{size:,} bytes")


@cli.command("convert", epilog=_EXIT_STATUS)
@click.argument("model", type=_PATH)
@click.option("--params", type=_PATH, help="Parameters (.bin, or .json) that came with MODEL.")
@click.option("-o", "--output", required=True, type=_PATH, help="The .mnn file to write.")
@click.option("--weight-bits", default=0, metavar="N", help="Store all other weights in N = 2..8 bits.")
@click.option("--asymmetric", is_flag=True, help="With --weight-bits: a minimum and a scale per channel.")
@click.option("--block", default=0, metavar="N", help="With --weight-bits: N = 16, 32... inputs per scale.")
@click.option("--hqq", is_flag=True, help="With --weight-bits and --asymmetric: optimize the grid.")
@click.option("--fp16", is_flag=True, help="Store floats in half precision, rounded to the nearest.")
@click.option("--sparse", is_flag=True, help=f"Leave zeros out where that is smaller. {_SPARSE_NOTE}")
@click.option("--allow-partial", is_flag=True, help="Write the model even if layers fall short of --params.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def convert_command(
    model: str,
    params: Optional[str],
    output: str,
    weight_bits: int,
    asymmetric: bool,
    block: int,
    hqq: bool,
    fp16: bool,
    sparse: bool,
    allow_partial: bool,
    as_json: bool,
) -> None:
    """Convert MODEL (.onnx, .pb, .mnn) to .mnn and check what was compressed."""
    try:
        options = ConvertOptions(weight_bits, asymmetric, block, hqq, fp16, sparse)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if sparse and not weight_bits:
        click.echo(f"Note: {_SPARSE_NOTE}", err=True)
    estimate = None
    if sparse:
        with _spinner(f"counting the zeros of {model}"):
            estimate = estimate_sparse(model, params, options, allow_partial)
        for note in estimate.notes():
            click.echo(f"Note: {note}", err=True)
    with _spinner(f"converting {model}"):
        conversion = convert(model, output, params, options, allow_partial)
    if as_json:
        sizes = {} if estimate is None else {"sparse": estimate.to_dict()}
        print_json({**report.conversion_dict(conversion), **sizes})
        return
    print_table(report.conversion_table(conversion))
    asked = f"{conversion.coverage.fraction:.1%} of the weights asked for are int8; " if params else ""
    click.echo(f"{asked}{conversion.bytes:,} bytes from {os.path.getsize(model):,}: {output}")
    if estimate is not None:
        click.echo(f"{estimate.zeros:.1%} zeros: expected {estimate.expected:,} bytes, got {conversion.bytes:,}, "
                   f"{conversion.bytes / estimate.dense:.1%} of the dense {estimate.dense:,}")


@cli.command("verify", epilog=_EXIT_STATUS)
@click.argument("model", type=_PATH)
@click.option(
    "--reference", required=True, type=_PATH, help="An .onnx model or a recorded simulation (.npz)."
)
@click.option("--inputs", type=_PATH, help="Arrays by input name (.npz); a simulation brings its own.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Fail with status 1 below this SQNR.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def verify_command(
    model: str, reference: str, inputs: Optional[str], min_sqnr: Optional[float], as_json: bool
) -> None:
    """Run MODEL (.mnn) and a reference on the same inputs: SQNR, max error, size, latency."""
    result = _verify(model, reference, inputs)
    if as_json:
        print_json(report.verification_dict(result))
    else:
        print_table(report.verification_table(result))
        click.echo(f"SQNR {result.sqnr_db:.1f} dB, {result.bytes:,} bytes, {result.milliseconds:.3f} ms")
    if min_sqnr is not None and not result.sqnr_db >= min_sqnr:
        fail(f"SQNR {result.sqnr_db:.1f} dB is below {min_sqnr:g} dB", CHECK_FAILED)


def _verify(model: str, reference: str, inputs: Optional[str]) -> Verification:
    is_simulation = reference.endswith(".npz")
    if is_simulation == (inputs is not None):
        raise click.UsageError("an .onnx reference needs --inputs, a recorded simulation brings its own")
    try:
        with _spinner(f"running {model}"):
            if inputs is None:
                return verify(model, load_simulation(reference))
            return verify(model, reference, load_inputs(inputs))
    except (TypeError, ValueError) as error:
        # Here all values come from files.
        fail(error, BAD_FILE)


@cli.command("report", epilog=_EXIT_STATUS)
@click.argument("file", type=_PATH)
@click.option("-o", "--output", type=_PATH, help="Write a page (.html) with pictures instead of a table.")
def report_command(file: str, output: Optional[str]) -> None:
    """Show FILE, a compression_report.json that was written at the end of training."""
    loaded = load_report(file)
    if output is None:
        print_table(report_table(loaded))
        return
    with _spinner(f"drawing {file}"):
        write_page(output, loaded)
    click.echo(output)


for _command in (config, doctor, quantize_command, import_qdq_command):
    _command.epilog = _command.epilog or _EXIT_STATUS
    cli.add_command(_command)


def main() -> None:
    """Entry point of the command."""
    cli(prog_name="slimtrain")


def _spinner(text: str) -> Status:
    """Moves on a terminal while the work inside its ``with`` lasts; elsewhere it shows nothing."""
    return Console(stderr=True).status(text)

