"""Learning rates as functions of the step, counted from 1."""


def inverse_square_root(step: int, size: int, warmup: int) -> float:
    """size^-0.5 * min(step^-0.5, step * warmup^-1.5): linear warm-up, then 1 / sqrt(step).

    step: from 1; size: the model's hidden size; warmup: steps. Source: Vaswani et al. 2017,
    section 5.3.
    """
    return size**-0.5 * min(step**-0.5, step * warmup**-1.5)
