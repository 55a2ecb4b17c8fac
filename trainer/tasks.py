"""Problems a run trains and evaluates on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question and the answer its reward is computed from."""

    problem_id: str
    """Unique within a data set; random choices for the problem derive from it."""
    question: str
    """The text that a template turns into a prompt."""
    answer: str
    """The accepted final answer."""
