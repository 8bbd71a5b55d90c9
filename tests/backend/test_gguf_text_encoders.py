"""Text encoders in GGUF as llama.cpp writes them: names, norms and tokenizers.

References: the `gguf` package's table of names, transformers' networks, the published tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.families.family import Component
from backend.families.gemma_text import gemma2
from backend.families.krea2.text import every_third
from backend.families.qwen_text import qwen3, qwen3_vl
from backend.families.qwen_vl_text import qwen25_vl
from backend.families.t5_text import t5xxl
from backend.state_dict import assign_tensors
from backend.storage.kinds import has_packed_weights
from backend.storage.running import set_types
from backend.text_processing.gemma_tokenizer import build_gemma_tokenizer
from backend.text_processing.qwen_tokenizer import byte_symbols, read_merges
from backend.text_processing.sentencepiece_file import USER_DEFINED, read_sentencepiece, write_sentencepiece
from backend.text_processing.t5_tokenizer import build_t5_tokenizer, read_vocabulary
from tests.support.lumina2_networks import gemma2_encoder, pieces, spiece_model
from tests.support.qwenimage_networks import qwen_vl
from tests.support.t5_encoders import t5_encoder, t5_state_dict
from tests.support.zimage_networks import qwen3_encoder, qwen_tokenizer

TEXTS = ("a photo of an astronaut riding a horse on mars", "  the red  cat\n\ncat", "Größe, 猫 12345 <|im_start|>user", "")
AddTokenizer = Callable[[gguf.GGUFWriter], None]


def write(path: Path, tensors: Mapping[str, Tensor], arch: gguf.MODEL_ARCH, add_tokenizer: AddTokenizer, *, adds_one: bool = False) -> Path:
    """Under the names of the package's table, matrices in Q8_0 where blocks fit, as llama.cpp's converter writes them."""
    names = gguf.get_tensor_name_map(arch, 8)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    add_tokenizer(writer)
    for key, tensor in tensors.items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        array = (tensor + 1 if adds_one and key.endswith("norm.weight") else tensor).float().numpy()
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path, component: Component) -> tuple[Any, Any]:
    """(network with packed weights, tokenizer)."""
    with open_tensor_file(path) as file:
        (part,) = component.find(file)
        network = component.build(file, part)
        assign_tensors(network, component.plan(network, file, part), file, storage_dtype=torch.float32, keeps_packed=True)
        assert component.read_tokenizer is not None
        tokenizer = component.read_tokenizer(file, part)
    set_types(network, torch.float32, torch.float32)
    return network, tokenizer


def rounded(network: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The reference network with the values that the package reads from Q8_0."""
    kind = gguf.GGMLQuantizationType.Q8_0

    def value(tensor: Tensor) -> Tensor:
        if tensor.ndim != 2 or tensor.shape[1] % 32:
            return tensor
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.float().numpy(), kind), kind))

    made = type(network)(network.config).eval().requires_grad_(False)
    made.load_state_dict({key: value(tensor) for key, tensor in tensors.items()}, strict=False)
    return made


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer([text], add_special_tokens=False)["input_ids"][0])


def gpt2_tokenizer(tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int]) -> AddTokenizer:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(list(tokens))
        writer.add_token_types(list(kinds))
        writer.add_token_merges(list(merges))

    return add


def sentencepiece_tokenizer(model: str, found: Sequence[tuple[str, float, int]]) -> AddTokenizer:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(model)
        writer.add_token_list([text.replace("\u2581", " ") if kind == USER_DEFINED else text for text, _, kind in found])
        writer.add_token_scores([score for _, score, _ in found])
        writer.add_token_types([kind for _, _, kind in found])

    return add


def qwen_vocabulary(num_rows: int = 151_936) -> tuple[list[str], list[int]]:
    """Tokens and kinds as llama.cpp writes them: markers as control tokens, and padding up to the table's rows."""
    symbols = [*byte_symbols(), *(merge.replace(" ", "") for merge in read_merges())]
    markers = [token for token, _ in sorted(qwen_tokenizer().get_added_vocab().items(), key=lambda item: item[1])]
    padding = [f"[PAD{number}]" for number in range(len(symbols) + len(markers), num_rows)]
    return [*symbols, *markers, *padding], [1] * len(symbols) + [3] * len(markers) + [5] * len(padding)


def test_qwen_gives_transformers_features_and_the_published_ids(tmp_path: Path) -> None:
    source = qwen3_encoder()
    tokens, kinds = qwen_vocabulary()
    tensors = {f"model.{key}": tensor for key, tensor in source.state_dict().items()}
    path = write(tmp_path / "qwen.gguf", tensors, gguf.MODEL_ARCH.QWEN3, gpt2_tokenizer(tokens, read_merges(), kinds))
    network, tokenizer = load(path, qwen3("qwen_3_4b.safetensors"))
    assert has_packed_weights(network)
    ids = torch.tensor([[5, 900, 17, 1, 0, 40_000]])
    with torch.no_grad():
        wanted = rounded(source, source.state_dict())(ids, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(network(ids), wanted)
    for text in TEXTS:
        assert ids_of(tokenizer, text) == ids_of(qwen_tokenizer(), text)
    assert len(tokenizer) == len(qwen_tokenizer()), "padding is no token"


def test_qwen25_vl_without_its_tower_gives_transformers_features(tmp_path: Path) -> None:
    """As for Qwen-Image from prompts; a file with the tower would be another one."""
    source = qwen_vl().model.language_model
    tokens, kinds = qwen_vocabulary(152_064)
    tensors = {f"model.{key}": tensor for key, tensor in source.state_dict().items()}
    path = write(tmp_path / "qwen.gguf", tensors, gguf.MODEL_ARCH.QWEN2VL, gpt2_tokenizer(tokens, read_merges(), kinds))
    network, tokenizer = load(path, qwen25_vl("qwen_2.5_vl_7b.safetensors"))
    ids = torch.tensor([[5, 900, 17, 1, 0, 40_000]])
    with torch.no_grad():
        wanted = rounded(source, source.state_dict())(input_ids=ids).last_hidden_state
    assert has_packed_weights(network)
    torch.testing.assert_close(network(ids), wanted, rtol=1e-4, atol=1e-4)
    assert ids_of(tokenizer, TEXTS[2]) == ids_of(qwen_tokenizer(), TEXTS[2])


@pytest.mark.parametrize(("arch", "is_found"), [(gguf.MODEL_ARCH.QWEN3VL, True), (gguf.MODEL_ARCH.QWEN3, False)])
def test_qwen3_vl_is_told_by_the_kind_in_the_file(arch: gguf.MODEL_ARCH, is_found: bool, tmp_path: Path) -> None:
    """Its shapes are Qwen3's."""
    tensors = {f"model.{key}": tensor for key, tensor in qwen3_encoder().state_dict().items()}
    path = write(tmp_path / "qwen.gguf", tensors, arch, lambda writer: None)
    with open_tensor_file(path) as file:
        assert bool(qwen3_vl("qwen3vl_4b.safetensors", every_third).find(file)) is is_found


def test_gemma_gives_transformers_features_and_its_own_ids(tmp_path: Path) -> None:
    """llama.cpp adds 1 to the norms' weights."""
    source = gemma2_encoder()
    tensors = {f"model.{key}": tensor for key, tensor in source.state_dict().items()}
    path = write(tmp_path / "gemma.gguf", tensors, gguf.MODEL_ARCH.GEMMA2, sentencepiece_tokenizer("llama", pieces()), adds_one=True)
    network, tokenizer = load(path, gemma2("gemma_2_2b.safetensors"))
    assert has_packed_weights(network)
    ids = torch.tensor([[2, 300, 17, 265, 270, 280, 290]])
    with torch.no_grad():
        wanted = rounded(source, source.state_dict())(ids, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(network(ids), wanted, rtol=1e-4, atol=1e-4)
    published = build_gemma_tokenizer(read_sentencepiece(spiece_model()))
    for text in TEXTS:
        assert ids_of(tokenizer, text) == ids_of(published, text)
    assert read_sentencepiece(network.tokenizer_bytes.numpy().tobytes()).pieces == read_sentencepiece(spiece_model()).pieces


@pytest.mark.parametrize("is_changed", [False, True])
def test_t5_uses_the_files_tokenizer(is_changed: bool, tmp_path: Path) -> None:
    model = read_vocabulary()
    found = [(text, score, kind) for (text, score), kind in zip(model.pieces, model.kinds, strict=True)]
    if is_changed:
        found[100], found[200] = (found[200][0], *found[100][1:]), (found[100][0], *found[200][1:])
    found += [(f"[PAD{number}]", -1000.0, 5) for number in range(32_000, 32_128)]
    encoder = t5_encoder(width=64)
    tensors = {key: tensor for key, tensor in t5_state_dict(encoder).items() if "embed_tokens" not in key}
    path = write(tmp_path / "t5.gguf", tensors, gguf.MODEL_ARCH.T5ENCODER, sentencepiece_tokenizer("t5", found))
    _, tokenizer = load(path, t5xxl(lambda file, part, denoiser: True))
    published = build_t5_tokenizer()
    for text in (*TEXTS, "<extra_id_7> and"):
        assert ids_of(tokenizer, text) == ids_of(published, text)
    piece = model.pieces[100][0]
    assert tokenizer.convert_tokens_to_ids(piece) == (200 if is_changed else 100)


def test_a_sentencepiece_model_is_written_as_it_is_read() -> None:
    model = read_vocabulary()
    again = read_sentencepiece(write_sentencepiece(model))
    assert again == model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": ["a"] * 200_000}, "200000 tokens for a table of 151936"),
        ({"kinds": [1, 1]}, "2 kinds for 151936 tokens"),
        ({"merges": ["not there"]}, "it merges 'not' and 'there', which are not all tokens"),
        ({"merges": []}, "no merges"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    tokens, kinds = qwen_vocabulary()
    lists: dict[str, Any] = {"tokens": tokens, "kinds": kinds, "merges": list(read_merges())[:20], **change}
    source = qwen3_encoder()
    tensors = {f"model.{key}": tensor for key, tensor in source.state_dict().items()}
    path = write(tmp_path / "qwen.gguf", tensors, gguf.MODEL_ARCH.QWEN3, gpt2_tokenizer(lists["tokens"], lists["merges"], lists["kinds"]))
    with pytest.raises(CheckpointError, match=rf"^qwen\.gguf: its tokenizer .*{words}"):
        load(path, qwen3("qwen_3_4b.safetensors"))


def test_a_file_that_llama_cpp_permuted_keeps_its_names(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": torch.ones(4, 32), "blk.0.attn_q.weight": torch.ones(4, 32), "blk.0.ffn_gate.weight": torch.ones(4, 32)}
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.asarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_tensor_file(tmp_path / "llama.gguf") as file:
        assert set(file.infos) == set(tensors)
