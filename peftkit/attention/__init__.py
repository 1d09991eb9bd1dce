"""Attention: which modules compute it, and keys and values in front of those that they attend to.

The only room that knows attention calls, their masks and the positions of tokens. Nothing here is a method: a method's
adapter inherits `Prefixing`, gives its keys and values, and they are put in front where attention is computed, behind
any cache. So a cache counts the tokens that are there, and the user's `past_key_values` stay the user's.
"""

from peftkit.attention.acting import recording
from peftkit.attention.finding import Sizes, kind_of, sizes_of, unreachable, why_no_attention
from peftkit.attention.interface import give_back, let_see
from peftkit.attention.positions import PositionShift, find_biases, is_cross, position_sites
from peftkit.attention.prefixing import Prefixing

__all__ = [
    "PositionShift",
    "Prefixing",
    "Sizes",
    "find_biases",
    "give_back",
    "is_cross",
    "kind_of",
    "let_see",
    "position_sites",
    "recording",
    "sizes_of",
    "unreachable",
    "why_no_attention",
]
