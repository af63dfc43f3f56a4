"""CoRA (arXiv 2408.10645): collaborative embeddings become low-rank weights, other ones for each user and item.

The prompt stays words and the language model stays as it is. A Q-Former reads the embeddings of user and item; its
queries become a matrix A for the sample, shared by all layers, and a layer's output gains x A B (section 4).
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedModel

from reclingua.models.collaborative.base import CollaborativeOutput
from reclingua.models.lora import linear_layers
from reclingua.models.yes_no import YesNoConfig, YesNoModel
from reclingua.utils.errors import InputError


class CoRAConfig(YesNoConfig):
    """
    Args:
        r, alpha, dropout: rank, scale (alpha / r) and dropout on the input of the generated weights.
        targets: names of the linear layers that get them.
        queries, num_layers, num_heads: shape of the Q-Former, as wide as user's and item's embedding together.
    """

    model_type = "recommender-cora"

    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    targets: list[str] | None = None
    queries: int = 4
    num_layers: int = 8
    num_heads: int = 8


class CoRA(YesNoModel):
    """Adds weights made from user and item to linear layers of the language model."""

    config_class = CoRAConfig
    supports_prefix_sharing = False  # the same words become something else for every user and item

    def build_projector(self) -> None:
        super().build_projector()
        config = self.config
        width = self.cf_model.user_width + self.cf_model.item_width
        if width % config.num_heads:
            raise InputError(
                f"{config.cf_model}: its embeddings of user and item are {width} wide together, which should be a "
                f"multiple of {config.num_heads}, the Q-Former's heads; train one with another --embedding_size"
            )
        self.queries = nn.Parameter(0.02 * torch.randn(1, config.queries, width))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                encoder_hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                cross_attention_frequency=1,
                # At the usual .02 the queries would hardly notice the one vector they read.
                initializer_range=width**-0.5,
            )
        )
        layers = linear_layers(self.language, config.targets)
        sizes = {name: layer_size(layer) for name, layer in layers.items()}
        # Layers that read something else than hidden states (o_proj of wide heads, down_proj) get an A of their own.
        self.to_a = nn.ModuleDict({str(n): nn.Linear(width, n * config.r) for n, _ in sizes.values()})
        # Modules, not bare weights: ZeRO-3 has the weights of a module together only while that is called.
        self.b = nn.ModuleDict(
            {name.replace(".", "/"): nn.Linear(config.r, out, bias=False) for name, (_, out) in sizes.items()}
        )
        for b in self.b.values():
            nn.init.zeros_(b.weight)
        self.a: dict[int, torch.Tensor] = {}  # of the rows that are being computed, by what a layer reads
        self.read: tuple[torch.Tensor, torch.Tensor] | None = None  # what the last layer read, and that times A
        for name, layer in layers.items():
            layer.register_forward_hook(self._adder(self.b[name.replace(".", "/")]))

    def train(self, mode: bool = True) -> "CoRA":
        """Weights of rows that were kept for a backward pass are forgotten with the training."""
        self.a, self.read = (self.a, self.read) if mode else ({}, None)
        return super().train(mode)

    def _adder(self, b: nn.Linear):
        def add(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            if not self.a:
                return output
            (x,) = inputs
            if self.read is None or self.read[0] is not x:  # query, key and value read the same
                a = self.a[x.shape[-1]]
                self.read = x, F.dropout(x.to(a.dtype), self.config.dropout, self.training) @ a
            return output + b(self.read[1]).to(output.dtype)

        return add

    def weights_of(
        self,
        users: torch.Tensor,
        items: torch.Tensor,
        histories: torch.Tensor | None = None,
        with_ids: torch.Tensor | None = None,
    ) -> dict[int, torch.Tensor]:
        """A, scaled by alpha / r, of each pair: width of a layer's input -> float [pairs, width, r].

        Args:
            with_ids: bool [pairs], where False the pair adds nothing.
        """
        user = self.normalize("user", self.cf_model.user_vectors(users, histories, items))
        item = self.normalize("item", self.cf_model.item_vectors(items))
        known = torch.cat([user, item], -1)
        queries = self.queries.expand(len(known), -1, -1)
        read = self.qformer(query_embeds=queries, encoder_hidden_states=known[:, None]).last_hidden_state
        scale = known.new_full((len(known), 1), self.config.alpha / self.config.r)
        if with_ids is not None:
            scale = scale * with_ids[:, None]
        # The mean over queries and the linear layer may change places, so that the layer has one row to read.
        mean = read.mean(1)
        return {
            int(width): (scale * F.normalize(linear(mean), dim=-1)).unflatten(-1, (int(width), self.config.r))
            for width, linear in self.to_a.items()
        }

    def forward(
        self,
        input_ids: torch.Tensor,
        last: torch.Tensor,
        users: torch.Tensor,
        items: torch.Tensor,
        histories: torch.Tensor | None = None,
        with_ids: torch.Tensor | None = None,
        **rest,
    ) -> CollaborativeOutput:
        """As the base class's; the weights are those of `users` and `items` int64 [batch]."""
        self.a = self.weights_of(users, items, histories, with_ids)
        try:
            return super().forward(input_ids, last, **rest)
        finally:
            self.read = None
            if not self.language.is_activation_checkpointing:  # which computes layers again in the backward pass
                self.a = {}

    @torch.no_grad()
    def merged(self, user: torch.Tensor, item: torch.Tensor, history: torch.Tensor | None = None) -> PreTrainedModel:
        """A copy of the language model with the weights of one user and item, int64 [1] each, added for good.

        Raises:
            ValueError: the language model is in 4 bits, to which nothing can be added.
        """
        if self.config.load_in_4bit:
            raise ValueError("weights in 4 bits cannot be added to; load the base model in full")
        weights = self.weights_of(user, item, history)
        language = copy.deepcopy(self.language)
        for name, layer in linear_layers(language, self.config.targets).items():
            layer._forward_hooks.clear()
            if hasattr(layer, "base_layer"):
                layer.merge()
            base = getattr(layer, "base_layer", layer)
            added = self.b[name.replace(".", "/")](weights[layer_size(layer)[0]][0])
            base.weight += added.T if isinstance(base, nn.Linear) else added
        return language


def layer_size(layer: nn.Module) -> tuple[int, int]:
    """What a linear layer reads and writes."""
    base = getattr(layer, "base_layer", layer)
    return (base.in_features, base.out_features) if isinstance(base, nn.Linear) else tuple(base.weight.shape)
