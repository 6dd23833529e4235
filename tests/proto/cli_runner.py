"""Running the command ``slimtrain`` inside the test's own process."""
import inspect

from click.testing import CliRunner

from slimtrain.proto.cli import cli


def run(*words):
    """Exit status, output and errors of ``slimtrain words``."""
    # Before click 8.2 the two streams come mixed unless told otherwise; later there is no such choice.
    mixed = "mix_stderr" in inspect.signature(CliRunner).parameters
    runner = CliRunner(mix_stderr=False) if mixed else CliRunner()
    result = runner.invoke(cli, [str(word) for word in words], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr
