"""The words that options may be: each list stands here once, for checks, help and recipes."""

KINDS = ("attention", "mlp", "token")
GRANULARITIES = ("head_dim", "uniform", "head")
TOKEN_STARTS = ("paper", "one")
TOKEN_GATES = ("input", "keys")
TOKEN_RULES = ("running-min", "any-deeper")
RANKINGS = ("fractions", "macs")
SPREADS = ("kind", "unit", "mac")
# The first one is what is taken unasked.
CRITERIA = ("obs", "fisher", "taylor", "activation", "magnitude", "random")
