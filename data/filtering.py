"""What of the raw ratings counts: of repeated ones the first, those in a time window, a k-core; and its ids.

All of it happens in DuckDB, which moves to disk what does not fit into its memory. The readers of `data.sources` leave
the table `ratings`; here it becomes
    rated: u, i (INTEGER, numbers of user and item), rating, timestamp (DOUBLE, in seconds), place (BIGINT, the order
        in time, among ratings of one second that of the file).
"""

from duckdb import DuckDBPyConnection


def fetch_one(con: DuckDBPyConnection, query: str) -> tuple | None:
    """The first row, None if there is none."""
    rows = con.execute(query).fetchall()
    return rows[0] if rows else None


def number_ratings(con: DuckDBPyConnection, only_known: bool) -> int:
    """Make `rated`, with `user_names` and `item_names`: name, number; returns how many ratings were left out.

    These are the ratings of items that are not in the table `items`, left out if `only_known`.
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
    """How many ratings are left."""
    return fetch_one(con, "SELECT count(*) FROM rated")[0]


def filter_ratings(con: DuckDBPyConnection, selection: str) -> int:
    """Go on with what the SELECT gives of `rated`; returns how many ratings that leaves out."""
    before = num_ratings(con)
    con.execute(f"CREATE OR REPLACE TABLE rated AS {selection}")
    con.execute("CHECKPOINT")  # gives the room of what was left out back
    return before - num_ratings(con)


def filter_window(con: DuckDBPyConnection, first: float, end: float) -> int:
    """Leave out what was rated before `first` or from `end` on, seconds; returns how many."""
    return filter_ratings(con, f"SELECT * FROM rated WHERE timestamp >= {first!r} AND timestamp < {end!r}")


def filter_duplicates(con: DuckDBPyConnection, same: str) -> int:
    """Of ratings that are the same in these columns leave out all but the first; returns how many."""
    earliest = f"SELECT min(place) FROM rated GROUP BY {same}"
    return filter_ratings(con, f"SELECT * FROM rated WHERE place IN ({earliest})")


def filter_core(con: DuckDBPyConnection, k: int) -> int:
    """Leave out users and items with fewer than `k` ratings until none is left to leave out; returns how many."""
    often = "{0} IN (SELECT {0} FROM rated GROUP BY {0} HAVING count(*) >= " + str(k) + ")"
    left_out = 0
    while now := filter_ratings(con, f"SELECT * FROM rated WHERE {often.format('u')} AND {often.format('i')}"):
        left_out += now
    return left_out


def assign_ids(con: DuckDBPyConnection, first: int = 0) -> None:
    """Make `users` and `items_kept`: id, name, number.

    Ids run from `first` in the order of the names, by value where all of them are whole numbers, else letter by
    letter: the same data always gets the same ids, in whatever order its lines come.
    """
    for table, names, column in (("users", "user_names", "u"), ("items_kept", "item_names", "i")):
        con.execute(f"""
            CREATE TABLE {table} AS
            WITH kept AS (SELECT * FROM {names} WHERE number IN (SELECT {column} FROM rated)),
            kind AS (SELECT bool_and(regexp_full_match(name, '[0-9]+')) AS whole FROM kept)
            SELECT row_number() OVER (
                ORDER BY CASE WHEN whole THEN length(ltrim(name, '0')) END,
                    CASE WHEN whole THEN ltrim(name, '0') END, name
            ) - 1 + {first} AS id, name, number FROM kept, kind""")
