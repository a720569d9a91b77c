"""megatron-m1: the open trainer for MiniMax-M1-type models.

Here is only the guard against a foreign package of the same name as one of our plain top-level packages.
"""

import importlib.util
from pathlib import Path

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent


def _refuse_foreign_packages() -> None:
    """Raises ImportError when a package that belongs beside this one would come from another place."""
    for name in ("kernels_cuda", "parallel", "data_pipeline"):
        spec = importlib.util.find_spec(name)
        folders = list(spec.submodule_search_locations or []) if spec else []
        if [Path(folder).resolve() for folder in folders] != [_ROOT / name]:
            found = folders or (spec.origin if spec else "nothing")
            raise ImportError(
                f"package '{name}' resolves to {found}, but megatron_m1 needs the one in {_ROOT}: "
                f"uninstall the other '{name}', or put {_ROOT} first on the import path"
            )


_refuse_foreign_packages()
