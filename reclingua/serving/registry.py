"""Registry of the models that are served, and their reload while requests are answered."""

import asyncio
import logging
from collections.abc import Sequence

from reclingua.serving.batching import BatchQueue
from reclingua.serving.models import ModelSource, ServedModel
from reclingua.utils.errors import InputError

logger = logging.getLogger("reclingua.serving")


class ModelRegistry:
    """Served models by name.

    A request keeps the model that it was given by `get`: after a reload it is finished on the old one.

    Args:
        sources: where the models are opened from, now and in each reload.

    Raises:
        InputError: a checkpoint cannot be opened.
    """

    def __init__(self, sources: Sequence[ModelSource], queue: BatchQueue):
        self.sources, self.queue = sources, queue
        self.models: dict[str, ServedModel] = {source.name: source.open() for source in sources}
        self._reloading = asyncio.Lock()
        for model in self.models.values():
            model.warm_up()

    def versions(self) -> dict[str, str]:
        """Return name -> fingerprint of the catalogue."""
        return {name: model.version for name, model in self.models.items()}

    async def reload(self) -> dict[str, str]:
        """Open all models anew beside the old ones, put them in their place at once, and return `versions`.

        A reload that is called during another one starts after it.

        Raises:
            InputError: a model cannot be opened or fails; the old ones stay.
        """
        async with self._reloading:
            try:
                opened = await asyncio.to_thread(self._open_all)
                for model in opened.values():
                    await self.queue.run_alone(model.warm_up)
            except Exception as error:
                reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__} in a checkpoint"
                self.queue.metrics.reloads.labels("failed").inc()
                logger.error("reload failed, the old catalogues stay: %s", reason)
                raise InputError(f"the old catalogues stay: {reason}") from error
            self.models = opened
            self.queue.metrics.reloads.labels("done").inc()
            logger.info("reloaded: %s", ", ".join(f"{name} {version}" for name, version in self.versions().items()))
            return self.versions()

    def _open_all(self) -> dict[str, ServedModel]:
        return {source.name: source.open(self.models[source.name]) for source in self.sources}
