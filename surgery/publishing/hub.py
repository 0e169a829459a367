"""Publishes a twin on the Hub: card, upload, and a check of what landed. All through huggingface_hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, RecipeError, SurgeryError, first_line
from surgery.publishing.card import Card, render_card
from surgery.runtime.files import sha256, write_text
from surgery.runtime.public import public_text
from surgery.runtime.vocabulary import understands_former_names
from surgery.saving.report import read_verified_report

REPORTS = ("surgery.json", "evaluation.json", "summary.md")
IGNORED = (".*", "**/.*", "*.tmp", "__pycache__", "**/__pycache__/**")


class HubError(SurgeryError):
    """The Hub refused, or cannot be reached."""


@dataclass(frozen=True)
class PushPlan:
    """What a push uploads.

    Attributes:
        files: (path in the repository, bytes).
        card: the rendered README.md.
    """

    folder: Path
    repository: str
    files: tuple[tuple[str, int], ...]
    card: Card


@understands_former_names
def push(
    twin: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """Publishes a twin on the Hub, with its card; the address of the commit or the pull request.

    Args:
        twin: folder of a finished twin; `repository`: its name on the Hub, user/name.
        private: create the repository as private.
        revision: branch to push to; `create_pr`: open a pull request instead of committing.
        base_model, license: for the card, see :func:`surgery.publishing.card.card`.
    Raises:
        CheckpointError: not a finished twin, or its weights are not those that were verified.
        HubError: see :func:`upload`.
    """
    planned = plan_push(twin, repository, base_model=base_model, license=license)
    return upload(planned, private=private, revision=revision, create_pr=create_pr)


def plan_push(
    twin: str | Path, repository: str, *, base_model: str | None = None, license: str | None = None
) -> PushPlan:
    """Everything that would be uploaded; touches nothing.

    Raises:
        CheckpointError: not a finished twin, or its weights are not those that were verified.
        RecipeError: no name that a repository can have.
    """
    check_repository(repository)
    folder = Path(twin)
    report = read_verified_report(folder)
    for name, digest in report["verification"].get("weights", {}).items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise CheckpointError(
                "the weights are not those that were verified",
                where=str(folder / name),
                cause="they were changed or damaged after the conversion",
                fix="convert again",
            )
    rendered = render_card(folder, base_model, license)
    text = rendered.text.replace("REPOSITORY", repository)
    names = sorted(path for path in folder.rglob("*") if path.is_file() and not _ignored(path.relative_to(folder)))
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in names}
    files["README.md"] = len(text.encode())
    files |= {name: len(cleaned.encode()) for name, cleaned in _cleaned(folder, files).items()}
    return PushPlan(folder, repository, tuple(sorted(files.items())), Card(text, rendered.missing))


def check_repository(name: str) -> None:
    """Raises RecipeError for what cannot be the name of a repository, by the Hub's own rule."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RecipeError(
            f"not a valid name of a repository: {first_line(error).rstrip('.')}",
            where=repr(name),
            fix="as in user/name",
        ) from error


def _cleaned(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Our reports that name places on this machine (older versions wrote some), without them."""
    found = {}
    for name in names:
        if Path(name).name in REPORTS or name.endswith(".html"):
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            cleaned = public_text(text)
            if cleaned != text:
                found[name] = cleaned
    return found


def _ignored(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts) or path.suffix == ".tmp"


def upload(planned: PushPlan, *, private: bool = False, revision: str | None = None, create_pr: bool = False) -> str:
    """Creates the repository, uploads, checks what landed; the address.

    The card is written into the twin's folder and uploaded with it. An interrupted upload goes on where it stopped:
    what the Hub has is not sent again.

    Raises:
        HubError: no login, no permission, no network, or what landed differs from what was sent.
    """
    from huggingface_hub import HfApi, ModelCard

    api = HfApi(library_name="polysurgery")
    write_text(planned.folder / "README.md", planned.card.text)
    for name, cleaned in _cleaned(planned.folder, [name for name, _ in planned.files]).items():
        write_text(planned.folder / name, cleaned)
    try:
        api.whoami()
        api.create_repo(planned.repository, private=private, exist_ok=True)
        ModelCard(planned.card.text).validate()
        if revision and not create_pr:
            api.create_branch(planned.repository, branch=revision, exist_ok=True)
        what = {"folder_path": planned.folder, "ignore_patterns": list(IGNORED), "commit_message": "Polynomial twin"}
        done = api.upload_folder(repo_id=planned.repository, revision=revision, create_pr=create_pr, **what)
        landed = api.get_paths_info(planned.repository, [name for name, _ in planned.files], revision=done.oid)
    except Exception as error:
        raise _explained(error, planned.repository) from error
    _compare(planned, {item.path: item for item in landed})
    return str(done.pr_url or done.commit_url)


def _compare(planned: PushPlan, landed: dict[str, Any]) -> None:
    for name, _ in planned.files:
        item, file = landed.get(name), planned.folder / name
        lfs = getattr(item, "lfs", None)
        same = item is not None and (sha256(file) == lfs.sha256 if lfs else git_blob(file) == item.blob_id)
        if not same:
            raise HubError(
                "what landed differs from what was sent", where=f"{planned.repository}/{name}", fix="push again"
            )


def git_blob(file: Path) -> str:
    """The id git gives a file's contents, as the Hub records small files."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _explained(error: Exception, repository: str) -> SurgeryError:
    if isinstance(error, SurgeryError):
        return error
    status = getattr(getattr(error, "response", None), "status_code", None)
    name = type(error).__name__
    if name == "LocalTokenNotFoundError" or status == 401:
        return HubError("not logged in to the Hub", where=repository, fix="run `hf auth login`, or set HF_TOKEN")
    if status == 403:
        return HubError(
            "your login may not write here",
            where=repository,
            fix="use a token with write access, or your own namespace",
        )
    if status == 429:
        return HubError(
            "the Hub limits how often it may be asked", where=repository, fix="wait some minutes, and push again"
        )
    if status == 404:
        return HubError(
            "the Hub has no such repository or branch",
            where=repository,
            cause="it was moved or deleted, or your login may not see it",
            fix="check its name on the Hub, and that of --revision",
        )
    if status == 409:
        return HubError("the Hub reports a conflict: somebody else is writing", where=repository, fix="push again")
    first = first_line(error)
    return HubError(
        f"the upload failed: {first}",
        where=repository,
        cause="no network, or the Hub is down" if status is None or status >= 500 else "",
        fix="push again: what has landed is not sent twice",
    )
