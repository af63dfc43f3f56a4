"""docs/: the site builds without a broken link or anchor, flags are those of --help, links of the README exist."""

import re
import subprocess
import sys

import pytest

from docs.flags import COMMANDS, build_page
from tests.helpers.scripts import ROOT


def test_flag_reference_is_that_of_the_parsers():
    assert (ROOT / "docs/flags.md").read_text() == build_page(), "run python docs/flags.py"


def test_every_command_has_its_flags_listed():
    listed = {command for commands in COMMANDS.values() for command in commands}
    files = [file for room in ("data", "index", "convert") for file in (ROOT / room).glob("*.py")]
    commands = {f"{file.parent.name}.{file.stem}" for file in files if '"__main__"' in file.read_text()}
    assert commands and commands <= listed


def test_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is missing: requirements-dev.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site/index.html").read_text()
    outside = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page)
    assert not outside, "the site loads something from another host"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "config/README.md", "bench/README.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)|(?:src|srcset)=\"([^\"]+)\"", (ROOT / page).read_text())
    files = [first or second for first, second in links if not (first or second).startswith("http")]
    missing = [file for file in files if not ((ROOT / page).parent / file).exists()]
    assert files and not missing


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
