"""Names in a checkpoint: which linear modules belong to which site, and what the files are called."""

from __future__ import annotations

from resq_vllm.formats.metadata import SiteName

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
BASIS_FILE = "resq_basis.safetensors"

SITE_MODULES: dict[SiteName, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_SITE_OF = {leaf: site for site, leaves in SITE_MODULES.items() for leaf in leaves}


def site_of(module: str) -> SiteName | None:
    """The site of a linear module by its Hugging Face name, or None: ``model.layers.0.mlp.up_proj`` is "gate_up"."""
    return _SITE_OF.get(module.rpartition(".")[2])


def key_rotation_name(attention: str) -> str:
    """The tensor of U_C for the attention module ``attention`` (``model.layers.0.self_attn``)."""
    return f"{attention}.attn.key_rotation"
