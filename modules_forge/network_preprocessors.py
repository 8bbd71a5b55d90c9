"""Forge's preprocessors that this program lacks, with what each needs, so that clients get a helpful message. Names only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_POSE = "body_pose_model.pth, hand_pose_model.pth, facenet.pth"
_PIDINET, _HED, _DPT = "table5_pidinet.pth", "ControlNetHED.pth", "dpt_hybrid-midas-501f0c75.pt"

NETWORK_FILES: Mapping[str, str] = MappingProxyType(
    {
        "animal_openpose": "yolox_l.onnx, rtmpose-m_ap10k_256.onnx",
        "densepose (pruple bg & purple torso)": "densepose_r50_fpn_dl.torchscript",
        "densepose_parula (black bg & blue torso)": "densepose_r50_fpn_dl.torchscript",
        "depth_anything": "depth_anything_vitl14.pth",
        "depth_anything_v2": "depth_anything_v2_vitl.pth",
        "depth_hand_refiner": "graphormer_hand_state_dict.bin",
        "depth_leres": "res101.pth",
        "depth_leres++": "res101.pth, latest_net_G.pth",
        "depth_marigold": "the folder of marigold",
        "depth_midas": _DPT,
        "depth_zoe": "ZoeD_M12_N.pt",
        "dw_openpose_full": "yolox_l.onnx, dw-ll_ucoco_384.onnx",
        "inpaint_only+lama": "ControlNetLama.pth",
        "instant_id_face_keypoints": "the folder antelopev2",
        "lineart_anime": "netG.pth",
        "lineart_anime_denoise": "erika.pth",
        "lineart_coarse": "sk_model2.pth",
        "lineart_realistic": "sk_model.pth",
        "mediapipe_face": "the package mediapipe",
        "mlsd": "mlsd_large_512_fp32.pth",
        "normal_midas": _DPT,
        "normalbae": "scannet.pt",
        "openpose": _POSE,
        "openpose_face": _POSE,
        "openpose_faceonly": _POSE,
        "openpose_full": _POSE,
        "openpose_hand": _POSE,
        "scribble_hed": _HED,
        "scribble_pidinet": _PIDINET,
        "seg_anime_face": "UNet.pth",
        "seg_ofade20k": "250_16_swin_l_oneformer_ade20k_160k.pth",
        "seg_ofcoco": "150_16_swin_l_oneformer_coco_100ep.pth",
        "seg_ufade20k": "upernet_global_small.pth",
        "softedge_hed": _HED,
        "softedge_hedsafe": _HED,
        "softedge_pidinet": _PIDINET,
        "softedge_pidisafe": _PIDINET,
        "softedge_teed": "7_model.pth",
        "t2ia_sketch_pidi": _PIDINET,
        "InsightFace+CLIP-H (IPAdapter)": "the folder antelopev2",
        "InsightFace (InstantID)": "the folder antelopev2",
        "CLIP-G (Revision)": "CLIP-ViT-bigG.safetensors",
        "CLIP-G (Revision ignore prompt)": "CLIP-ViT-bigG.safetensors",
    }
)
"""Name -> the file or files from which extensions usually load its network."""
NOT_HERE: Mapping[str, str] = MappingProxyType(
    {
        "reference_adain": "reference_only",
        "reference_adain+attn": "reference_only",
        "tile_colorfix": "tile_resample",
        "tile_colorfix+sharp": "tile_resample",
    }
)
"""Name -> the most similar available preprocessor that needs no network."""
OLD_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "binary": "threshold",
        "blur": "blur_gaussian",
        "tile_gaussian": "blur_gaussian",
        "clip_vision": "CLIP-ViT-H (IPAdapter)",
        "color": "t2ia_color_grid",
        "depth": "depth_midas",
        "fake_scribble": "scribble_hed",
        "hed": "softedge_hed",
        "inpaint": "inpaint_global_harmonious",
        "ip-adapter-auto": "CLIP-ViT-H (IPAdapter)",
        "ip-adapter_clip_g": "CLIP-ViT-bigG (IPAdapter)",
        "ip-adapter_clip_h": "CLIP-ViT-H (IPAdapter)",
        "ip-adapter_clip_sd15": "CLIP-ViT-H (IPAdapter)",
        "ip-adapter_clip_sdxl": "CLIP-ViT-bigG (IPAdapter)",
        "ip-adapter_clip_sdxl_plus_vith": "CLIP-ViT-H (IPAdapter)",
        "leres": "depth_leres",
        "lineart": "lineart_realistic",
        "normal_bae": "normalbae",
        "normal_map": "normal_midas",
        "pidinet": "softedge_pidinet",
        "pidinet_scribble": "scribble_pidinet",
        "reference": "reference_only",
        "segmentation": "seg_ufade20k",
        "tile": "tile_resample",
        "xdog": "scribble_xdog",
    }
)
"""Names sent by clients of older versions -> current names."""


def explain_missing(name: str, folder: str) -> str | None:
    """The message for a Forge preprocessor that is not registered; None for an unknown name."""
    wanted = name.strip().lower()
    wanted = OLD_NAMES.get(wanted, wanted).lower()
    for known, files in NETWORK_FILES.items():
        if wanted in (known.lower(), known.lower().split(" (")[0]):
            return (
                f"ControlNet's preprocessor {known} needs a network from an extension: install one that registers {known!r}, and put "
                f"{files} into {folder}, where such extensions look for it. Or create the map elsewhere and choose None."
            )
    nearest = next((here for known, here in NOT_HERE.items() if wanted == known), None)
    return None if nearest is None else f"ControlNet's preprocessor {wanted} is not available; the most similar one is {nearest}."
