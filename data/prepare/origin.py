"""Where a file really lies: its address, what may be sent there and shown, and what the hub says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,  # of the HTTP library that this version of the hub's client is built on
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from anchorformer.errors import UserError
from data.prepare.config import FileConfig

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Origin:
    """A file that can be fetched.

    Attributes:
        url: address, in which there may be keys; never written down.
        shown: the same for people.
        headers: sent to that host, and to no other that it sends us to.
        size, sha256: where the publisher states them, or an earlier call has noted them.
        stated_in: where that note is.
    """

    url: str = field(repr=False)
    shown: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    size: int | None = None
    sha256: str | None = None
    stated_in: str | None = None


def file_name(config: FileConfig) -> str:
    """What the publisher calls the file."""
    return PurePosixPath(config.file or unquote(urlsplit(config.url or config.to).path)).name


def shown(config: FileConfig, name: str, mirror: str | None) -> str:
    """Where the file comes from, for people: without user, password and query."""
    if mirror is not None:
        return f"{plain(mirror).rstrip('/')}/{name}/{file_name(config)}"
    if config.url is not None:
        return plain(config.url)
    if config.hub is not None:
        return f"hf://datasets/{config.hub}/{config.file}"
    return "by hand"


def plain(url: str) -> str:
    """A URL without what may be secret in it."""
    parts = urlsplit(url)
    if not parts.scheme:
        return url
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def origin(config: FileConfig, name: str, mirror: str | None) -> Origin:
    """Where a file is fetched from; the hub is asked about its own.

    Args:
        name: of the data set, which is the mirror's folder.

    Raises:
        UserError: the hub cannot be reached, or does not give the file to this machine.
    """
    text = shown(config, name, mirror)
    if mirror is not None:
        return Origin(f"{mirror.rstrip('/')}/{name}/{file_name(config)}", text, sha256=config.sha256)
    if config.url is not None:
        return Origin(config.url, text, sha256=config.sha256)
    assert config.hub is not None
    assert config.file is not None
    url = hf_hub_url(config.hub, config.file, repo_type="dataset", revision=config.revision)
    page = f"{constants.ENDPOINT}/datasets/{config.hub}"
    try:
        facts = get_hf_file_metadata(url)
    except GatedRepoError:
        raise _refused(text, "the data set is gated", f"agree to its terms at {page}, then `hf auth login`") from None
    except (RepositoryNotFoundError, EntryNotFoundError, RevisionNotFoundError) as error:
        words = f"{type(error).__name__.removesuffix('Error')} at revision {config.revision}"
        raise _refused(text, words, f"look at {page}; a private one needs `hf auth login`") from None
    except (HTTPError, OSError) as error:
        remedy = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE; or name a copy with mirror="
        raise _refused(text, type(error).__name__, remedy) from None
    # Of a large file the hub's ETag is its sha256; of a small one it is another hash.
    known = facts.etag if facts.etag and SHA256.fullmatch(facts.etag) else config.sha256
    # The hub's own address, not the one it sends us to: that is signed, and expires while a large file is fetched.
    return Origin(url, text, build_hf_headers(), facts.size, known)


def _refused(place: str, found: str, remedy: str) -> UserError:
    return UserError(f"{place} cannot be fetched", found=found, expected="the published file", remedy=remedy)
