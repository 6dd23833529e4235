"""The command ``slimtrain``: look into files, convert, verify."""

from __future__ import annotations

import json
import logging
import os
from contextlib import contextmanager
from typing import Any, Iterator, NoReturn, Optional

import click
from rich.console import Console

from slimtrain.core import CoverageError, SlimtrainError
from slimtrain.proto import report
from slimtrain.proto.arrays import load_inputs, load_simulation
from slimtrain.proto.converter import ConvertOptions, convert
from slimtrain.proto.mnnfile import inspect_model
from slimtrain.proto.params import params_to_json, read_params
from slimtrain.proto.verify import verify
from slimtrain.proto.version import VERSION

CHECK_FAILED = 1
BAD_FILE = 3
_EXIT_CODES = """\b
Exit status:
  0  done, and every check passed
  1  a check failed: coverage below what was asked for, SQNR below --min-sqnr
  2  wrong usage
  3  a file is missing or broken, or the converter or runtime failed
"""
_SPARSE_NOTE = ("--sparse without --weight-bits makes a layer smaller only above 60 % zeros (above 30 % in blocks of 4 "
                "or more); with --weight-bits 8 from about 30 %. Full int8 layers are always stored dense.")


class _Commands(click.Group):
    """Turns the errors of this package into the documented exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CoverageError as error:
            _fail(error, CHECK_FAILED)
        except (SlimtrainError, OSError) as error:
            _fail(error, BAD_FILE)


def _fail(error: Exception, status: int) -> NoReturn:
    click.echo("Error: {}".format(error), err=True)
    raise click.exceptions.Exit(status)


@click.group(cls=_Commands, epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="slimtrain")
@click.option("-v", "--verbose", is_flag=True, help="Log what the converter says.")
def cli(verbose: bool) -> None:
    """Compressed models: look into parameter files and .mnn models, convert, verify."""
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, format="%(levelname)s: %(message)s")


@cli.command("inspect", epilog=_EXIT_CODES)
@click.argument("file", type=click.Path())
@click.option("--json", "as_json", is_flag=True,
              help="Print JSON; that of a parameter file is what the converter itself reads from *.json.")
def inspect_command(file: str, as_json: bool) -> None:
    """Show the layers in FILE: a parameter file (.bin, .json) or a converted model (.mnn)."""
    if not file.endswith(".mnn"):
        pipeline = read_params(file)
        if as_json:
            click.echo(params_to_json(pipeline), nl=False)
        else:
            _print(report.params_table(pipeline))
        return
    with _spinner("reading {}".format(file)):
        model = inspect_model(file)
    if as_json:
        _print_json({"path": file, "bytes": os.path.getsize(file), "layers": report.model_rows(model)})
    else:
        _print(report.model_table(model))
        click.echo("{:,} bytes".format(os.path.getsize(file)))


@cli.command("convert", epilog=_EXIT_CODES)
@click.argument("model", type=click.Path())
@click.option("--params", type=click.Path(), help="Parameter file (.bin, or .json) that came with MODEL.")
@click.option("-o", "--output", required=True, type=click.Path(), help="The .mnn file to write.")
@click.option("--weight-bits", default=0, metavar="N", help="Store weights of all other layers in N = 2..8 bits.")
@click.option("--asymmetric", is_flag=True, help="With --weight-bits: a minimum and a scale per channel.")
@click.option("--block", default=0, metavar="N", help="With --weight-bits: N input channels per scale, N = 16, 32...")
@click.option("--hqq", is_flag=True, help="With --weight-bits and --asymmetric: optimize the grid.")
@click.option("--fp16", is_flag=True, help="Store floats in half precision.")
@click.option("--sparse", is_flag=True, help="Leave zeros out where that is smaller. " + _SPARSE_NOTE)
@click.option("--allow-partial", is_flag=True, help="Write the model even if layers are less compressed than asked.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def convert_command(model: str, params: Optional[str], output: str, weight_bits: int, asymmetric: bool, block: int,
                    hqq: bool, fp16: bool, sparse: bool, allow_partial: bool, as_json: bool) -> None:
    """Convert MODEL (.onnx, .pb, .mnn) to .mnn and check what was compressed."""
    try:
        options = ConvertOptions(weight_bits, asymmetric, block, hqq, fp16, sparse)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if sparse and not weight_bits:
        click.echo("Note: " + _SPARSE_NOTE, err=True)
    with _spinner("converting {}".format(model)):
        conversion = convert(model, output, params, options, allow_partial)
    if as_json:
        _print_json(report.conversion_dict(conversion))
        return
    _print(report.conversion_table(conversion))
    wanted = "{:.1%} of the weights asked for are int8; ".format(conversion.coverage.fraction) if params else ""
    click.echo("{}{:,} bytes from {:,}: {}".format(wanted, conversion.bytes, os.path.getsize(model), output))


@cli.command("verify", epilog=_EXIT_CODES)
@click.argument("model", type=click.Path())
@click.option("--reference", required=True, type=click.Path(), help="An .onnx model, or a recorded simulation (.npz).")
@click.option("--inputs", type=click.Path(), help="Arrays by input name (.npz); not needed with a simulation.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Fail with status 1 below this SQNR.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def verify_command(model: str, reference: str, inputs: Optional[str], min_sqnr: Optional[float],
                   as_json: bool) -> None:
    """Run MODEL (.mnn) and a reference on the same inputs: SQNR, max error, size, latency."""
    is_simulation = reference.endswith(".npz")
    if inputs is None and not is_simulation:
        raise click.UsageError("an ONNX reference needs --inputs")
    arrays = load_inputs(inputs) if inputs is not None else None
    with _spinner("running {}".format(model)):
        result = verify(model, load_simulation(reference) if is_simulation else reference, arrays)
    if as_json:
        _print_json(report.verification_dict(result))
    else:
        _print(report.verification_table(result))
        click.echo("SQNR {:.1f} dB, {:,} bytes, {:.3f} ms".format(result.sqnr_db, result.bytes, result.milliseconds))
    if min_sqnr is not None and not result.sqnr_db >= min_sqnr:
        click.echo("Error: SQNR {:.1f} dB is below {:g} dB".format(result.sqnr_db, min_sqnr), err=True)
        raise click.exceptions.Exit(CHECK_FAILED)


def main() -> None:
    """Entry point of the command."""
    cli(prog_name="slimtrain")


@contextmanager
def _spinner(text: str) -> Iterator[None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def _print(table: Any) -> None:
    console = Console()
    # Without a terminal there is no width to respect; rich would break names at 80 columns.
    (console if console.is_terminal else Console(width=200)).print(table)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))
