"""The entry point that bitsandbytes loads when it is imported; see peftkern/integrations/bnb_backend.py.

A module of its own, since bitsandbytes fails to import if an entry point does: peftkern is imported only if it is
wanted, and where it cannot be, bitsandbytes stays as it is.
"""

import os
import warnings


def register() -> None:
    """Puts bitsandbytes' NF4 ops on peftkern's kernels, unless PEFTKERN_BNB is 0 or peftkern cannot be imported.

    Raises:
        ValueError: PEFTKERN_BNB is neither 0 nor 1.
    """
    if os.environ.get("PEFTKERN_BNB") == "0":
        return
    try:
        from peftkern.integrations import bnb_backend
    except (
        Exception
    ) as error:  # OSError of the native module, ImportError of torch's, whatever else a broken install has
        warnings.warn(f"peftkern cannot be imported ({error}); bitsandbytes stays on its own kernels", stacklevel=2)
        return
    bnb_backend.register()
