"""``nbdfleece completion``: what makes a shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ..errors import UsageError


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script for the shell to source.

    For bash: add  eval "$(nbdfleece completion bash)"  to ~/.bashrc.
    """
    found = get_completion_class(shell)
    if found is None:
        raise UsageError(f"there is no completion for '{shell}'")
    root = ctx.find_root()
    click.echo(found(root.command, {}, "nbdfleece", "_NBDFLEECE_COMPLETE").source())
