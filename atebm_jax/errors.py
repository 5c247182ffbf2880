"""The one exception that means "the input is wrong", as opposed to "the code is"."""


class UserError(ValueError):
    """A mistake in a config, flag, path, image or checkpoint.

    The message is one clear sentence or two: what is wrong, what was expected and
    what to do. Command-line tools print it without a traceback and exit with code 2.
    """
