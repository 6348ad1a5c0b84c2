"""The error that bad input raises."""


class SparseSSMError(ValueError):
    """A mistake in what the user gave: model, recipe, data or path.

    Its message is one line that names the offending thing, its value and what is
    allowed. The command prints it and exits with a non-zero status; anything else that
    is raised is a defect of this package.
    """
