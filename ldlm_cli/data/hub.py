"""Is the Hugging Face hub there? Asked before anything that would otherwise retry for minutes without a network."""

import os
import urllib.error
import urllib.request

from ldlm_cli.errors import UsageError

_TRUE = ("1", "ON", "YES", "TRUE")
_TIMEOUT_SECONDS = 5.0


def is_offline_asked() -> bool:
    """Say whether the environment forbids the network (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE, TRANSFORMERS_OFFLINE)."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def demand_hub(what: str, way_on: str) -> None:
    """Raise UsageError within seconds when the hub may not or cannot be reached.

    Args:
        what: the thing wanted, as the subject of the message, e.g. "hub:owner/name".
        way_on: what the user can do without the hub, as an order, e.g. "name a local file".
    """
    if is_offline_asked():
        raise UsageError(
            f"{what} is not on this machine and HF_HUB_OFFLINE forbids the network: unset it, or {way_on}."
        )
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return  # Somebody answered: whether this name exists is for the library to find out.
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UsageError(
            f"{what} is not on this machine and {endpoint} cannot be reached ({reason}): {way_on}."
        ) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, without its final full stop, for use within a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(". ")
