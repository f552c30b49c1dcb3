"""Files and folders behind URLs: recognised, listed, fetched into a folder of this machine, and published whole.

The library behind it is fsspec: `s3://`, `gs://` and `az://` with an extra each, `https://` for reading, `memory://`
for tests, and whatever else is installed for it. Paths of Windows (`C:\\clips`) are no URLs, and `file://` is a path.

**Reading.** A copy is kept in the user's cache folder, one for each URL, with the version that the store reported
(ETag, else the time of the last change). It is fetched again when that differs. Large objects come in ranges, and what
has come stays when the connection or the process ends.

**Writing.** An object has its final name only with all of its content. Puts of S3, Google Cloud Storage and Azure are
atomic; elsewhere a temporary object is written and renamed.

**Faults.** What may pass (connections, timeouts, 429, 5xx) is tried again, a few times with growing pauses. All else,
and what does not pass, is one `EmtError` that names the URL.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from emt.cache import default_dir
from emt.errors import EmtError, first_line
from emt.hub import OnFetch, megabytes
from emt.storage import PARTIAL, exclusive, partial_file, sync, write_atomically

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 5
"""Times that a request is made before its fault is reported."""

SLOW = 3.0
"""Seconds after which a store that has not answered yet is named as what is waited for."""

PAUSE = 0.5
"""Seconds before the second attempt, about; twice as many before each further one."""

_BLOCK = 16 << 20  # bytes of one request
_AT_ONCE = 4  # files of a folder
_SETTLED = 24 * 3600.0  # seconds after which a copy is in nobody's use
_SOURCE = "source.json"

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+([^/].*)", re.DOTALL)  # a Path has one slash; one letter is a drive
_ON_DISK = ("file", "local")
_WEB = ("http", "https")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
_ATOMIC = {*_EXTRAS, "memory"}
_KNOWN = "Known are s3://, gs://, az://, https:// (for reading) and paths."
_SECRET = re.compile(r"sig|token|secret|key|cred|pass|auth", re.IGNORECASE)  # in names of parameters

_LOGIN = {
    "s3": "For S3: `aws sso login`, or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN; "
    "FSSPEC_S3_ANON=true for a public bucket",
    "gcs": "For Google Cloud Storage: `gcloud auth application-default login`",
    "azure": "For Azure: AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
_VERSIONS = ("ETag", "etag", "e_tag", "md5Hash", "content_md5", "Content-MD5", "generation")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "created")


class MissingError(EmtError):
    """Nothing is behind a URL."""


# ---- names --------------------------------------------------------------------------------------------------------


def _match(given: str | PurePath) -> re.Match[str] | None:
    return _URL.fullmatch(given.as_posix() if isinstance(given, PurePath) else given)


def is_url(given: str | PurePath | None) -> bool:
    """Return whether a text names something in a store; a Path that was made of a URL does, too."""
    match = _match(given) if given is not None else None
    return match is not None and match[1].lower() not in _ON_DISK


def normal(given: str | PurePath) -> str:
    """A URL with two slashes, whatever a Path has made of them, and none at its end."""
    match = _match(given)
    assert match is not None, given
    return f"{match[1].lower()}://{match[2]}".rstrip("/")


def to_path(given: str | Path) -> Path:
    """The path that a text without a store names: itself, or that of a `file://` URL."""
    match = _match(given)
    if match is None:
        return Path(given)
    return Path("/" + urllib.parse.unquote(match[2]))


def distinct(given: Sequence[Path]) -> list[Path]:
    """Files and folders each once, however they are spelled, in their order; URLs among them."""
    found: dict[str, Path] = {}
    for one in given:
        found.setdefault(normal(one) if is_url(one) else os.path.realpath(to_path(one)), one)
    return list(found.values())


def check_on_disk(given: str | Path | None, option: str) -> None:
    """Raise EmtError if a URL is given where only a path will do.

    Args:
        given: As the user wrote it.
        option: Name of the option or argument.
    """
    if is_url(given):
        raise EmtError(f"{option} is {shown(normal(str(given)))}, but must be on disk", "Give a path.")


def shown(url: str) -> str:
    """A URL as messages and records have it: without user, password and signed parameters."""
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    user, at, host = place.rpartition("@")
    if at and (scheme in _WEB or ":" in user):  # of Azure's container@account nothing is secret
        place = host
    if scheme in _WEB:
        path, mark, query = path.partition("?")
        if any(_SECRET.search(part.partition("=")[0]) for part in query.split("&")):
            query = "…"
        path = f"{path}{mark}{query}"
    return f"{scheme}://{place}{slash}{path}"


def file_name(url: str) -> str:
    """Name of the file behind a URL, safe as one on any disk."""
    scheme, _, rest = url.partition("://")
    if scheme in _WEB:
        rest = urllib.parse.unquote(rest.partition("?")[0].partition("#")[0])
    name = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", rest.rstrip("/").rpartition("/")[2])
    stem, dot, suffix = name.rpartition(".")
    if len(name.encode()) > 200:
        kept = (stem or name).encode()[:150].decode(errors="ignore")
        name = f"{kept}{dot}{suffix[:20]}" if dot else kept
    return name if name.strip(". ") else "file"


def child(url: str, name: str) -> str:
    """URL of something in a folder."""
    return f"{url.rstrip('/')}/{name}"


# ---- requests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stat:
    """Description of an object by its store.

    Attributes:
        size: Bytes; None where it is not reported.
        version: Changes with the content; empty where it is not reported.
        modified: Time of the last change in seconds since 1970; 0 where it is not reported.
        is_folder: Other objects have it as the beginning of their names.
        has_ranges: Parts of it can be requested.
    """

    size: int | None
    version: str
    modified: float = 0.0
    is_folder: bool = False
    has_ranges: bool = True

    @classmethod
    def of(cls, info: dict[str, Any], scheme: str = "") -> Stat:
        """From fsspec's description."""
        version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
        changed = next((info[name] for name in _TIMES if info.get(name)), None)
        modified = float(changed if isinstance(changed, int | float) else getattr(changed, "timestamp", float)())
        ranges = scheme not in _WEB or info.get("partial") is True
        version = version or str(modified or changed or "")
        return cls(info.get("size"), version, modified, info.get("type") == "directory", ranges)


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        EmtError: the protocol is unknown, or what it needs is not installed.
    """
    import fsspec

    scheme = url.partition("://")[0]
    if "::" in url.partition("?")[0]:
        raise EmtError(f"{shown(url)} is a chain of URLs, which is not read", "Name the file itself.")
    options: dict[str, Any] = {}
    if scheme in _WEB:
        try:
            import aiohttp
        except ImportError:
            raise EmtError(f"{shown(url)} needs aiohttp, which is not installed", "pip install aiohttp") from None
        # aiohttp's own limit is on the whole download, whose length nobody knows.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)}
    elif scheme in ("s3", "s3a"):
        # botocore would make each attempt several times without a word; attempts are counted here.
        own = fsspec.config.conf.get("s3", {}).get("config_kwargs") or {}
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, **own}
    try:
        found, path = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        hint = f"pip install 'emt-cli[{extra}]'" if extra else f"{first_line(error)}."
        raise EmtError(f"{shown(url)} needs a package that is not installed", hint) from None
    except ValueError as error:
        if "rotocol" not in str(error):
            raise EmtError(f"{shown(url)} is no URL that can be read: {first_line(error)}", _KNOWN) from None
        raise EmtError(f"{scheme}:// of {shown(url)} is not known", _KNOWN) from None
    if scheme in ("s3", "s3a"):
        found.retries = 1  # they are counted here
    return found, path


def _request(url: str, verb: str, make: Callable[[Any, str], T]) -> T:
    """Make a request; what may pass is tried again.

    Args:
        url: What it is about.
        verb: What cannot be done if it fails: read, written.
        make: Called with the file system and the path in it.

    Raises:
        MissingError: nothing is there.
        EmtError: it failed for good, or ATTEMPTS times.
    """
    renewed = False
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _naming_what_is_slow(url):
                system, path = _filesystem(url)  # that of ftp:// connects at once
                return make(system, path)
        except Exception as error:  # stores' libraries have no common base of errors
            kind = _kind(error)
            if kind == "denied" and not renewed:  # credentials may have been renewed where they come from
                renewed = True
                with suppress(Exception):
                    type(system).clear_instance_cache()
                continue
            if kind != "passing" or attempt == ATTEMPTS:
                raise _explain(url, verb, kind, error, attempt) from None
            if attempt == 1:
                logger.warning("%s cannot be %s yet: %s; it is tried again", shown(url), verb, _reason(error))
            time.sleep(PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
    raise AssertionError


_answered: set[str] = set()  # stores that have answered a request, or of which was said that they have not


@contextmanager
def _naming_what_is_slow(url: str) -> Iterator[None]:
    """Context manager of a request: a store that has never answered is named once if it takes longer than SLOW."""
    store = "/".join(shown(url).split("/")[:3])
    if store in _answered:
        yield
        return

    def tell() -> None:
        _answered.add(store)
        logger.warning("waiting for %s, which has not answered for %g s", store, SLOW)

    timer = threading.Timer(SLOW, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
        _answered.add(store)
    finally:
        timer.cancel()


_CREDENTIALS = frozenset({
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError",
    "SSOTokenLoadError", "UnauthorizedSSOTokenError", "ProfileNotFound", "DefaultCredentialsError", "RefreshError",
    "ClientAuthenticationError",
})  # fmt: skip
_EXPIRED = frozenset({
    "ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "UnauthorizedSSOTokenError",
})  # fmt: skip
_DENIED = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "InvalidToken"})
_PASSING = frozenset({
    "ClientConnectionError", "ClientPayloadError", "HTTPClientError", "EndpointConnectionError", "IncompleteReadError",
    "IncompleteRead", "ResponseParserError", "ServiceRequestError", "ServiceResponseError", "TransportError",
    "FSTimeoutError", "RequestException", "ResponseStreamingError",
})  # fmt: skip
_PASSING_NUMBERS = (
    *(errno.EBUSY, errno.EIO, errno.ETIMEDOUT, errno.EPIPE, errno.EAGAIN, errno.ENETUNREACH, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, getattr(errno, "EREMOTEIO", errno.EIO)),
)
_ASTRAY = {
    "TooManyRedirects": "it redirects without an end",
    "NonHttpUrlRedirectClientError": "it redirects to what is no web address",
    "InvalidUrlRedirectClientError": "it redirects to what is no web address",
}
_ON_THIS_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it."""
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        seen.append(found)
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _codes(error: BaseException) -> tuple[int, str]:
    """HTTP status and code of an error, of whatever library; 0 and "" where it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code", ""))
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return (status if isinstance(status, int) else 0), code
    for name in ("status", "status_code", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) and 100 <= value < 600:
            return value, ""
    return 0, ""


def _kind(error: BaseException) -> str:
    """Kind of a fault: passing, missing, denied, expired, disk or other."""
    for found in _chain(error):
        names = {kind.__name__ for kind in type(found).__mro__}
        status, code = _codes(found)
        if code in _EXPIRED or names & _EXPIRED:
            return "denied"
        if names & _ASTRAY.keys():
            return "other"
        if code in _DENIED or names & _CREDENTIALS or status in (401, 403):
            return "denied"
        if status in (408, 425, 429) or status >= 500:
            return "passing"
        if status in (404, 410):
            return "missing"
        if status >= 400:
            return "other"
        if names & _PASSING or isinstance(found, ConnectionError | TimeoutError):
            return "passing"
        if isinstance(found, OSError) and found.errno in _ON_THIS_DISK:
            return "disk"
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, PermissionError):
        return "denied"
    if isinstance(error, OSError) and error.errno in _PASSING_NUMBERS:
        return "passing"
    return "other"


def _explain(url: str, verb: str, kind: str, error: Exception, attempts: int) -> EmtError:
    """A fault as a message."""
    if isinstance(error, EmtError):
        return error
    name = shown(url)
    if kind == "missing":
        return MissingError(f"{name} does not exist", "Check the URL.")
    reason = _reason(error)
    login = _LOGIN.get(_EXTRAS.get(url.partition("://")[0], ""), "Check user and password")
    if kind == "denied":
        if any(_codes(e)[1] in _EXPIRED or type(e).__name__ in _EXPIRED for e in _chain(error)):
            return EmtError(
                f"{name} cannot be {verb}: the credentials have expired",
                f"Renew them, then give the same command again: what is done stays done. {login}.",
            )
        return EmtError(f"{name} cannot be {verb}: access is denied ({reason})", f"{login}.")
    if kind == "passing":
        hint = "Check the network and give the same command again: what has come or is done stays."
        return EmtError(f"{name} cannot be {verb}: {reason} (tried {attempts} times)", hint)
    if kind == "disk":
        return EmtError(f"{name} cannot be {verb}: {reason}", f"Free space on the disk of {default_dir()}.")
    return EmtError(f"{name} cannot be {verb}: {reason}", "Check the URL.")


def _reason(error: BaseException) -> str:
    """Reason of a fault in a line."""
    for found in _chain(error):
        if said := _ASTRAY.get(type(found).__name__):
            return said
    texts = [first_line(e) for e in _chain(error) if str(e).strip()]
    texts = [text for text in texts if not _URL_IN_TEXT.fullmatch(text)]  # it says nothing but the URL
    status = next((status for status, _ in map(_codes, _chain(error)) if status), 0)
    text = re.sub(r"^\[Errno \d+\] ", "", texts[0]) if texts else type(error).__name__
    is_there = re.search(rf"\b{status}\b", _URL_IN_TEXT.sub("", text))
    text = _URL_IN_TEXT.sub(lambda match: shown(match[0]), text)
    return f"{text} ({status})" if status and not is_there else text


_URL_IN_TEXT = re.compile(r"[a-z][a-z0-9+.-]+://[^\s'\"<>)]+")


def stat(url: str) -> Stat:
    """Description of a file or folder by its store.

    Raises:
        MissingError: there is none.
        EmtError: it cannot be read.
    """
    url = normal(url)
    scheme = url.partition("://")[0]

    def look(system: Any, path: str) -> Stat:
        system.invalidate_cache()
        try:
            return Stat.of(system.info(path), scheme)
        except Exception as error:
            if scheme in ("s3", "s3a") and next((s for s, _ in map(_codes, _chain(error)) if s), 0) in (400, 403):
                system.ls(path.rpartition("/")[0], refresh=True)  # answers to HEAD have no reason; this one's has
            raise

    return _request(url, "read", look)


def exists(url: str) -> bool:
    """Return whether there is a file or folder.

    Raises:
        EmtError: the store cannot be read.
    """
    try:
        stat(url)
    except MissingError:
        return False
    return True


def files(url: str, *, recursive: bool = True) -> dict[str, Stat]:
    """The files of a folder, by their names relative to it; none if there is no such folder.

    Args:
        url: The folder.
        recursive: Those in folders of it, too.

    Raises:
        EmtError: it cannot be read.
    """
    url = normal(url)

    def look(system: Any, path: str) -> dict[str, Stat]:
        system.invalidate_cache()
        found = system.find(path, maxdepth=None if recursive else 1, detail=True)
        inside = path.rstrip("/") + "/"
        return {
            name.removeprefix(inside): Stat.of(info)
            for name, info in found.items()
            if name.startswith(inside) and info.get("type") == "file" and not name.endswith("/")
        }

    try:
        return {name: found for name, found in _request(url, "read", look).items() if _is_inside(name)}
    except MissingError:
        return {}


def _is_inside(name: str) -> bool:
    """Return whether the name of an object is that of a file in a folder on any disk."""
    return bool(name) and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def matching(pattern: str) -> list[str]:
    """URLs of the files that a pattern with `*`, `?` and `[…]` matches.

    Raises:
        EmtError: the store cannot be read.
    """
    pattern = normal(pattern)
    root = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]

    def look(system: Any, path: str) -> list[str]:
        system.invalidate_cache()
        start = len(path) - (len(pattern) - len(root))
        found = system.glob(path, detail=True)
        return [root + name[start:] for name, info in found.items() if info.get("type") == "file"]

    try:
        return _request(pattern, "read", look)
    except MissingError:
        return []


# ---- copies on this machine ---------------------------------------------------------------------------------------


def _home(url: str, part: str = "") -> Path:
    key = f"{url}\0{part}" if part else url
    return default_dir() / "downloads" / hashlib.sha256(key.encode()).hexdigest()[:24]


def copy_of(url: str, part: str = "") -> Path:
    """Path of the copy of a file or folder behind a URL, whether it has been fetched or not.

    Args:
        url: The file or folder.
        part: Name of a part of the folder, which has a copy of its own.
    """
    url = normal(url)
    return _home(url, part) / file_name(url)


def fetched(url: str, part: str = "") -> Path | None:
    """The copy of a file or folder if it was fetched whole; the store is not asked whether it has changed.

    Args:
        url: The file or folder.
        part: As `copy_of`.
    """
    known, path = _Known(_home(normal(url), part)), copy_of(url, part)
    return path if known.whole and path.exists() else None


class _Known:
    """Versions of the files in a copy's folder, kept in a file of it."""

    def __init__(self, home: Path) -> None:
        self._path = home / _SOURCE
        self.whole, self.saved = False, 0.0
        self.versions: dict[str, Any] = {}
        with suppress(OSError, ValueError, RecursionError, AttributeError, TypeError):
            content = json.loads(self._path.read_bytes())
            self.versions = dict(content["versions"])
            self.whole = content["whole"] is True

    def save(self, whole: bool) -> None:
        self.whole, self.saved = whole, time.monotonic()
        write_atomically(self._path, json.dumps({"whole": whole, "versions": self.versions}).encode())


def fetch(url: str, on_fetch: OnFetch | None = None) -> Path:
    """Fetch a file, unless the copy on this machine is of the same version; returns the copy.

    Args:
        url: The file.
        on_fetch: Called with the progress.

    Raises:
        MissingError: there is no such file.
        EmtError: it cannot be read, or not be written here.
    """
    url = normal(url)
    found = stat(url)
    if found.is_folder:
        raise EmtError(f"{shown(url)} is a folder", "Name a file in it.")
    home, name = _home(url), file_name(url)
    with _writing(url), exclusive(_made(home) / ".lock"):
        known = _Known(home)
        if _is_same(known.versions.get(name), found, home / name):
            with suppress(OSError):
                os.utime(home / _SOURCE)
            return home / name
        known.save(False)
        known.versions = {name: _load(url, found, home, home / name, on_fetch)}
        known.save(True)
    return home / name


def copy(url: str, path: Path) -> None:
    """Fetch a file to a path, of which no version is remembered; it is there whole or not at all.

    Raises:
        MissingError: there is no such file.
        EmtError: it cannot be read, or not be written here.
    """
    url = normal(url)
    with _writing(url), partial_file(path, folder=True) as home:
        _load(url, stat(url), home, path, None)


def fetch_folder(
    url: str, choose: Callable[[list[str]], Collection[str]], on_fetch: OnFetch | None = None, *, part: str = ""
) -> Path:
    """Fetch files of a folder, as far as the copies on this machine are of other versions; returns the copy.

    Args:
        url: The folder.
        choose: Given the names of its files, those that are wanted.
        on_fetch: Called with the progress, from several threads.
        part: As `copy_of`.

    Raises:
        MissingError: there is no such folder, or none of the files.
        EmtError: they cannot be read, or not be written here.
    """
    url = normal(url)
    found = files(url)
    wanted = {name: found[name] for name in choose(list(found))}
    if not wanted:
        raise MissingError(f"{shown(url)} does not exist, or has none of the files that are read", "Check the URL.")
    folder = copy_of(url, part)
    mirror(url, wanted, folder, on_fetch)
    return folder


def mirror(
    url: str, wanted: Mapping[str, Stat], folder: Path, on_fetch: OnFetch | None = None, *, keep: bool = False
) -> None:
    """Have files of a folder in a store in one on this machine; other files that are there stay.

    Args:
        url: The folder in the store.
        wanted: The files, by their names.
        folder: Where to; what is known of them is kept beside it.
        on_fetch: Called with the progress, from several threads.
        keep: Keep files that were fetched before and are not wanted now.

    Raises:
        EmtError: they cannot be read, or not be written here.
    """
    from concurrent.futures import ThreadPoolExecutor

    home = folder.parent
    with _writing(url), exclusive(_made(home) / ".lock"):
        known = _Known(home)
        missing = {name: s for name, s in wanted.items() if not _is_same(known.versions.get(name), s, folder / name)}
        unwanted = set() if keep else set(known.versions) - set(wanted)
        if missing or unwanted:
            known.save(False)

        def load(name: str) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            version = _load(child(url, name), missing[name], home, folder / name, on_fetch)
            if missing[name].modified:  # stores give whole seconds, rounded down
                os.utime(folder / name, (missing[name].modified + 1,) * 2)
            with guard:
                known.versions[name] = version
                if time.monotonic() - known.saved > 1:  # what has come is known even if this process ends here
                    known.save(False)

        guard = threading.Lock()
        try:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for work in [pool.submit(load, name) for name in missing]:
                    work.result()
        except BaseException:
            known.save(False)
            raise
        for name in unwanted:
            (folder / name).unlink(missing_ok=True)
            del known.versions[name]
        known.save(True)


def _made(home: Path) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    return home


def _is_same(known: Any, found: Stat, path: Path) -> bool:
    """Return whether a copy is of the version that the store has; never where it reports none."""
    return bool(found.version) and known == [found.size, found.version] and path.is_file()


class _writing:
    """Context manager: errors of this machine's disk as `EmtError`."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            problem = f"{shown(self._url)} cannot be kept in {default_dir()}: {error.strerror or error}"
            raise EmtError(problem, "Free some space there, or name another folder by XDG_CACHE_HOME.") from None


def _load(url: str, found: Stat, home: Path, path: Path, on_fetch: OnFetch | None) -> list[Any]:
    """Fetch one file to a path; returns what is remembered of its version."""
    name = file_name(url)
    for _ in range(3):
        key = hashlib.sha256(json.dumps([url, found.size, found.version]).encode()).hexdigest()[:16]
        partial = home / f"{PARTIAL}{key}"
        if found.size is not None and found.has_ranges:
            several = _load_ranges(url, found.size, partial, name, on_fetch, resume=bool(found.version))
        else:
            several = False
            _load_whole(url, partial, name, on_fetch)
        # What was fetched in several requests may be parts of several versions.
        again = stat(url) if several else found
        if (again.size, again.version) == (found.size, found.version):
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
            return [found.size, found.version]
        partial.unlink(missing_ok=True)
        found = again
    raise EmtError(f"{shown(url)} changes while it is read", "Try again once it is written.")


def _load_ranges(url: str, size: int, partial: Path, name: str, on_fetch: OnFetch | None, *, resume: bool) -> bool:
    """Fetch a file range by range, from where an earlier attempt ended; returns whether several requests were made."""
    requests = int(resume and partial.exists())
    with open(partial, "ab" if resume else "wb") as file:
        if file.tell() > size:
            file.truncate(0)
        while (start := file.seek(0, os.SEEK_END)) < size:
            end = min(start + _BLOCK, size)

            def read(system: Any, path: str, start: int = start, end: int = end) -> bytes:
                block: bytes = system.cat_file(path, start=start, end=end)
                if len(block) != end - start:
                    raise ConnectionError(f"{len(block):,} of {end - start:,} bytes came")
                return block

            file.write(_request(url, "read", read))
            file.flush()
            requests += 1
            if on_fetch:
                on_fetch(name, end, size)
    return requests > 1


def _load_whole(url: str, partial: Path, name: str, on_fetch: OnFetch | None) -> None:
    """Fetch a file in one request."""
    from fsspec.callbacks import Callback

    class Report(Callback):
        """Passes the progress on."""

        def call(self, *_: Any, **__: Any) -> None:
            if on_fetch:
                on_fetch(name, self.value, self.size or 0)

    _request(url, "read", lambda system, path: system.get_file(path, str(partial), callback=Report()))


def working_folder(url: str) -> Path:
    """Folder of this machine in which a run works on an output folder in a store, whether it is there or not."""
    url = normal(url)
    return default_dir() / "outputs" / hashlib.sha256(url.encode()).hexdigest()[:24] / file_name(url)


def is_settled(folder: Path) -> bool:
    """Return whether the files that `mirror` has fetched into a folder have not been used for a day."""
    with suppress(OSError):
        return time.time() - (folder.parent / _SOURCE).stat().st_mtime > _SETTLED
    return False


def trim_copies(limit: float) -> None:
    """Remove copies that have not been used for a day, the oldest first, until all fit into a limit.

    Args:
        limit: Bytes.
    """
    entries = []
    with suppress(OSError):
        for home in (default_dir() / "downloads").iterdir():
            with suppress(OSError):
                used = (home / _SOURCE).stat().st_mtime if (home / _SOURCE).exists() else home.stat().st_mtime
                entries.append((used, sum(p.stat().st_size for p in home.rglob("*") if p.is_file()), home))
    total = sum(size for _, size, _ in entries)
    for used, size, home in sorted(entries):
        if total <= limit or time.time() - used < _SETTLED:
            return
        with suppress(OSError), exclusive(home / ".lock"):
            shutil.rmtree(home, ignore_errors=True)
        total -= size


class Announcer:
    """Says how downloads that take a while go on: an `OnFetch` for threads to share.

    Args:
        say: Called with each line.
        every: Seconds between lines, and before the first one.
    """

    def __init__(self, say: Callable[[str], None], every: float = 5.0) -> None:
        self._say, self._every = say, every
        self._guard = threading.Lock()
        self._last = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        """Report a file that is being fetched, in bytes."""
        with self._guard:
            if time.monotonic() - self._last < self._every:
                return
            self._last = time.monotonic()
        self._say(f"downloading {name}: {megabytes(done, total)}")


class Downloads:
    """Files that a run has fetched; each is looked for in its store once. Threads may share it.

    Args:
        say: Called with lines about downloads that take a while.
    """

    _REMEMBERED = 4096

    def __init__(self, say: Callable[[str], None]) -> None:
        self._announce = Announcer(say)
        self._guard = threading.Lock()
        self._known: OrderedDict[str, Path] = OrderedDict()

    def fetch(self, url: str) -> Path:
        """The copy of a file.

        Raises:
            EmtError: it cannot be fetched.
        """
        with self._guard:
            if url in self._known:
                self._known.move_to_end(url)
                return self._known[url]
        path = fetch(url, self._announce)
        with self._guard:
            self._known[url] = path
            while len(self._known) > self._REMEMBERED:
                self._known.popitem(last=False)
        return path


# ---- publishing ---------------------------------------------------------------------------------------------------


def check_writable(url: str) -> None:
    """Raise EmtError if a URL is of a kind that is read alone, unknown, or needs what is not installed."""
    scheme = normal(url).partition("://")[0]
    if scheme in _WEB:
        raise EmtError(f"{shown(normal(url))} can only be read", "Write to s3://, gs://, az:// or a folder.")
    _filesystem(normal(url))


def put(source: Path | bytes, url: str) -> Stat:
    """Publish a file, or bytes: under its name it is there whole or not at all.

    Returns:
        What the store reports of it.

    Raises:
        EmtError: it cannot be written.
    """
    url, size = normal(url), len(source) if isinstance(source, bytes) else source.stat().st_size

    def send(system: Any, place: str) -> None:
        if isinstance(source, bytes):
            system.pipe_file(place, source)
        else:
            system.put_file(str(source), place)

    def write(system: Any, place: str) -> Stat:
        if url.partition("://")[0] in _ATOMIC:
            send(system, place)
        else:
            folder = place.rpartition("/")[0]
            temporary = f"{folder}/{PARTIAL}{os.urandom(8).hex()}"
            system.makedirs(folder, exist_ok=True)
            try:
                send(system, temporary)
                system.mv(temporary, place)
            except BaseException:
                with suppress(Exception):
                    system.rm_file(temporary)
                raise
        system.invalidate_cache()
        found = Stat.of(system.info(place))
        if found.size != size:
            raise ConnectionError(f"{found.size} of {size:,} bytes arrived")
        return found

    return _request(url, "written", write)
