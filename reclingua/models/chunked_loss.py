"""The output head where a label is, and nowhere else.

Five of a hundred tokens of an LC-Rec sample carry a label. A head of 50,000 words at every position is a fifth of a
small model's work, and its logits are most of the memory of a large one's batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

# What some models do to the logits after their head, by the key of the config that says so.
AFTER_HEAD: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2
    "logit_scale": torch.mul,  # Cohere
    "logits_scaling": torch.div,  # Granite
}


@contextmanager
def patched_forward(module: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside it `module` computes `forward`."""
    before = module.__dict__.get("forward")  # an instance's own, as some wrappers leave it
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class ChunkedCrossEntropy:
    """Makes the output head of a model compute the loss of the labels instead of the logits of every position.

    While `where(labels)` lasts, a forward pass of the model (or of a wrapper of it) leaves the sum of the labels'
    cross-entropies in `loss`. The gradients are computed along the way, a chunk of rows at a time: logits and what
    the loss derives from them never take more than `max_logits_mb`, and none are kept for the backward pass.

    Raises:
        ValueError: the logits of this model are not its output head's, or something unknown is done to them.
    """

    def __init__(self, model: PreTrainedModel, max_logits_mb: int):
        self.head = model.get_output_embeddings()
        self.head_forward = self.head.forward
        self.after = [
            (change, value) for key, change in AFTER_HEAD.items() if (value := getattr(model.config, key, None))
        ]
        # In float32: the logits, their log-probabilities, and the gradients of both.
        self.chunk = max(1, max_logits_mb * 2**20 // (4 * 4 * len(self.head.weight)))
        self.loss: torch.Tensor | None = None
        if not self._matches_model(model):
            raise ValueError(f"{type(model).__name__} makes its logits in a way of its own")

    @contextmanager
    def at_labels(self, labels: torch.Tensor) -> Iterator[None]:
        """Inside it the head looks at the positions before a label alone.

        Args:
            labels: int64 [batch, length], -100 where there is none; position t is to say labels[t + 1], as always.
        """
        before = functional.pad(labels[:, 1:] >= 0, (0, 1))
        targets = labels[:, 1:][before[:, :-1]]
        self.loss = None

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            self.loss = _ChunkedLoss.apply(
                self._logits, hidden[before], targets, self.chunk, torch.is_grad_enabled(), *self.head.parameters()
            )
            # Returned as well, so that a wrapper that looks at a model's outputs (DDP) sees what they depend on.
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
        """Whether the model's logits are what this class computes from the head's input."""
        given = []
        hook = self.head.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        was_training = model.training
        try:
            logits = model.eval()(input_ids=torch.arange(3, device=model.device)[None]).logits
        finally:
            hook.remove()
            model.train(was_training)
        if not given or given[0].shape[:2] != (1, 3):
            return False
        expected = self._logits(given[0])
        if logits.shape != expected.shape:
            return False
        return bool((logits.float() - expected.float()).abs().max() < 1e-2 * logits.float().std())


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of `logits(rows)`, its gradients found chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx, logits, rows, targets, chunk, differentiable, *parameters):
        wanted = [at for at, tensor in enumerate(parameters) if differentiable and tensor.requires_grad]
        with_rows = differentiable and rows.requires_grad
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        by_rows, by_parameter = [], {}
        for part, goal in zip(rows.split(chunk), targets.split(chunk), strict=True):
            part = part.detach().requires_grad_(with_rows)
            with torch.set_grad_enabled(differentiable):
                entropy = functional.cross_entropy(logits(part).float(), goal, reduction="sum")
            loss += entropy.detach()
            leaves = [part] * with_rows + [parameters[at] for at in wanted]
            found = list(torch.autograd.grad(entropy, leaves)) if leaves else []
            if with_rows:
                by_rows.append(found.pop(0))
            for at, gradient in zip(wanted, found, strict=True):
                by_parameter[at] = by_parameter[at].add_(gradient) if at in by_parameter else gradient
        ctx.gradients = (
            torch.cat(by_rows) if with_rows else None,
            *(by_parameter.get(at) for at in range(len(parameters))),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        gradients, ctx.gradients = ctx.gradients, None  # given away, so that nobody has to copy them
        rows, *parameters = (None if gradient is None else gradient.mul_(scale) for gradient in gradients)
        return None, rows, None, None, None, *parameters
