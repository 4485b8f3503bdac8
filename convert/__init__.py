"""Convert a Gemma 4 target and its MTP drafter from Hugging Face folders to two linked GGUF files."""

from gemma_mtp.convert.link import MtpError, PairError
from gemma_mtp.convert.pipeline import Pair, PairPlan, convert_pair, plan_pair

__all__ = ["MtpError", "Pair", "PairError", "PairPlan", "convert_pair", "plan_pair"]
