"""A Hugging Face style model folder, read without its weights: what it is, what it lacks, and what is mended.

Knows the JSON files and the tensors' names. Opens no tensor, runs nothing that it
finds, and changes nothing in the folder: where a configuration is written in a way
that a library cannot read although its meaning is clear, `prepare` makes a view of
the folder (links to the files, with the mended JSON beside them) in a private place.
Standard library only, so that both ExLlama engines and the tests can use it.
"""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.errors import LoadError, ModelFilesDamaged, ModelFilesUnsafe, ModelNotDownloaded

MAX_JSON_BYTES = 64 << 20  # tokenizer.json of the largest vocabularies has 35 MB
MAX_HEADER_BYTES = 100 << 20
AGAIN = "Download the model again, all of its files."
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Tensor name endings of one format alone. GPTQ's, .qweight, is AWQ's and others' too: there config.json decides.
SUFFIXES = (("exl3", ".trellis"), ("exl2", ".q_weight"))
GPTQ_FORMATS = ("gptq", "gptq_v2")  # of checkpoint_format; others are packed for other kernels
TOWERS = ("visual.", "model.visual.", "vision_tower.", "model.vision_tower.", "vision_model.")
# Tokens that end a turn. They count where the model's own template or vocabulary has them.
END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>",
    "<｜end▁of▁sentence｜>", "</s>", "<|end_of_role|>", "<|END_OF_TURN_TOKEN|>", "<|user|>",
)  # fmt: skip
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Rules:
    """What one engine can read: names of architectures and of quantization formats.

    vision names the architectures that may have a tower; mends says whether newer forms of
    configurations have to be rewritten for it. ropes names the types of rope_scaling, processors
    those of image_processor_type that it knows; empty ones are not checked.
    """

    engine: str
    architectures: frozenset[str]
    quantizations: frozenset[str]
    vision: frozenset[str] = frozenset()
    mends: bool = True
    ropes: frozenset[str] = frozenset()
    processors: frozenset[str] = frozenset()
    instead: str = "Choose another variant on the Models page."


@dataclass(frozen=True)
class Checkpoint:
    """What the folder holds. stop_ids are token ids, weights the safetensors files that belong to the model.

    vocabulary is how many tokens it has, 0 where config.json does not say.
    """

    folder: Path
    architecture: str
    quantization: str
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    weights: tuple[Path, ...]
    tensors: frozenset[str]
    stop_ids: tuple[int, ...]
    template: str
    bos_token: str
    eos_token: str
    special_tokens: tuple[str, ...]
    max_position_embeddings: int
    vision: bool
    vocabulary: int
    repairs: tuple[str, ...] = ()
    mended: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights' files."""
        return sum(path.stat().st_size for path in self.weights)


def read_checkpoint(folder: Path, rules: Rules, *, answers: bool = True) -> Checkpoint:
    """Read and judge a folder.

    answers False is for a draft model, which only guesses tokens: it needs no template, no end and no eyes.
    Raises ModelNotDownloaded, ModelFilesDamaged, ModelFilesUnsafe, or LoadError for a
    model that the engine cannot run; each says what to do.
    """
    if not folder.is_dir():
        raise ModelNotDownloaded(f"The model's folder {folder} is not there.")
    config = _json(folder / "config.json")
    if config is None:
        raise ModelFilesDamaged(f"{folder.name} has no config.json.", hint=AGAIN)
    weights = _weights(folder)
    tensors = frozenset(name for path in weights for name in header(path) if name != "__metadata__")
    architecture = _architecture(config, rules)
    quantization = _quantization(folder, config, tensors)
    if quantization not in rules.quantizations:
        raise LoadError(
            f"{folder.name} is in the {quantization.upper()} format, which {rules.engine} cannot read.",
            hint=f"{rules.engine} reads {', '.join(sorted(q.upper() for q in rules.quantizations))}. {rules.instead}",
        )
    _check_gptq(config, quantization, folder.name)
    _check_rope(config, rules, folder.name)
    vision = answers and architecture in rules.vision and any(name.startswith(TOWERS) for name in tensors)
    tokens = _json(folder / "tokenizer_config.json") or {}
    special, ids = _special_tokens(folder, tokens)
    template = _template(folder, tokens, special) if answers else ""
    preprocessor = (_json(folder / "preprocessor_config.json") or {}) if vision else {}
    if vision and not preprocessor:
        raise ModelFilesDamaged(
            f"{folder.name} has no preprocessor_config.json, which a model that sees needs.",
            hint=AGAIN,
        )
    mended, repairs = mend(config, preprocessor) if rules.mends else ({}, ())
    if vision:
        _check_processor(mended.get("preprocessor_config.json", preprocessor), rules, folder.name)
    generation = _json(folder / "generation_config.json") or {}
    text = config.get("text_config") or {}
    return Checkpoint(
        folder=folder, architecture=architecture, quantization=quantization, config=config, preprocessor=preprocessor,
        weights=weights, tensors=tensors,
        stop_ids=_stop_ids(config, generation, tokens, template, ids) if answers else (),
        template=template, bos_token=_token(tokens.get("bos_token")), eos_token=_token(tokens.get("eos_token")),
        special_tokens=special, vision=vision, repairs=repairs, mended=mended,
        vocabulary=_whole(config, text, "vocab_size"),
        max_position_embeddings=_whole(config, text, "max_position_embeddings"),
    )  # fmt: skip


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file. Its truth against the file's length was checked by library.py."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise ModelFilesDamaged(f"{path.name} is no safetensors file, or is cut off.")
        try:
            table = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise ModelFilesDamaged(f"{path.name} has a damaged header.") from None
    if not isinstance(table, dict):
        raise ModelFilesDamaged(f"{path.name} has a damaged header.")
    return table


def prepare(checkpoint: Checkpoint, place: Path) -> Path:
    """The folder to give to the library: the model's own, or a view of it below `place` where something was mended.

    A view is also made when the folder holds safetensors files that do not belong to
    the model (a stray consolidated.safetensors): the libraries index every file they see.
    """
    stray = {path.name for path in checkpoint.folder.glob("*.safetensors")} - {p.name for p in checkpoint.weights}
    if not checkpoint.mended and not stray:
        return checkpoint.folder
    place.mkdir(parents=True, exist_ok=True)
    keep = {path.name for path in checkpoint.weights}
    for path in checkpoint.folder.iterdir():
        wanted = path.suffix in (".json", ".jinja", ".model") or path.name in keep
        if wanted and path.is_file() and path.name not in checkpoint.mended:
            _link(path.resolve(), place / path.name)
    for name, table in checkpoint.mended.items():
        (place / name).write_text(json.dumps(table, indent=1), encoding="utf-8")
    return place


def mend(
    config: dict[str, Any], preprocessor: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Rewrite what newer tools write in forms that ExLlamaV2 0.3.2 refuses or misreads. Meaning is never changed.

    Sources: ExLlamaV2Config.prepare, and configurations as transformers 4.45 to 5 save them.
    """
    mended: dict[str, dict[str, Any]] = {}
    repairs: list[str] = []
    new = copy.deepcopy(config)
    _mend_rope(new, repairs)
    if isinstance(new.get("quantization_config"), dict) and new != config:
        repairs.append("config.json was rewritten for the engine; the quantization is untouched")
    if new != config:
        mended["config.json"] = new
    images = dict(preprocessor)
    kind = str(images.get("image_processor_type", ""))
    if kind.endswith("Fast"):
        images["image_processor_type"] = kind[: -len("Fast")]
        repairs.append(f"image_processor_type {kind} is the same as {images['image_processor_type']}")
    size = images.get("size") or {}
    for key, other, default in (
        ("min_pixels", "shortest_edge", 56 * 56),
        ("max_pixels", "longest_edge", 28 * 28 * 1280),
    ):
        if images and "Qwen2" in str(images.get("image_processor_type")) and not isinstance(images.get(key), int):
            images[key] = size.get(other) if isinstance(size.get(other), int) else default
            repairs.append(f"{key} was not in preprocessor_config.json; {images[key]} is taken")
    if images != preprocessor:
        mended["preprocessor_config.json"] = images
    return mended, tuple(repairs)


def _mend_rope(config: dict[str, Any], repairs: list[str]) -> None:
    for table in (config, config.get("text_config")):
        if not isinstance(table, dict):
            continue
        parameters = table.pop("rope_parameters", None)  # transformers 5
        if isinstance(parameters, dict):
            parameters = dict(parameters)
            theta = parameters.pop("rope_theta", None)
            if theta is not None and table.get("rope_theta") is None:
                table["rope_theta"] = theta
            kind = parameters.get("rope_type") or parameters.get("type")
            if table.get("rope_scaling") is None and (kind not in (None, "default") or "mrope_section" in parameters):
                table["rope_scaling"] = parameters
            repairs.append("rope_parameters was written in the older form")
        scaling = table.get("rope_scaling")
        if not isinstance(scaling, dict):
            continue
        if "mrope_section" in scaling and scaling.get("type") != "mrope":
            scaling = {"type": "mrope", "mrope_section": scaling["mrope_section"]}
            repairs.append("rope_scaling has mrope_section, so its type is mrope")
        elif "type" in scaling and "rope_type" in scaling:
            scaling = {k: v for k, v in scaling.items() if k != ("rope_type" if scaling["type"] == "mrope" else "type")}
            repairs.append("rope_scaling named its type twice")
        elif scaling.get("mrope_section") and "rope_type" in scaling:
            scaling = {k: v for k, v in scaling.items() if k != "rope_type"}
        table["rope_scaling"] = scaling


def _json(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(raw) > MAX_JSON_BYTES:
        raise ModelFilesDamaged(f"{path.name} is larger than {MAX_JSON_BYTES >> 20} MB.")
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelFilesDamaged(f"{path.name} is damaged: {str(error)[:120]}.") from None
    if not isinstance(table, dict):
        raise ModelFilesDamaged(f"{path.name} is damaged: it holds no table.")
    return table


def _weights(folder: Path) -> tuple[Path, ...]:
    found = {path.name: path for path in folder.glob("*.safetensors")}
    if not found:
        if any(path.suffix in PICKLES for path in folder.iterdir()):
            raise ModelFilesUnsafe(
                f"{folder.name} holds its weights as pickles, which can run code and are never opened.",
                hint="Take a repository or a revision with safetensors files.",
            )
        raise ModelNotDownloaded(
            f"{folder.name} holds no weights.",
            hint="EXL2 and EXL3 repositories keep them on a branch per bits per weight: download with that revision.",
        )
    index = _json(folder / "model.safetensors.index.json")
    # The EXL2 converter writes output*.safetensors, and may leave the original model's index in the folder.
    if index is None or any(name.startswith("output") for name in found):
        ours = [path for name, path in found.items() if not name.startswith("consolidated") or len(found) == 1]
        if any(path.name.startswith("output") for path in ours):
            ours = [path for path in ours if path.name.startswith("output")]
        return tuple(sorted(ours))
    table = index.get("weight_map")
    names = set(table.values()) if isinstance(table, dict) else set()
    if not names or not all(isinstance(n, str) and re.fullmatch(r"[A-Za-z0-9_][\w.+-]{0,250}", n) for n in names):
        raise ModelFilesUnsafe(f"The index of {folder.name} names files outside its folder, or none.")
    lacking = sorted(names - set(found))
    if lacking:
        raise ModelNotDownloaded(f"{folder.name} lacks {len(lacking)} of its files, the first is {lacking[0]}.")
    return tuple(found[name] for name in sorted(names))


def _architecture(config: dict[str, Any], rules: Rules) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise LoadError("The model's config.json does not name one architecture.", hint=rules.instead)
    if names[0] in rules.architectures:
        return names[0]
    if config.get("auto_map"):
        raise ModelFilesUnsafe(
            f"{names[0]} brings Python code of its own, which is never run, and {rules.engine} does not know it.",
            hint=rules.instead,
        )
    raise LoadError(f"{rules.engine} does not know the architecture {names[0]}.", hint=rules.instead)


def _quantization(folder: Path, config: dict[str, Any], tensors: frozenset[str]) -> str:
    method = _said_of_quantization(config).get("quant_method")
    for name, suffix in SUFFIXES:
        if any(tensor.endswith(suffix) for tensor in tensors):
            return name
    if method:
        return str(method).lower()
    if not any(tensor.endswith(".qweight") for tensor in tensors):
        return "fp16"
    # Before quant_method there was quant_config.json for AWQ, and quantize_config.json for GPTQ.
    return "awq" if (folder / "quant_config.json").is_file() else "gptq"


def _said_of_quantization(config: dict[str, Any]) -> dict[str, Any]:
    said = config.get("quantization_config") or {}
    if not isinstance(said, dict):
        raise ModelFilesDamaged("config.json is damaged: its quantization_config is no table.", hint=AGAIN)
    return said


def _check_gptq(config: dict[str, Any], quantization: str, name: str) -> None:
    if quantization != "gptq":
        return
    said = _said_of_quantization(config)
    bits, packing = said.get("bits"), said.get("checkpoint_format") or "gptq"
    if said.get("is_marlin_format"):
        packing = "marlin"
    wrong = f"with {bits} bits; only 4 bits" if bits not in (None, 4) else ""
    if not wrong and packing not in GPTQ_FORMATS:
        wrong = f"in the packing {packing}; only {' and '.join(GPTQ_FORMATS)}"
    if wrong:
        raise LoadError(f"{name} is GPTQ {wrong} can be read.", hint="Take its EXL2, or a plain 4-bit GPTQ model.")


def _check_rope(config: dict[str, Any], rules: Rules, name: str) -> None:
    """A type of rope_scaling that a library does not know is passed over by it, and the positions are wrong."""
    for table in (config, config.get("text_config")):
        scaling = (table.get("rope_scaling") or table.get("rope_parameters")) if isinstance(table, dict) else None
        if not isinstance(scaling, dict) or not rules.ropes:
            continue
        kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
        both = rules.mends and "mrope_section" in scaling and kind not in ("default", "mrope")
        if kind not in rules.ropes or both:
            what = f"{kind} together with mrope_section" if both else kind
            raise LoadError(
                f"{name} has rope_scaling of the type {what}, which {rules.engine} does not know.", hint=rules.instead
            )


def _check_processor(preprocessor: dict[str, Any], rules: Rules, name: str) -> None:
    kind = str(preprocessor.get("image_processor_type") or "none")
    if rules.processors and kind not in rules.processors:
        raise LoadError(
            f"{name} prepares its pictures with {kind}; {rules.engine} knows {', '.join(sorted(rules.processors))}.",
            hint="Take preprocessor_config.json from the repository of the original model, or another variant.",
        )


def _special_tokens(folder: Path, tokens: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The control tokens, longest first, and the ids of every added token."""
    table = _json(folder / "tokenizer.json")
    if table is None:
        raise ModelFilesDamaged(
            f"{folder.name} has no tokenizer.json; a tokenizer.model alone cannot be read.",
            hint="Take tokenizer.json from the repository of the original model.",
        )
    special: set[str] = set()
    ids: dict[str, int] = {}
    added = [t for t in table.get("added_tokens") or () if isinstance(t, dict)]
    added += [
        {**t, "id": int(key)}
        for key, t in (tokens.get("added_tokens_decoder") or {}).items()
        if isinstance(t, dict) and str(key).isdigit()
    ]
    for token in added:
        content, number = token.get("content"), token.get("id")
        if isinstance(content, str) and content and isinstance(number, int):
            ids.setdefault(content, number)
            if token.get("special"):
                special.add(content)
    for name in ("bos_token", "eos_token"):
        content = _token(tokens.get(name))
        if content and content not in ids:
            vocabulary = (table.get("model") or {}).get("vocab")
            if isinstance(vocabulary, dict) and isinstance(vocabulary.get(content), int):
                ids[content] = vocabulary[content]
                special.add(content)
    return tuple(sorted(special, key=lambda s: (-len(s), s))), ids


def _token(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _template(folder: Path, tokens: dict[str, Any], special: tuple[str, ...]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFilesDamaged(f"{path.name} is larger than {MAX_JSON_BYTES >> 20} MB.")
        return path.read_text(encoding="utf-8")
    for table in (_json(folder / "chat_template.json") or {}, tokens):
        found = table.get("chat_template")
        if isinstance(found, list):
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default") or next(iter(named.values()), None)
        if isinstance(found, str) and found:
            return found
    if "<|im_start|>" in special and "<|im_end|>" in special:
        return CHATML
    raise LoadError(
        f"{folder.name} has no chat template.",
        hint="Take an instruct or chat model, or put its chat_template.jinja into the folder.",
    )


def _stop_ids(
    config: dict[str, Any], generation: dict[str, Any], tokens: dict[str, Any], template: str, ids: dict[str, int]
) -> tuple[int, ...]:
    """Every id at which an answer ends.

    Phi-4's early quants, for one, name another token in config.json than their chat uses.
    """
    stop: set[int] = set()
    for table in (config, config.get("text_config") or {}, generation):
        value = table.get("eos_token_id")
        stop |= {n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)}
    eos = _token(tokens.get("eos_token"))
    stop |= {ids[name] for name in (eos,) if name in ids}
    stop |= {ids[name] for name in END_OF_TURN if name in ids and (name in template or name == "<|endoftext|>")}
    # A template that merely opens a user's turn with it names <|user|> too; it never belongs into an answer.
    if not stop:
        raise LoadError("No token that ends an answer is named in the model's files.")
    return tuple(sorted(stop))


def _whole(config: dict[str, Any], text: dict[str, Any], key: str) -> int:
    value = config.get(key, text.get(key))
    return value if isinstance(value, int) and value > 0 else 0


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source)
    except OSError:  # Windows without the right to make links
        os.link(source, target)
