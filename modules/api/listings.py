"""GET routes that list what is available: samplers, schedules, upscalers, checkpoints, styles, embeddings, scripts; and refresh routes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modules.api import models
from modules.api.script_args import find_runner

if TYPE_CHECKING:
    from modules.application import Application

TABS = ("txt2img", "img2img")


class ListingRoutes:
    """One method per list."""

    def __init__(self, app: Application) -> None:
        self.app = app

    def samplers(self) -> list[models.SamplerItem]:
        from modules.samplers import registry  # imports torch; server startup does not wait for it

        return [
            models.SamplerItem(name=sampler.name, aliases=list(sampler.aliases), options={key: str(value) for key, value in sampler.options.items()})
            for sampler in registry.all_samplers
        ]

    def schedulers(self) -> list[models.SchedulerItem]:
        from modules.samplers import schedules  # imports torch; server startup does not wait for it

        return [
            models.SchedulerItem(
                name=scheduler.name,
                label=scheduler.label,
                aliases=scheduler.aliases,
                default_rho=scheduler.default_rho,
                need_inner_model=scheduler.need_inner_model,
            )
            for scheduler in schedules.schedulers
        ]

    def upscalers(self) -> list[models.UpscalerItem]:
        from modules.pictures.upscaler_list import available_upscalers

        return [
            models.UpscalerItem(name=entry.name, model_name=entry.scaler.model_name, model_path=entry.data_path, model_url=None, scale=entry.scale)
            for entry in available_upscalers()
        ]

    def latent_upscale_modes(self) -> list[models.LatentUpscalerModeItem]:
        from modules.processing import LATENT_UPSCALE_MODES

        return [models.LatentUpscalerModeItem(name=name) for name in LATENT_UPSCALE_MODES]

    def sd_models(self) -> list[models.SDModelItem]:
        return [
            models.SDModelItem(
                title=info.title, model_name=info.model_name, hash=info.shorthash, sha256=info.sha256, filename=info.filename, config=None
            )
            for info in self.app.checkpoints
        ]

    def sd_modules(self) -> list[models.SDModuleItem]:
        return [models.SDModuleItem(model_name=name, filename=str(path)) for name, path in self.app.additional_modules.files.items()]

    def sd_vae(self) -> list[models.SDModuleItem]:
        """Only the VAE files, as A1111's clients request them."""
        return [models.SDModuleItem(model_name=name, filename=str(path)) for name, path in self.app.additional_modules.vaes.items()]

    def prompt_styles(self) -> list[models.PromptStyleItem]:
        return [
            models.PromptStyleItem(name=style.name, prompt=style.prompt or "", negative_prompt=style.negative_prompt or "")
            for style in list(self.app.styles.styles.values())
        ]

    def hypernetworks(self) -> list[models.HypernetworkItem]:
        """Hypernetworks are not available."""
        return []

    def face_restorers(self) -> list[models.FaceRestorerItem]:
        """Face restoration is not available."""
        return []

    def realesrgan_models(self) -> list[models.RealesrganItem]:
        """Real-ESRGAN is not available."""
        return []

    def embeddings(self) -> models.EmbeddingsResponse:
        """Embeddings that fit the loaded model, and those that do not. Empty if no model is loaded."""
        database = getattr(self.app.models.engine, "embeddings", None)
        if database is None:
            return models.EmbeddingsResponse(loaded={}, skipped={})
        return models.EmbeddingsResponse(
            loaded={name: _embedding_item(entry) for name, entry in database.word_embeddings.items()},
            skipped={name: _embedding_item(entry) for name, entry in database.skipped_embeddings.items()},
        )

    def refresh_embeddings(self) -> None:
        database = getattr(self.app.models.engine, "embeddings", None)
        if database is not None:
            database.load_textual_inversion_embeddings(force_reload=True)

    def refresh_checkpoints(self) -> None:
        self.app.checkpoints.refresh()

    def refresh_vae(self) -> None:
        self.app.additional_modules.refresh()

    def scripts(self) -> models.ScriptsList:
        return models.ScriptsList(**{tab: [str(script.title()).lower() for script in self._scripts(tab)] for tab in TABS})

    def script_info(self) -> list[models.ScriptInfo]:
        infos = (getattr(script, "api_info", None) for tab in TABS for script in self._scripts(tab))
        return [models.ScriptInfo.model_validate(info, from_attributes=True) for info in infos if info is not None]

    def _scripts(self, tab: str) -> list[Any]:
        runner = find_runner(self.app, tab)
        return [] if runner is None else list(runner.scripts)

    def extensions(self) -> list[models.ExtensionItem]:
        """User-installed extensions. The git fields are empty for a folder that is not a clone, such as an unpacked archive."""
        found = []
        for extension in getattr(self.app, "extensions", None) or ():
            extension.read_info_from_repo()
            if not getattr(extension, "is_builtin", False):
                fields = ("name", "remote", "branch", "commit_hash", "version", "commit_date", "enabled")
                found.append(models.ExtensionItem(**{name: _text(name, getattr(extension, name, "")) for name in fields}))
        return found


def _text(name: str, value: Any) -> Any:
    return bool(value) if name == "enabled" else str(value or "")


def _embedding_item(entry: Any) -> models.EmbeddingItem:
    return models.EmbeddingItem(
        step=getattr(entry, "step", None),
        sd_checkpoint=getattr(entry, "sd_checkpoint", None),
        sd_checkpoint_name=getattr(entry, "sd_checkpoint_name", None),
        shape=int(entry.shape),
        vectors=int(entry.vectors),
    )
