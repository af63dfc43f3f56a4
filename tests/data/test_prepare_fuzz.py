"""data.prepare on nearly valid files and on any bytes: a dataset, or exit code 2 and no files."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare
from tests.helpers.raw_data import ROWS, TITLES, WHEN, WRITERS, prepare_flags


def check_run(main_flags, root):
    """Run in this process; it must succeed, or end with exit code 2 and leave no files behind."""
    argv, sys.argv = sys.argv, ["prepare", *map(str, main_flags)]
    try:
        prepare.main()
    except SystemExit as stop:
        assert stop.code == 2
        assert not (root / "out").exists()
    else:
        assert json.loads((root / "out/D/D.inter.json").read_text())
    finally:
        sys.argv = argv
    assert not list(root.glob("**/.prepare-*"))


CELLS = st.one_of(
    st.sampled_from(
        ["Ann", "i1", "", " ", "NaN", "inf", "1e999", "-1", "5", str(WHEN), "1_0", "0x1F", "١", "'", '"', "\\"]
    ),
    st.text(max_size=6),
)
VALUES = st.one_of(
    CELLS, st.none(), st.booleans(), st.floats(), st.integers(-(10**25), 10**25), st.lists(CELLS, max_size=2),
    st.dictionaries(CELLS, CELLS, max_size=2),
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.data())
@pytest.mark.parametrize("source", WRITERS)
def test_nearly_valid_files(source, data):
    with TemporaryDirectory() as folder:
        root = Path(folder)
        raw_flags = WRITERS[source](root / "raw")
        cells = VALUES if "amazon" in source else CELLS
        rows = data.draw(st.lists(st.tuples(cells, cells, cells, cells), max_size=3))
        titles = data.draw(st.dictionaries(CELLS, cells, max_size=2))
        WRITERS[source](root / "raw", [*ROWS, *rows] if data.draw(st.booleans()) else [*rows, *ROWS], TITLES | titles)
        check_run(prepare_flags(root, source, raw_flags), root)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.binary(max_size=60), st.data())
@pytest.mark.parametrize("source", WRITERS)
def test_any_bytes(source, noise, data):
    with TemporaryDirectory() as folder:
        root = Path(folder)
        raw_flags = WRITERS[source](root / "raw")
        path = data.draw(st.sampled_from(sorted((root / "raw").iterdir())))
        content = path.read_bytes()
        start, skip = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 40))
        path.write_bytes(data.draw(st.sampled_from([noise, content[:start] + noise + content[start + skip :]])))
        check_run(prepare_flags(root, source, raw_flags), root)
