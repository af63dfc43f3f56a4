"""What training does with its time: targets and tokens per second, padding, peak memory, share of a GPU's peak."""

import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

# Dense bfloat16 TFLOP/s of a GPU by a word of its name, as its maker states it.
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
    """Counts what a model is trained on, on the device itself, so that no step waits for the counting."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self.device = device
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        self.seconds, self.since = 0.0, None
        self.flops = training_flops(model)

    def add(self, labels: torch.Tensor, lengths: torch.Tensor, slots: int) -> None:
        """One batch: labels, int64 [rows, length], -100 where there is none, or float [samples]; tokens of each sample
        [samples]; places for tokens, padding included."""
        targets = (labels[:, 1:] >= 0).sum() if labels.ndim > 1 else torch.tensor(len(labels), device=labels.device)
        slots = torch.tensor(slots, device=labels.device)
        self.counts += torch.stack([targets, lengths.sum(), lengths.square().sum(), slots])

    def start(self) -> None:
        self.since = self._now()

    def stop(self) -> None:
        if self.since is not None:
            self.seconds += self._now() - self.since
            self.since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training's: evaluation, saving."""
        running = self.since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    def figures(self, accelerator: Accelerator) -> dict[str, float]:
        """targets_per_second, tokens_per_second and padding (share) over all processes, peak_memory_gb of this one;
        on a GPU also tflops and mfu of one device."""
        targets, tokens, squares, slots = accelerator.reduce(self.counts, "sum").tolist()
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
        flops = sum(each * count for each, count in zip(self.flops, (targets, tokens, squares), strict=True))
        figures["tflops"] = flops / seconds / accelerator.num_processes / 1e12
        name = torch.cuda.get_device_name(self.device)
        if peak := next((value for word, value in PEAK_TFLOPS.items() if re.search(rf"\b{word}\b", name)), None):
            figures["mfu"] = figures["tflops"] / peak
        return figures

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def training_flops(model: PreTrainedModel) -> tuple[float, float, float]:
    """Operations of a training step that the samples need, per target, per token, and per token squared of a sample.

    Forward pass and the gradients of inputs and weights: 6 operations for each weight and row that meets it, 4 where
    the weight is frozen; the output head at the targets alone; causal attention 6 for each pair of tokens, layer and
    width (the scheme of PaLM's appendix B, halved for the mask).
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    apart = {id(weight) for module in (head, embedding) for weight in module.parameters()}
    body = sum(w.numel() * (6 if w.requires_grad else 4) for w in model.parameters() if id(w) not in apart)
    config = getattr(model, "language", model).config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)  # none in a state space model
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
    return 6.0 * head.weight.numel(), float(body), 6.0 * config.num_hidden_layers * width


def format_throughput(figures: dict[str, float]) -> str:
    """One line of `Throughput.figures`."""
    words = (
        f"{figures['targets_per_second']:,.0f} targets/s, {figures['tokens_per_second']:,.0f} tokens/s, "
        f"{figures['padding']:.1%} padding, peak memory {figures['peak_memory_gb']:.1f} GB"
    )
    if "tflops" in figures:
        share = f" ({figures['mfu']:.1%} of this GPU's peak in bf16)" if "mfu" in figures else ""
        words += f", {figures['tflops']:,.1f} TFLOP/s{share}"
    return words
