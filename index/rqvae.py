"""RQ-VAE: an autoencoder whose bottleneck is a sum of codes, one from each level's codebook (LC-Rec, section 3.1)."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class RQVAEConfig(PreTrainedConfig):
    """Shape and losses of an RQ-VAE.

    Args:
        input_dim: width of the embeddings.
        hidden_sizes: widths of the encoder's hidden layers; the decoder mirrors them. None: neither encoder nor
            decoder, the codes add up to the embeddings themselves, as those of residual k-means do.
        code_dim: width of a code; without an encoder it is `input_dim`.
        codebook_sizes: number of codes of each level.
        commitment: weight of the commitment loss beside the codebook loss.
        sinkhorn_epsilon: sharpness of the balanced assignment on the last level; 0 turns it off.
        sinkhorn_rounds: its number of normalisation rounds.
        balanced_assignment: an index is made with as many items for each code as for any other (balanced k-means) instead of
            nearest codes.
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
        balanced_assignment: bool = False,
        **kwargs,
    ):
        self.input_dim = input_dim
        self.hidden_sizes = None if hidden_sizes is None else list(hidden_sizes)
        self.code_dim = input_dim if hidden_sizes is None else code_dim
        self.codebook_sizes = list(codebook_sizes)
        self.commitment = commitment
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_rounds = sinkhorn_rounds
        self.balanced_assignment = balanced_assignment
        super().__init__(**kwargs)


@dataclass
class RQVAEOutput(ModelOutput):
    """`loss` = `reconstruction_loss + rq_loss`; `codes` int64 [batch, levels]; `reconstruction` [batch, input_dim]."""

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    rq_loss: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None


def squared_distances(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """[batch, codes] from [batch, dim] and [codes, dim]."""
    return (vectors**2).sum(1, keepdim=True) + (codebook**2).sum(1) - 2 * vectors @ codebook.T


def sinkhorn(distances: torch.Tensor, epsilon: float, rounds: int) -> torch.Tensor:
    """Balanced assignment (Sinkhorn-Knopp): [batch, codes] squared distances -> float64 [batch, codes] plan.

    Every sample carries the same mass and every code receives the same, so samples spread over the codes. The
    distances are first centred and scaled to [-1, 1], which makes one epsilon serve data of any scale.
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
    """ReLU between the layers, none after the last; without layers x itself."""
    for at, layer in enumerate(layers):
        x = layer(F.relu(x) if at else x)
    return x


class RQVAE(PreTrainedModel):
    """Encoder, residual quantiser and decoder over embeddings [batch, input_dim]."""

    config_class = RQVAEConfig
    main_input_name = "x"

    def __init__(self, config: RQVAEConfig):
        super().__init__(config)
        widths = [config.input_dim]
        if config.hidden_sizes is not None:
            widths += [*config.hidden_sizes, config.code_dim]
        self.encoder, self.decoder = mlp(widths), mlp(widths[::-1])
        self.codebooks = nn.ParameterList(torch.empty(n, config.code_dim) for n in config.codebook_sizes)
        # Inputs are centred and scaled to unit variance, whatever encoder they come from.
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
        """Learn the centre and scale of all embeddings [items, input_dim]."""
        self.shift.copy_(embeddings.mean(0))
        self.scale.copy_(1 / (embeddings - self.shift).std().clamp(min=1e-9))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, input_dim] -> latents [batch, code_dim]."""
        return run_mlp(self.encoder, (x - self.shift) * self.scale)

    def quantize(self, latent: torch.Tensor, balanced: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents -> (sum of codes with straight-through gradient, codes int64 [batch, levels], rq loss).

        `balanced`: solve the last level by Sinkhorn (the paper's uniform semantic mapping, section 3.1.3).
        """
        residual, codes, losses = latent, [], []
        for level, codebook in enumerate(self.codebooks):
            distances = squared_distances(residual.detach(), codebook.detach())
            if balanced and level == len(self.codebooks) - 1 and self.config.sinkhorn_epsilon > 0:
                code = sinkhorn(distances, self.config.sinkhorn_epsilon, self.config.sinkhorn_rounds).argmax(1)
            else:
                code = distances.argmin(1)
            chosen = F.embedding(code, codebook)  # the gradient of codebook[code] has its sums in any order
            losses.append(
                F.mse_loss(chosen, residual.detach()) + self.config.commitment * F.mse_loss(residual, chosen.detach())
            )
            residual = residual - chosen.detach()
            codes.append(code)
        quantized = latent - residual.detach()  # the codes go forward, the gradient passes them by
        return quantized, torch.stack(codes, 1), torch.stack(losses).mean()

    def forward(self, x: torch.Tensor, balanced: bool = True) -> RQVAEOutput:
        """Reconstruct embeddings x float [batch, input_dim]; the loss is taken in the centred, scaled space."""
        quantized, codes, rq_loss = self.quantize(self.encode(x), balanced)
        scaled = run_mlp(self.decoder, quantized)
        reconstruction_loss = F.mse_loss(scaled, (x - self.shift) * self.scale)
        return RQVAEOutput(
            loss=reconstruction_loss + rq_loss,
            reconstruction_loss=reconstruction_loss,
            rq_loss=rq_loss,
            codes=codes,
            reconstruction=scaled / self.scale + self.shift,
        )
