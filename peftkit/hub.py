"""Adapters on the Hugging Face Hub: fetched into huggingface_hub's cache and read there, or uploaded once they are saved.

This alone asks a network, and only where it is told to. huggingface_hub (`pip install 'peftkit[hub]'`) does the asking:
its login, its cache, `HF_ENDPOINT` and `HF_HUB_OFFLINE` hold. Whatever it meets becomes one StorageError.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftkit import storage
from peftkit.storage import StorageError, Stored, card, layout

_LOGIN = "log in by `hf auth login`, or set HF_TOKEN"


def read(path: str | os.PathLike[str], *, name: str = "default", revision: str | None = None) -> Stored:
    """Read the adapter that `path` means: a directory, or else `"user/name"` on the Hub.

    What is here comes first. The Hub is asked only for a string of one slash that is a name by huggingface_hub's rule; not
    for a Path, nor `./x`, `/x`, `x/`, `a/b/c`. Where `user` is a directory here, `user/name` is taken for a path whose end
    is not there, unless a `revision` says that the Hub is meant.

    Args:
        name: of the adapter; as in a directory, `<name>/` is looked into where there is none at the top.
        revision: a branch, a tag or a commit of the repository; None is its main branch.

    Raises:
        StorageError: neither is there, or what is cannot be read. ValueError: a `revision` of a directory.
    """
    if not isinstance(path, str) or os.path.exists(path):
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for names on the Hub, and {path} is a path here; what is on the Hub is fetched "
                f"by peftkit.hub.download('user/name', revision={revision!r})"
            )
        return storage.read(path, name=name)
    try:
        _check_name(path)
        owner = path.partition("/")[0]
        if revision is None and os.path.isdir(owner):
            raise StorageError(f"{owner}/ is here, so that the Hub is asked only if you give revision='main'")
        folder = download(path, name=name, revision=revision)
    except StorageError as error:
        raise StorageError(f"{path!r} is no directory here; {error}") from None
    try:
        return storage.read(folder)
    except StorageError as error:
        raise StorageError(
            f"{error}. This is a copy of {path!r} on the Hub; if it is right there, delete {_cached(folder)} and load again"
        ) from error


def download(repo: str, *, name: str = "default", revision: str | None = None) -> Path:
    """Fetch the two files of an adapter from `repo`, `"user/name"`, into huggingface_hub's cache, and no others.

    Both are of one commit. What the cache has of that commit is not fetched again. Where the Hub cannot be reached, or
    is not to be (`HF_HUB_OFFLINE=1`), it is the commit that was fetched last.

    Args:
        name, revision: as in `read`.

    Returns:
        The directory in the cache that holds them.

    Raises:
        StorageError: there is no such repository, revision or adapter, it may not be read, or was not fetched whole.
    """
    _check_name(repo)
    hub = _library()
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RemoteEntryNotFoundError

    with _told(repo, revision):
        try:
            config, depth = Path(hub.hf_hub_download(repo, layout.CONFIG, revision=revision)), 0
        except EntryNotFoundError as missing:
            here_only = isinstance(missing, LocalEntryNotFoundError)  # then nobody is asked, or waited for, once more
            try:
                inside = f"{name}/{layout.CONFIG}"
                config = Path(hub.hf_hub_download(repo, inside, revision=revision, local_files_only=here_only))
                depth = 1
            except EntryNotFoundError:
                if here_only:
                    raise missing from missing.__cause__
                raise StorageError(f"it holds no {layout.CONFIG}{_instead(hub, repo, revision)}") from None
        commit = config.parents[depth].name
        tensors = config.relative_to(config.parents[depth]).with_name(layout.TENSORS).as_posix()
        try:
            hub.hf_hub_download(repo, tensors, revision=commit)
        except RemoteEntryNotFoundError:
            raise StorageError(f"it holds no {tensors}{_instead(hub, repo, commit)}") from None
    return config.parent


def upload(folder: str | os.PathLike[str], repo: str, *, private: bool | None = None) -> str:
    """Upload the adapter in the directory `folder` to `repo`, `"user/name"`, in one commit to its main branch.

    The adapter's two files and its card go there, whatever else is in the directory. A card there that somebody has edited
    stays as it is, as it does in a directory.

    Args:
        private: whether the repository is private; where it is made, None is as your account has it.

    Returns:
        The URL of the commit; of the last one, where nothing has changed.

    Raises:
        StorageError: the directory holds no adapter, the repository is not as private as it should be, or the Hub did not
            take it; the directory is as it was, and the same call can be made again.
    """
    folder = Path(folder)
    missing = [file for file in (layout.CONFIG, layout.TENSORS) if not (folder / file).is_file()]
    if missing:
        raise StorageError(f"{folder} holds no adapter to upload: {missing[0]} is missing")
    try:
        _check_name(repo)
        with _told(repo, None):
            return _commit(_library(), folder, repo, private)
    except StorageError as error:
        again = f"peftkit.hub.upload({str(folder)!r}, {repo!r}{'' if private is None else f', {private=}'})"
        raise StorageError(f"{folder} is whole, but was not uploaded: {error}. To upload it later: {again}") from None


def _commit(hub: Any, folder: Path, repo: str, private: bool | None) -> str:
    api = hub.HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    if private is not None and (is_private := bool(api.model_info(repo).private)) is not private:
        raise StorageError(
            f"it is there already, and {'private' if is_private else 'public'}; change that on the Hub, or leave out "
            f"{private=}"
        )
    files = [layout.CONFIG, layout.TENSORS]
    if (folder / layout.README).is_file() and _may_replace_card(hub, repo):
        files.append(layout.README)
    adding = [hub.CommitOperationAdd(path_in_repo=f, path_or_fileobj=str(folder / f)) for f in files]
    return str(api.create_commit(repo, adding, commit_message="Upload an adapter with peftkit").commit_url)


def _may_replace_card(hub: Any, repo: str) -> bool:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        there = Path(hub.hf_hub_download(repo, layout.README))
    except RemoteEntryNotFoundError:
        return True
    return card.unedited(there.read_text("utf-8", errors="replace"))


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise StorageError("the Hub is reached by huggingface_hub: pip install 'peftkit[hub]'") from None
    return huggingface_hub


def _check_name(repo: str) -> None:
    """Raise StorageError for what cannot be a name on the Hub, without asking it."""
    if repo.count("/") != 1:
        raise StorageError(f"a name on the Hub would be 'user/name', with one slash, not {repo!r}")
    if not repo.isascii() or not all(part.strip(".~") for part in repo.split("/")):  # with no library to tell
        raise StorageError(f"{repo!r} is a path, and not a name on the Hub")
    _library()
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise StorageError(f"{repo!r} cannot be a name on the Hub: {_line(error)}") from None


@contextlib.contextmanager
def _told(repo: str, revision: str | None) -> Iterator[None]:
    """Turn whatever huggingface_hub meets into a StorageError that says what was asked for and what to do."""
    asked = f"{repo!r} on the Hub" + (f" at {revision!r}" if revision else "")
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{asked}: {error}") from None
    except Exception as error:  # its own, its HTTP client's of whichever version, or a KeyError over a strange answer
        raise StorageError(f"{asked}: {_why(error, repo)}") from None


def _why(error: Exception, repo: str) -> str:
    from huggingface_hub import constants, errors

    answered = _root(error)
    status = getattr(getattr(answered, "response", None), "status_code", None)
    if constants.HF_HUB_OFFLINE and isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set, and the cache ({constants.HF_HUB_CACHE}) has no whole copy of it; unset it, or "
            "fetch the adapter where there is a network"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated ({status}); ask for access at {constants.ENDPOINT}/{repo}, then {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no such revision ({status})"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository ({status}), or a private one, for which {_LOGIN}"
    if isinstance(error, errors.LocalEntryNotFoundError) and (status is None or status >= 500):
        return f"it cannot be reached, and the cache ({constants.HF_HUB_CACHE}) has no whole copy of it: {_line(error)}"
    if status in (401, 403):
        return f"it may not be read or written with the token in use, if any ({_line(error)}); {_LOGIN}"
    return _line(error)


def _root(error: BaseException) -> BaseException:
    """The first cause, or the answer of the Hub that it was."""
    while error.__cause__ is not None and not hasattr(error, "response"):
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    """What it says at its root, in one line."""
    error = _root(error)
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    server = getattr(error, "server_message", None)
    more = f", {' '.join(str(server).split())[:200]}" if server and str(server) not in said else ""
    return f"{type(error).__name__}: {said[:300]}{more}".rstrip(": .")


def _instead(hub: Any, repo: str, revision: str | None) -> str:
    """What there is in place of an adapter, for the end of a sentence; nothing where that cannot be told."""
    try:
        files = hub.HfApi().list_repo_files(repo, revision=revision)
    except Exception:
        return ""
    if pickled := [f for f in files if f.rpartition("/")[2] == "adapter_model.bin"]:
        return f"; {pickled[0]} is a pickle, which is not read: convert it to safetensors"
    inside = [f.rpartition("/")[0] for f in files if f.endswith(f"/{layout.CONFIG}")]
    if direct := [folder for folder in inside if "/" not in folder]:
        return f"; the adapters in it are {', '.join(map(repr, direct[:5]))}: load one by name={direct[0]!r}"
    return f"; there are {len(files)} files in it, such as {files[0]!r}" if files else "; it is empty"


def _cached(folder: Path) -> Path:
    """Where the cache keeps all of the repository that `folder` is a commit's directory of, or within."""
    return next((p for p in folder.parents if p.name.startswith("models--")), folder)
