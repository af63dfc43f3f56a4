"""RQ-VAE: autoencoder whose bottleneck is a sum of codes, one from each level's codebook (LC-Rec, section 3.1)."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class RQVAEConfig(PreTrainedConfig):
    """Architecture and losses of an RQ-VAE.

    Args:
        input_dim: width of the embeddings.
        hidden_sizes: widths of the hidden layers of the encoder; the decoder mirrors them. None: no encoder and no
            decoder, the codes add up to the embeddings themselves, as in residual k-means.
        code_dim: width of a code; `input_dim` without an encoder.
        codebook_sizes: number of codes of each level.
        commitment: weight of the commitment loss relative to the codebook loss.
        sinkhorn_epsilon: entropic regularization of Sinkhorn on the last level; 0 turns Sinkhorn off.
        sinkhorn_rounds: normalization rounds of Sinkhorn.
        balanced: semantic IDs use every code of a level equally often (balanced k-means) instead of nearest codes.
    """

    model_type = "rqvae"

    def __init__(
        self,
        input_dim: int = 384,
        hidden_sizes: tuple[int, ...] | None = (512, 256, 128, 64),
        code_dim: int = 32,
        codebook_sizes: tuple[int, ...] = (256, 256, 256, 256),
        commitment: float = 0.25,
        sinkhorn_epsilon: float = 0.003,
        sinkhorn_rounds: int = 50,
        balanced: bool = False,
        **kwargs,
    ):
        self.input_dim = input_dim
        self.hidden_sizes = None if hidden_sizes is None else list(hidden_sizes)
        self.code_dim = input_dim if hidden_sizes is None else code_dim
        self.codebook_sizes = list(codebook_sizes)
        self.commitment = commitment
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_rounds = sinkhorn_rounds
        self.balanced = balanced
        super().__init__(**kwargs)


@dataclass
class RQVAEOutput(ModelOutput):
    """Output of an RQ-VAE.

    `loss` = `reconstruction_loss + rq_loss`; `codes` int64 [batch, levels]; `reconstruction` [batch, input_dim].
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    rq_loss: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None


def squared_distances(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return squared Euclidean distances [batch, codes] of vectors [batch, dim] and a codebook [codes, dim]."""
    return (vectors**2).sum(1, keepdim=True) + (codebook**2).sum(1) - 2 * vectors @ codebook.T


def sinkhorn(distances: torch.Tensor, epsilon: float, rounds: int) -> torch.Tensor:
    """Compute the balanced transport plan (Sinkhorn-Knopp) for squared distances [batch, codes].

    Every sample carries the same mass and every code receives the same, so samples spread over the codes: exp(-d /
    epsilon) is normalized over rows and columns in turn until both sums are uniform. The distances are first centred
    and scaled to [-1, 1], so that one epsilon fits data of any scale.

    Returns:
        float64 [batch, codes].
    """
    low, high = distances.min(), distances.max()
    middle, half_range = (low + high) / 2, (high - low) / 2 + 1e-5
    plan = torch.exp(-((distances - middle) / half_range).double() / epsilon)
    plan = plan / plan.sum()
    samples, codes = plan.shape
    for _ in range(rounds):
        plan = plan / plan.sum(1, keepdim=True) / samples
        plan = plan / plan.sum(0, keepdim=True) / codes
    return plan


def mlp(widths: list[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))


def run_mlp(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """Apply the layers with ReLU in between, none after the last; without layers return x."""
    for depth, layer in enumerate(layers):
        x = layer(F.relu(x) if depth else x)
    return x


class RQVAE(PreTrainedModel):
    """Encoder, residual quantizer and decoder over embeddings [batch, input_dim]."""

    config_class = RQVAEConfig
    main_input_name = "x"

    def __init__(self, config: RQVAEConfig):
        super().__init__(config)
        widths = [config.input_dim]
        if config.hidden_sizes is not None:
            widths += [*config.hidden_sizes, config.code_dim]
        self.encoder, self.decoder = mlp(widths), mlp(widths[::-1])
        self.codebooks = nn.ParameterList(torch.empty(n, config.code_dim) for n in config.codebook_sizes)
        # Inputs are centred and scaled to unit variance, for any sentence encoder.
        self.register_buffer("shift", torch.zeros(config.input_dim))
        self.register_buffer("scale", torch.ones(()))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.ParameterList):
            for codebook in module:
                nn.init.uniform_(codebook, -1 / len(codebook), 1 / len(codebook))

    @torch.no_grad()
    def fit_scale(self, embeddings: torch.Tensor) -> None:
        """Fit centre and scale to all embeddings [items, input_dim]."""
        self.shift.copy_(embeddings.mean(0))
        self.scale.copy_(1 / (embeddings - self.shift).std().clamp(min=1e-9))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Encode embeddings [batch, input_dim] to latents [batch, code_dim]."""
        return run_mlp(self.encoder, (x - self.shift) * self.scale)

    def quantize(self, latent: torch.Tensor, use_sinkhorn: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize latents [batch, code_dim] level by level, each level the residual of the levels before it.

        Args:
            use_sinkhorn: assign the last level by Sinkhorn (the paper's uniform semantic mapping, section 3.1.3).

        Returns:
            (sum of codes with straight-through gradient [batch, code_dim], codes int64 [batch, levels], rq loss []).
        """
        residual, codes, losses = latent, [], []
        for level, codebook in enumerate(self.codebooks):
            distances = squared_distances(residual.detach(), codebook.detach())
            if use_sinkhorn and level == len(self.codebooks) - 1 and self.config.sinkhorn_epsilon > 0:
                code = sinkhorn(distances, self.config.sinkhorn_epsilon, self.config.sinkhorn_rounds).argmax(1)
            else:
                code = distances.argmin(1)
            chosen = F.embedding(code, codebook)  # codebook[code] has a nondeterministic order of sums in its gradient
            losses.append(
                F.mse_loss(chosen, residual.detach()) + self.config.commitment * F.mse_loss(residual, chosen.detach())
            )
            residual = residual - chosen.detach()
            codes.append(code)
        # Straight-through estimator: the value is the sum of codes, the gradient that of the latent.
        quantized = latent - residual.detach()
        return quantized, torch.stack(codes, 1), torch.stack(losses).mean()

    def forward(self, x: torch.Tensor, use_sinkhorn: bool = True) -> RQVAEOutput:
        """Reconstruct embeddings x float [batch, input_dim]; the losses are computed in the centred, scaled space."""
        quantized, codes, rq_loss = self.quantize(self.encode(x), use_sinkhorn)
        scaled = run_mlp(self.decoder, quantized)
        reconstruction_loss = F.mse_loss(scaled, (x - self.shift) * self.scale)
        return RQVAEOutput(
            loss=reconstruction_loss + rq_loss,
            reconstruction_loss=reconstruction_loss,
            rq_loss=rq_loss,
            codes=codes,
            reconstruction=scaled / self.scale + self.shift,
        )
