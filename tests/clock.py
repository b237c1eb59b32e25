"""A clock that stands still until a test moves it, for whatever takes its clock as an argument."""


class Clock:
    """Returns the time in milliseconds since 1970, as the clock of Redis does.

    Args:
        now: time at which it begins. Tests of what compares times with a clock of its own give the true one.
    """

    def __init__(self, now: int = 1_800_000_000_000) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * 1000)
