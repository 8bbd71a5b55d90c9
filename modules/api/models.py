"""Request and response bodies of the API, with the field names and defaults that A1111's and Forge's clients use.

A null field counts as not sent. Must not know how a request is handled.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modules.api.limits import (
    MAX_BATCH_COUNT,
    MAX_BATCH_SIZE,
    MAX_CFG_SCALE,
    MAX_INPUT_PICTURES,
    MAX_MASK_BLUR_PX,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MAX_SIDE_PX,
    MAX_STEPS,
    MAX_UPSCALE_FACTOR,
    MIN_SIDE_PX,
)

Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
Name = Annotated[str, Field(max_length=4096)]
Seed = Annotated[int, Field(ge=-1, le=MAX_SEED, description="-1 for a random seed")]
SidePx = Annotated[int, Field(ge=MIN_SIDE_PX, le=MAX_SIDE_PX, description="rounded down to a multiple of 8")]
OptionalSidePx = Annotated[int, Field(ge=0, le=MAX_SIDE_PX, description="0: not used")]
ResizeFromPx = Annotated[int, Field(ge=-1, le=MAX_SIDE_PX)]
CfgScale = Annotated[float, Field(ge=0, le=MAX_CFG_SCALE, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]


class RequestModel(BaseModel):
    """A request body. Unknown fields are ignored, because clients of other versions send them; null counts as not sent."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class GenerationRequest(RequestModel):
    """Fields shared by txt2img and img2img."""

    prompt: Prompt = ""
    negative_prompt: Prompt = ""
    styles: list[Name] | None = None
    seed: Seed = -1
    subseed: Seed = -1
    subseed_strength: Share = 0
    seed_resize_from_h: ResizeFromPx = -1
    seed_resize_from_w: ResizeFromPx = -1
    sampler_name: Name | None = None
    scheduler: Name | None = None
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] = 1
    n_iter: Annotated[int, Field(ge=1, le=MAX_BATCH_COUNT)] = 1
    steps: Steps = 50
    cfg_scale: CfgScale = 7.0
    distilled_cfg_scale: CfgScale = 3.5
    width: SidePx = 512
    height: SidePx = 512
    restore_faces: bool | None = None
    tiling: bool | None = None
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    eta: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    denoising_strength: Share | None = None
    s_min_uncond: NotNegative | None = None
    s_churn: NotNegative | None = None
    s_tmax: NotNegative | None = None
    s_tmin: NotNegative | None = None
    s_noise: NotNegative | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool = True
    refiner_checkpoint: Name | None = None
    refiner_switch_at: Share | None = None
    disable_extra_networks: bool = False
    firstpass_image: str | None = None
    comments: dict[str, Any] | None = None
    force_task_id: Annotated[str, Field(max_length=200)] | None = None
    hr_distilled_cfg: CfgScale = 3.5

    sampler_index: Annotated[str, Field(max_length=4096, description="used if sampler_name is not sent")] = "Euler"
    script_name: Name | None = None
    script_args: list[Any] = []
    send_images: bool = True
    save_images: bool = False
    alwayson_scripts: dict[str, Any] = {}
    infotext: Prompt | None = None


class StableDiffusionProcessingTxt2Img(GenerationRequest):
    """Body of POST /sdapi/v1/txt2img."""

    enable_hr: bool = False
    firstphase_width: OptionalSidePx = 0
    firstphase_height: OptionalSidePx = 0
    hr_scale: Annotated[float, Field(ge=0, le=MAX_UPSCALE_FACTOR, allow_inf_nan=False)] = 2.0
    hr_upscaler: Name | None = None
    hr_second_pass_steps: Annotated[int, Field(ge=0, le=MAX_STEPS)] = 0
    hr_resize_x: OptionalSidePx = 0
    hr_resize_y: OptionalSidePx = 0
    hr_checkpoint_name: Name | None = None
    hr_additional_modules: list[Name] | None = None
    hr_sampler_name: Name | None = None
    hr_scheduler: Name | None = None
    hr_prompt: Prompt = ""
    hr_negative_prompt: Prompt = ""
    hr_cfg: Annotated[float, Field(ge=0, le=MAX_CFG_SCALE, allow_inf_nan=False, description="default: cfg_scale")] = 1.0


class StableDiffusionProcessingImg2Img(GenerationRequest):
    """Body of POST /sdapi/v1/img2img."""

    init_images: Annotated[list[str], Field(max_length=MAX_INPUT_PICTURES)] | None = None
    resize_mode: Annotated[int, Field(ge=0, le=3)] = 0
    denoising_strength: Share = 0.75
    image_cfg_scale: CfgScale | None = None
    mask: str | None = None
    mask_blur_x: Annotated[int, Field(ge=0, le=MAX_MASK_BLUR_PX)] = 4
    mask_blur_y: Annotated[int, Field(ge=0, le=MAX_MASK_BLUR_PX)] = 4
    mask_blur: Annotated[int, Field(ge=0, le=MAX_MASK_BLUR_PX)] | None = None
    mask_round: bool = True
    inpainting_fill: Annotated[int, Field(ge=0, le=3)] = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=MAX_SIDE_PX)] = 0
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] = 0
    initial_noise_multiplier: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    latent_mask: str | None = None
    include_init_images: bool = False


StableDiffusionTxt2ImgProcessingAPI = StableDiffusionProcessingTxt2Img
StableDiffusionImg2ImgProcessingAPI = StableDiffusionProcessingImg2Img


class TextToImageResponse(BaseModel):
    """`images` are base64 pictures with infotext; `info` is a JSON string."""

    images: list[str] | None = None
    parameters: dict[str, Any]
    info: str


class ImageToImageResponse(BaseModel):
    """Like TextToImageResponse."""

    images: list[str] | None = None
    parameters: dict[str, Any]
    info: str


# Extras and PNG info


class ExtrasBaseRequest(RequestModel):
    """How to upscale a picture. resize_mode 0: by upscaling_resize, 1: to upscaling_resize_w x upscaling_resize_h."""

    resize_mode: Literal[0, 1] = 0
    show_extras_results: bool = True
    gfpgan_visibility: Share = 0
    codeformer_visibility: Share = 0
    codeformer_weight: Share = 0
    upscaling_resize: Annotated[float, Field(gt=0, le=MAX_UPSCALE_FACTOR, allow_inf_nan=False)] = 2
    upscaling_resize_w: Annotated[int, Field(ge=1, le=MAX_SIDE_PX)] = 512
    upscaling_resize_h: Annotated[int, Field(ge=1, le=MAX_SIDE_PX)] = 512
    upscaling_crop: bool = True
    upscaler_1: Name = "None"
    upscaler_2: Name = "None"
    extras_upscaler_2_visibility: Share = 0
    upscale_first: bool = False


class ExtrasSingleImageRequest(ExtrasBaseRequest):
    """One picture, base64."""

    image: str = ""


class FileData(BaseModel):
    """A picture (base64) and its name."""

    data: str
    name: str


class ExtrasBatchImagesRequest(ExtrasBaseRequest):
    """Several pictures."""

    imageList: Annotated[list[FileData], Field(max_length=MAX_INPUT_PICTURES)]


class ExtrasSingleImageResponse(BaseModel):
    """The upscaled picture."""

    html_info: str
    image: str | None = None


class ExtrasBatchImagesResponse(BaseModel):
    """The upscaled pictures, in request order."""

    html_info: str
    images: list[str]


class PNGInfoRequest(RequestModel):
    """A picture, base64."""

    image: str


class PNGInfoResponse(BaseModel):
    """`info` is the infotext, `items` are other texts in the file, `parameters` is the parsed infotext."""

    info: str
    items: dict[str, Any]
    parameters: dict[str, Any]


class InterrogateRequest(RequestModel):
    """A picture to caption; extensions derive their own bodies from it."""

    image: str = ""
    model: Name = "clip"


class CreateEmbeddingRequest(RequestModel):
    """A new embedding with that many vectors, initialized from init_text."""

    name: Name
    num_vectors_per_token: Annotated[int, Field(ge=1, le=75)] = 1
    overwrite_old: bool = False
    init_text: str = "*"


class CreateResponse(BaseModel):
    info: str


# Jobs


class ProgressResponse(BaseModel):
    """Progress of the running job: `progress` 0..1, `eta_relative` in seconds, `current_image` base64."""

    progress: float
    eta_relative: float
    state: dict[str, Any]
    current_image: str | None = None
    textinfo: str | None = None


class TaskProgressRequest(RequestModel):
    """The task, the preview already known, and whether to send previews."""

    id_task: Name | None = None
    id_live_preview: int = -1
    live_preview: bool = True


class TaskProgressResponse(BaseModel):
    """Progress of a task; `live_preview` is a data URI."""

    active: bool
    queued: bool
    completed: bool
    progress: float | None = None
    eta: float | None = None
    live_preview: str | None = None
    id_live_preview: int | None = None
    textinfo: str | None = None


class PendingTasksResponse(BaseModel):
    """The queued tasks."""

    size: int
    tasks: list[str]


# Lists


class SamplerItem(BaseModel):
    name: str
    aliases: list[str]
    options: dict[str, str]


class SchedulerItem(BaseModel):
    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float | None = None
    need_inner_model: bool | None = None


class UpscalerItem(BaseModel):
    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float | None = None


class LatentUpscalerModeItem(BaseModel):
    name: str


class SDModelItem(BaseModel):
    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class SDModuleItem(BaseModel):
    model_name: str
    filename: str


class HypernetworkItem(BaseModel):
    name: str
    path: str | None = None


class FaceRestorerItem(BaseModel):
    name: str
    cmd_dir: str | None = None


class RealesrganItem(BaseModel):
    name: str
    path: str | None = None
    scale: int | None = None


class PromptStyleItem(BaseModel):
    name: str
    prompt: str | None = None
    negative_prompt: str | None = None


class EmbeddingItem(BaseModel):
    """`shape` is the length of a vector, `vectors` their number."""

    step: int | None = None
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    shape: int
    vectors: int


class EmbeddingsResponse(BaseModel):
    loaded: dict[str, EmbeddingItem]
    skipped: dict[str, EmbeddingItem]


class ScriptsList(BaseModel):
    txt2img: list[str] | None = None
    img2img: list[str] | None = None


class ScriptArg(BaseModel):
    label: str | None = None
    value: Any = None
    minimum: Any = None
    maximum: Any = None
    step: Any = None
    choices: list[str] | None = None


class ScriptInfo(BaseModel):
    name: str | None = None
    is_alwayson: bool | None = None
    is_img2img: bool | None = None
    args: list[ScriptArg]


class ExtensionItem(BaseModel):
    name: str
    remote: str
    branch: str
    commit_hash: str
    version: str
    commit_date: str
    enabled: bool


class QuicksettingsHint(BaseModel):
    name: str
    label: str


class MemoryResponse(BaseModel):
    """Bytes, only under A1111's names, because strict clients reject others. MultiGpuResponse has every slot."""

    ram: dict[str, Any]
    cuda: dict[str, Any]


class SlotItem(BaseModel):
    """Current state of a slot. `speed` is relative to the first slot. Null: unknown. `utilization` in percent, `temperature` in °C, `power` in W."""

    model_config = ConfigDict(from_attributes=True)

    index: int
    name: str
    torch_device: str
    vram_state: str
    total_bytes: int
    free_bytes: int
    resident_bytes: int
    peak_bytes: int | None
    speed: float
    utilization: int | None = None
    temperature: int | None = None
    power: float | None = None


class PlanItem(BaseModel):
    """What runs where. `stages` lists each replica's slots, `rows` each replica's rows per step. `tiles`: for each team of slots that computes
    rows together, how many rows of latents or tokens each slot computes. Times are per step."""

    model_config = ConfigDict(from_attributes=True)

    strategy: str
    reason: str
    replicas: int
    stages: list[list[int]]
    rows: list[int]
    predicted_ms: float | None
    measured_ms: float | None
    predicted_bytes: dict[int, int]
    tiles: list[dict[int, int]] = []


class LinkItem(BaseModel):
    """The link from one slot to another, by index."""

    model_config = ConfigDict(from_attributes=True)

    source: int
    target: int
    route: str
    reason: str
    bytes_per_ms: float
    latency_ms: float


class WorkerSlotItem(BaseModel):
    """A slot of a worker."""

    index: int
    device: str
    name: str
    total_bytes: int
    free_bytes: int
    utilization: float | None


class WorkerItem(BaseModel):
    """A worker of the cluster. `state`: idle, busy, draining or refused; `pid`: its process there; `reason`: why it is refused, else its plan;
    `speed`: measured megapixel steps per second."""

    worker: str
    machine: str
    address: str
    pid: int
    state: str
    reason: str
    running: int
    checkpoint: str
    networks: list[str]
    done: int
    speed: float | None
    busy_s: float
    step_ms: float | None
    free_disk_bytes: int | None
    slots: list[WorkerSlotItem]


class ClusterItem(BaseModel):
    """The workers, pieces that wait for one, pieces made again after a loss, and jobs that cost a load of their checkpoint."""

    workers: list[WorkerItem]
    waiting: int
    retries: int
    loads: int


class DrainRequest(BaseModel):
    """`worker`: the name of a worker or machine."""

    worker: str = Field(min_length=1, max_length=500)
    draining: bool = True


class MultiGpuResponse(BaseModel):
    """The slots, the newest job's plan (null if there has been none), the links between slots, and on a cluster's front the workers."""

    slots: list[SlotItem]
    plan: PlanItem | None
    links: list[LinkItem]
    cluster: ClusterItem | None = None
