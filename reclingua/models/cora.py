"""CoRA (arXiv 2408.10645): collaborative embeddings become low-rank weights for each pair of user and item.

The prompt is plain text and the language model is frozen. A Q-Former reads the embeddings of user and item; its
queries become a matrix A for the sample, shared by all layers, and x A B is added to a layer's output (section 4).
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedModel

from reclingua.models.collaborative.base import CollaborativeModel, CollaborativeOutput
from reclingua.models.lora import linear_layers
from reclingua.models.yes_no import YesNoConfig, YesNoModel
from reclingua.utils.errors import InputError


class CoRAConfig(YesNoConfig):
    """Config of a CoRA.

    Args:
        r, alpha, dropout: rank, scale (alpha / r) and dropout on the input of the generated weights.
        targets: names of the linear layers with generated weights.
        queries, num_layers, num_heads: shape of the Q-Former; its width is that of user and item embedding together.
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
    """Yes/No model whose linear layers get weights generated from user and item."""

    config_class = CoRAConfig
    cf_model: CollaborativeModel
    supports_trees = False  # type: ignore[assignment]  # the same tokens differ between pairs of user and item

    def build_projector(self) -> None:
        """Build the Q-Former, the linear layers from its output to A, and B of each target layer."""
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
                # With the usual .02 the one vector that the queries read would hardly change them.
                initializer_range=width**-0.5,
            )
        )
        layers = linear_layers(self.language, config.targets)
        sizes = {name: layer_size(layer) for name, layer in layers.items()}
        # Layers with an input of another width (o_proj of wide heads, down_proj) get an A of their own.
        self.to_a = nn.ModuleDict({str(n): nn.Linear(width, n * config.r) for n, _ in sizes.values()})
        # Modules, not parameters: ZeRO-3 gathers the weights of a module only while it is called.
        b = {name: nn.Linear(config.r, out, bias=False) for name, (_, out) in sizes.items()}
        for linear in b.values():
            nn.init.zeros_(linear.weight)
        self.b = nn.ModuleDict({name.replace(".", "/"): linear for name, linear in b.items()})
        self.a: dict[int, torch.Tensor] = {}  # of the current batch, by the width of a layer's input
        self.last_product: tuple[torch.Tensor, torch.Tensor] | None = None  # the last layer's x and x A
        for name, layer in layers.items():
            layer.register_forward_hook(self._make_hook(b[name]))

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and drop the weights kept for a backward pass when training ends."""
        self.a, self.last_product = (self.a, self.last_product) if mode else ({}, None)
        super().train(mode)
        return self

    def _make_hook(self, b: nn.Linear) -> Callable:
        def add(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            if not self.a:
                return output
            (x,) = inputs
            if self.last_product is None or self.last_product[0] is not x:  # query, key and value share x
                a = self.a[x.shape[-1]]
                self.last_product = x, F.dropout(x.to(a.dtype), self.config.dropout, self.training) @ a
            return output + b(self.last_product[1]).to(output.dtype)

        return add

    def pair_weights(
        self,
        users: torch.Tensor,
        items: torch.Tensor,
        histories: torch.Tensor | None = None,
        with_ids: torch.Tensor | None = None,
    ) -> dict[int, torch.Tensor]:
        """Return A, scaled by alpha / r, of each pair: width of a layer's input -> float [pairs, width, r].

        Args:
            with_ids: bool [pairs]; where False, A is 0.
        """
        user = self.normalize("user", self.cf_model.user_vectors(users, histories, items))
        item = self.normalize("item", self.cf_model.item_vectors(items))
        pairs = torch.cat([user, item], -1)
        queries = self.queries.expand(len(pairs), -1, -1)
        states = self.qformer(query_embeds=queries, encoder_hidden_states=pairs[:, None]).last_hidden_state
        scale = pairs.new_full((len(pairs), 1), self.config.alpha / self.config.r)
        if with_ids is not None:
            scale = scale * with_ids[:, None]
        # The mean over queries commutes with the linear layer, which thus computes one row instead of all queries.
        mean = states.mean(1)
        return {
            int(width): (scale * F.normalize(linear(mean), dim=-1)).unflatten(-1, (int(width), self.config.r))
            for width, linear in self.to_a.items()
        }

    def forward(  # type: ignore[override]  # names the keys of the batch that it needs
        self,
        input_ids: torch.Tensor,
        users: torch.Tensor,
        items: torch.Tensor,
        histories: torch.Tensor | None = None,
        with_ids: torch.Tensor | None = None,
        **rest,
    ) -> CollaborativeOutput:
        """Return the logit of Yes (see `YesNoModel`) with the weights of `users` and `items`, int64 [rows].

        A tree has one row, whose weights apply to all its tokens.
        """
        self.a = self.pair_weights(users, items, histories, with_ids)
        try:
            return super().forward(input_ids, **rest)
        finally:
            self.last_product = None
            if not self.language.is_activation_checkpointing:  # it computes layers again in the backward pass
                self.a = {}

    @torch.no_grad()
    def merge(self, user: torch.Tensor, item: torch.Tensor, history: torch.Tensor | None = None) -> PreTrainedModel:
        """Return a copy of the language model with the weights of one user and item, int64 [1] each, merged.

        Raises:
            ValueError: the language model is in 4 bits, so weights cannot be added.
        """
        if self.config.load_in_4bit:
            raise ValueError("weights in 4 bits cannot be added to; load the base model in full")
        weights = self.pair_weights(user, item, history)
        language = copy.deepcopy(self.language)
        for name, layer in linear_layers(language, self.config.targets).items():
            layer._forward_hooks.clear()
            if hasattr(layer, "base_layer"):
                layer.merge()  # type: ignore[operator]  # a LoRA layer
            base = getattr(layer, "base_layer", layer)
            added = self.b[name.replace(".", "/")](weights[layer_size(layer)[0]][0])
            base.weight += added.T if isinstance(base, nn.Linear) else added
        return language


def layer_size(layer: nn.Module) -> tuple[int, int]:
    """Return the input and output width of a linear layer."""
    base: Any = getattr(layer, "base_layer", layer)
    return (base.in_features, base.out_features) if isinstance(base, nn.Linear) else tuple(base.weight.shape)
