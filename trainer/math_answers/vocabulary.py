"""The words of mathematical answers: LaTeX commands, their plain spellings, units."""

from __future__ import annotations

import re
from fractions import Fraction

from trainer.math_answers.tree import Node, integer

_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi "
    "Omega hbar ell"
)
GREEK = frozenset(_GREEK.split())

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech "
    "csch arcsinh arccosh arctanh ln log lg exp max min gcd lcm floor ceil abs sgn arg Re Im "
    "det".split()
)

RENAMED_COMMANDS = {
    **{"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom"},
    **{"asin": "arcsin", "acos": "arccos", "atan": "arctan", "arsinh": "arcsinh"},
    **{"arcosh": "arccosh", "artanh": "arctanh", "asinh": "arcsinh", "acosh": "arccosh"},
    **{"atanh": "arctanh", "tg": "tan", "ctg": "cot", "cosec": "csc", "arctg": "arctan"},
    **{"varnothing": "emptyset", "O": "emptyset", "infin": "infty", "dots": "ldots"},
    **{"cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots", "vdots": "ldots", "degree": "deg"},
    **{"imath": "i", "jmath": "j", "varepsilon": "epsilon", "varphi": "phi", "vartheta": "theta"},
    **{"land": "and", "wedge": "and", "lor": "or", "vee": "or", "sign": "sgn", "cupdot": "cup"},
    **{"mod": "bmod", "ceiling": "ceil", "backslash": "setminus", "smallsetminus": "setminus"},
    **{"uplus": "cup", "bigcup": "cup", "bigcap": "cap", "iint": "int", "oint": "int"},
    **{
        "overline": "bar",
        "dddot": "ddot",
        "widehat": "hat",
        "widetilde": "tilde",
        "overrightarrow": "vec",
    },
}

DROPPED_COMMANDS = frozenset(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle "
    "textstyle scriptstyle limits nolimits boldsymbol mathbf mathit mathsf mathtt mathcal bf it "
    "sf tt rm pmb bm mathstrut hline nonumber middle checkmark".split()
)

SPACE_COMMANDS = frozenset("quad qquad thinspace enspace space".split())

TEXT_COMMANDS = frozenset(
    "text mbox hbox textrm textbf textit textsf texttt textnormal mathrm operatorname emph".split()
)

SEPARATORS = frozenset(("and", "or"))

OPERATOR_COMMANDS = {
    **{"lt": "<", "le": "<=", "leq": "<=", "leqslant": "<=", "leqq": "<=", "gt": ">", "ge": ">="},
    **{"geq": ">=", "geqslant": ">=", "geqq": ">=", "ne": "!=", "neq": "!=", "in": "in"},
    **{"approx": "~", "simeq": "~", "cong": "~", "thickapprox": "~", "equiv": "="},
    **{"times": "*", "cdot": "*", "ast": "*", "bullet": "*", "div": "/", "colon": ":"},
    **{"mid": "|", "vert": "|", "lvert": "|", "rvert": "|", "Vert": "|", "lVert": "|"},
    **{"rVert": "|", "|": "|", "{": "\\{", "}": "\\}", "lbrace": "\\{", "rbrace": "\\}"},
    **{"lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "%": "%", "&": "&"},
    **{"prime": "'", "to": "->", "rightarrow": "->", "ldots": "...", "\\": "\\\\", "_": "_"},
}

WORD_COMMANDS = {
    **{name: name for name in FUNCTIONS - {"Re", "Im", "det"} | GREEK},
    **{name: name for name in ("sqrt", "cbrt", "pi", "infty", "pm", "asin", "acos", "atan")},
    **{"infinity": "infty", "Infinity": "infty", "inf": "infty", "oo": "infty", "in": "in"},
    **{"union": "cup", "Union": "cup", "intersection": "cap", "degrees": "deg", "degree": "deg"},
    **{"mod": "bmod", "percent": "%", "choose": "choose", "binomial": "binom", "binom": "binom"},
    **{"cdot": "cdot", "times": "times", "over": "over", "Re": "Re", "Im": "Im", "det": "det"},
    **{"arsinh": "arcsinh", "asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh"},
    **{"arcosh": "arccosh", "artanh": "arctanh"},
    **{"deg": "deg", "factorial": "factorial", "ceiling": "ceil"},
}

UNICODE_COMMANDS = str.maketrans(
    {
        char: f" {command} "
        for char, command in {
            **{"α": "\\alpha", "β": "\\beta", "γ": "\\gamma", "δ": "\\delta", "ε": "\\epsilon"},
            **{"θ": "\\theta", "λ": "\\lambda", "μ": "\\mu", "ν": "\\nu", "ξ": "\\xi", "π": "\\pi"},
            **{
                "ρ": "\\rho",
                "σ": "\\sigma",
                "τ": "\\tau",
                "φ": "\\phi",
                "χ": "\\chi",
                "ψ": "\\psi",
            },
            **{"ω": "\\omega", "Δ": "\\Delta", "Σ": "\\Sigma", "Ω": "\\Omega", "∞": "\\infty"},
            **{"≤": "\\le", "≥": "\\ge", "≠": "\\ne", "≈": "\\approx", "∈": "\\in", "⩽": "\\le"},
            **{"∪": "\\cup", "∩": "\\cap", "∖": "\\setminus", "∅": "\\emptyset", "⩾": "\\ge"},
            **{"ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}"},
            **{"×": "\\times", "·": "\\cdot", "⋅": "\\cdot", "∙": "\\cdot", "÷": "\\div"},
            **{"±": "\\pm", "∓": "\\mp", "√": "\\sqrt", "°": "^\\circ", "′": "'", "″": "''"},
            **{"⟨": "\\langle", "⟩": "\\rangle", "⌊": "\\lfloor", "⌋": "\\rfloor", "∠": "\\angle"},
            **{"⌈": "\\lceil", "⌉": "\\rceil", "…": "\\ldots", "–": "-", "º": "^\\circ"},
        }.items()
    }
)

_REALS, _NOTHING = Node("set", value="R"), Node("set", value="empty")
PHRASES = {
    **{f"{start}{end}": _REALS for start in ("", "all ") for end in ("real numbers", "reals")},
    **{"no solution": _NOTHING, "no solutions": _NOTHING, "empty set": _NOTHING},
    **{"no real solution": _NOTHING, "no real solutions": _NOTHING, "the empty set": _NOTHING},
    **{"infinity": Node("const", value="oo")},
    **{
        word: integer(value)
        for value, word in enumerate(
            "zero one two three four five six seven eight nine ten eleven twelve".split()
        )
    },
}
"""What some phrases stand for."""

ABBREVIATIONS = {"dne": "does not exist"}

MULTIPLIERS = {
    **{
        "dozen": 12,
        "hundred": 100,
        "thousand": 1000,
        "million": 10**6,
        "billion": 10**9,
        "trillion": 10**12,
    },
}

_UNIT_TABLE = """
m metre metres meter meters | L1 | 1
km kilometer kilometers kilometre kilometres | L1 | 1000
cm centimeter centimeters centimetre centimetres | L1 | 1/100
mm millimeter millimeters millimetre millimetres | L1 | 1/1000
nm nanometer nanometers | L1 | 1/1000000000
in inch inches | L1 | 127/5000
ft foot feet | L1 | 381/1250
yd yard yards | L1 | 1143/1250
mi mile miles | L1 | 201168/125
g gram grams | M1 | 1/1000
kg kilogram kilograms | M1 | 1
mg milligram milligrams | M1 | 1/1000000
s sec secs second seconds | T1 | 1
ms millisecond milliseconds | T1 | 1/1000
min mins minute minutes | T1 | 60
h hr hrs hour hours | T1 | 3600
day days | T1 | 86400
week weeks | T1 | 604800
l L liter liters litre litres | L3 | 1/1000
ml mL milliliter milliliters millilitre millilitres | L3 | 1/1000000
dollar dollars usd USD bucks | D1 | 1
cent cents | D1 | 1/100
euro euros | E1 | 1
N newton newtons | M1L1T-2 | 1
J joule joules | M1L2T-2 | 1
kJ kilojoule kilojoules | M1L2T-2 | 1000
W watt watts | M1L2T-3 | 1
kW kilowatt kilowatts | M1L2T-3 | 1000
Pa pascal pascals | M1L-1T-2 | 1
Hz hertz | T-1 | 1
mph | L1T-1 | 1397/3125
V volt volts | V1 | 1
A amp amps ampere amperes | A1 | 1
K kelvin kelvins | K1 | 1
C coulomb coulombs | A1T1 | 1
rad radian radians | | 1
unit units | | 1
mol mole moles | N1 | 1
"""


def _read_units() -> dict[str, tuple[dict[str, int], Fraction]]:
    units = {}
    for line in _UNIT_TABLE.strip().splitlines():
        names, dimension, factor = (part.strip() for part in line.split("|"))
        powers = {base: int(power) for base, power in re.findall(r"([A-Z])(-?\d)", dimension)}
        for name in names.split():
            units[name] = (powers, Fraction(factor))
    return units


UNITS = _read_units()
"""Name to powers of base dimensions and the factor to the base unit."""

_VOWEL = re.compile("[aeiouyAEIOUY]")
_NO_UNIT = frozenset(
    "is not isn no none if when where but then than for with the are was all any each every only "
    "unless except answer wrong true false between from does solution solutions undefined lambda "
    "exec eval import print return minus plus squared cubed halves thirds fourths quarters fifths "
    "sixths sevenths eighths ninths tenths below above under remainder".split()
)


def is_unit_word(word: str, *, after_number: bool) -> bool:
    """Whether a run of plain letters is a word (a unit after a number), not a product."""
    if word in UNITS or word in ("per", "sq", "cu"):
        return after_number
    return len(word) >= 4 and _VOWEL.search(word) is not None


def is_unit_stop(words: str) -> bool:
    """Whether words after a number are not what is counted, but go on with the sentence."""
    return any(word in _NO_UNIT for word in words.lower().split())
