"""POST create/embedding: a new textual inversion file as a starting point for training programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modules.api import models
from modules.api.waiting import wait_for_job
from modules.errors import RequestError

if TYPE_CHECKING:
    from modules.application import Application


class EmbeddingRoutes:
    """One method per route."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def create(self, body: models.CreateEmbeddingRequest) -> models.CreateResponse:
        """Create the file for the selected checkpoint's text encoders; prompts can use it immediately."""
        job = self.app.jobs.submit(None, "create embedding", lambda: self._create(body))
        return models.CreateResponse(info=await wait_for_job(job))

    def _create(self, body: models.CreateEmbeddingRequest) -> str:
        from backend.text_processing.embedding import EmbeddingError  # imports torch
        from backend.text_processing.embedding_creation import clean_name, first_vectors, write_embedding

        try:
            clean_name(body.name)
            engine = self.app.models.ensure_loaded()
            checkpoint = self.app.models.loaded_checkpoint
            path = write_embedding(
                self.app.config.embeddings_dirs[0],
                body.name,
                first_vectors(_clip_engines(engine), body.num_vectors_per_token, body.init_text),
                overwrite=body.overwrite_old,
                sd_checkpoint=None if checkpoint is None else checkpoint.shorthash,
                sd_checkpoint_name=None if checkpoint is None else checkpoint.name_for_extra,
            )
        except EmbeddingError as error:
            raise RequestError(f"name: {error}.") from error
        engine.embeddings.load_textual_inversion_embeddings()
        return f"create embedding filename: {path}"


def _clip_engines(engine: Any) -> list[Any]:
    """The text engines that support embeddings. Raises EmbeddingError for a model without any."""
    from backend.text_processing.classic_engine import ClassicTextProcessingEngine  # imports torch
    from backend.text_processing.embedding import EmbeddingError

    found = [one for one in engine.text_engines if isinstance(one, ClassicTextProcessingEngine)]
    if not found:
        raise EmbeddingError(f"{engine.family_title} does not support embeddings; choose a checkpoint of another family")
    return found
