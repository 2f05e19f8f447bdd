"""A model as it lies on disk: its config, its tensors on demand, and what can be wrong with either."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from offline.finite import all_finite
from offline.models.adapter import ModelAdapter
from offline.models.registry import adapter_class
from offline.models.shards import ShardReader
from offline.models.tokenizer import load_tokenizer
from resq_vllm.errors import ResQError

HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def resolve_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: ``name`` itself when it is one, else a snapshot of that Hugging Face Hub id.

    Raises ResQError when it is neither, or the hub cannot be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ResQError(f"{folder}: is a file; give the folder that holds config.json and the weights")
    text = str(name)
    if text.startswith(("/", ".", "~")) or text.count("/") != 1:
        raise ResQError(f"{text}: no such folder, and not a hub id of the form owner/name; check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # the hub client, its HTTP library and its cache share no base class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ResQError(
            f"{text}: no such folder, and the Hugging Face Hub did not give it ({type(error).__name__}: {reason}); "
            "check the name and the network, or download it and give the folder"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder as it is written; raises ResQError when it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ResQError(f"{path}: missing; give the folder of a Hugging Face model")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResQError(f"{path}: not valid JSON ({error}); download the file again") from error
    if not isinstance(raw, dict):
        raise ResQError(f"{path}: holds no JSON object; download the file again")
    return raw


class ModelSource:
    """A model folder opened for reading, one tensor at a time.

    ``config`` is the transformers config, ``adapter`` knows the names and sizes, ``raw_config`` is config.json as
    written. Every tensor handed out has been checked: shape against the config, values finite.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ResQError for anything wrong with the config or with the list of files (see ``open``)."""
        self.folder = folder
        self.raw_config = read_config(folder)
        config_path = folder / "config.json"
        family = adapter_class(self.raw_config.get("architectures"), str(config_path))
        quantized = self.raw_config.get("quantization_config")
        if quantized is not None:
            method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized
            raise ResQError(f"{config_path}: the model is already quantized ({method}); give the 16-bit original")
        try:
            self.config = family.config_class.from_pretrained(folder)
            self.adapter: ModelAdapter = family(self.config)
        except ResQError as error:
            raise ResQError(f"{folder}/{error}") from error
        except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())
            raise ResQError(f"{config_path}: invalid for {family.architecture} ({reason}); mend the field") from error
        self._shards = ShardReader(folder)
        self._shapes = self.adapter.model_shapes()
        for layer in range(self.adapter.num_layers):
            self._shapes |= self.adapter.layer_shapes(layer)
        self._check_names()

    @classmethod
    def open(cls, name: str | Path, revision: str | None = None) -> ModelSource:
        """Open a folder, or the snapshot of a hub id when no such folder exists.

        Raises ResQError for: no such folder or id, no config.json, an unsupported architecture, an already quantized
        model, pickled weights only, a missing or truncated shard, a missing or unknown tensor.
        """
        return cls(resolve_folder(name, revision))

    def _check_names(self) -> None:
        present = self._shards.names()
        missing = sorted(set(self._shapes) - present)
        if missing:
            raise ResQError(
                f"{self.folder}: tensor {missing[0]} is missing ({len(missing)} missing in all), "
                "though config.json asks for it; download the model again or mend config.json"
            )
        inside = tuple(self.adapter.layer_prefix(layer) for layer in range(self.adapter.num_layers))
        # Old Llama files carry the rotary table, which transformers computes by itself.
        extra = (
            n for n in present - set(self._shapes) if n.startswith(inside) and not n.endswith("rotary_emb.inv_freq")
        )
        for name in sorted(extra):
            raise ResQError(
                f"{self.folder}: tensor {name} is not part of {self.adapter.architecture} with this config.json; "
                "leaving it out would change the model, so mend config.json or use a supported model"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the embedding is stored in: the model's dtype."""
        return self._shards.dtype(self.adapter.embedding)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor in ``dtype`` (None: as stored).

        Raises ResQError when it is missing, its shape is not the config's, or it holds NaN or Inf.
        """
        expected = self._shapes.get(name)
        shape = self._shards.shape(name)
        if expected is not None and shape != expected:
            raise ResQError(
                f"{self._shards.file_of(name)}: tensor {name} has shape {list(shape)}, but config.json means "
                f"{list(expected)}; the weights and config.json are not of the same model"
            )
        value = self._shards.read(name)
        if not all_finite(value):
            raise ResQError(
                f"{self._shards.file_of(name)}: tensor {name} holds NaN or Inf; get an intact copy of the model"
            )
        return value if dtype is None else value.to(dtype)

    def layer_tensors(self, layer: int, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """All tensors of a decoder layer by their full names; errors as ``tensor``."""
        return {name: self.tensor(name, dtype) for name in self.adapter.layer_shapes(layer)}

    def embedding(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Token embedding [vocab, d]."""
        return self.tensor(self.adapter.embedding, dtype)

    def final_norm(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Weight of the last RMSNorm [d]."""
        return self.tensor(self.adapter.final_norm, dtype)

    def lm_head(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Output projection [vocab, d]; of a tied model a copy of the embedding, never the same storage."""
        return self.tensor(self.adapter.embedding if self.adapter.tied else self.adapter.lm_head, dtype)

    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        """The model's tokenizer (:func:`offline.models.tokenizer.load_tokenizer`)."""
        return load_tokenizer(self.folder, trust_remote_code)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of config.json, all tensor names, shapes and dtypes, and the first and last layer's weights.

        Tells saved calibration results of another model apart without reading every weight.
        """
        digest = hashlib.sha256(json.dumps(self.raw_config, sort_keys=True).encode())
        for name in sorted(self._shapes):
            digest.update(f"{name}{self._shards.shape(name)}{self._shards.dtype(name)}".encode())
        adapter = self.adapter
        for name in (
            adapter.final_norm,
            adapter.linear(0, "q") + ".weight",
            adapter.linear(adapter.num_layers - 1, "down") + ".weight",
        ):
            digest.update(self.tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
