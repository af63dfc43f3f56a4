"""Values of raw files as SQL: ids, numbers and times as people write them, and marks of missing values."""

import duckdb

from data.raw_files import literal
from reclingua.utils.errors import InputError

# Marks of a missing value; those of pandas, and of MySQL. Upper and lower case count: "Na" can be a name.
MISSING = ("#N/A", "#NA", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "-NaN", "-nan", "\\N")
YES, NO = ("true", "t", "yes", "y", "like", "liked"), ("false", "f", "no", "n", "dislike", "disliked")
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # per second
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# Plausible times, seconds since 1970: the years 1985 to 2099.
EARLIEST, LATEST = 473_385_600, 4_102_444_800
# Dates written as a number: number of digits -> format. 20170715 would be August 1970 if it were seconds.
COMPACT_DATES = {8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
_BLANK = " || ".join(f"chr({code})" for code in (9, 10, 13, 32, 160, 0xFEFF))


def text_sql(column: str, missing: list[str]) -> str:
    """Return SQL of a value without white space around it, NULL if it is empty or a mark of a missing value.

    The trim has a second purpose: DuckDB pushes a bare try_cast into its CSV reader, which fails instead of returning
    NULL.
    """
    marks = ", ".join(literal(mark) for mark in ("", *missing))
    return f"(CASE WHEN trim({column}, {_BLANK}) NOT IN ({marks}) THEN trim({column}, {_BLANK}) END)"


def id_sql(column: str, missing: list[str], decimal: str) -> str:
    """Return SQL of an id; 12.0 and 1.2e+01 are 12, as tables of numbers with missing values have them."""
    text, point = text_sql(column, missing), literal(f"-?[0-9]+[.{decimal}]0+")
    exponent = literal(r"[0-9](\.[0-9]+)?[eE]\+[0-9]{1,2}")
    number = f"try_cast({text} AS DOUBLE)"
    return f"""(CASE WHEN contains({text}, '0') AND regexp_full_match({text}, {point})
        THEN regexp_extract({text}, '-?[0-9]+')
        WHEN contains({text}, '+') AND regexp_full_match({text}, {exponent}) AND {number} < 1e15
            AND {number} = floor({number}) THEN {number}::BIGINT::VARCHAR
        ELSE {text} END)"""


def number_sql(column: str, missing: list[str], decimal: str) -> str:
    """Return SQL of a number; yes and no, true and false, like and dislike are 1 and 0; else NULL."""
    text = text_sql(column, missing)
    number = f"replace({text}, {literal(decimal)}, '.')" if decimal != "." else text
    yes, no = (", ".join(map(literal, words)) for words in (YES, NO))
    return f"""coalesce(try_cast({number} AS DOUBLE),
        CASE WHEN lower({text}) IN ({yes}) THEN 1.0 WHEN lower({text}) IN ({no}) THEN 0.0 END)"""


def time_sql(column: str, missing: list[str], decimal: str, unit: str, time_format: str | None) -> str:
    """Return SQL of a time in seconds since 1970: a number of units, or a date, in UTC without a time zone."""
    text = text_sql(column, missing)
    if time_format:
        return f"epoch(try_strptime({text}, {literal(time_format)}))"
    number = f"try_cast({f'replace({text}, {literal(decimal)}, chr(46))' if decimal != '.' else text} AS DOUBLE)"
    return f"coalesce({number} / {UNITS[unit]}, epoch(try_cast({text} AS TIMESTAMPTZ)))"


def compact_date_sql(column: str, digits: int) -> str:
    """Return SQL that reads a number of so many digits as a date, in seconds since 1970; NULL if it is none."""
    first, end = 1970 * 10 ** (digits - 4), 2100 * 10 ** (digits - 4)
    text = f"CASE WHEN {column} >= {first} AND {column} < {end} THEN {column}::BIGINT::VARCHAR END"
    return f"epoch(try_strptime({text}, '{COMPACT_DATES[digits]}'))"


def check_time_format(con: duckdb.DuckDBPyConnection, time_format: str) -> None:
    """Raise InputError unless DuckDB knows the format."""
    try:
        con.execute(f"SELECT try_strptime('', {literal(time_format)})")
    except duckdb.Error as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--time_format {time_format}: is no format like %d/%m/%Y %H:%M ({reason})") from None


def plausible_unit(value: float) -> str | None:
    """Return the unit in which a number since 1970 is a plausible time, None if there is none."""
    return next((unit for unit, size in UNITS.items() if EARLIEST <= value / size < LATEST), None)


def describe_time(seconds: float, unit: str) -> str:
    """Return what is wrong with an implausible time, and the flag that makes it one if a flag does."""
    year = f"the year {1970 + int(seconds // 31_556_952)}" if abs(seconds) < 1e13 else "no year"
    number = seconds * UNITS[unit]
    meaning = f"{number:.0f} {UNIT_NAMES[unit]} since 1970 is {year}"
    if other := plausible_unit(number):
        return f"{meaning}; is it in {UNIT_NAMES[other]}? --time_unit {other}"
    digits = f"{abs(number):.0f}"
    if len(digits) in COMPACT_DATES and digits[:2] in ("19", "20"):
        return f"{meaning}; is it a date? --time_format {COMPACT_DATES[len(digits)]}"
    return f"it is {year}"
