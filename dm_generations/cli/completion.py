"""`completion`: a script that completes commands and flags in a shell."""

import argparse

from dm_generations.errors import UserError

HELP = "print a script that completes commands and flags in a shell"
DESCRIPTION = """\
Print a script for a shell, which then completes commands, flags and file names of dm-generations on Tab. It needs
shtab: pip install 'dm-generations[completion]'.
"""
EPILOG = """\
example:
  python -m dm_generations completion bash > ~/.local/share/bash-completion/completions/dm-generations
  python -m dm_generations completion zsh > _dm-generations
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("shell", choices=["bash", "zsh"], help="the shell")


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs shtab; install 'dm-generations[completion]'") from error
    from dm_generations.cli import build_parser

    parser = build_parser()
    parser.prog = "dm-generations"  # a script is for a program's name
    print(shtab.complete(parser, args.shell))
    return 0
