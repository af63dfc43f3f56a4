"""LightGCN (arXiv 2002.02126): embeddings averaged over neighbours in the graph of who liked what."""

import torch
from torch import nn
from torch.nn import functional as F

from reclingua.models.collaborative.base import CollaborativeConfig, CollaborativeModel


class LightGCNConfig(CollaborativeConfig):
    """
    Args:
        num_layers: rounds of averaging.
        num_edges: liked pairs of train, the edges of the graph.
    """

    model_type = "lightgcn"

    num_layers: int = 2
    num_edges: int = 0


class LightGCN(CollaborativeModel):
    """LightGCN: users and items are nodes of one graph, users first, which is saved with the weights."""

    config_class = LightGCNConfig
    edges: torch.Tensor

    def __init__(self, config: LightGCNConfig):
        super().__init__(config)
        self.user_embedding = nn.Embedding(config.num_users, config.embedding_size, padding_idx=0)
        self.item_embedding = nn.Embedding(config.num_items, config.embedding_size, padding_idx=0)
        self._graph: torch.Tensor | None = None
        self._propagated: tuple[torch.Tensor, torch.Tensor]
        self._propagated_state: tuple | None = None
        self.register_buffer("edges", torch.zeros(2, config.num_edges, dtype=torch.long))
        self.post_init()

    def set_graph(self, users: torch.Tensor, items: torch.Tensor) -> None:
        """Set the edges to the liked pairs of train, int64 [pairs] each; duplicates are one edge."""
        edges = torch.unique(torch.stack([users, items]), dim=1)
        self.config.num_edges = edges.shape[1]
        self.edges, self._graph, self._propagated_state = edges.to(self.edges.device), None, None

    def graph(self) -> torch.Tensor:
        """Return the normalised adjacency of users and items, sparse [nodes, nodes], built once per device."""
        if self._graph is None or self._graph.device != self.edges.device:
            nodes = self.config.num_users + self.config.num_items
            users, items = self.edges[0], self.edges[1] + self.config.num_users
            edges = torch.stack([torch.cat([users, items]), torch.cat([items, users])])
            degree = torch.bincount(edges[0], minlength=nodes).float()
            weights = (degree[edges[0]] * degree[edges[1]]).rsqrt()
            self._graph = torch.sparse_coo_tensor(edges, weights, (nodes, nodes), check_invariants=True).coalesce()
        return self._graph

    def propagate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings of all users and of all items, the mean over the layers (section 3.1.2).

        Of frozen weights they are computed once, until the weights change or move.
        """
        weights = (self.user_embedding.weight, self.item_embedding.weight)
        if any(weight.requires_grad for weight in weights):
            return self._propagate(*weights)
        state = tuple((weight.data_ptr(), weight._version, weight.dtype) for weight in weights)
        if state != self._propagated_state:
            with torch.no_grad():
                self._propagated, self._propagated_state = self._propagate(*weights), state
        return self._propagated

    def _propagate(self, users: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(users.device.type, enabled=False):
            layer = total = torch.cat([users, items]).float()  # there are no sparse products in half precision
            for _ in range(self.config.num_layers):
                layer = torch.sparse.mm(self.graph(), layer)
                total = total + layer
            mean = (total / (self.config.num_layers + 1)).to(users.dtype)
        return mean[: self.config.num_users], mean[self.config.num_users :]

    def user_vectors(self, users, histories=None, items=None) -> torch.Tensor:
        return F.embedding(users, self.propagate()[0])

    def item_vectors(self, items: torch.Tensor) -> torch.Tensor:
        return F.embedding(items, self.propagate()[1], padding_idx=0)

    def score(self, users, items, histories=None) -> torch.Tensor:
        user_embeddings, item_embeddings = self.propagate()
        return torch.linalg.vecdot(F.embedding(users, user_embeddings), F.embedding(items, item_embeddings))
