"""Throughput of training: targets and tokens per second, padding, peak memory, TFLOP/s and MFU."""

import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

# Peak TFLOP/s of GPUs in dense bfloat16, as the vendor states it, by a part of the device name; the first match wins.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "A10": 125,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


class Throughput:
    """Counter of targets and tokens, kept on the device so that no step waits for it."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self.device = device
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.rows = self.slots = 0  # known without the device
        self.seconds = 0.0
        self.started: float | None = None
        self.flops = training_flops(model)

    def add(self, labels: torch.Tensor, lengths: torch.Tensor, num_slots: int) -> None:
        """Count a batch.

        Args:
            labels: int64 [rows, length], -100 at unlabelled positions, or float [samples].
            lengths: int64 [samples], tokens of each sample.
            num_slots: tokens of the batch, padding included.
        """
        targets = (labels[:, 1:] >= 0).sum() if labels.ndim > 1 else lengths.new_zeros(())
        self.counts += torch.stack([targets, lengths.sum(), lengths.square().sum()])
        self.slots += num_slots
        self.rows += len(labels) if labels.ndim == 1 else 0

    def start(self) -> None:
        self.started = self._now()

    def stop(self) -> None:
        if self.started is not None:
            self.seconds += self._now() - self.started
            self.started = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside this context, e.g. of evaluation and saving."""
        is_running = self.started is not None
        self.stop()
        try:
            yield
        finally:
            if is_running:
                self.start()

    def figures(self, accelerator: Accelerator) -> dict[str, float]:
        """Return seconds, targets_per_second, tokens_per_second, padding (a share) and peak_memory_gb.

        Rates and padding are over all processes, memory is of this one. On a GPU also tflops and mfu of one device.
        """
        host = torch.tensor([self.rows, self.slots], device=self.device)
        targets, tokens, squares, rows, slots = accelerator.reduce(torch.cat([self.counts, host]), "sum").tolist()
        targets += rows
        seconds = max(self.seconds, 1e-9)
        figures = {
            "seconds": self.seconds,
            "targets_per_second": targets / seconds,
            "tokens_per_second": tokens / seconds,
            "padding": 1 - tokens / max(slots, 1),
        }
        if self.device.type != "cuda":
            return figures | {"peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        figures["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        flops = sum(cost * count for cost, count in zip(self.flops, (targets, tokens, squares), strict=True))
        figures["tflops"] = flops / seconds / accelerator.num_processes / 1e12
        name = torch.cuda.get_device_name(self.device)
        if peak := next((tflops for model, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{model}\b", name)), None):
            figures["mfu"] = figures["tflops"] / peak
        return figures

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def training_flops(model: PreTrainedModel) -> tuple[float, float, float]:
    """Return the operations of a training step per target, per token, and per squared token of a sample.

    Forward and backward pass take 6 operations for each weight and token, 4 if the weight is frozen. The output head
    counts at targets only. Causal attention takes 6 for each pair of tokens, layer and unit of width (PaLM,
    appendix B, halved for the mask).
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    vocabulary = {id(weight) for module in (head, embedding) for weight in module.parameters()}
    body = sum(w.numel() * (6 if w.requires_grad else 4) for w in model.parameters() if id(w) not in vocabulary)
    config = getattr(model, "language", model).config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)  # a state space model has none
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
    return 6.0 * head.weight.numel(), float(body), 6.0 * config.num_hidden_layers * width


def format_throughput(figures: dict[str, float]) -> str:
    """Return `Throughput.figures` as one line of text."""
    text = (
        f"{figures['targets_per_second']:,.0f} targets/s, {figures['tokens_per_second']:,.0f} tokens/s, "
        f"{figures['padding']:.1%} padding, peak memory {figures['peak_memory_gb']:.1f} GB"
    )
    if "tflops" in figures:
        mfu = f" (MFU {figures['mfu']:.1%})" if "mfu" in figures else ""
        text += f", {figures['tflops']:,.1f} TFLOP/s{mfu}"
    return text
