"""What a command cannot write is said before it looks at what it is to read, which is nowhere here."""

import os
import re
from pathlib import Path

import pytest

from mosa_hf.cli import convert, evaluate, heal, trace

MAIN = {f"mosa-{each.__name__.rpartition('.')[2]}": each.main for each in (convert, evaluate, heal, trace)}
COMMANDS = (
    "mosa-convert ./nowhere {}",
    "mosa-convert ./nowhere new --save-plan {}",
    "mosa-convert ./nowhere new --plot-plan {}",
    "mosa-evaluate ./nowhere --text nothing.txt --output {}",
    "mosa-heal --model ./nowhere --text nothing.txt --destination {}",
    "mosa-heal --model ./nowhere --text nothing.txt --destination new --output_dir {}",
    "mosa-trace ./nowhere --text nothing.txt --html {}",
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where commands run, with a file, a folder and a link to nothing in it."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("locked").mkdir()
    Path("link").symlink_to("gone")
    return tmp_path


def check_refused(command: str, destination: str, message: str) -> None:
    name, *arguments = command.format(destination).split()
    with pytest.raises(SystemExit, match=f"^{name}: {destination}.* cannot be made: {re.escape(message)}"):
        MAIN[name](arguments)
    assert sorted(os.listdir()) == ["file", "link", "locked"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_in_what_is_no_folder(command, folder):
    check_refused(command, "file/new", f"{folder / 'file'} is no folder. Choose another")
    check_refused(command, "link/deep/new", f"{folder / 'link'} is no folder. Choose another")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_may_not_be_written_to(command, folder, monkeypatch):
    # Whoever runs this may be allowed everything.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    check_refused(command, "locked/deep/new", f"{folder / 'locked'} may not be written to. Choose another")


def test_a_link_to_nothing_is_there():
    with pytest.raises(SystemExit, match="^mosa-convert: link exists: remove it"):
        convert.main(["./nowhere", "link"])
