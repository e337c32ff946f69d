"""Reads torch RPC's error texts: of its own failures they are all there is, and a class that the peer raised says less.

Seen on torch 2.11 to 2.13; `tests/rpc` provokes each kind.
"""

from eagle_rpc.errors import ConnectionLost, EagleRpcError, PayloadRefused, TargetFailed, WaitTimeout

_TIMEOUT_PREFIX = "RPCErr:1:"
_CONNECTION_MARKS = (
    "this error originated at tensorpipe/",
    "pipe closed",
    "ECONNREFUSED",
    "could not find destination",
)
_REFUSAL_PREFIX = f"{PayloadRefused.__name__}: "
_RAISED_PREFIX, _PYTHON_FRAMES = "RuntimeError: ", "\n\nAt:\n"  # around what was raised in a callback
_FRAME_MARKS = ("frame #", "Exception raised from")


def classify(error: Exception, *, peer: str, what: str) -> EagleRpcError:
    """The exception of this package for an error of an RPC call named `what` to `peer`."""
    # Some classes (KeyError) quote their text when printed.
    text = (
        str(error.args[0] if error.args else error)
        .strip()
        .partition(_PYTHON_FRAMES)[0]
        .removeprefix(_RAISED_PREFIX)
    )
    if text.startswith(_TIMEOUT_PREFIX):
        return WaitTimeout(f"{peer} did not answer {what} in time: {text.removeprefix(_TIMEOUT_PREFIX)}")
    if text.startswith(_REFUSAL_PREFIX):
        return PayloadRefused(f"{peer} refused {what}: {text.removeprefix(_REFUSAL_PREFIX)}")
    if any(mark in text for mark in _CONNECTION_MARKS):
        return ConnectionLost(f"lost the connection to {peer} during {what}: {text.splitlines()[0]}")
    # A remote exception's text is its traceback on the peer, which has logged it; the last line that is no frame names it.
    said = [line for line in text.splitlines() if line.strip() and not line.startswith(_FRAME_MARKS)]
    return TargetFailed(f"{peer} raised during {what}: {said[-1] if said else text}")
