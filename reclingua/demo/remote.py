"""Next-item model of a running serve.py, which the demo page asks in place of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2

from reclingua.datasets.interactions import open_interactions
from reclingua.decoding.beam_search import ScoredItem
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import CheckpointMetadata


class RemoteRecommender:
    """The first next-item model of a server, asked like `Recommender`; its dataset is read from a folder here.

    Args:
        url: address of the server.
        data_path: folder that holds the dataset of the model, with titles, semantic IDs and test users.
        key: API key of the server, "" if it has none.

    Raises:
        InputError: the server cannot be reached, refuses the key or serves no next-item model; the dataset is missing.
    """

    def __init__(self, url: str, data_path: str | Path, key: str = "", timeout: float = 60):
        self.url, headers = url, {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx2.Client(headers=headers, timeout=timeout)
        self.info = next((model for model in self._ask("/v1/models") if model["kind"] == "next-item"), None)
        if self.info is None:
            raise InputError(f"--server {url}: serves no next-item model")
        self.dataset = open_interactions(data_path, self.info["dataset"], ["items", "index"])
        name, max_his_len = self.info["name"], self.info["max_his_len"]
        self.metadata = CheckpointMetadata(name, self.dataset.name, max_his_len=max_his_len)

    def recommend(
        self, histories: Sequence[Sequence[str]], k: int, *, exclude_seen: bool, num_beams: int
    ) -> list[list[ScoredItem]]:
        """Return for each history its best `k` items, best first; the server has a beam width of its own.

        Raises:
            InputError: the server has no answer, or one with items that the dataset here does not have.
        """
        lists = []
        for history in histories:
            body = {"model": self.metadata.method, "history": list(history), "k": k, "exclude_seen": exclude_seen}
            items = self._ask("/v1/recommend", body)["items"]
            if unknown := next((entry["item"] for entry in items if entry["item"] not in self.dataset.index), None):
                raise InputError(f"the server has an item {unknown!r} that {self.dataset.folder} does not have")
            lists.append([ScoredItem(entry["item"], entry["score"]) for entry in items])
        return lists

    def _ask(self, path: str, body: dict | None = None) -> Any:
        """Return the JSON that the server answers."""
        try:
            response = self.client.request("GET" if body is None else "POST", f"{self.url}{path}", json=body)
            if response.status_code == 200:
                return response.json()
            reason = f"answers {response.status_code}: {response.text[:200]}"
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            reason = f"cannot be asked ({error})"
        raise InputError(f"--server {self.url}: {reason}")
