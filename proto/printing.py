"""How the commands print, and with which exit status they end."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

CHECK_FAILED = 1
BAD_FILE = 3
# Without a terminal there is no width to respect, and rich would break names at 80 columns.
_FILE_WIDTH = 200


def fail(reason: object, status: int) -> NoReturn:
    """End the command with one line on standard error."""
    click.echo(f"Error: {reason}", err=True)
    raise click.exceptions.Exit(status)


def print_table(table: Table) -> None:
    """Print a table, as wide as it needs where there is no terminal."""
    console = Console()
    (console if console.is_terminal else Console(width=_FILE_WIDTH)).print(table)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))
