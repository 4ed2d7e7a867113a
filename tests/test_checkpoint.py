"""checkpoint.py: what a model folder is, what is refused and why, what is mended, and where an answer ends."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from modules.engines.checkpoint import Checkpoint, Rules, mend, prepare, read_checkpoint
from modules.errors import LoadError, ModelFilesDamaged, ModelFilesUnsafe, ModelNotDownloaded, TurntableError

RULES = Rules(
    "ExLlamaV2", frozenset({"LlamaForCausalLM", "Qwen2_5_VLForConditionalGeneration"}),
    frozenset({"exl2", "gptq", "fp16"}), vision=frozenset({"Qwen2_5_VLForConditionalGeneration"}),
    ropes=frozenset({"default", "yarn", "mrope"}), processors=frozenset({"Qwen2VLImageProcessor"}),
)  # fmt: skip
ROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}


def tensors(path: Path, *names: str) -> None:
    head = {n: {"dtype": "F16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]} for i, n in enumerate(names)}
    text = json.dumps({"__metadata__": {"format": "pt"}, **head}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(2 * len(names)))


def model(folder: Path, *, weights: tuple[str, ...] = ("lm_head.q_weight",), **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tensors(folder / "output.safetensors", *weights)
    said = {"architectures": ["LlamaForCausalLM"], "eos_token_id": 7, "max_position_embeddings": 4096, **config}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not ...}))
    added = [
        {"id": 5, "content": "<|im_end|>", "special": True}, {"id": 6, "content": "<|im_start|>", "special": True},
        {"id": 9, "content": "<think>", "special": False},
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"vocab": {"</s>": 2}}}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "<|im_end|>", "eos_token": {"content": "</s>"}, "bos_token": "<|im_start|>"})
    )
    return folder


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_an_exl2_model_is_read(tmp_path: Path) -> None:
    found = read_checkpoint(model(tmp_path / "m"), RULES)
    assert (found.quantization, found.architecture, found.vision) == ("exl2", "LlamaForCausalLM", False)
    assert found.stop_ids == (2, 5, 7)
    assert found.special_tokens == ("<|im_start|>", "<|im_end|>", "</s>")
    assert (found.bos_token, found.eos_token, found.max_position_embeddings) == ("<|im_start|>", "</s>", 4096)
    assert found.size_bytes == (tmp_path / "m" / "output.safetensors").stat().st_size
    assert prepare(found, tmp_path / "view") == tmp_path / "m"


@pytest.mark.parametrize(
    ("name", "kind"), [("a.q_weight", "exl2"), ("a.qweight", "gptq"), ("a.weight", "fp16")]
)
def test_the_format_is_told_by_the_tensors(tmp_path: Path, name: str, kind: str) -> None:
    assert read_checkpoint(model(tmp_path / "m", weights=(name,)), RULES).quantization == kind


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"architectures": ["LlamaForCausalLM", "Other"]}, LoadError, "one architecture"),
        ({"architectures": ...}, LoadError, "one architecture"),
        ({"architectures": ["Qwen3_5ForCausalLM"]}, LoadError, "does not know the architecture Qwen3_5ForCausalLM"),
        ({"architectures": ["Odd"], "auto_map": {"AutoModel": "m.Odd"}}, ModelFilesUnsafe, "never run"),
        ({"eos_token_id": ..., "weights": ("a.trellis",)}, LoadError, "EXL3 format, which ExLlamaV2 cannot read"),
        ({"quantization_config": {"quant_method": "awq"}, "weights": ("a.other",)}, LoadError, "AWQ"),
        ({"quantization_config": {"bits": 8}, "weights": ("a.qweight",)}, LoadError, "GPTQ with 8 bits"),
        ({"quantization_config": {"quant_method": "awq"}, "weights": ("a.qweight",)}, LoadError, "the AWQ format"),
        ({"quantization_config": {"quant_method": "Marlin"}, "weights": ("a.qweight",)}, LoadError, "the MARLIN"),
        ({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}, "weights": ("a.qweight",)},
         LoadError, "GPTQ in the packing marlin"),
        ({"quantization_config": {"bits": 4, "is_marlin_format": True}, "weights": ("a.qweight",)},
         LoadError, "GPTQ in the packing marlin"),
        ({"quantization_config": "x"}, ModelFilesDamaged, "quantization_config"),
        ({"rope_scaling": {"type": "ntk", "factor": 2}}, LoadError, "rope_scaling of the type ntk"),
        ({"text_config": {"rope_parameters": {"rope_type": "ntk"}}}, LoadError, "rope_scaling of the type ntk"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, LoadError, "yarn together with mrope"),
    ],
)
def test_what_the_engine_cannot_run_is_refused_with_its_reason(
    tmp_path: Path, config: dict[str, Any], error: type[TurntableError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        read_checkpoint(model(tmp_path / "m", **config), RULES)
    assert caught.value.hint


def test_plain_gptq_is_read_and_awq_is_known_by_its_older_file_too(tmp_path: Path) -> None:
    for said in ({}, {"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}}):
        folder = model(tmp_path / "m", weights=("a.qweight",), **said)
        assert read_checkpoint(folder, RULES).quantization == "gptq"
    folder = model(tmp_path / "old", weights=("a.qweight",))
    write(folder, "quant_config.json", {"w_bit": 4, "version": "GEMM"})
    with pytest.raises(LoadError, match="the AWQ format"):
        read_checkpoint(folder, RULES)


def test_an_image_processor_that_the_engine_does_not_know_is_refused(tmp_path: Path) -> None:
    assert seeing(tmp_path / "fast", image_processor_type="Qwen2VLImageProcessorFast").vision
    for kind, words in (("SiglipImageProcessor", "SiglipImageProcessor"), (..., "none")):
        with pytest.raises(LoadError, match=f"pictures with {words}; ExLlamaV2 knows Qwen2VL") as caught:
            seeing(tmp_path / "m", image_processor_type=kind)
        assert "original model" in caught.value.hint


def test_code_beside_a_known_architecture_is_only_ignored(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", auto_map={"AutoConfig": "configuration_phi3.Phi3Config"})
    write(folder, "configuration_phi3.py", "raise SystemExit")
    assert read_checkpoint(folder, RULES).architecture == "LlamaForCausalLM"


def test_pickles_alone_are_refused_and_an_empty_branch_is_explained(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "output.safetensors").unlink()
    with pytest.raises(ModelNotDownloaded, match="holds no weights") as caught:
        read_checkpoint(folder, RULES)
    assert "branch" in caught.value.hint
    write(folder, "pytorch_model.bin", "x")
    with pytest.raises(ModelFilesUnsafe, match="pickles"):
        read_checkpoint(folder, RULES)
    with pytest.raises(ModelNotDownloaded, match="is not there"):
        read_checkpoint(tmp_path / "nowhere", RULES)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_or_broken_file_is_named(tmp_path: Path, name: str) -> None:
    folder = model(tmp_path / "m")
    for broken in ("{", "[1]", "[" * 100_000):
        write(folder, name, broken)
        with pytest.raises(ModelFilesDamaged, match=name):
            read_checkpoint(folder, RULES)
    (folder / name).unlink()
    with pytest.raises(ModelFilesDamaged, match=name):
        read_checkpoint(folder, RULES)


@pytest.mark.parametrize("raw", [b"", b"\xff" * 64, struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]"])
def test_a_damaged_header_is_an_error(tmp_path: Path, raw: bytes) -> None:
    folder = model(tmp_path / "m")
    (folder / "output.safetensors").write_bytes(raw)
    with pytest.raises(ModelFilesDamaged, match=r"output\.safetensors"):
        read_checkpoint(folder, RULES)


def test_only_the_indexed_files_belong_to_the_model(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "output.safetensors").unlink()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated.safetensors"):
        tensors(folder / name, f"{name}.weight")
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write(folder, "model.safetensors.index.json", {"weight_map": index})
    found = read_checkpoint(folder, RULES)
    assert [path.name for path in found.weights] == sorted(index.values())
    view = prepare(found, tmp_path / "view")
    assert sorted(p.name for p in view.glob("*.safetensors")) == sorted(index.values())
    assert (view / "config.json").read_text() == (folder / "config.json").read_text()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotDownloaded, match="lacks 1 of its files"):
        read_checkpoint(folder, RULES)
    write(folder, "model.safetensors.index.json", {"weight_map": {"a": "../../x.safetensors"}})
    with pytest.raises(ModelFilesUnsafe, match="outside"):
        read_checkpoint(folder, RULES)


def test_an_old_index_beside_a_quantized_model_is_ignored(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    write(folder, "model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00009.safetensors"}})
    assert [path.name for path in read_checkpoint(folder, RULES).weights] == ["output.safetensors"]


def test_every_way_to_name_an_end_is_heard(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", eos_token_id=[7, 8], text_config={"eos_token_id": 11})
    write(folder, "generation_config.json", {"eos_token_id": [12, 13]})
    write(
        folder, "tokenizer_config.json",
        {"chat_template": "<|eot_id|>", "eos_token": "<x>", "added_tokens_decoder": {
            "14": {"content": "<x>", "special": True}, "15": {"content": "<|endoftext|>", "special": True},
            "16": {"content": "<|eot_id|>", "special": True}, "bad": {"content": "y"}}},
    )  # fmt: skip
    assert read_checkpoint(folder, RULES).stop_ids == (7, 8, 11, 12, 13, 14, 15, 16)


def test_no_end_at_all_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", eos_token_id=...)
    write(folder, "tokenizer_config.json", {"chat_template": "x"})
    with pytest.raises(LoadError, match="No token that ends an answer"):
        read_checkpoint(folder, RULES)


def test_the_template_is_found_in_each_of_its_places(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "plain"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert read_checkpoint(folder, RULES).template == "plain"
    write(folder, "chat_template.json", {"chat_template": "from json"})
    assert read_checkpoint(folder, RULES).template == "from json"
    write(folder, "chat_template.jinja", "from jinja")
    assert read_checkpoint(folder, RULES).template == "from jinja"


def test_without_a_template_chatml_is_taken_where_its_tokens_are(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    write(folder, "tokenizer_config.json", {})
    assert "<|im_start|>" in read_checkpoint(folder, RULES).template
    write(folder, "tokenizer.json", {"added_tokens": []})
    with pytest.raises(LoadError, match="no chat template"):
        read_checkpoint(folder, RULES)


def seeing(folder: Path, rope: Any = ROPE, **preprocessor: Any) -> Checkpoint:
    model(
        folder, weights=("lm_head.q_weight", "visual.blocks.0.norm1.weight"), rope_scaling=rope,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )  # fmt: skip
    said = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 1, "max_pixels": 2, **preprocessor}
    write(folder, "preprocessor_config.json", {k: v for k, v in said.items() if v is not ...})
    return read_checkpoint(folder, RULES)


def test_a_model_that_sees_needs_its_preprocessor(tmp_path: Path) -> None:
    found = seeing(tmp_path / "m")
    assert found.vision
    assert not found.repairs
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    with pytest.raises(ModelFilesDamaged, match="preprocessor_config"):
        read_checkpoint(tmp_path / "m", RULES)


def test_weights_without_the_tower_are_a_model_that_does_not_see(tmp_path: Path) -> None:
    model(tmp_path / "m", architectures=["Qwen2_5_VLForConditionalGeneration"])
    assert not read_checkpoint(tmp_path / "m", RULES).vision


@pytest.mark.parametrize(
    ("rope", "after"),
    [
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, ROPE),
        ({"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}, ROPE),
        ({"type": "yarn", "rope_type": "yarn", "factor": 4}, {"rope_type": "yarn", "factor": 4}),
    ],
)
def test_rope_scaling_in_newer_forms_is_mended(rope: dict[str, Any], after: dict[str, Any]) -> None:
    mended, repairs = mend({"rope_scaling": rope, "kept": 1}, {})
    assert mended["config.json"] == {"rope_scaling": after, "kept": 1}
    assert repairs


def test_the_rope_parameters_of_transformers_5_are_mended() -> None:
    mended, _ = mend({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {})
    assert mended["config.json"] == {"rope_theta": 1e6}
    section = {"rope_type": "default", "rope_theta": 5.0, "mrope_section": [1, 2, 3]}
    mended, _ = mend({"text_config": {"rope_parameters": section}}, {})
    assert mended["config.json"]["text_config"] == {
        "rope_theta": 5.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}
    }  # fmt: skip


def test_what_is_right_is_left_alone() -> None:
    config = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_theta": 5e5}
    assert mend(config, {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 1, "max_pixels": 2}) == ({}, ())


def test_a_mended_model_is_shown_to_the_library_without_touching_the_folder(tmp_path: Path) -> None:
    found = seeing(
        tmp_path / "m", image_processor_type="Qwen2VLImageProcessorFast", min_pixels=..., max_pixels=...,
        size={"shortest_edge": 3136, "longest_edge": 12845056},
    )  # fmt: skip
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    view = prepare(found, tmp_path / "view")
    said = json.loads((view / "preprocessor_config.json").read_text())
    assert said["image_processor_type"] == "Qwen2VLImageProcessor"
    assert (said["min_pixels"], said["max_pixels"]) == (3136, 12845056)
    assert (view / "output.safetensors").samefile(tmp_path / "m" / "output.safetensors")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
