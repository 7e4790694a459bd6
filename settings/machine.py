"""What the machine lets this process use."""


def cores() -> int:
    """Count the cores that this process may use: those it may run on, or fewer if a container's quota says so."""
    from joblib import cpu_count  # takes 0.2 s; most starts need not wait for it

    return int(cpu_count())
