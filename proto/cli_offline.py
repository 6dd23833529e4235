"""The commands ``slimtrain quantize`` and ``slimtrain import-qdq``: int8 models without a training framework."""
from __future__ import annotations

import os
from typing import Any, Dict, List, Optional, Tuple

import click
from rich.table import Table

from slimtrain.core import ActivationMethod, Coverage, LayerState, WeightMethod, method_of
from slimtrain.proto.calibration_data import (
    DEFAULT_BATCH,
    ImageFormat,
    InputType,
    ModelInput,
    Preprocessing,
    read_batches,
)
from slimtrain.proto.mnnquant import MnnquantConfig, read_mnnquant
from slimtrain.proto.printing import BAD_FILE, CHECK_FAILED, fail, print_json, print_table

_PATH = click.Path()


def _method(kind: Any) -> click.Choice:
    return click.Choice([member.value for member in kind], case_sensitive=False)


def _numbers(_: click.Context, __: click.Parameter, value: Optional[str]) -> Tuple[float, ...]:
    try:
        return tuple(float(number) for number in value.split(",")) if value else ()
    except ValueError as error:
        raise click.BadParameter("expected numbers separated by commas") from error


@click.command("quantize")
@click.argument("model", type=_PATH)
@click.option("--data", type=_PATH, help="A folder of images, arrays by input name (.npz), or one array (.npy).")
@click.option("--config", type=_PATH, help="A JSON configuration of MNN's mnnquant; options given here win.")
@click.option("-o", "--output", required=True, type=_PATH, help="The folder to write to.")
@click.option("--method", type=_method(ActivationMethod), help="How activations find their scale.  [default: mse]")
@click.option("--weight-method", type=_method(WeightMethod), help="How weights find theirs.  [default: mse]")
@click.option("--bits", type=click.IntRange(2, 8), help="Of weights and activations.  [default: 8]")
@click.option("--skip", multiple=True, metavar="NAME", help="A layer, or a pattern of them, that stays float.")
@click.option("--batch-size", type=click.IntRange(1), help=f"Samples of a batch.  [default: {DEFAULT_BATCH}]")
@click.option("--count", type=click.IntRange(0), help="The most samples to use; 0 for all.")
@click.option("--format", "image_format", type=_method(ImageFormat), help="Channels of images.")
@click.option("--width", type=click.IntRange(1), help="Of images, where the model has no fixed size.")
@click.option("--height", type=click.IntRange(1), help="Of images, where the model has no fixed size.")
@click.option("--mean", callback=_numbers, help="Subtracted from pixels 0..255, e.g. 103.9,116.8,123.7.")
@click.option("--normal", callback=_numbers, help="Multiplied with them after that.")
@click.option("--equalize", is_flag=True, help="Let layers in a row trade the ranges of their channels.")
@click.option("--correct-bias", is_flag=True, help="Give the outputs of layers their mean back.")
@click.option("--adaptive-rounding", is_flag=True, help="Round weights by what the layers compute.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Fail with status 1 below this SQNR against float.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def quantize_command(model: str, data: Optional[str], config: Optional[str], output: str, min_sqnr: Optional[float],
                     as_json: bool, **options: Any) -> None:
    """Quantize MODEL (.onnx, float) from data, without training.

    Writes the ONNX model on its grid, its compress_params.bin and, where MNN is installed, the int8 .mnn; runs it and
    compares it with the simulation and with the float model.
    """
    if not data and not config:
        raise click.UsageError("say where the calibration data is: --data or --config")
    from slimtrain.proto.onnx_deploy import deploy_onnx  # needs onnx, which other commands do not
    from slimtrain.proto.onnx_normal import graph_inputs, input_dtype, input_shape, load_onnx
    from slimtrain.proto.onnx_offline import quantize_onnx

    given = read_mnnquant(config) if config else None
    preprocessing = _preprocessing(given, options)
    loaded = load_onnx(model)
    inputs = [ModelInput(value.name, input_shape(value), input_dtype(value)) for value in graph_inputs(loaded)]
    batches = read_batches(data or (given.path if given else ""), inputs, preprocessing,
                           options["batch_size"] or (given.batch_size if given else DEFAULT_BATCH),
                           (given.samples if given else 0) if options["count"] is None else options["count"])
    try:
        quantized = quantize_onnx(loaded, batches, _settings(given, options))
    except ValueError as error:
        fail(error, BAD_FILE)
    stem = os.path.join(output, os.path.splitext(os.path.basename(model))[0])
    deployed = deploy_onnx(loaded, quantized.rewritten, quantized.example, stem)
    if as_json:
        tensors = [row._asdict() for row in quantized.tensors]
        print_json({**_summary(deployed), "layers": _rows(quantized.coverage), "tensors": tensors})
    else:
        print_table(coverage_table(quantized.coverage))
        if given is not None and given.debug:
            print_table(_tensor_table(quantized.tensors))
        batch_counts = {row.batches for row in quantized.tensors}
        click.echo("%d scales from %s batches" % (len(quantized.tensors), "/".join(map(str, sorted(batch_counts)))))
        _echo(deployed)
    if min_sqnr is not None and not deployed.reference_sqnr_db >= min_sqnr:
        fail("SQNR %.1f dB against the float model is below %g dB" % (deployed.reference_sqnr_db, min_sqnr),
             CHECK_FAILED)


@click.command("import-qdq")
@click.argument("model", type=_PATH)
@click.option("-o", "--output", required=True, type=_PATH, help="The folder to write to.")
@click.option("--data", type=_PATH, help="Inputs to compare with (.npz by name, .npy); random ones without it.")
@click.option("--symmetric", is_flag=True, help="Give no activation a zero point; unsigned ones lose a bit.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def import_qdq_command(model: str, output: str, data: Optional[str], symmetric: bool, as_json: bool) -> None:
    """Take over MODEL, an ONNX model quantized by another tool (QuantizeLinear and DequantizeLinear).

    Writes a float ONNX model on its grid, its compress_params.bin and, where MNN is installed, the int8 .mnn, and says
    what MNN cannot represent as the file has it.
    """
    from slimtrain.proto.onnx_deploy import deploy_onnx  # needs onnx, which other commands do not
    from slimtrain.proto.onnx_normal import graph_inputs, input_dtype, input_shape, load_onnx
    from slimtrain.proto.onnx_qdq import import_qdq, random_example

    loaded = load_onnx(model)
    imported = import_qdq(loaded, keep_zero_points=not symmetric)
    example = random_example(loaded, imported)
    if data:
        inputs = [ModelInput(value.name, input_shape(value), input_dtype(value)) for value in graph_inputs(loaded)]
        example = next(read_batches(data, inputs, Preprocessing()))
    name = os.path.splitext(os.path.basename(model))[0]
    name = name[:-len(".qdq")] if name.endswith(".qdq") else name
    deployed = deploy_onnx(loaded, imported.rewritten, example, os.path.join(output, name))
    if as_json:
        print_json({**_summary(deployed), "layers": _rows(imported.coverage), "remarks": list(imported.remarks)})
        return
    print_table(coverage_table(imported.coverage))
    for remark in imported.remarks:
        click.echo("Note: " + remark)
    _echo(deployed)


def coverage_table(coverage: Coverage) -> Table:
    """Every layer of a file, its share of the weights, and why it is left float."""
    table = Table("layer", "kind", "weights", "share", "state", "why not")
    for name, kind, weights, share, state, reason in coverage.rows():
        table.add_row(name, kind, f"{weights:,}", f"{share:.1%}", state, reason)
    return table


def _tensor_table(tensors: Any) -> Table:
    table = Table("layer", "role", "batches", "lowest", "highest", "scale", "saturated")
    for row in tensors:
        table.add_row(row.name, row.role, str(row.batches), f"{row.lowest:.4g}", f"{row.highest:.4g}",
                      f"{row.scale:.4g}", f"{row.saturated:.3%}")
    return table


def _preprocessing(given: Optional[MnnquantConfig], options: Dict[str, Any]) -> Preprocessing:
    base = given.preprocessing if given else Preprocessing()
    chosen = ImageFormat(options["image_format"].upper()) if options["image_format"] else base.format
    return Preprocessing(base.input_type if given else InputType.IMAGE, chosen, options["mean"] or base.mean,
                         options["normal"] or base.normal, options["width"] or base.width,
                         options["height"] or base.height, base.crop)


def _settings(given: Optional[MnnquantConfig], options: Dict[str, Any]) -> Any:
    from slimtrain.proto.onnx_offline import OfflineSettings

    method = method_of(ActivationMethod, options["method"] or (given.method if given else ActivationMethod.MSE))
    weights = method_of(WeightMethod, options["weight_method"] or (given.weight_method if given else WeightMethod.MSE))
    return OfflineSettings(
        method, weights, options["bits"] or (given.bits if given else 8),
        tuple(options["skip"]) or (given.skip if given else ()), given.largest_level if given else None,
        given.largest_weight_level if given else None, options["equalize"], options["correct_bias"],
        options["adaptive_rounding"])


def _summary(deployed: Any) -> Dict[str, Any]:
    values = deployed._asdict()
    conversion = values.pop("conversion")
    for name in ("simulation_sqnr_db", "reference_sqnr_db"):
        values[name] = None if values[name] is None else min(values[name], 1e4)
    return {**values, "coverage": None if conversion is None else conversion.coverage.fraction}


def _rows(coverage: Coverage) -> List[Dict[str, Any]]:
    return [dict(layer._asdict(), state=layer.state.value) for layer in coverage.layers]


def _echo(deployed: Any) -> None:
    click.echo("%.1f dB against the model that was given" % deployed.reference_sqnr_db)
    if deployed.conversion is None:
        click.echo("wrote %s and %s (MNN is not installed: not converted)" % (deployed.onnx, deployed.params))
        return
    share = deployed.conversion.coverage.share(LayerState.INT8)
    click.echo("%s: %s bytes, %.1f %% of the weights asked for are int8, %.1f dB against the simulation" % (
        deployed.mnn, f"{deployed.bytes:,}", 100 * share, deployed.simulation_sqnr_db))
