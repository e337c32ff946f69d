"""Reads the error texts of torch RPC, which loses the classes of its own and of most remote errors.

Seen on torch 2.11 to 2.14; `tests/rpc` provokes each kind.
"""

from eagle_rpc.errors import ConnectionLost, EagleRpcError, PayloadRefused, TargetFailed, WaitTimeout

_TIMEOUT = "RPCErr:1:"
_CONNECTION = (
    "this error originated at tensorpipe/",
    "pipe closed",
    "ECONNREFUSED",
    "could not find destination",
)
_REFUSAL = f"{PayloadRefused.__name__}: "
# Before and after the text of an error that a callback raised.
_CALLBACK, _PYTHON_FRAMES = "RuntimeError: ", "\n\nAt:\n"
_CPP_FRAMES = ("frame #", "Exception raised from")


def classify(error: Exception, *, peer: str, what: str) -> EagleRpcError:
    """The error of this package for an error of the RPC `what` to `peer`: `WaitTimeout`, `ConnectionLost`,
    `PayloadRefused`, or `TargetFailed` for an exception that the peer raised.
    """
    # Some classes (KeyError) quote their text when printed.
    text = str(error.args[0] if error.args else error).strip()
    text = text.partition(_PYTHON_FRAMES)[0].removeprefix(_CALLBACK)
    if text.startswith(_TIMEOUT):
        return WaitTimeout(f"{peer} did not answer {what} in time: {text.removeprefix(_TIMEOUT)}")
    if text.startswith(_REFUSAL):
        return PayloadRefused(f"{peer} refused {what}: {text.removeprefix(_REFUSAL)}")
    if any(mark in text for mark in _CONNECTION):
        return ConnectionLost(f"lost the connection to {peer} during {what}: {text.splitlines()[0]}")
    # The text is the peer's traceback: its last line that is no C++ frame names the error.
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(_CPP_FRAMES)]
    return TargetFailed(f"{peer} raised during {what}: {lines[-1] if lines else text}")
