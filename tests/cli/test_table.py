"""Rows on a terminal and for programs."""

import csv
import io
import json
import sys

import pytest

from dm_generations.cli.table import FORMATS, print_rows

HOSTILE = "\x1b]0;title\x07\u202eprompt"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("style", FORMATS)
def test_no_control_character_reaches_a_terminal(style, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    print_rows(["prompt"], [[HOSTILE]], style)
    text = sys.stdout.getvalue()
    assert "prompt" in text and not {*HOSTILE} - {*"prompttitle0;]"} & {*text}


def test_programs_get_the_text_as_it_is(capsys):
    print_rows(["prompt"], [[HOSTILE]], "csv")
    assert list(csv.reader(io.StringIO(capsys.readouterr().out))) == [["prompt"], [HOSTILE]]
    print_rows(["prompt"], [[HOSTILE]], "json")
    assert json.loads(capsys.readouterr().out) == [{"prompt": HOSTILE}]
