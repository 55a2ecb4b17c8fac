"""Rule-based rewards: the final answer of a completion, its grade, what it earns."""

from trainer.rewards.code_extraction import extract_code
from trainer.rewards.code_grader import CodeGrade, CodeGrader
from trainer.rewards.code_sandbox import Limits, SandboxUnavailable
from trainer.rewards.code_tests import (
    CheckTest,
    CodeTest,
    FunctionTest,
    Program,
    StdinTest,
    code_test,
)
from trainer.rewards.extraction import extract_answer, extract_boxed, format_reward
from trainer.rewards.language import language_consistency
from trainer.rewards.matching import answer_key, answers_match
from trainer.rewards.math_grader import Grade, MathGrader, check_gold
from trainer.rewards.scoring import Reward, Scorer

__all__ = [
    "CheckTest",
    "CodeGrade",
    "CodeGrader",
    "CodeTest",
    "FunctionTest",
    "Grade",
    "Limits",
    "MathGrader",
    "Program",
    "Reward",
    "SandboxUnavailable",
    "Scorer",
    "StdinTest",
    "answer_key",
    "answers_match",
    "check_gold",
    "code_test",
    "extract_answer",
    "extract_boxed",
    "extract_code",
    "format_reward",
    "language_consistency",
]
