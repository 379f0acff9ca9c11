"""The public name of the model for lm-evaluation-harness: importing it registers "megalodon" there."""

from .measure.lm_eval_adapter import MegalodonLM

__all__ = ["MegalodonLM"]
