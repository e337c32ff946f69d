"""EAGLE-3 drafts trained against a target that runs as a torch.distributed.rpc service.

`eagle_rpc.NAME` is a name of `eagle_rpc/library.py`, which is loaded, and torch with it, when it is first
used. Import this package before torch: torch reads the environment that is set here.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from eagle_rpc import errors as errors
from eagle_rpc.process import prepare_environment

__version__ = "0.1.0"

prepare_environment()

if TYPE_CHECKING:
    from eagle_rpc.library import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        # The import of a room asks here first, and must not load the library.
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is None:
            library = importlib.import_module(f"{__name__}.library")
            if name in library.__all__:
                return getattr(library, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *importlib.import_module(f"{__name__}.library").__all__})
