"""What a name that people type stands for: a preset, a folder or file, or a repository; and what that would take.

Repositories are read by their metadata: config.json, the sizes of the files, and for
a GGUF file the first megabytes, which hold its header. No weights are downloaded.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modules import planner
from modules.downloads import Downloads
from modules.errors import (
    InvalidRequest,
    LoadError,
    ModelFilesDamaged,
    ModelNotDownloaded,
    PresetNotFound,
    SourceNotFound,
)
from modules.hub import Entry, Plan, Ref
from modules.library import check_gguf, read_config
from modules.planner import Quantization, Setup, TensorBytes, VisionShape
from modules.presets import EXL_ENGINES, Presets, Variant

DEFAULT_CONTEXT = 16384  # where nobody names one
# A GGUF header is as long as its vocabulary: 6 to 12 MB for 150,000 to 260,000 words. Tried with more each time.
HEAD_BYTES = (1 << 20, 8 << 20, 24 << 20)
MAX_LAYERS = 1024  # as in a preset; the planner counts them one by one, and a stranger's header may claim billions
# What ExLlamaV2 knows: ARCHITECTURES in engines/exllamav2.py, which imports the library and so cannot be asked here.
# ExLlamaV3's names come from its library at run time; here it is held to models that write text.
EXLLAMAV2_KNOWS = frozenset(
    "LlamaForCausalLM MistralForCausalLM MixtralForCausalLM YiForCausalLM OrionForCausalLM Qwen2ForCausalLM "
    "Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration "
    "GemmaForCausalLM Gemma2ForCausalLM Gemma3ForConditionalGeneration Starcoder2ForCausalLM GemmoeForCausalLM "
    "CohereForCausalLM Cohere2ForCausalLM DbrxForCausalLM Phi3ForCausalLM GPTBigCodeForCausalLM GPT2LMHeadModel "
    "MiniCPMForCausalLM InternLM2ForCausalLM IndexForCausalLM GraniteForCausalLM Glm4ForCausalLM "
    "LlavaForConditionalGeneration Mistral3ForConditionalGeneration".split()
)
WRITES_TEXT = ("ForCausalLM", "ForConditionalGeneration")
KINDS = ("exl2", "exl3", "gptq", "full")  # of a folder of safetensors, that an engine of ours reads
GPTQ_FORMATS = ("gptq", "gptq_v2")  # as in engines/checkpoint.py
FOLDER = "."  # in the place of a GGUF file's name: not one file of the repository, but its safetensors
_BITS = re.compile(r"(\d+)[._](\d+)")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_PROJECTOR = re.compile(r"mmproj", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """A model as it would run. download is what its repository would send, None for what is here already."""

    title: str
    setup: Setup
    tensors: TensorBytes | None
    download: Plan | None = None


@dataclass(frozen=True)
class Choices:
    """A repository that holds several models: what has to be named. files are GGUF files to bytes, projectors the
    files that let such a model see. folder is the branch whose safetensors can be taken beside these files, or empty.
    """

    repo: str
    branches: tuple[str, ...]
    files: Mapping[str, int]
    projectors: tuple[str, ...] = ()
    folder: str = ""


class Lookup:
    """Finds what is meant. Asks the hub, so calls can take seconds."""

    def __init__(self, presets: Presets, downloads: Downloads) -> None:
        self._presets, self._downloads = presets, downloads

    def find(self, what: str, file: str = "", projector: str = "") -> Found:
        """A preset's first variant, a path, or OWNER/NAME@REVISION with the file for GGUF, FOLDER for its safetensors.

        Raises a TurntableError that says what is missing.
        """
        if "@" not in what and (path := _existing(what)):
            return _from_path(path)
        if "/" in what:
            return self._from_hub(Ref.parse(what, "" if file == FOLDER else file, projector))
        try:
            variant = self._presets.get(what).variants[0]
        except PresetNotFound as error:
            hint = "Name a preset, a folder or file, or OWNER/NAME@REVISION of a repository."
            raise PresetNotFound(str(error), hint=hint) from None
        if variant.shape is None:
            hint = "Name its repository, folder or file instead."
            raise InvalidRequest(f"The preset {what} does not give the shape of {variant.title}.", hint=hint)
        return found_of(variant)

    def choices(self, repo: str, revision: str = "") -> Choices | Ref:
        """What a repository holds, at its main branch unless a revision is named: its model, or what to choose from."""
        look = self._downloads.look(repo, revision)
        at = f"{repo}@{revision}" if revision else repo
        plain = any(name.endswith(".safetensors") for name in look.weights)
        others = tuple(name for name in look.branches if name != "main")
        models = {n: size for n, size in look.weights.items() if n.endswith(".gguf") and not _PROJECTOR.search(n)}
        # Parts are left out; where there are only parts, the first of each model stands for all of them.
        if files := {n: size for n, size in models.items() if not _PART.search(n)} or _joined(models):
            projectors = tuple(n for n in look.weights if n.endswith(".gguf") and _PROJECTOR.search(n))
            return Choices(at, others, files, projectors, (revision or "main") if plain else "")
        if plain:
            return Choices(repo, ("main", *others), {}) if others else Ref(repo, revision or "main")
        if not others and look.nested:
            some = ", ".join(f"{name[:80]!a}" for name in look.nested[:3])
            raise SourceNotFound(
                f"{at} holds its weights in subfolders, which are not supported: {some}"
                f"{f' and {len(look.nested) - 3} more' if len(look.nested) > 3 else ''}.",
                hint="Download the file by hand, and name it in a preset by its path.",
            )
        if not others:
            raise SourceNotFound(f"{at} holds no weights that an engine of ours could load.")
        return Choices(repo, others, {})

    def _from_hub(self, ref: Ref) -> Found:
        fetched = self._downloads.plan(ref)
        if ref.file:
            return self._gguf(ref, fetched)
        config = self._downloads.read_json(fetched, "config.json")
        with _sense(f"config.json of {ref.title}"):
            return self._folder(ref, fetched, config)

    @staticmethod
    def _folder(ref: Ref, fetched: Plan, config: Mapping[str, Any]) -> Found:
        shape = planner.shape_of_config(config)
        said = config.get("quantization_config") or {}
        kind = _kind(said)
        engine = _engine(config, kind, ref.title)
        bits = _bits(said, ref.revision, ref.repo) if kind != "full" else 16.0
        quantization = Quantization(kind, bits, planner.stated_bits(said.get("head_bits") or 6, "head_bits"))
        setup = Setup(
            shape, quantization, engine,
            context=min(shape.max_positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT),
        )  # fmt: skip
        tensors = planner.weight_bytes(setup)
        # The files' size is a fact, the bits are a name: what the arithmetic misses is in the layers.
        weights = sum(e.size_bytes for e in fetched.entries if e.name.endswith(".safetensors"))
        off = weights - planner.file_bytes(setup, tensors)
        if weights and tensors.layers + off > 0:
            tensors = replace(tensors, layers=tensors.layers + off)
        return Found(ref.title, setup, tensors, fetched)

    def _gguf(self, ref: Ref, fetched: Plan) -> Found:
        """By the headers of the model, or of its first part, and of its projector."""
        parts = [e for e in fetched.entries if e.name != ref.projector]
        with self._header(fetched, parts[0]) as path:
            model = _with_parts(planner.read_gguf(path), sum(e.size_bytes for e in parts[1:]))
        for entry in fetched.entries:
            if entry.name == ref.projector:
                with self._header(fetched, entry) as path:
                    shape = replace(model.shape, vision=_tower(planner.gguf_tensors(path)[0]))
                model = replace(model, shape=shape, tensors=replace(model.tensors, vision=entry.size_bytes))
        return Found(ref.title, _local_setup(model, "llamacpp"), model.tensors, fetched)

    @contextlib.contextmanager
    def _header(self, fetched: Plan, entry: Entry) -> Iterator[Path]:
        """A file of the right length with the first megabytes of a GGUF file, and nothing behind them."""
        unknown = ModelFilesDamaged(f"{entry.name} does not say in its header what model it is.")
        with tempfile.TemporaryDirectory(prefix="turntable-header-") as folder:
            path = Path(folder) / entry.name
            for limit in HEAD_BYTES:
                path.write_bytes(self._downloads.read_head(fetched, entry.name, min(limit, entry.size_bytes)))
                try:
                    # Before it has its length: a header that goes on behind what was read would go on with zeros.
                    values, _ = planner.gguf_tensors(path)
                    break
                except ModelFilesDamaged:
                    if limit >= min(entry.size_bytes, HEAD_BYTES[-1]):
                        raise unknown from None
            _refuse_layers(values, entry.name)
            with path.open("r+b") as file:
                file.truncate(entry.size_bytes)  # a hole: takes no disk
            try:
                with _sense(entry.name):
                    yield path
            except ModelFilesDamaged:
                raise unknown from None


def found_of(variant: Variant) -> Found:
    """A preset's variant. Raises ValueError for one without a shape."""
    setup = planner.setup_of(variant, gpus=1 if variant.engine in EXL_ENGINES else 0)
    return Found(variant.title, setup, planner.variant_tensors(variant, setup)[0])


def _existing(what: str) -> Path | None:
    """The path that is meant; None for what cannot be one: too long, or in the home of somebody unknown."""
    try:
        path = Path(what).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _from_path(path: Path) -> Found:
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelNotDownloaded(f"The folder {path} holds no model: it has no config.json.")
    try:
        with _sense(path.name):
            if not path.is_dir():
                model, engine = _read_gguf(path), "llamacpp"
            else:
                model, config = planner.read_folder(path), read_config(path)
                said = _kind(config.get("quantization_config") or {})
                engine = _engine(config, model.quantization.kind if said == "full" else said, path.name)
    except OSError as error:
        raise ModelFilesDamaged(f"{path} cannot be read: {error.strerror or error}.") from None
    return Found(path.name, _local_setup(model, engine), model.tensors)


def _kind(said: Mapping[str, Any]) -> str:
    """How a quantization_config says that the weights are stored; full where it says nothing."""
    return str(said.get("quant_method") or "full").lower()


def _engine(config: Mapping[str, Any], kind: str, title: str) -> str:
    """The engine that loads a folder of safetensors of this kind. Raises LoadError where none of ours does."""
    said = config.get("quantization_config") or {}
    packing = "marlin" if said.get("is_marlin_format") else said.get("checkpoint_format") or "gptq"
    architecture = str((config.get("architectures") or ["?"])[0])
    wrong = ""
    if kind not in KINDS:
        wrong = f"its weights are quantized by {kind[:40]!a}, and they read EXL2, EXL3, 4-bit GPTQ and 16 bits"
    elif kind == "gptq" and said.get("bits", 4) != 4:
        wrong = f"it is GPTQ with {planner.stated_bits(said['bits']):g} bits, and ExLlamaV2 reads 4"
    elif kind == "gptq" and packing not in GPTQ_FORMATS:
        wrong = f"it is GPTQ in the packing {str(packing)[:40]!a}, and ExLlamaV2 reads {' and '.join(GPTQ_FORMATS)}"
    elif kind in ("exl2", "gptq") and architecture not in EXLLAMAV2_KNOWS:
        wrong = f"ExLlamaV2 does not know the architecture {architecture[:60]!a}"
    elif architecture not in EXLLAMAV2_KNOWS and not architecture.endswith(WRITES_TEXT):
        wrong = f"{architecture[:60]!a} is not the architecture of a model that writes text"
    if wrong:
        raise LoadError(f"No engine of ours loads {title}: {wrong}.", hint="Look for its EXL2, EXL3 or GGUF files.")
    return "exllamav3" if kind == "exl3" or architecture not in EXLLAMAV2_KNOWS else "exllamav2"


def _read_gguf(path: Path) -> planner.Model:
    """A GGUF file, or all the parts of the model of which it is one."""
    if not path.is_file():
        raise ModelFilesDamaged(f"{path.name} is neither a file nor a folder.")  # reading a pipe would wait for ever
    parts = [path]
    if _PART.search(path.name):
        stem = _PART.sub("", path.name)
        parts = sorted(p for p in path.parent.glob("*.gguf") if _PART.search(p.name) and _PART.sub("", p.name) == stem)
    check_gguf(parts[0])  # which bounds all that is counted in the header, before anything counts it
    return _with_parts(planner.read_gguf(parts[0]), sum(part.stat().st_size for part in parts[1:]))


def _with_parts(model: planner.Model, more_bytes: int) -> planner.Model:
    """A model of which only the first part was read: all that the others hold is taken for weights of its layers."""
    if not more_bytes:
        return model
    tensors = replace(model.tensors, layers=model.tensors.layers + more_bytes, per_layer=())
    bits = 8 * tensors.layers / planner.layer_parameters(model.shape)
    return replace(model, quantization=replace(model.quantization, bpw=bits), tensors=tensors)


def _joined(files: Mapping[str, int]) -> dict[str, int]:
    """Models in parts: the name of each one's first part to the bytes of all its parts."""
    firsts: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for name in sorted(files):
        first = firsts.setdefault(_PART.sub("", name), name)
        sizes[first] = sizes.get(first, 0) + files[name]
    return sizes


def _refuse_layers(values: Mapping[str, Any], name: str) -> None:
    count = values.get(f"{values.get('general.architecture')}.block_count")
    if isinstance(count, int) and count > MAX_LAYERS:
        raise ModelFilesDamaged(f"{name} is damaged: it claims {count} layers.")


def _tower(values: Mapping[str, Any]) -> VisionShape:
    """What a projector's header says of its vision tower."""

    def of(key: str, default: int = 0) -> int:
        value = values.get(f"clip.vision.{key}")
        return value if isinstance(value, int) and value > 0 else default

    return VisionShape(
        depth=of("block_count"), hidden=of("embedding_length"), intermediate=of("feed_forward_length"),
        patch=of("patch_size", 14), out=of("projection_dim"), merge=of("spatial_merge_size", 1),
    )  # fmt: skip


@contextlib.contextmanager
def _sense(name: str) -> Iterator[None]:
    """Around what takes a stranger's figures apart: one that makes no sense is no bug of ours."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError):
        raise ModelFilesDamaged(f"{name} is damaged: its figures make no sense.") from None


def _local_setup(model: planner.Model, engine: str) -> Setup:
    return Setup(
        model.shape, model.quantization, engine,
        context=min(model.shape.max_positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT),
        gpus=0 if engine == "llamacpp" else 1,
    )  # fmt: skip


def _bits(said: Mapping[str, Any], revision: str, repo: str) -> float:
    """Bits per weight as the configuration says, or the branch's or repository's name ("4_25", "6.5bpw")."""
    if said.get("bits") is not None:
        return planner.stated_bits(said["bits"])
    for text in (revision, repo):
        if found := _BITS.search(text):
            return float(f"{found[1]}.{found[2]}")
    return 4.0
