"""Downloads files from the hub, and single files from other servers.

huggingface_hub does the transfers: retries, continuing after a cut connection, Xet. It checks only
the size of what arrives, so here each file is also compared with the sha256 that the hub announces.
Files arrive in a hidden folder and get their names, by an atomic rename, after that comparison:
whatever has its name is whole, and an interrupted run fetches only what is not there yet.
"""

import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from nanochat_jax.data.reader import read_footer
from nanochat_jax.data.shards import HUB_DATASETS, dataset_folder, shard_name

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # in a notebook tqdm misses a widget that nothing here uses
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.file_download import http_get

TIMEOUT = 20.0  # seconds to wait for a server's first answer
# A cut connection loses the chunk that was being received: huggingface_hub's 10 MB are too many.
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 2**19


def download_shards(dataset: str, shards: int, *, workers: int = 8, verify: bool = False) -> Path:
    """Makes sure that the first `shards` training shards and the validation shard are there.

    Shards that are there are not fetched again and need no network; with `verify` they are compared
    with the hub's checksums. Returns the folder. Raises ValueError, in one sentence, when the hub
    cannot be reached, lacks a file or delivers other bytes than it announced, or when the disk is
    full.
    """
    hub = HUB_DATASETS[dataset]
    if not 1 <= shards <= hub.last_shard:
        raise ValueError(f"{dataset} has 1 to {hub.last_shard} training shards, not {shards}")
    folder = dataset_folder(dataset)
    names = [shard_name(index) for index in [*range(shards), hub.last_shard]]
    download = Download(
        folder,
        without_network="`--dataset local` needs no network",
        with_less_space="ask for fewer shards",
        workers=workers,
    )
    with download.lock():
        wanted = [name for name in names if verify or not _is_whole(folder / name)]
        if wanted:
            announced = download.list_files(hub.repo_id)
            for name in wanted:
                if name not in announced:
                    raise ValueError(f"{endpoint()} has no {name} in the data set {hub.repo_id}")
            download.fetch({name: announced[name] for name in wanted})
    return folder


def _is_whole(shard: Path) -> bool:
    try:
        read_footer(shard)
    except ValueError:
        return False
    return True


def endpoint() -> str:
    """The address of the hub, or of the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT).rstrip("/")


def sha256_of(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@dataclass(frozen=True)
class HubFile:
    """A file of a data set as the hub announces it."""

    repo_id: str
    revision: str
    path: str  # in the repository
    size: int
    sha256: str | None  # None for a small file that is not in large-file storage

    @property
    def url(self) -> str:
        return huggingface_hub.hf_hub_url(
            self.repo_id,
            self.path,
            repo_type="dataset",
            revision=self.revision,
            endpoint=endpoint(),
        )

    def is_at(self, path: Path) -> bool:
        """Whether the file at `path` has the announced size and content."""
        if not path.exists() or path.stat().st_size != self.size:
            return False
        return self.sha256 is None or sha256_of(path) == self.sha256


@dataclass(frozen=True)
class Download:
    """Downloads into one folder.

    `without_network` and `with_less_space` end the messages about a network or a disk that fails:
    what else the user can do.
    """

    folder: Path
    without_network: str
    with_less_space: str
    workers: int = 8  # files downloaded at the same time

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers must be at least 1, not {self.workers}")

    @contextmanager
    def lock(self, timeout: float = 0) -> Iterator[None]:
        """Creates the folder and keeps other processes from downloading into it.

        Waits `timeout` seconds for one that does (−1: until it is done); then ValueError.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".download.lock", timeout=timeout):
                yield
        except Timeout:
            raise ValueError(
                f"another download into {self.folder} is running; wait for its end"
            ) from None

    def list_files(
        self, repo_id: str, folder: str | None = None, revision: str = "main"
    ) -> dict[str, HubFile]:
        """The files of a data set on the hub, or in one of its folders, by their paths."""
        with self._explained(endpoint(), folder or "files", f"the data set {repo_id}"):
            # Without a network this fails at once; what follows would try for half a minute.
            huggingface_hub.get_session().head(endpoint(), timeout=TIMEOUT)
            tree = huggingface_hub.HfApi(endpoint()).list_repo_tree(
                repo_id, folder, revision=revision, repo_type="dataset"
            )
            found = [one for one in tree if isinstance(one, huggingface_hub.hf_api.RepoFile)]
        announced = [(one.path, one.size, one.lfs.sha256 if one.lfs else None) for one in found]
        return {one[0]: HubFile(repo_id, revision, *one) for one in announced}

    def fetch(self, files: Mapping[str, HubFile]) -> None:
        """Downloads files to their names below the folder, unless they are there already."""
        lacking = {name: f for name, f in files.items() if not f.is_at(self.folder / name)}
        if not lacking:
            return
        size = sum(file.size for file in lacking.values())
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise ValueError(
                f"{len(lacking)} files need {size / 1e9:.1f} GB, but {self.folder} has only "
                f"{free / 1e9:.1f} GB free; {self.with_less_space}, or set NANOCHAT_BASE_DIR to a "
                "folder on another disk"
            )
        incoming = self.folder / ".incoming"
        shutil.rmtree(incoming, ignore_errors=True)  # of an interrupted run
        # The threads of a ThreadPool are daemons: an error or Ctrl-C does not wait for them.
        with (
            closing(_Bar(len(lacking), size)) as bar,
            ThreadPool(min(self.workers, len(lacking))) as pool,
        ):
            for _ in pool.imap_unordered(
                lambda item: self._fetch(*item, incoming, bar), lacking.items()
            ):
                pass
        shutil.rmtree(incoming, ignore_errors=True)

    def _fetch(self, name: str, file: HubFile, incoming: Path, bar: "_Bar") -> None:
        """Downloads one file; after a wrong checksum, once more."""
        for _ in range(2):
            with self._explained(file.url, name, f"the data set {file.repo_id}"):
                local = huggingface_hub.hf_hub_download(
                    file.repo_id,
                    file.path,
                    repo_type="dataset",
                    revision=file.revision,
                    endpoint=endpoint(),
                    local_dir=incoming,
                    tqdm_class=bar,
                )
                arrived = Path(local)
                if file.is_at(arrived):
                    target = self.folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    arrived.replace(target)
                    return
                arrived.unlink()
                bar.update(-file.size)
        raise ValueError(
            f"{endpoint()} twice delivered a {name} of the wrong size or checksum; try again "
            "later, or set HF_ENDPOINT to another mirror"
        )

    def fetch_url(self, url: str, name: str) -> None:
        """Downloads a file that is not on the hub; a partial one is continued."""
        path = self.folder / name
        with self._explained(url, name, url):
            found = huggingface_hub.get_hf_file_metadata(url, token=False, timeout=TIMEOUT)
            version = "".join(filter(str.isalnum, found.etag or ""))[:16]
            part = path.with_name(f".{name}.{version}.part")
            with part.open("ab") as out:
                http_get(
                    url,
                    out,
                    resume_size=out.tell(),
                    expected_size=found.size,
                    headers={"Accept-Encoding": "identity"},  # else sizes and ranges do not match
                    displayed_filename=name,
                )
            part.replace(path)
            for outdated in self.folder.glob(f".{name}.*.part"):
                outdated.unlink()

    @contextmanager
    def _explained(self, url: str, name: str, source: str) -> Iterator[None]:
        """Turns whatever goes wrong in a download into a ValueError of one sentence."""
        server = "{0.scheme}://{0.netloc}".format(urlsplit(url))
        try:
            yield
        except Exception as error:
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
            raise ValueError(self._sentence(cause or error, server, name, source)) from error

    def _sentence(self, error: BaseException, server: str, name: str, source: str) -> str:
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            if status == 404:
                return f"{server} has no {name} in {source}"
            if status in (401, 403):
                return (
                    f"{server} refuses access to {source} ({status}); set HF_TOKEN, or unset it "
                    "when it has expired"
                )
            return f"{server} answered {status} for {name}; try again later"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk of {self.folder} is full; make room and run this again"
        if isinstance(error, OSError) and error.filename:
            return f"cannot write {error.filename}: {error.strerror}"
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return (
            f"cannot reach {server} ({detail}); check the network or set HF_ENDPOINT to a mirror, "
            f"then run this again; {self.without_network}"
        )


class _Bar(huggingface_hub.utils.tqdm):
    """One bar for the bytes of all files, where huggingface_hub would show one for each."""

    def __init__(self, n_files: int, size: int) -> None:
        desc = f"{n_files} files"
        super().__init__(desc=desc, total=size, unit="B", unit_scale=True, disable=None)

    def __call__(self, **settings: object) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass  # after each file

    def update_transfer(self, size: int) -> None:
        pass  # what Xet received; `update` counts what it wrote

    def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass
