"""Pages of the site that are written elsewhere, for mkdocs.yml.

README.md, the archive format and others keep their place in the checkout, and the options of the commands come from
their parsers. Links are written as they work in a checkout; here they become links of the site.
"""

import argparse
import os
import re
import sys
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
COMMANDS_PAGE = "reference/commands.md"
# The page of the site and the file of the checkout.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
    "explanation/recipe.md": "recipes/emoji/README.md",
    "explanation/shipped-archive.md": "archive/README.md",
    "reference/archive-format.md": "schema/README.md",
    "reference/sampling.md": "schema/sampling.md",
}
LINK = re.compile(r"(\[[^]]*\])\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for uri, name in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, COMMANDS_PAGE, content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the checkout into links of the site, and those to files without a page into their names.

    Raises:
        PluginError: A link points to nothing.
    """
    uri = page.file.src_uri
    source = PAGES.get(uri, f"docs/{uri}")
    uris = {name: uri for uri, name in PAGES.items()}

    def convert(match: re.Match[str]) -> str:
        text, link = match.groups()
        target, _, anchor = link.partition("#")
        if not target or re.match(r"[a-z]+:", link):
            return match[0]
        name = os.path.normpath(PurePosixPath(source).parent / target).replace(os.sep, "/")
        if not (ROOT / name).exists():
            raise PluginError(f"{source} links to {link}, which does not exist")
        if (ROOT / name).is_dir() and f"{name}/README.md" in uris:
            name += "/README.md"
        if name in uris or name.startswith("docs/"):
            to = os.path.relpath(uris.get(name, name.removeprefix("docs/")), PurePosixPath(uri).parent)
            return f"{text}({to.replace(os.sep, '/')}{'#' if anchor else ''}{anchor})"
        return f"`{name}`"

    return LINK.sub(convert, markdown)


def commands_page() -> str:
    """Return the page of all commands, from their parsers."""
    sys.path.insert(0, str(ROOT))
    from dm_generations.cli import build_parser

    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lines = ["# Commands", "", "`python -m dm_generations COMMAND`. `--help` prints the same text.", ""]
    for name, command in commands.choices.items():
        lines += [f"## {name}", "", as_text(command.description), ""]
        for group in command._action_groups:
            actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
            if not actions:
                continue
            if group.title not in ("options", "positional arguments"):
                lines += [f"**{as_text(group.title)}**", "", as_text(group.description or ""), ""]
            lines += ["| option | meaning |", "|---|---|"]
            lines += [f"| {usage(action)} | {as_text(action.help % {**vars(action)})} |" for action in actions]
            lines.append("")
        lines += ["```text", (command.epilog or "").strip(), "```", ""]
    return "\n".join(lines)


def usage(action: argparse.Action) -> str:
    """Return how an option is written: its names and its values."""
    metavar = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices is not None and action.metavar is None:
        metavar = "{" + ",".join(map(str, action.choices)) + "}"
    if action.nargs == "+":
        metavar = f"{metavar} [{metavar} ...]"
    elif action.nargs == "*":
        metavar = f"[{metavar} ...]"
    elif action.nargs == "?":
        metavar = f"[{metavar}]"
    elif action.nargs == 0:
        metavar = ""
    elif isinstance(metavar, tuple):  # a name for each of several values
        metavar = " ".join(metavar)
    return f"`{' '.join([', '.join(action.option_strings), metavar]).strip()}`"


def as_text(text: str) -> str:
    """Return plain text as Markdown that shows it."""
    return re.sub(r"([\\<>*_|\[\]])", r"\\\1", text.strip())
