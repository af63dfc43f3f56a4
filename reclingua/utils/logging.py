"""Imported before all else by the scripts: hushes what libraries say of their own doings, not of the user's."""

import logging
import warnings

logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # that there is no GPU
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # kernels for 4-bit arithmetic on a CPU
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # as peft still calls it
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)  # as DeepSpeed still calls it


def silence_third_party() -> None:
    """No warnings of transformers, and no progress bars but the scripts' own."""
    import datasets  # which take seconds to import, and not every script has them
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
