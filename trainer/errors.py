"""The one exception that a user may see: a mistake that the user can mend."""


class UserError(Exception):
    """A mistake in what the user gave; the command prints each line as it is and exits with code 2.

    Args:
        lines: one problem per line, each naming the place, the value, the rule and, where there is
            one, the mend. Never a traceback.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
