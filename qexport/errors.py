"""The errors qexport raises. Each is one line that names the value, the limit and the mend."""


class QexportError(Exception):
    """Something failed; the message is one line for the user. The CLI exits with `exit_code`."""

    exit_code = 1


class UsageError(QexportError):
    """The call itself is wrong: an option, a recipe or an argument."""

    exit_code = 2
