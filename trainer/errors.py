"""The exceptions that a user may see: a mistake that the user can mend, and what another start may get round."""


class UserError(Exception):
    """A mistake in what the user gave; the command prints each line as it is and exits with code 2.

    Args:
        lines: one problem per line, each naming the place, the value, the rule and, where there is
            one, the mend. Never a traceback.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class OutOfMemory(Exception):
    """A run does not fit as it was planned; the command tries again with less, or says what would fit."""


class NumbersGoneWrong(Exception):
    """Several steps in a row could not be taken; the next start goes back, and past the data of these steps."""


class WeightsDiffer(Exception):
    """Workers that hold the same weights hold them no more; the next start goes back to when they did."""
