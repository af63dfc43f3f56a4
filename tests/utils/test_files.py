"""Files are replaced as a whole or not at all, by one process at a time; secrets of a command line are masked."""

import fcntl
import os
import sys

import pytest

from reclingua.utils import files
from reclingua.utils.errors import InputError, cli_main, mask_flags
from reclingua.utils.files import (
    REPLACING,
    atomic_files,
    atomic_write,
    check_complete,
    check_outputs,
    locked_folder,
)
from reclingua.utils.metadata import run_metadata

NAMES = ("a", "b", "c")


def write_all(folder, content):
    with atomic_files(folder, NAMES) as paths:
        for name in NAMES:
            paths[name].write_text(content)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("broken", NAMES)
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_files_of_two_preparations_never_stand_side_by_side(tmp_path, monkeypatch, broken, error, has_links):
    """A rename fails, of any of the files, over earlier files or none: what was there before is there again."""
    replace = os.replace

    def fail(source, target):
        if os.path.basename(target) == broken:
            raise error
        replace(source, target)

    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no hard links")))
    for earlier in ({}, dict.fromkeys(NAMES, "old")):
        if earlier:
            write_all(tmp_path, "old")
        with monkeypatch.context() as patched, pytest.raises((InputError, KeyboardInterrupt)):
            patched.setattr(os, "replace", fail)
            write_all(tmp_path, "new")
        assert contents(tmp_path) == earlier
        check_complete(tmp_path)


def test_a_kill_between_two_renames_is_noticed_and_mended_by_the_next_run(tmp_path, monkeypatch):
    write_all(tmp_path, "old")
    with monkeypatch.context() as patched:
        patched.setattr(files, "_replace_files", lambda folder, staging, names: (folder / REPLACING).touch())
        write_all(tmp_path, "new")
    with pytest.raises(InputError, match="killed while it replaced the files there; run it again"):
        check_complete(tmp_path)
    write_all(tmp_path, "newer")
    check_complete(tmp_path)
    assert contents(tmp_path) == dict.fromkeys(NAMES, "newer")


def test_an_error_while_files_are_written_leaves_the_earlier_ones(tmp_path):
    write_all(tmp_path, "old")
    with pytest.raises(ValueError), atomic_files(tmp_path, NAMES) as paths:
        paths["a"].write_text("new")
        raise ValueError
    assert contents(tmp_path) == dict.fromkeys(NAMES, "old")


def test_two_writers_with_one_process_number_do_not_meet(tmp_path):
    """As in two containers on a shared disk; the file is on the disk before it gets its name."""
    with atomic_write(tmp_path / "x") as first, atomic_write(tmp_path / "x") as second:
        assert first != second
        second.write_text("second")
        first.write_text("first")
    assert contents(tmp_path) == {"x": "first"}


def test_outputs_that_coincide_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    check_outputs({"--a": tmp_path / "a", "--b": tmp_path / "b", "--c": None}, {"--d": tmp_path / "d", "--e": None})
    for outputs, inputs in (
        ({"--a": tmp_path / "a", "--b": tmp_path / "x/../a"}, {}),
        ({"--a": tmp_path / "link", "--b": tmp_path / "a"}, {}),
        ({"--b": tmp_path / "a"}, {"--a": tmp_path / "a"}),
    ):
        with pytest.raises(InputError, match="is both --a and --b; name two files"):
            check_outputs(outputs, inputs)


def test_a_locked_folder_is_refused_until_it_is_free(tmp_path, monkeypatch):
    with locked_folder(tmp_path), pytest.raises(InputError, match="another run is writing there"):
        with locked_folder(tmp_path, patience=0):
            raise AssertionError
    with locked_folder(tmp_path, patience=0):
        pass

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked_folder(tmp_path):
        pass


def test_secrets_are_masked_wherever_a_command_line_is_printed(monkeypatch, capsys):
    words = ["x.py", "--hub_token", "hf_x", "--api-key=k", "--token", "--soft_tokens", "3", "--auth", "me:pw"]
    masked = ["x.py", "--hub_token", "***", "--api-key=***", "--token", "--soft_tokens", "3", "--auth", "***"]
    assert mask_flags(words) == masked
    assert run_metadata({"hub_token": "hf_x", "api_key": None, "soft_tokens": 3}, 0)["arguments"] == {
        "hub_token": "***",
        "api_key": None,
        "soft_tokens": 3,
    }

    @cli_main
    def fail():
        raise InputError(f"cannot use {' '.join(words)}")

    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        fail()
    error = capsys.readouterr().err
    assert "hf_x" not in error and "pw" not in error and "--soft_tokens 3" in error
