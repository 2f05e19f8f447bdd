"""Perplexity of plain and ResQ models, by a torch reference or by vLLM, on the same token sequences."""

from offline.evaluate.naive import load_naive_model
from offline.evaluate.perplexity import Perplexity, evaluate_perplexity
from offline.evaluate.reference_model import load_reference_model

__all__ = ["Perplexity", "evaluate_perplexity", "load_naive_model", "load_reference_model"]
