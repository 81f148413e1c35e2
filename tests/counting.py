"""A lane of work for the tests of worker processes, in a module that they import in a moment."""


def counted(limit, lane):
    for step in range(10):
        if (lane, step) == limit:
            raise ValueError(f"lane {lane} fails")
        yield 100 * lane + step
