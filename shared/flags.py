"""What single bits of a store say of a row: rows/<model>/flags, faults/<source> and documents/split, as in STORE.md."""

import numpy as np

FIRST, BOS, SPECIAL = 1, 2, 4  # bits of rows/<model>/flags
# Of the message that the row's token ends in: bits 3 to 5, counted from 1.
ROLES = ("system", "user", "assistant", "tool", "other")
TEMPLATE = 64  # the row's token ends in a chat, outside the content of every message
CLIPPED, MASKED, SINK = 1, 2, 4  # bits of faults/<source>
SINK_MULTIPLE = (
    10.0  # a row is a sink where its norm is above this multiple of the median (those of Qwen and Gemma are far above)
)
TRAIN, HELD_OUT = 0, 1  # documents/split


def role_flag(role: str) -> int:
    """The bits of rows/<model>/flags for a row of a message of this role."""
    return (1 + ROLES.index(role if role in ROLES else "other")) << 3


def flag_names(flags: int) -> list[str]:
    """What the bits of rows/<model>/flags say, as words: first, special, and a chat's role or template."""
    role = (flags >> 3) & 7
    return [
        *(name for bit, name in ((FIRST, "first"), (SPECIAL, "special")) if flags & bit),
        *([ROLES[role - 1]] if role else []),
        *(["template"] if flags & TEMPLATE else []),
    ]


def count_faults(faults_N: np.ndarray) -> dict[str, int]:
    bits = {"clipped": CLIPPED, "masked": MASKED, "sink": SINK}
    return {name: int(np.count_nonzero(faults_N & bit)) for name, bit in bits.items()}
