"""Rule-based rewards: the final answer of a completion, its grade, what it earns."""

from trainer.rewards.extraction import extract_answer, extract_boxed, format_reward
from trainer.rewards.language import language_consistency
from trainer.rewards.matching import answer_key, answers_match
from trainer.rewards.math_grader import Grade, MathGrader, check_gold
from trainer.rewards.scoring import Reward, Scorer

__all__ = [
    "Grade",
    "MathGrader",
    "Reward",
    "Scorer",
    "answer_key",
    "answers_match",
    "check_gold",
    "extract_answer",
    "extract_boxed",
    "format_reward",
    "language_consistency",
]
