"""Raw files with odd records: what is understood, what is left out and counted, what is refused."""

import json
import signal
import subprocess
import sys
import time

import pytest

from data import prepare
from tests.helpers.raw_data import (
    ITEMS,
    ROWS,
    TITLES,
    WHEN,
    WRITERS,
    prepare_flags,
    read_output,
    write,
    write_amazon2018,
    write_amazon2023,
    write_csv,
    write_movielens1m,
)


@pytest.fixture(params=WRITERS)
def source(request):
    return request.param


# ---- Bad input ----

BAD_ROWS = {
    "no user": (("", "i1", 5, WHEN), "has no user"),
    "no item": (("Ann", "", 5, WHEN), "has no item"),
    "rating": (("Ann", "i1", "good", WHEN), "has no numeric rating"),
    "NaN": (("Ann", "i1", float("nan"), WHEN), "has no numeric rating"),
    "unit": (("Ann", "i1", 5, WHEN * 1_000_000), "seconds? --time_unit "),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_the_line_of_a_bad_row_is_named(tmp_path, refused, source, case):
    row, message = BAD_ROWS[case]
    if source == "recbole" and "rating" in message:
        pytest.skip("ratings are optional in RecBole files")
    raw_flags = WRITERS[source](tmp_path / "raw", [*ROWS, row, *ROWS])
    error = refused(prepare.main, *prepare_flags(tmp_path, source, raw_flags))
    line = 13 if source in ("movielens", "amazon2018", "amazon2023") else 14  # after a header
    assert f": line {line}" in error and message in error
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_units_of_time(tmp_path, script, refused):
    raw_flags = write_amazon2023(tmp_path / "raw", [(u, i, r, float(t)) for u, i, r, t in ROWS])
    error = refused(prepare.main, *prepare_flags(tmp_path, "amazon2023", raw_flags))
    assert "1500000000 milliseconds since 1970 is the year 1970; is it in seconds? --time_unit s" in error
    assert script(prepare.main, *prepare_flags(tmp_path, "amazon2023", raw_flags, "--time_unit", "s"))[0] == 0
    inter = read_output(tmp_path)[0]
    raw_flags = write_csv(tmp_path / "raw", [(u, i, r, t * 1000) for u, i, r, t in ROWS])
    assert "is it in milliseconds?" in refused(prepare.main, *prepare_flags(tmp_path, "csv", raw_flags))
    assert script(prepare.main, *prepare_flags(tmp_path, "csv", raw_flags, "--time_unit", "ms"))[0] == 0
    assert read_output(tmp_path)[0] == inter
    days = [(u, i, r, f"2017-07-{n + 1:02d}" + " 10:00:00" * (n % 2)) for n, (u, i, r, _) in enumerate(ROWS)]
    assert script(prepare.main, *prepare_flags(tmp_path, "csv", write_csv(tmp_path / "raw", days)))[0] == 0
    assert read_output(tmp_path)[0] == inter


def test_delimiters_are_detected_by_the_header(tmp_path, script, refused):
    for delimiter in ",;|\t":
        raw_flags = write_csv(tmp_path / "raw", delimiter=delimiter)
        assert script(prepare.main, *prepare_flags(tmp_path, "csv", raw_flags))[0] == 0
    error = refused(prepare.main, *prepare_flags(tmp_path, "csv", raw_flags, "--user_column", "whom"))
    assert "sales.csv: has no column 'whom'; it has stars, who, what, sold" in error
    write(tmp_path / "raw/sales.csv", "\ufeffwho,what,sold,stars,note\n" + 'a,i1,1,5,"x, ""y""\nz"\n\nb,i1,2,5\n')
    error = refused(prepare.main, *prepare_flags(tmp_path, "csv", raw_flags))
    assert "sales.csv: line 5 has 4 fields, not 5" in error


def test_a_table_without_texts(tmp_path, script, refused):
    raw_flags = write_csv(tmp_path / "raw")
    assert script(prepare.main, *prepare_flags(tmp_path, "csv", raw_flags))[0] == 0
    alone = (*raw_flags[:2], *raw_flags[6:])
    error = refused(prepare.main, *prepare_flags(tmp_path, "csv", alone))
    assert "D.item.json: exists, but no --items_path" in error
    (tmp_path / "out/D/D.item.json").unlink()
    assert script(prepare.main, *prepare_flags(tmp_path, "csv", alone))[0] == 0
    assert sorted(path.name for path in (tmp_path / "out/D").iterdir()) == ["D.inter.json", "D.item2id", "D.user2id"]
    assert "needs item texts: give --items_path" in refused(
        prepare.main, *prepare_flags(tmp_path, "csv", alone, "--task", "preference")
    )


BAD_LINES = {
    "no object": "[]",
    "no JSON": "{",
    "half an emoji": '{"a": "\\ud83d"}',
    "deep": "[" * 100_000,
    "text": '"x"',
}


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("file", ["D.json", "meta_D.json"])
def test_lines_that_are_no_json_objects(tmp_path, refused, case, file):
    raw_flags = write_amazon2018(tmp_path / "raw")
    with (tmp_path / "raw" / file).open("a") as lines:
        lines.write("\n" + BAD_LINES[case] + "\n{}\n")
    line = 14 if file == "D.json" else 6
    fault = "has half a character" if "emoji" in case else "is no JSON object"
    error = refused(prepare.main, *prepare_flags(tmp_path, "amazon2018", raw_flags))
    assert f"{file}: line {line} {fault}" in error and "2 of " in error


def test_incomplete_gzip_files(tmp_path, refused):
    raw_flags = write_amazon2023(tmp_path / "raw")
    complete = (tmp_path / "raw/D.jsonl.gz").read_bytes()
    for data in (complete[:-4], complete[: len(complete) // 2], b"", b"plain text\n", complete + b"junk"):
        (tmp_path / "raw/D.jsonl.gz").write_bytes(data)
        assert "D.jsonl.gz: " in refused(prepare.main, *prepare_flags(tmp_path, "amazon2023", raw_flags))


def test_gzip_files_can_have_several_members(tmp_path, script):
    raw_flags = write_amazon2023(tmp_path / "raw", ROWS[:7])
    first = (tmp_path / "raw/D.jsonl.gz").read_bytes()
    write_amazon2023(tmp_path / "raw", ROWS[7:])
    (tmp_path / "raw/D.jsonl.gz").write_bytes(first + (tmp_path / "raw/D.jsonl.gz").read_bytes())
    assert "12 ratings read" in script(prepare.main, *prepare_flags(tmp_path, "amazon2023", raw_flags))[1]


def test_texts_of_amazon_items(tmp_path, script):
    raw_flags = write_amazon2023(tmp_path / "raw")
    assert script(prepare.main, *prepare_flags(tmp_path, "amazon2023", raw_flags))[0] == 0
    item = json.loads((tmp_path / "out/D/D.item.json").read_text())["0"]
    more = {"description": "Red big", "categories": "A, B", "store": ""}
    assert item == {"title": "Thing i1 & more", **more}
    raw_flags = write_amazon2018(tmp_path / "raw", titles=TITLES | {"i4": "var aPageStart = (new Date()).getTime();"})
    out = script(prepare.main, *prepare_flags(tmp_path, "amazon2018", raw_flags))[1]
    assert "1 items without a title are named by their description (1)" in out
    items = json.loads((tmp_path / "out/D/D.item.json").read_text())
    more = {"description": "Thing i1 & more", "brand": "", "categories": ""}
    assert items["0"] == {"title": "Thing i1 & more", **more} and items["3"]["title"] == ""


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_movies_in_either_encoding(tmp_path, script, encoding):
    raw_flags = write_movielens1m(tmp_path / "raw")
    movies = "".join(f"{item}::Amélie, La (2001)::War\n" for item in ITEMS)
    (tmp_path / "raw/movies.dat").write_bytes(movies.encode(encoding))
    assert script(prepare.main, *prepare_flags(tmp_path, "movielens", raw_flags))[0] == 0
    assert read_output(tmp_path)[1]["3"] == "La Amélie (2001)"


def test_empty_files(tmp_path, refused, source):
    raw_flags = WRITERS[source](tmp_path / "raw", [])
    assert "has no ratings" in refused(prepare.main, *prepare_flags(tmp_path, source, raw_flags))
    for path in (tmp_path / "raw").iterdir():
        write(path, "")
        error = refused(prepare.main, *prepare_flags(tmp_path, source, raw_flags))
        assert any(problem in error for problem in ("no ratings", "it is empty", "no line", "line for none"))
        WRITERS[source](tmp_path / "raw")


FLAGS = {
    "no folder": (("--source", "csv"), "--source csv needs --raw_path, a file"),
    "end": (("--task", "preference", "--end", "2020-01-01"), "--end has no effect with --task preference"),
    "day": (("--end", "2020-13-01"), "--end 2020-13-01: should be a day"),
    "memory": (("--memory_gb", 0), "--memory_gb 0: should be at least 0.1"),
    "threshold": (("--liked_above", "nan"), "--liked_above nan: should be a number"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_are_checked(refused, case):
    bad_flags, message = FLAGS[case]
    assert message in refused(prepare.main, *bad_flags)


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(heeded, tmp_path):
    rows = [(f"user {n}", f"item {n % 7}", 5, WHEN + n) for n in range(200_000)]
    raw_flags = write_amazon2018(tmp_path / "raw", rows, {f"item {n}": f"Thing {n}" for n in range(7)})
    reviews = tmp_path / "raw" / "D.json"
    reviews.write_bytes(reviews.read_bytes() * 10)  # seconds of work: the signal arrives before the end
    command = [sys.executable, "-m", "data.prepare", *map(str, prepare_flags(tmp_path, "amazon2018", raw_flags))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob(".prepare-*/*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130 and error.strip() == "interrupted", error
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
