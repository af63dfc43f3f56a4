"""Chunked cross-entropy, computed at labelled positions only.

Five of a hundred tokens of an LC-Rec sample have a label. An output head with 50,000 tokens at every position is a
fifth of a small model's FLOPs, and its logits are most of the memory of a large model's batch.

`torch.nn.functional.linear_cross_entropy` has the same loss and gradients for a plain linear head, but covers neither
logits that are capped after the head (Gemma 2) nor heads that are not one weight (trainable tokens of an adapter).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

# Functions that some models apply to the logits after their head, by the key of the config with their argument.
AFTER_HEAD: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2
    "logit_scale": torch.mul,  # Cohere
    "logits_scaling": torch.div,  # Granite
}


@contextmanager
def patched_forward(module: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Replace the forward of `module` within the context."""
    before = module.__dict__.get("forward")  # of the instance, as some wrappers leave it
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class ChunkedCrossEntropy:
    """Cross-entropy that replaces the logits of a model's output head.

    Within `at_labels(labels)`, a forward pass of the model (or of a wrapper of it) leaves the sum of the labels'
    cross-entropies in `loss`. Gradients are computed in the forward pass, a chunk of rows at a time: logits and their
    derivatives never take more than `max_logits_mb`, and none are kept for the backward pass.

    Raises:
        ValueError: the model's logits are not the output of its head and of functions in AFTER_HEAD.
    """

    def __init__(self, model: PreTrainedModel, max_logits_mb: int):
        self.head: Any = model.get_output_embeddings()
        self.head_forward = self.head.forward
        self.after = [
            (change, value) for key, change in AFTER_HEAD.items() if (value := getattr(model.config, key, None))
        ]
        # Four float32 tensors: the logits, their log-probabilities, and the gradients of both.
        self.chunk = max(1, max_logits_mb * 2**20 // (4 * 4 * len(self.head.weight)))
        self.loss: torch.Tensor | None = None
        if not self._matches_model(model):
            raise ValueError(f"{type(model).__name__} changes its logits after the output head in an unknown way")

    @contextmanager
    def at_labels(self, labels: torch.Tensor) -> Iterator[None]:
        """Apply the head only at positions that predict a label, within the context.

        Args:
            labels: int64 [batch, length], -100 without a label; position t predicts labels[t + 1].
        """
        before = functional.pad(labels[:, 1:] >= 0, (0, 1))
        targets = labels[:, 1:][before[:, :-1]]
        self.loss = None

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            self.loss = _ChunkedLoss.apply(
                self._logits, hidden[before], targets, self.chunk, torch.is_grad_enabled(), *self.head.parameters()
            )
            # Returned as well: DDP finds the parameters in use by following a model's outputs.
            return self.loss.view(1, 1, 1)

        with patched_forward(self.head, forward):
            yield

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        logits = self.head_forward(rows)
        for change, value in self.after:
            logits = change(logits, value)
        return logits

    @torch.no_grad()
    def _matches_model(self, model: PreTrainedModel) -> bool:
        """Return whether this class computes the model's logits from the head's input."""
        hidden: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        was_training = model.training
        try:
            logits = model.eval()(input_ids=torch.arange(3, device=model.device)[None]).logits
        finally:
            hook.remove()
            model.train(was_training)
        if not hidden or hidden[0].shape[:2] != (1, 3):
            return False
        expected = self._logits(hidden[0])
        if logits.shape != expected.shape:
            return False
        return bool((logits.float() - expected.float()).abs().max() < 1e-2 * logits.float().std())


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of `logits(rows)`, with gradients computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx, logits, rows, targets, chunk, differentiable, *parameters):
        trained = [index for index, tensor in enumerate(parameters) if differentiable and tensor.requires_grad]
        with_rows = differentiable and rows.requires_grad
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        row_gradients, gradients = [], {}
        for part, target in zip(rows.split(chunk), targets.split(chunk), strict=True):
            part = part.detach().requires_grad_(with_rows)
            with torch.set_grad_enabled(differentiable):
                entropy = functional.cross_entropy(logits(part).float(), target, reduction="sum")
            loss += entropy.detach()
            leaves = [part] * with_rows + [parameters[index] for index in trained]
            chunk_gradients = list(torch.autograd.grad(entropy, leaves)) if leaves else []
            if with_rows:
                row_gradients.append(chunk_gradients.pop(0))
            for index, gradient in zip(trained, chunk_gradients, strict=True):
                gradients[index] = gradients[index].add_(gradient) if index in gradients else gradient
        ctx.gradients = (
            torch.cat(row_gradients) if with_rows else None,
            *(gradients.get(index) for index in range(len(parameters))),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        gradients, ctx.gradients = ctx.gradients, None  # released, so that autograd need not copy them
        rows, *parameters = (None if gradient is None else gradient.mul_(scale) for gradient in gradients)
        return None, rows, None, None, None, *parameters
