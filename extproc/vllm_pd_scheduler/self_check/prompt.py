"""The prompt of a check: new each time, and what follows it stands in it."""

from __future__ import annotations

from random import Random

_WORDS = (
    *("apple", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "jacket"),
    *("kettle", "ladder", "market", "needle", "ocean", "pencil", "quarter", "river", "silver", "temple"),
    *("window", "yellow", "anchor", "basket", "copper", "dragon", "eagle", "feather", "glass", "hammer"),
    *("jungle", "kitchen", "lemon", "mirror", "night", "orange", "paper", "queen", "rocket", "stone"),
    *("tiger", "uncle", "violin", "water", "autumn", "butter", "castle", "doctor", "evening", "flower"),
    *("guitar", "honey", "insect", "journey", "king", "lantern", "mountain", "number", "valley", "zebra"),
)
_SAID = 128
"""Words that are said once."""
_REPEATED = 64
"""Those of them that are said again. The answer is what comes next."""


def new_prompt(random: Random) -> str:
    """Return a prompt of some 250 tokens that nobody has had before, whose first words differ already.

    It says random words, and begins to say them again. What follows can be read nowhere but in the prompt's
    KV cache, and a model is sure of it: with another cache it says something else.
    """
    words = random.choices(_WORDS, k=_SAID)
    return f"{' '.join(words)}. Once more: {' '.join(words[:_REPEATED])}"
