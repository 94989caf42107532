"""The one exception for everything that is the user's to mend."""


class UserError(Exception):
    """A mistake in what the user gave: an option file, a checkpoint, a path, an argument.

    The message is one line that says what is wrong, where (file, key, line), what was expected and what to do. The
    command line prints it as it stands and exits with code 2; a program that uses the package can catch it.
    """
