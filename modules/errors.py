"""Every failure a person can meet, one class each, under one base. Standard library only.

TurntableError                    code, status, hint
├─ SettingsError     422
├─ PresetError       PresetNotFound 404 · PresetInvalid 422
├─ ModelFilesError   ModelNotDownloaded 409 · ModelFilesDamaged 409 · ModelFilesUnsafe 422
├─ LoadError         EngineMissing 501 · DoesNotFit 507 · EngineCrashed 503 · LoadTimedOut 504 ·
│                    InstallFailed 500
├─ GenerateError     ContextTooLong 400 · InvalidRequest 400 · Busy 429 · EngineStuck 504
├─ DownloadError     SourceNotFound 404 · AccessDenied 403 · NotEnoughDisk 507 · SourceUnreachable 502 ·
│                    HashMismatch 502
├─ ImageError        ImageRefused 415 · ImageTooLarge 413 · ImageMissing 400
├─ ChatError         ChatNotFound 404 · ChatDamaged 500
└─ AccessError       Forbidden 403 · WrongHost 421 · TooLarge 413

The page shows `str(error)` and `error.hint`; an API answers `error.status` and
`error.code`; a child process sends `to_wire()` and the parent raises `from_wire()`.
No other module invents a code, a status or a hint.
"""

from __future__ import annotations

from typing import Any


class TurntableError(Exception):
    """Base of all the expected failures."""

    code = "turntable_error"
    status = 500
    hint = "This is a bug of ours; the log has the details."

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        if hint is not None:
            self.hint = hint

    def to_wire(self) -> dict[str, Any]:
        """The error as plain data, for the pipe, the page and the API."""
        return {"code": self.code, "message": str(self), "hint": self.hint}


class SettingsError(TurntableError):
    """A setting on the command line or in the environment makes no sense."""

    code, status, hint = "settings_invalid", 422, "`--help` lists the settings."


class PresetError(TurntableError):
    """Something is wrong with a preset."""

    code, status, hint = "preset_error", 422, "Look at the preset's TOML file."


class PresetNotFound(PresetError):
    """No preset has this name."""

    code, status, hint = "preset_not_found", 404, "Use one of the names that are listed."


class PresetInvalid(PresetError):
    """A preset file breaks the rules; the others go on working."""

    code, status, hint = "preset_invalid", 422, "Correct the file and reload the page."


class ModelFilesError(TurntableError):
    """Something is wrong with a model's files."""

    code, status, hint = "model_files_error", 409, "The Models page shows what is there and how to get the rest."


class ModelNotDownloaded(ModelFilesError):
    """The files of the model are not on this machine."""

    code, status, hint = "model_not_downloaded", 409, "The Models page has the command that downloads it."


class ModelFilesDamaged(ModelFilesError):
    """A file of the model is cut off, empty or not what its name says."""

    code, status, hint = "model_files_damaged", 409, "Delete the file and download it again."


class ModelFilesUnsafe(ModelFilesError):
    """A file of the model could run code, or points outside its folder."""

    code, status, hint = "model_files_unsafe", 422, "Use a GGUF or safetensors file from a source you trust."


class LoadError(TurntableError):
    """The model did not come up."""

    code, status, hint = "load_failed", 503, "The engine's last lines are in the log."


class EngineMissing(LoadError):
    """The preset names an engine that this machine lacks."""

    code, status, hint = (
        "engine_missing",
        501,
        "Install the engine, or choose a variant of another one on the Models page.",
    )


class DoesNotFit(LoadError):
    """The model needs more memory than the budget or the machine has."""

    code, status = "does_not_fit", 507
    hint = "Choose a smaller variant or a shorter context, or raise --memory-budget."


class EngineCrashed(LoadError):
    """The engine's process ended by itself."""

    code, status, hint = "engine_crashed", 503, "Send the message again; the engine starts anew."


class LoadTimedOut(LoadError):
    """The model was not ready in time."""

    code, status, hint = "load_timed_out", 504, "A slow disk needs a higher --load-timeout."


class InstallFailed(LoadError):
    """An engine could not be installed, or its self-test could not be run."""

    code, status, hint = "install_failed", 500, "The log in the engine's folder has the details."


class GenerateError(TurntableError):
    """The model is loaded, but the answer failed."""

    code, status, hint = "generate_failed", 500, "Send the message again."


class ContextTooLong(GenerateError):
    """The prompt does not fit the model's context."""

    code, status, hint = (
        "context_length_exceeded",
        400,
        "Shorten the message, or choose a variant with a longer context.",
    )


class InvalidRequest(GenerateError):
    """The request holds a value that no engine can use."""

    code, status, hint = "invalid_request", 400, "Correct the value that the message names."


class Busy(GenerateError):
    """Too much is waiting already, or this conversation is still being answered."""

    code, status, hint = "busy", 429, "Wait for the answer, or stop it."


class EngineStuck(GenerateError):
    """The engine gave no sign of life for too long, and was ended."""

    code, status, hint = "engine_stuck", 504, "Send the message again; the engine starts anew."


class DownloadError(TurntableError):
    """A model could not be downloaded."""

    code, status, hint = "download_failed", 502, "Resume the download on the Models page; what has arrived is kept."


class SourceNotFound(DownloadError):
    """The hub has no such repository, branch or file, or the branch holds no weights."""

    code, status, hint = "source_not_found", 404, "Check the names of the repository, the revision and the file."


class AccessDenied(DownloadError):
    """The hub does not hand the files to this person."""

    code, status, hint = (
        "access_denied",
        403,
        "Accept the terms on the model's page, then store a token with `hf auth login`.",
    )


class NotEnoughDisk(DownloadError):
    """The disk has no room for the model and the reserve."""

    code, status, hint = "not_enough_disk", 507, "Free some space, or choose another disk with --models-dir."


class SourceUnreachable(DownloadError):
    """The hub does not answer, or not in its own protocol."""

    code, status, hint = "source_unreachable", 502, "Check the network and resume; what has arrived is kept."


class HashMismatch(DownloadError):
    """What arrived is not what the hub announced."""

    code, status, hint = "hash_mismatch", 502, "Resume later; if it happens again, use another network or source."


class ImageError(TurntableError):
    """Something is wrong with an image."""

    code, status, hint = "image_error", 400, "Use a PNG, JPEG or WebP picture."


class ImageRefused(ImageError):
    """The file is not an image that Turntable opens."""

    code, status, hint = "image_refused", 415, "Use a PNG, JPEG or WebP picture."


class ImageTooLarge(ImageError):
    """The image has too many bytes or too many pixels."""

    code, status, hint = "image_too_large", 413, "Make the picture smaller."


class ImageMissing(ImageError):
    """The preset needs an image and the conversation has none, or the image is gone."""

    code, status, hint = "image_missing", 400, "Add a picture: drop it, paste it, or press the picture button."


class ChatError(TurntableError):
    """Something is wrong with a conversation."""

    code, status, hint = "chat_error", 500, "Start a new conversation."


class ChatNotFound(ChatError):
    """The conversation does not exist, or was deleted."""

    code, status, hint = "chat_not_found", 404, "Choose another conversation, or start a new one."


class ChatDamaged(ChatError):
    """The conversation could not be read from or written to the disk."""

    code, status, hint = "chat_damaged", 500, "Look at the free space and the rights of the data folder."


class AccessError(TurntableError):
    """Not allowed from here."""

    code, status, hint = "access_error", 403, "Open the address that Turntable printed at its start."


class Forbidden(AccessError):
    """The request came from another site, or names another host."""

    code, status, hint = "forbidden", 403, "Open the address that Turntable printed at its start."


class WrongHost(AccessError):
    """The request names a host that is not this machine."""

    code, status, hint = "wrong_host", 421, "Open the address that Turntable printed at its start."


class TooLarge(AccessError):
    """The request's body is larger than the limit."""

    code, status, hint = "too_large", 413, "Send less at once."


def all_errors(root: type[TurntableError] = TurntableError) -> list[type[TurntableError]]:
    """The tree in reading order, the base first."""
    return [root] + [found for child in root.__subclasses__() for found in all_errors(child)]


def from_wire(wire: dict[str, Any]) -> TurntableError:
    """Rebuild what a child process sent. An unknown code becomes an EngineCrashed, never a success."""
    known = {error.code: error for error in all_errors()}
    kind = known.get(str(wire.get("code", "")), EngineCrashed)
    return kind(str(wire.get("message", "The engine gave no reason.")), hint=wire.get("hint"))
