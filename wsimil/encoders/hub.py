"""Weights on the Hugging Face hub: first what is on this machine, then the network, with a clear end.

- A file in the cache is used as it is, without asking the hub for a newer one: the same command gives the same features.
- Before a download the hub is asked once, with a short limit. Without that, its client retries for half a minute per file.
- No torch here, so availability can be listed in an instant.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

from wsimil.errors import EncoderWeightsError

__all__ = ["cached_file", "fetch", "ways_out"]

_PROBE_SECONDS = 5.0


def cached_file(hub_id: str, files: Sequence[str], revision: str | None = None) -> Path | None:
    """The first of `files` that lies in the hub's cache on this machine, else None; asks no network."""
    for file in files:
        found = try_to_load_from_cache(hub_id, file, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def fetch(name: str, hub_id: str, files: Sequence[str], *, revision: str | None = None, gated: bool = False) -> Path:
    """The first of `files` that the repository has, from the cache or else from the hub; `name` is the encoder's, for errors.

    Raises:
        EncoderWeightsError: they cannot be had; it says why, whether access must be asked for, and what to do.
    """
    found = cached_file(hub_id, files, revision)
    if found is not None:
        return found
    reason = _unreachable()
    for file in files if reason is None else ():
        try:
            return Path(hf_hub_download(hub_id, file, revision=revision, etag_timeout=_PROBE_SECONDS))
        except errors.GatedRepoError:
            reason = "the hub refuses: access must be granted to your account first"
            gated = True
            break
        except errors.RepositoryNotFoundError:
            reason = "the hub knows no such repository, or hides it from you"
            break
        except errors.LocalEntryNotFoundError as error:  # an EntryNotFoundError too, but it means that the download failed
            reason = f"the download failed ({_first_line(error)})"
            break
        except errors.EntryNotFoundError:
            reason = f"the repository has no {' or '.join(files)}"
        except errors.RevisionNotFoundError:
            reason = f"the repository has no revision {revision!r}"
            break
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            reason = f"the download failed ({_first_line(error)})"
            break
    raise EncoderWeightsError(
        f"encoder {name}: its weights are not on this machine and cannot be fetched from https://huggingface.co/{hub_id}: "
        f"{reason}. " + ways_out(name, hub_id, revision=revision, gated=gated)
    )


def ways_out(name: str, hub_id: str, *, revision: str | None = None, gated: bool = False) -> str:
    """Sentences: how to come by the weights, here or on a machine without network."""
    at = f" --revision {revision}" if revision else ""
    first = (
        f"This model is gated: accept its terms on https://huggingface.co/{hub_id}, then run `hf auth login` (or set HF_TOKEN). "
        if gated
        else ""
    )
    passed = "FOLDER" if ":" in name else f"{name}=FOLDER"  # what the hub describes itself needs no name
    return (
        f"{first}On a connected machine: `hf download {hub_id}{at} --local-dir FOLDER`; "
        f"bring FOLDER here and pass --encoder {passed}"
    )


def _unreachable() -> str | None:
    """Why the hub cannot be asked, or None if it answers, whatever it answers."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host = constants.ENDPOINT
    try:
        # urllib goes through the proxies of the environment, as the hub's client does
        with urllib.request.urlopen(urllib.request.Request(host, method="HEAD"), timeout=_PROBE_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except (urllib.error.URLError, TimeoutError, OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLError):
            return None  # certificates are another matter for the hub's client: let it try
        return f"no connection to {host} ({cause})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
