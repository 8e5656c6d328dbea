"""By which norm codes are weighed, in the words of crosscoder_learning."""

from enum import Enum

from shared.errors import CheckpointError


class CodeNormalization(Enum):
    """The decoder norm that weighs codes in penalties and selections, and where codes are shown."""

    CROSSCODER = 1  # sum over sources of |d|
    SAE = 2  # the length of all that a latent writes
    MIXED = 3  # alpha_sae x SAE + alpha_cc x CROSSCODER
    NONE = 4  # 1
    DECOUPLED = 5  # |d| of each source, which selects for itself

    @classmethod
    def from_string(cls, name: str) -> "CodeNormalization":
        """By its name, in any case. Raises CheckpointError for another one."""
        if name.upper() not in cls.__members__:
            raise CheckpointError("an unknown code normalisation", name, f"Known: {', '.join(cls.__members__)}")
        return cls[name.upper()]

    @classmethod
    def of(cls, given: "CodeNormalization | str") -> "CodeNormalization":
        return cls.from_string(given) if isinstance(given, str) else given
