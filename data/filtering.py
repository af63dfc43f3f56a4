"""Filters of raw ratings: first of duplicates, time window, k-core; and the assignment of ids.

All filters run in DuckDB, which spills to disk. The table `ratings` of `data.ingestion` becomes
    rated: u, i (INTEGER, numbers of user and item), rating, timestamp (DOUBLE, seconds), place (BIGINT, order in time,
        within one second the order of the file).
"""

from collections.abc import Mapping

import pandas as pd
from duckdb import DuckDBPyConnection


def fetch_one(con: DuckDBPyConnection, query: str) -> tuple | None:
    """Run a query and return its first row, None if there is none."""
    rows = con.execute(query).fetchall()
    return rows[0] if rows else None


def has_labels(con: DuckDBPyConnection) -> bool:
    """Return whether the ratings are labels, 0 and 1."""
    return fetch_one(con, "SELECT min(rating) = 0 AND max(rating) = 1 AND count(DISTINCT rating) = 2 FROM ratings")[0]


def drop_negatives(con: DuckDBPyConnection) -> int:
    """Drop ratings that are labels 0, items that a user was shown and did not take; return their number."""
    return con.execute("DELETE FROM ratings WHERE rating = 0").fetchone()[0]


def number_ratings(con: DuckDBPyConnection, only_known: bool) -> int:
    """Create the tables `rated`, and `user_names` and `item_names` with columns name, number.

    If `only_known`, ratings of items that are not in the table `items` are dropped.

    Returns:
        number of dropped ratings.
    """
    known = "WHERE item IN (SELECT item FROM items)" if only_known else ""
    for column, condition in (("user", ""), ("item", known)):
        distinct = f"SELECT DISTINCT {column} AS name FROM ratings {condition}"
        con.execute(f"CREATE TABLE {column}_names AS SELECT name, row_number() OVER () AS number FROM ({distinct})")
    con.execute("""
        CREATE TABLE rated AS SELECT users.number::INTEGER AS u, items.number::INTEGER AS i, rating,
            timestamp, row_number() OVER (ORDER BY timestamp, ratings.rowid) AS place
        FROM ratings JOIN user_names AS users ON user = users.name JOIN item_names AS items ON item = items.name""")
    (read,) = fetch_one(con, "SELECT count(*) FROM ratings")
    con.execute("DROP TABLE ratings")
    return read - num_ratings(con)


def num_ratings(con: DuckDBPyConnection) -> int:
    """Return the number of ratings left."""
    return fetch_one(con, "SELECT count(*) FROM rated")[0]


def filter_ratings(con: DuckDBPyConnection, selection: str) -> int:
    """Replace `rated` by a SELECT from it; return the number of dropped ratings."""
    num_before = num_ratings(con)
    con.execute(f"CREATE OR REPLACE TABLE rated AS {selection}")
    con.execute("CHECKPOINT")  # frees the disk space of the dropped ratings
    return num_before - num_ratings(con)


def filter_window(con: DuckDBPyConnection, first: float, end: float) -> int:
    """Drop ratings before `first` or from `end` on (seconds); return their number."""
    return filter_ratings(con, f"SELECT * FROM rated WHERE timestamp >= {first!r} AND timestamp < {end!r}")


def filter_duplicates(con: DuckDBPyConnection, columns: str) -> int:
    """Keep the first of the ratings that are equal in these columns; return the number of dropped ratings."""
    earliest = f"SELECT min(place) FROM rated GROUP BY {columns}"
    return filter_ratings(con, f"SELECT * FROM rated WHERE place IN ({earliest})")


def filter_core(con: DuckDBPyConnection, k: int) -> int:
    """Reduce the ratings to their k-core; return the number of dropped ratings.

    Users and items with fewer than `k` ratings are dropped until none is left: dropping items can take users below
    `k`, and the other way round.
    """
    frequent = "{0} IN (SELECT {0} FROM rated GROUP BY {0} HAVING count(*) >= " + str(k) + ")"
    selection = f"SELECT * FROM rated WHERE {frequent.format('u')} AND {frequent.format('i')}"
    total = 0
    while num_dropped := filter_ratings(con, selection):
        total += num_dropped
    return total


def assign_ids(con: DuckDBPyConnection, first: int, known: Mapping[str, Mapping[str, int]]) -> None:
    """Create `users` and `items_kept` with columns id, name, number.

    Ids count from `first` in the order of the names, by value if all of them are integers, else alphabetically: the
    same data always gets the same ids, independent of the order of lines.

    Args:
        known: table -> id by name, of an earlier preparation. These names keep their ids, the others count after them.
    """
    for table, names, column in (("users", "user_names", "u"), ("items_kept", "item_names", "i")):
        ids = known[table]
        earlier = pd.DataFrame(
            {"name": pd.Series(ids.keys(), dtype=str), "id": pd.Series(ids.values(), dtype="int64")}
        )
        con.register("earlier", earlier)
        con.execute(f"""
            CREATE TABLE {table} AS
            WITH kept AS (
                SELECT names.*, earlier.id FROM {names} AS names LEFT JOIN earlier USING (name)
                WHERE number IN (SELECT {column} FROM rated)),
            kind AS (SELECT bool_and(regexp_full_match(name, '[0-9]+')) AS whole FROM kept)
            SELECT coalesce(id, row_number() OVER (
                PARTITION BY id IS NULL
                ORDER BY CASE WHEN whole THEN length(ltrim(name, '0')) END,
                    CASE WHEN whole THEN ltrim(name, '0') END, name
            ) - 1 + {max(ids.values(), default=first - 1) + 1}) AS id, name, number FROM kept, kind""")
        con.unregister("earlier")
