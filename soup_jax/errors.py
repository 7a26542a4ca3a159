"""The one exception that means "the user can fix this"; everything else is a bug of ours."""


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and how to fix it.

    `soup_jax.cli.main` prints it in one line, without a traceback, and exits with status 2.
    """
