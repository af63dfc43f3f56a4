"""Raw files of every source -> dataset: the same from all of them, filtering, the k-core."""

import json
import random

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare
from data.filtering import filter_core
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.ratings import open_ratings
from tests.helpers.raw_data import ITEMS, ROWS, TITLES, WHEN, WRITERS, prepare_flags, read_output

# ---- RecBole files ----


def write_atomic(folder, ratings, items):
    folder.mkdir(exist_ok=True)
    rows = "".join(f"{u}\t{i}\t4\t{t}\n" for u, i, t in ratings)
    (folder / "mini.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + rows)
    rows = "".join(f"{i}\t{title}\t{year}\t{kind}\n" for i, title, year, kind in items)
    head = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    (folder / "mini.item").write_text(head + rows)


MOVIES = [(i, f"Film {i}, The", 1990 + i, "Drama War") for i in range(1, 11)]


def test_prepare_orders_by_time_and_keeps_ties_in_file_order(tmp_path, script):
    ratings = [(u, i, 5) for u in (10, 9) for i in (3, 1, 2)] + [(9, 10, 1), (10, 10, 9)]
    write_atomic(tmp_path / "raw", ratings, MOVIES)
    flags = ("--dataset", "mini", "--raw_path", tmp_path / "raw", "--data_path", tmp_path, "--min_interactions", 2)
    code, out, _ = script(prepare.main, *flags)
    assert code == 0 and "users 2" in out
    inter = json.loads((tmp_path / "mini/mini.inter.json").read_text())
    assert inter == {"0": ["3", "2", "0", "1"], "1": ["2", "0", "1", "3"]}  # raw ids 9, 10 and 1, 2, 3, 10 numbered
    item = json.loads((tmp_path / "mini/mini.item.json").read_text())["3"]
    assert (item["title"], item["description"]) == ("The Film 10", "Released in 2000. Genres: Drama, War")
    assert (tmp_path / "mini/mini.item2id").read_text().splitlines()[-1] == "10\t3"


@pytest.mark.parametrize("task, prefix, first", [("sequential", "mini.", 0), ("preference", "", 1)])
def test_known_users_and_items_keep_their_ids(tmp_path, script, refused, task, prefix, first):
    """Raw items 5 and 7 come first; later 3 and 10, users before and after, and the earlier ids stay."""
    months = (1_579_046_400, 1_581_724_800, 1_584_230_400)  # the middle of January, February and March 2020
    flags = ("--dataset", "mini", "--raw_path", tmp_path / "raw", "--data_path", tmp_path, "--min_interactions", 1)
    flags = (*flags, "--task", task, "--keep_ids", *(("--months", 1, 1, 1) if task == "preference" else ()))

    def prepare_ratings(users, items):
        pairs = [(user, place, item) for user in users for place, item in enumerate(items)]
        write_atomic(tmp_path / "raw", [(u, i, months[(u + place) % 3]) for u, place, i in pairs], MOVIES)
        path = tmp_path / "raw/mini.inter"  # likes and dislikes
        head, *rows = path.read_text().splitlines()
        rows = [row.replace("\t4\t", "\t1\t") if number % 4 < 2 else row for number, row in enumerate(rows)]
        path.write_text("\n".join([head, *rows]) + "\n")
        code, _, error = script(prepare.main, *flags)
        assert code == 0, error
        maps = [(tmp_path / f"mini/{prefix}{name}").read_text().split() for name in ("user2id", "item2id")]
        return [dict(zip(words[::2], map(int, words[1::2]), strict=True)) for words in maps]

    users, items = prepare_ratings([4, 6, 7], [5, 7, 8])
    assert users == {"4": first, "6": first + 1, "7": first + 2} and items["5"] == first
    more_users, more_items = prepare_ratings([2, 4, 6, 7, 11], [3, 5, 7, 8, 10])
    assert more_users == users | {"2": first + 3, "11": first + 4}
    assert more_items == items | {"3": first + 3, "10": first + 4}
    content = json.loads((tmp_path / f"mini/{prefix}item.json").read_text())
    assert list(content) == sorted(content, key=int) and content[str(first)]["title"] == "The Film 5"
    (tmp_path / f"mini/{prefix}item2id").write_text("5\tfive\n")
    assert "'5' has 'five', no number; leave --keep_ids out" in refused(prepare.main, *flags)


def test_prepare_replaces_all_files_or_none(tmp_path, script, refused):
    write_atomic(tmp_path / "raw", [(u, i, i) for u in (1, 2) for i in (1, 2, 3)], MOVIES)
    flags = ("--dataset", "mini", "--raw_path", tmp_path / "raw", "--data_path", tmp_path, "--min_interactions", 1)
    assert script(prepare.main, *flags)[0] == 0
    content = (tmp_path / "mini/mini.inter.json").read_bytes()
    (tmp_path / "mini/mini.item2id").unlink()
    (tmp_path / "mini/mini.item2id").mkdir()
    write_atomic(tmp_path / "raw", [(u, i, 9 - i) for u in (1, 2) for i in (1, 2, 3)], MOVIES)
    assert "mini.item2id: is a folder" in refused(prepare.main, *flags)
    assert (tmp_path / "mini/mini.inter.json").read_bytes() == content


def test_bad_raw_files_are_rejected(tmp_path, refused):
    raw = tmp_path / "raw"
    flags = ("--dataset", "mini", "--raw_path", raw, "--data_path", tmp_path / "out", "--min_interactions", 1)
    assert "mini.inter: no such file" in refused(prepare.main, *flags)
    write_atomic(raw, [(1, 1, "yesterday")], MOVIES)
    assert "line 2 has no readable time: '1 1 4 yesterday'" in refused(prepare.main, *flags)
    write_atomic(raw, [(1, 77, 5)], MOVIES)
    assert "mini.item: has a line for none of the 1 items of mini.inter" in refused(prepare.main, *flags)
    write_atomic(raw, [(1, 1, 5)], MOVIES)
    assert "lower --min_interactions" in refused(prepare.main, *flags[:-1], 9)
    assert not (tmp_path / "out").exists()


# ---- Every source ----


@pytest.fixture(params=WRITERS)
def source(request):
    return request.param


def test_every_source_gives_the_same(tmp_path, script, source):
    code, out, error = script(prepare.main, *prepare_flags(tmp_path, source, WRITERS[source](tmp_path / "raw")))
    assert code == 0, error
    inter, titles, users = read_output(tmp_path)
    assert inter == {str(u): ["0", "1", "2", "3"] for u in range(3)}
    assert titles == {str(i): f"Thing {item} & more" for i, item in enumerate(ITEMS)}
    assert users == "Ann\t0\nBob\t1\nCy\t2\n"
    assert "12 ratings read, 12 kept" in out and "dropped" not in out
    assert "users 3   items 4   density 100.00%" in out and "min 4, median 4, mean 4.0, max 4" in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["D"]
    assert open_interactions(tmp_path / "out", "D", ["items"]).test_users == ["0", "1", "2"]


def test_every_source_gives_preferences(tmp_path, script, source):
    month = 86400 * 31
    rows = [(user, item, 4 + n % 2, WHEN + n // 4 * month) for n, (user, item, _, _) in enumerate(ROWS)]
    again = [(*rows[1][:3], WHEN + month), (*rows[2][:2], 5, WHEN + 2 * month)]
    raw_flags = WRITERS[source](tmp_path / "raw", [*rows, *again])
    task = ("--task", "preference", "--months", 1, 1, 1, "--liked_above", 4, "--start", "2017-07-01")
    code, out, error = script(prepare.main, *prepare_flags(tmp_path, source, raw_flags, *task))
    assert code == 0 and "dropped: 2 ratings of items that the user had rated before" in out, error
    parts = open_ratings(tmp_path / "out", "D").parts
    assert {part: rows["label"] for part, rows in parts.items()} == dict.fromkeys(parts, [0, 1, 0, 1])
    assert parts["train"]["his"] == [[], [], [2], [2]] and parts["test"]["not_cold"] == [0] * 4


@pytest.mark.parametrize("shuffle", range(2))
def test_ids_do_not_depend_on_the_order_of_lines(tmp_path, script, source, shuffle):
    rows = random.Random(shuffle).sample(ROWS, len(ROWS))
    titles = dict(reversed(TITLES.items()))
    assert (
        script(prepare.main, *prepare_flags(tmp_path, source, WRITERS[source](tmp_path / "raw", rows, titles)))[0] == 0
    )
    inter, titles, _ = read_output(tmp_path)
    assert inter == {str(u): ["0", "1", "2", "3"] for u in range(3)} and titles["3"] == "Thing i4 & more"


def test_duplicates_count_once(tmp_path, script, source):
    again = (*ROWS[0][:3], WHEN + 99)
    raw_flags = WRITERS[source](tmp_path / "raw", [*ROWS, *[ROWS[0]] * 5000, again])
    code, out, error = script(prepare.main, *prepare_flags(tmp_path, source, raw_flags))
    assert code == 0 and "dropped: 5,000 ratings with user, item and time of another" in out, error
    assert read_output(tmp_path)[0]["0"] == ["0", "1", "2", "3", "0"]  # the same item at another time is kept


def test_start_and_end_limit_the_window(tmp_path, script, refused, source):
    rows = [(u, i, r, WHEN + 86400 * n) for n, (u, i, r, _) in enumerate(ROWS)]  # from 2017-07-14 on, a day each
    raw_flags = WRITERS[source](tmp_path / "raw", rows)
    window = ("--start", "2017-07-16", "--end", "2017-07-23")
    code, out, error = script(prepare.main, *prepare_flags(tmp_path, source, raw_flags, *window))
    assert code == 0 and "dropped: 4 ratings before --start or after --end" in out, error
    assert read_output(tmp_path)[0] == {"0": ["2", "3"], "1": ["0", "1", "2", "3"], "2": ["0", "1"]}
    error = refused(prepare.main, *prepare_flags(tmp_path, source, raw_flags, "--start", "2020-01-01"))
    assert "no ratings from --start to --end; the data has 2017-07-14 to 2017-07-25" in error


def test_items_without_a_title_are_kept_and_unknown_items_dropped(tmp_path, script, refused, source):
    """One rule for all sources and tasks."""
    raw_flags = WRITERS[source](tmp_path / "raw", ROWS, {"i1": "One", "i2": "nan", "i3": "<br> "})
    code, out, error = script(prepare.main, *prepare_flags(tmp_path, source, raw_flags))
    assert code == 0 and "dropped: 3 ratings of items that the items file lacks" in out, error
    assert read_output(tmp_path)[1] == {"0": "One", "1": "", "2": ""} and "2 items without a title are named by" in out
    dataset = open_interactions(tmp_path / "out", "D", ["items"])
    named = {"amazon2023": "Red big", "movielens": "Genres: Drama, War"}.get(source)
    assert [dataset.title(item) for item in "012"] == ["One", named or "item 1", named or "item 2"]
    raw_flags = WRITERS[source](tmp_path / "raw", ROWS, {"other": "One"})
    error = refused(prepare.main, *prepare_flags(tmp_path, source, raw_flags))
    assert "has a line for none of the 4 items of" in error


UNUSUAL_IDS = [
    "tab\there",
    "new\nline",
    "back\\slash",
    'quo"te',
    "ünï 🎬",
    "x" * 5000,
    "a,b;c|d",
    "NULL",
    "'",
    "--",
]


@pytest.mark.parametrize("source", ["amazon2018", "amazon2023", "csv"])
def test_unusual_ids_are_kept(tmp_path, script, source):
    raw_flags = WRITERS[source](tmp_path / "raw*[1]/k=v", [(name, "i1", 5, WHEN) for name in UNUSUAL_IDS])
    code, _, error = script(prepare.main, *prepare_flags(tmp_path, source, raw_flags), "--na_values")
    assert code == 0, error
    lines = (tmp_path / "out/D/D.user2id").read_bytes().decode().removesuffix("\n").split("\n")
    unescaped = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}
    names = []
    for number, line in enumerate(lines):
        name, number_text = line.split("\t")
        assert number_text == str(number)
        letters = iter(name)
        names.append("".join(unescaped[c + next(letters)] if c == "\\" else c for c in letters))
    assert names == sorted(UNUSUAL_IDS)


# ---- The k-core ----


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_k_core_is_a_fixed_point(pairs, k):
    left = list(pairs)
    while True:  # the definition, one rating at a time
        rare = next((p for p in left if min(sum(q[side] == p[side] for q in left) for side in (0, 1)) < k), None)
        if rare is None:
            break
        left.remove(rare)
    with duckdb.connect() as con:
        con.execute("CREATE TABLE rated (u INTEGER, i INTEGER)")
        if pairs:
            con.executemany("INSERT INTO rated VALUES (?, ?)", pairs)
        assert filter_core(con, k) == len(pairs) - len(left)
        assert sorted(con.execute("SELECT u, i FROM rated").fetchall()) == sorted(left)
