"""Toy datasets: interactions on a ring, ratings by parity."""

import json
from pathlib import Path

TITLE = 'Toy <b>"bold"</b> & $x_1$ <script src="http://x"></script>'


def write_toy(root: Path, users: int = 12, items: int = 9) -> Path:
    """A dataset folder root/toy: users walk around a ring of items, so the next item is certain."""
    folder = root / "toy"
    folder.mkdir(parents=True, exist_ok=True)
    inter = {str(u): [(u + step) % items for step in range(6 + u % 3)] for u in range(users)}
    item = {str(i): {"title": f"Toy number {i}", "description": f"kind {i % 3}"} for i in range(items)}
    index = {str(i): [f"<a_{i // 3}>", f"<b_{i % 3}>"] for i in range(items)}
    for name, content in (("inter", inter), ("item", item), ("index", index)):
        (folder / f"toy.{name}.json").write_text(json.dumps(content))
    return folder


def write_preferences(root: Path, users: int = 40, items: int = 30, name: str = "liked") -> Path:
    """A preference dataset root/`name`: users like the items of their own parity. The last users are cold."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    rows = {"train": [], "valid": [], "test": []}
    for user in range(1, users + 1):
        his = []
        for at, item in enumerate(draw.permutation(np.arange(1, items + 1)).tolist()):
            part = "train" if at < items * 0.6 else "valid" if at < items * 0.8 else "test"
            if part == "train" and user > users - 4:
                continue
            label = int((user + item) % 2 == 0)
            row = {"uid": user, "iid": item, "label": label, "timestamp": at, "his": [*his]}
            rows[part].append(row | {"not_cold": int(user <= users - 4)})
            his += [item] * label
    for part, content in rows.items():
        pq.write_table(pa.Table.from_pylist(content), folder / f"{part}.parquet")
    titles = {str(item): {"title": f"Thing {item}"} for item in range(1, items + 1)}
    (folder / "item.json").write_text(json.dumps(titles))
    return folder
