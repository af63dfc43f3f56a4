"""The same ratings in the raw format of every source of data.prepare."""

import gzip
import json

USERS, ITEMS = ("Ann", "Bob", "Cy"), ("i1", "i2", "i3", "i4")
WHEN = 1_500_000_000
ROWS = [
    (user, item, 4 + (i + j) % 2, WHEN + 10 * i + j) for i, user in enumerate(USERS) for j, item in enumerate(ITEMS)
]
TITLES = {item: f"Thing {item} &amp;amp; more" for item in ITEMS}


def json_lines(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def quoted(rows, delimiter=","):
    cells = [[f'"{str(cell).replace(chr(34), chr(34) * 2)}"' for cell in row] for row in rows]
    return "".join(delimiter.join(row) + "\n" for row in cells)


def write_recbole(folder, rows=ROWS, titles=TITLES):
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    write(folder / "D.inter", head + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    write(folder / "D.item", "item_id:token\ttitle:token_seq\n" + "".join(f"{i}\t{t}\n" for i, t in titles.items()))
    return "--raw_path", folder


def write_amazon2018(folder, rows=ROWS, titles=TITLES, end=".json"):
    keys = ("reviewerID", "asin", "overall", "unixReviewTime")
    write(folder / f"D{end}", json_lines(dict(zip(keys, row, strict=True)) for row in rows))
    write(folder / f"meta_D{end}", json_lines({"asin": i, "title": t, "description": [t]} for i, t in titles.items()))
    return "--raw_path", folder


def write_amazon2023(folder, rows=ROWS, titles=TITLES, end=".jsonl.gz"):
    keys = ("user_id", "parent_asin", "rating", "timestamp")
    rows = [(*row[:3], row[3] * 1000 + 7 if isinstance(row[3], int) else row[3]) for row in rows]
    write(folder / f"D{end}", json_lines(dict(zip(keys, row, strict=True)) for row in rows))
    more = {"features": ["Red", "<b>big</b>"], "categories": ["A", "B"], "store": None, "description": []}
    write(folder / f"meta_D{end}", json_lines({"parent_asin": i, "title": t, **more} for i, t in titles.items()))
    return "--raw_path", folder


def write_movielens1m(folder, rows=ROWS, titles=TITLES):
    write(folder / "ratings.dat", "".join("::".join(map(str, row)) + "\n" for row in rows))
    write(folder / "movies.dat", "".join(f"{i}::{t}::Drama|War\n" for i, t in titles.items()).encode())
    return "--raw_path", folder


def write_movielens20m(folder, rows=ROWS, titles=TITLES):
    write(
        folder / "ratings.csv",
        "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, r)) + "\n" for r in rows),
    )
    kinds = "(no genres listed)"
    write(folder / "movies.csv", "movieId,title,genres\n" + quoted([(i, t, kinds) for i, t in titles.items()]))
    return "--raw_path", folder


def write_csv(folder, rows=ROWS, titles=TITLES, delimiter=";"):
    write(
        folder / "sales.csv",
        quoted([("stars", "who", "what", "sold"), *((r[2], r[0], r[1], r[3]) for r in rows)], delimiter),
    )
    write(folder / "goods.csv.gz", quoted([("what", "name"), *titles.items()]))
    columns = ("--user_column", "who", "--item_column", "what", "--time_column", "sold", "--rating_column", "stars")
    files = ("--raw_path", folder / "sales.csv", "--items_path", folder / "goods.csv.gz", "--title_column", "name")
    return *files, *columns


WRITERS = {
    "recbole": write_recbole,
    "amazon2018": write_amazon2018,
    "amazon2023": write_amazon2023,
    "movielens": write_movielens1m,
    "movielens csv": write_movielens20m,
    "csv": write_csv,
}


def prepare_flags(tmp_path, source, raw_flags, *more):
    start = ("--source", source.split()[0], "--dataset", "D", "--data_path", tmp_path / "out")
    return *start, *raw_flags, "--min_interactions", 1, *more


def read_output(tmp_path):
    folder = tmp_path / "out/D"
    inter, item = (json.loads((folder / f"D.{name}.json").read_text()) for name in ("inter", "item"))
    return inter, {key: record["title"] for key, record in item.items()}, (folder / "D.user2id").read_text()
