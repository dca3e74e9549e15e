"""The values that cross the client, under the name they have in the `tinker` SDK."""

from cookbook_core.types import *  # noqa: F403 (the SDK's own name for this module)
from cookbook_core.types import __all__ as __all__
