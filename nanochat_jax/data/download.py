"""Fetches files from the hub: in parallel, resumed where they were cut off, verified.

Bytes arrive in a hidden part file beside the wanted one. Only when size and sha256 are those that
the hub announced does it get its name, by one atomic rename; so whatever has such a name is whole.
Part files survive cut connections and killed processes and are continued, not repeated.
"""

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import huggingface_hub
from filelock import FileLock, Timeout
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from nanochat_jax.data.shards import HUB_DATASETS, dataset_folder, read_footer, shard_name

TIMEOUT = 20.0  # seconds without a sign of life
RETRIES = 4  # in a row without one new byte
PAUSE = 1.0  # seconds before the first retry, doubled with each further one


class Progress(Protocol):
    """Told what is going on, from several threads."""

    def expect(self, files: int, size: int) -> None: ...

    def advance(self, size: int) -> None: ...


class Silent:
    """Shows nothing."""

    def expect(self, files: int, size: int) -> None:
        pass

    def advance(self, size: int) -> None:
        pass


@dataclass(frozen=True)
class Wanted:
    """A file to fetch."""

    name: str  # where it goes, below the folder
    url: str
    source: str  # what it is a part of, for messages: "the data set karpathy/…"

    @property
    def server(self) -> str:
        return "{0.scheme}://{0.netloc}".format(urlsplit(self.url))


@dataclass(frozen=True)
class RemoteFile(Wanted):
    """A file as the hub announces it."""

    size: int | None
    etag: str

    @property
    def sha256(self) -> str | None:
        """The etag of a file in large-file storage is the sha256 of its content."""
        is_sha256 = len(self.etag) == 64 and set(self.etag) <= set("0123456789abcdef")
        return self.etag if is_sha256 else None


def download_shards(
    dataset: str,
    shards: int,
    *,
    workers: int = 8,
    verify: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Sees to it that the first `shards` training shards and the validation shard are there.

    What is there is not fetched again and needs no network; with `verify` it is compared with the
    hub's checksums. Returns the folder. Raises ValueError, in one sentence, when the hub cannot be
    reached, lacks a file or delivers other bytes than it announced, or when the disk is full.
    """
    hub = HUB_DATASETS[dataset]
    if not 1 <= shards <= hub.last_shard:
        raise ValueError(f"{dataset} has 1 to {hub.last_shard} training shards, not {shards}")
    folder = dataset_folder(dataset)
    names = [shard_name(index) for index in [*range(shards), hub.last_shard]]
    wanted = [
        Wanted(name, hub_url(hub.repo_id, name), f"the data set {hub.repo_id}") for name in names
    ]
    download = Download(
        folder,
        is_whole=_is_whole,
        workers=workers,
        progress=progress,
        without_network="`--dataset local` needs no network",
        with_less_space="ask for fewer shards",
    )
    with download.alone():
        download.fetch([one for one in wanted if verify or not _is_whole(folder / one.name)])
    return folder


def hub_url(repo_id: str, name: str, revision: str | None = None) -> str:
    """Where the hub, or the mirror that HF_ENDPOINT names, has a file of a data set."""
    return huggingface_hub.hf_hub_url(
        repo_id, name, repo_type="dataset", revision=revision, endpoint=hub_endpoint()
    )


def hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT


class _Stopped(Exception):
    """Another file failed, or the user interrupted."""


class Download:
    """Some files on their way into one folder.

    `is_whole` checks a file of which the server announces no sha256. The last two arguments end the
    messages about a network or a disk that fails: what else the user can do.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_whole: Callable[[Path], bool],
        workers: int = 8,
        progress: Progress | None = None,
        without_network: str,
        with_less_space: str,
    ) -> None:
        if workers < 1:
            raise ValueError(f"--workers must be at least 1, not {workers}")
        self._folder, self._is_whole, self._workers = folder, is_whole, workers
        self._progress = progress or Silent()
        self._without_network, self._with_less_space = without_network, with_less_space
        self._stop = threading.Event()

    @contextmanager
    def alone(self, timeout: float = 0) -> Iterator[None]:
        """Makes the folder and keeps other processes from fetching into it.

        One that does so already is waited for, `timeout` seconds long (−1: as long as it takes).
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self._folder / ".download.lock", timeout=timeout):
                yield
        except Timeout:
            raise ValueError(
                f"another download into {self._folder} is running; wait for its end"
            ) from None

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        """Sees to it that the files are there as the server announces them."""
        if not wanted:
            return
        first = self._look_up(wanted[0], retries=0)  # without a network this fails at once
        files = [first, *self.each(self._look_up, wanted[1:])]
        files = [file for file in files if not self._matches(self._folder / file.name, file)]
        self._check_space(files)
        self._progress.expect(len(files), sum(file.size or 0 for file in files))
        self.each(self._fetch_file, files)

    def each[A, B](self, action: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """Runs `action` in parallel; the first failure or Ctrl-C stops all the others."""
        with ThreadPoolExecutor(self._workers) as pool:
            futures = [pool.submit(action, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def ask[A](self, action: Callable[[], A], about: Wanted, retries: int = RETRIES) -> A:
        """What a server answers; ValueError, in one sentence, when it does not."""
        try:
            return self._persist(action, retries=retries)
        except Exception as error:
            raise self._explained(error, about) from error

    def _look_up(self, wanted: Wanted, retries: int = RETRIES) -> RemoteFile:
        found = self.ask(
            lambda: huggingface_hub.get_hf_file_metadata(wanted.url, timeout=TIMEOUT),
            wanted,
            retries,
        )
        return RemoteFile(**vars(wanted), size=found.size, etag=found.etag or "")

    def _check_space(self, files: Sequence[RemoteFile]) -> None:
        here = sum(_size(self._part(file)) for file in files)
        needed = sum(file.size or 0 for file in files) - here
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise ValueError(
                f"{len(files)} files need {needed / 1e9:.1f} GB, but {self._folder} has only "
                f"{free / 1e9:.1f} GB free; {self._with_less_space}, or set NANOCHAT_BASE_DIR to a "
                "folder on another disk"
            )

    def _part(self, file: RemoteFile) -> Path:
        path = self._folder / file.name
        return path.with_name(f".{path.name}.{_plain(file.etag)}.part")

    def _fetch_file(self, file: RemoteFile) -> None:
        part, path = self._part(file), self._folder / file.name
        part.parent.mkdir(parents=True, exist_ok=True)
        self._progress.advance(_size(part))
        try:
            self._fetch_part(file, part)
        except (ValueError, _Stopped):
            raise
        except Exception as error:
            raise self._explained(error, file) from error
        os.replace(part, path)
        for outdated in path.parent.glob(f".{path.name}.*.part"):
            outdated.unlink()

    def _fetch_part(self, file: RemoteFile, part: Path) -> None:
        """Completes the part file; one with a wrong checksum is thrown away, once."""
        for _ in range(2):
            self._persist(lambda: self._receive(file, part), received=lambda: _size(part))
            if self._matches(part, file):
                return
            self._progress.advance(-_size(part))
            part.unlink()
        raise ValueError(
            f"{file.server} twice delivered a {file.name} of the wrong size or checksum; try "
            "again later, or set HF_ENDPOINT to another mirror"
        )

    def _receive(self, file: RemoteFile, part: Path) -> None:
        """Appends what is still missing of a file."""
        done = _size(part)
        if done and done == file.size:
            return  # received before, but not yet verified
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if done:
            headers["Range"] = f"bytes={done}-"
        session = huggingface_hub.get_session()
        with session.stream("GET", file.url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            continued = response.status_code == 206
            if done and not continued:  # the server does not know ranges
                self._progress.advance(-done)
            with part.open("ab" if continued else "wb") as out:
                for received in response.iter_raw():
                    if self._stop.is_set():
                        raise _Stopped
                    out.write(received)
                    self._progress.advance(len(received))
        if file.size is not None and _size(part) < file.size:
            raise ConnectionError("the connection ended early")

    def _persist[A](
        self,
        action: Callable[[], A],
        *,
        retries: int = RETRIES,
        received: Callable[[], int] = lambda: 0,
    ) -> A:
        """Repeats `action` after passing troubles as long as now and then something arrives."""
        idle = 0
        while True:
            before = received()
            try:
                return action()
            except Exception as error:
                idle = 0 if received() > before else idle + 1
                if not _is_passing(error) or idle > retries:
                    raise
                if self._stop.wait(PAUSE * 2**idle):
                    raise _Stopped from error

    def _matches(self, path: Path, file: RemoteFile) -> bool:
        """Whether a file has the announced size and content."""
        if not path.exists() or (file.size is not None and _size(path) != file.size):
            return False
        if file.sha256 is None:  # not in large-file storage
            return self._is_whole(path)
        return sha256_of(path) == file.sha256

    def _explained(self, error: Exception, wanted: Wanted) -> ValueError:
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            if status == 404:
                return ValueError(f"{wanted.server} has no {wanted.name} in {wanted.source}")
            if status in (401, 403):
                return ValueError(
                    f"{wanted.server} refuses access to {wanted.source} ({status}); set HF_TOKEN, "
                    "or unset it when it has expired"
                )
            return ValueError(
                f"{wanted.server} answered {status} for {wanted.name}; try again later"
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ValueError(f"the disk of {self._folder} is full; make room and run this again")
        if isinstance(error, OSError) and error.filename:
            return ValueError(f"cannot write {error.filename}: {error.strerror}")
        detail = str(error).strip() or type(error).__name__
        return ValueError(
            f"cannot reach {wanted.server} ({detail}); check the network or set HF_ENDPOINT to a "
            f"mirror, then run this again; {self._without_network}"
        )


def _is_passing(error: Exception) -> bool:
    """Whether trying again may help. huggingface_hub's HTTP client is httpx or httpx2."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    client_error = type(error).__module__.split(".")[0] in ("httpx", "httpx2")
    return client_error or isinstance(error, ConnectionError | TimeoutError)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_whole(path: Path) -> bool:
    try:
        read_footer(path)
    except ValueError:
        return False
    return True


def _plain(etag: str) -> str:
    return "".join(filter(str.isalnum, etag))[:16]


def sha256_of(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
