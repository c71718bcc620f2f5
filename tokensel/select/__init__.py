"""From what is known of each token to its weight: signals, scores (scorers), rules, and the methods that pair them."""

from tokensel.select.rules import AdaptiveThreshold, AsGiven, AsScored, LearnAndForget, TopSamples, TopShare
from tokensel.select.signals import TokenSignals

__all__ = [
    "AdaptiveThreshold",
    "AsGiven",
    "AsScored",
    "LearnAndForget",
    "TokenSignals",
    "TopSamples",
    "TopShare",
]
