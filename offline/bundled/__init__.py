"""The small real model, calibration text and held-out text that the repository carries."""

from pathlib import Path

BUNDLED_DIR = Path(__file__).resolve().parent

MODEL_DIR: Path = BUNDLED_DIR / "model"
"""Hugging Face checkpoint folder (Llama, 5.8 M parameters, bf16)."""

CALIBRATION_TEXT: Path = BUNDLED_DIR / "calibration.txt"
"""UTF-8 text the model was trained on; the default calibration text of `resq quantize`."""

HELDOUT_TEXT: Path = BUNDLED_DIR / "heldout.txt"
"""UTF-8 text kept out of training and calibration; perplexities are measured on it."""
