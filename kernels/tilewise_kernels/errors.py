"""The root of tilewise's exception tree; `tilewise.errors` adds the branches the engine needs."""


class TilewiseError(Exception):
    """Base of every error that tilewise raises on purpose."""


class ArgumentError(TilewiseError, ValueError):
    """A tensor or option that an op or layer cannot take."""


class KernelUnavailable(TilewiseError, RuntimeError):
    """An implementation was demanded that this machine or this call cannot have."""
