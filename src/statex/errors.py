"""The user's mistakes: one shape of message, so that every error says what, which value and what to do."""


class UserError(ValueError):
    """A mistake of the user, told as field, value and remedy. The command line exits with status 2 on it.

    Args:
        field: the argument, recipe key or file that is wrong.
        value: what was given.
        problem: what is wrong with it, in one clause.
        remedy: what to do instead, in one clause.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str):
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(f"{field} = {value!r}: {problem}; {remedy}.")

    def __reduce__(self):
        return type(self), (self.field, self.value, self.problem, self.remedy)
