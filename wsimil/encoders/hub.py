"""Weights on the Hugging Face hub: first what is on this machine, then the network, with a clear end.

- A file in the cache is used as it is, without asking the hub for a newer one: the same command gives the same features.
- Before a download the hub is asked once, with a short limit. Without that, its client retries for half a minute per file.
- A commit that the registry pins is what is downloaded; weights of another commit that lie here already are used, and their commit
  is recorded. One that the user asked for (`name@revision`) is used or nothing.
- No torch here, so availability can be listed in an instant.
"""

from __future__ import annotations

import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

from wsimil.errors import EncoderWeightsError

__all__ = ["cache_folder", "cached_file", "commit_of", "fetch", "ways_out"]

_PROBE_SECONDS = 5.0


def cache_folder() -> Path:
    """Where the hub's client keeps what it downloads on this machine."""
    return Path(constants.HF_HUB_CACHE)


def cached_file(hub_id: str, files: Sequence[str], revision: str | None = None, *, exact: bool = False) -> Path | None:
    """The first of `files` that lies in the hub's cache on this machine, else None; asks no network.

    With `exact` of that revision only, else of the main branch too.
    """
    for wanted in (revision,) if exact or revision is None else (revision, None):
        for spelling in _spellings(hub_id):
            for file in files:
                found = try_to_load_from_cache(spelling, file, cache_dir=constants.HF_HUB_CACHE, revision=wanted)
                if isinstance(found, str):
                    return Path(found)
    return None


def _spellings(hub_id: str) -> list[str]:
    """The id, and the same in other cases: the hub takes MahmoodLab/uni for MahmoodLab/UNI, its cache makes two folders of them."""
    folder = f"models--{hub_id.replace('/', '--')}"
    cache = cache_folder()
    others = [path.name for path in cache.iterdir() if path.name.lower() == folder.lower()] if cache.is_dir() else []
    return [hub_id, *(name.removeprefix("models--").replace("--", "/", 1) for name in sorted(others) if name != folder)]


def commit_of(file: Path) -> str:
    """The commit that a file of the hub's cache belongs to; empty for any other file.

    >>> commit_of(Path("hub/models--org--model/snapshots/0123456789abcdef0123456789abcdef01234567/model.safetensors"))[:8]
    '01234567'
    """
    found = re.search(r"/snapshots/([0-9a-f]{7,64})/", file.absolute().as_posix())
    return found.group(1) if found else ""


def fetch(
    name: str, hub_id: str, files: Sequence[str], *, revision: str | None = None, exact: bool = False, gated: bool = False
) -> Path:
    """The first of `files` that the repository has, from the cache or else from the hub; `name` is the encoder's, for errors.

    Raises:
        EncoderWeightsError: they cannot be had; it says why, whether access must be asked for, and what to do.
    """
    found = cached_file(hub_id, files, revision, exact=exact)
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
        except Exception as error:  # of the hub, the network, or whatever library its client downloads with
            reason = f"the download failed ({_first_line(error)})"
            break
    raise EncoderWeightsError(
        f"encoder {name}: its weights are not on this machine and cannot be fetched from https://huggingface.co/{hub_id}: "
        f"{reason}.\n" + "\n".join(ways_out(name, hub_id, files, revision=revision, gated=gated))
    )


def ways_out(name: str, hub_id: str, files: Sequence[str] = (), *, revision: str | None = None, gated: bool = False) -> list[str]:
    """Lines: how to come by the weights, here or on a machine without network."""
    download = " ".join(
        ["hf download", hub_id, *(files if len(files) == 1 else ()), *(("--revision", revision) if revision else ())]
    )
    passed = "FOLDER" if ":" in name else f"{name.partition('@')[0]}=FOLDER"  # what the hub describes itself needs no name
    terms = f"  gated: accept the terms on https://huggingface.co/{hub_id} (can take days), then `hf auth login` or set HF_TOKEN"
    return [
        *((terms,) if gated else ()),
        f"  with network: `{download}`, or simply extract: it is fetched on first use into {cache_folder()} (HF_HOME moves it)",
        f"  without: elsewhere `{download} --local-dir FOLDER`, bring FOLDER here and pass --encoder {passed} (a file does too);",
        "  or bring a whole cache and point HF_HOME at it; HF_HUB_OFFLINE=1 then keeps everything off the network",
    ]


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
