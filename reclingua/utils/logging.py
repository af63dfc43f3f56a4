"""Silence third-party warnings and progress bars.

Every script imports this module before everything else: the filters below have to be in place before transformers,
peft, DeepSpeed and bitsandbytes are imported, since these log and warn at import.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# A filter, since DeepSpeed sets the level of its logger at import; it warns that no GPU exists.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns about kernels for 4-bit arithmetic on a CPU
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft still uses it
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)  # DeepSpeed still uses it


@contextmanager
def silenced_transformers() -> Iterator[None]:
    """Silence warnings and progress bars of transformers within the context, for callers of the library."""
    import transformers  # imported here: it takes seconds, and not every script needs it

    log = transformers.utils.logging
    verbosity, has_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if has_bars:
            log.enable_progress_bar()


def silence_third_party() -> None:
    """Silence warnings of transformers and the progress bars of transformers and datasets."""
    import datasets  # imported here: both take seconds, and not every script needs them
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
