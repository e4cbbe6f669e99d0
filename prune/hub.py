"""Saved pruners on the Hugging Face hub: look up, download, upload, and the model card. All of it is data.

The network, the cache and the token are `huggingface_hub`'s, with its environment variables: `HF_ENDPOINT`, `HF_HOME`,
`HF_HUB_OFFLINE`, `HF_TOKEN`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune._version import __version__
from prune.errors import ConfigError, PruneError

if TYPE_CHECKING:  # config imports this module
    from prune.config import PrunerConfig

CARD = "README.md"
OURS = "<!-- Written by prune. Take this line away, and the next push leaves your card as it is. -->"
CARD_LIMIT = 2**20
BUDGETS = {
    "ratio": "the share of the visual tokens that is removed",
    "keep": "the visual tokens that are kept per image",
    "average": "the mean number (below 1: share) of visual tokens per decoder layer",
    "flops": "the share of the un-pruned decoder's prefill FLOPs",
}
ROWS = 40
"""Numbers in the table of a card; all of them are in the config."""


def is_repo_id(name: str) -> bool:
    """Whether a name has the form "user/repo". Whether such a repository may exist, the hub's own check says later."""
    return re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", name, re.ASCII) is not None


def check_revision(revision: object) -> None:
    """A branch, a tag, a pull request or a commit.

    Raises:
        ConfigError: it cannot be one.
    """
    sound = isinstance(revision, str) and re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", revision) is not None
    if revision is not None and (not sound or len(str(revision)) > 250):
        raise ConfigError(f"revision={revision!r:.80} must be a branch, a tag or a commit, such as 'main'")


# ------------------------------------------------------------------------------------------------------ download
def download(
    repo: str,
    file: str,
    limit: int,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The path of a repository's file in the local cache, downloaded if the cache lacks this version of it.

    Args:
        repo: "user/repo".
        file: its path in the repository.
        limit: bytes; the size is asked for first, and nothing larger is downloaded.
        revision, cache_dir, token, local_files_only: as in `huggingface_hub.hf_hub_download`.

    Raises:
        ConfigError: no such repository, revision or file, no permission, no network, or it is too large.
    """
    check_revision(revision)
    with explained(repo, file=file, revision=revision, local=local_files_only):
        from huggingface_hub import hf_hub_download

        options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
        options |= {"local_files_only": local_files_only, "library_name": "prune", "library_version": __version__}
        size = hf_hub_download(repo, file, dry_run=True, **options).file_size
        if size is not None and size > limit:
            raise ConfigError(f"{repo}: {file} has {size} bytes, more than {limit}: no saved pruner's; check the name")
        return Path(hf_hub_download(repo, file, **options))


# -------------------------------------------------------------------------------------------------------- upload
def upload(
    folder: Path,
    repo: str,
    card: Callable[[str], str],
    *,
    message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Make the repository if need be, and commit the files of a folder and a card to it, in one commit.

    A card that does not carry the line `OURS` was written by somebody and stays. Other files stay too.

    Args:
        folder: all its files go up, with their paths in it.
        repo: "user/repo", or "repo" of whom the token belongs to.
        card: gives the text of the card for the repository's full name.
        message: of the commit.
        private: whether a new repository is; None is the owner's default.
        token: None takes the one of `hf auth login`.
        revision: a branch, made if need be; None is main.
        create_pr: whether to open a pull request with the commit.

    Returns:
        The URL of the pull request, or of the commit.

    Raises:
        ConfigError: not logged in, no permission to write, no network, an impossible name, or refused by the hub.
    """
    check_revision(revision)
    with explained(repo, revision=revision, writing=True):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=token, library_name="prune", library_version=__version__)
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        content: dict[str, Path | bytes] = dict(files)
        if not _foreign_card(api, repo, revision):
            content[CARD] = card(repo).encode()
        operations = [CommitOperationAdd(path, source) for path, source in content.items()]
        done = api.create_commit(repo, operations, commit_message=message, revision=revision, create_pr=create_pr)
        return done.pr_url or str(done.commit_url)


def _foreign_card(api, repo: str, revision: str | None) -> bool:
    """Whether the repository has a card that we did not write."""
    from tempfile import TemporaryDirectory

    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    with TemporaryDirectory() as folder:
        try:
            path = api.hf_hub_download(repo, CARD, revision=revision, local_dir=folder)
        except (EntryNotFoundError, RevisionNotFoundError):  # none yet, or an empty repository
            return False
        with open(path, "rb") as file:
            return OURS.encode() not in file.read(CARD_LIMIT)


# -------------------------------------------------------------------------------------------------------- errors
@contextmanager
def explained(
    repo: str,
    *,
    file: str | None = None,
    revision: str | None = None,
    writing: bool = False,
    local: bool = False,
) -> Iterator[None]:
    """Whatever the hub's client raises becomes a `ConfigError` that says what to do.

    Args:
        repo, file, revision: what is asked for.
        writing: whether it is an upload.
        local: whether the caller forbade to use the network.
    """
    try:
        yield
    except PruneError:
        raise
    except Exception as error:  # also of the client's HTTP library, of a full or read-only disk, of a refused card
        raise ConfigError(_reason(error, repo, file, revision, writing, local)) from None


def _reason(error: Exception, repo: str, file: str | None, revision: str | None, writing: bool, local: bool) -> str:
    from huggingface_hub import constants, errors

    site = constants.ENDPOINT
    place = f"{repo!r:.200}" + (f" (revision {revision!r:.80})" if revision else "")
    login = "log in with `hf auth login`, or give a token that may do it"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the cache was the client's second choice
    if isinstance(error, errors.HFValidationError):
        return f"{place} is no name of a repository: {_first_line(error)}; a name has the form user/repo"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo!r} has no revision {revision!r:.80}; {site}/{repo}/commits lists them"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"the repository {place} has no file {file}, so no whole saved pruner; handle.push_to_hub uploads one"
    if isinstance(error, errors.GatedRepoError):
        return f"{place} is gated: ask for access on {site}/{repo}, and {login}"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"no permission for {place}: {login}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        why = "local_files_only=True" if local else "HF_HUB_OFFLINE"
        if writing and constants.is_offline_mode():
            return f"{why} forbids to use the network, so nothing was sent to {place}; unset it"
        if local or constants.is_offline_mode():
            return f"{file} of {place} is not in the cache, and {why} forbids to use the network; load it once without"
        return f"cannot reach {site} for {place} ({_cause(error)}); check the network or HF_ENDPOINT"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if not writing and (status == 401 or isinstance(error, errors.RepositoryNotFoundError)):
            return (
                f"there is no folder {repo!r} here and no such repository on {site}, or it is private: check the name, "
                f"or {login}"
            )
        if status in (401, 403, 404):
            return f"no permission for {place} (HTTP {status}): {login}"
        return f"{site} answers HTTP {status} for {place}: {_first_line(error)}; try again later"
    return f"{place}: {_cause(error)}; check the network, HF_ENDPOINT and the folder of the cache"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0] if lines else type(error).__name__:.300}".rstrip(".")


def _cause(error: BaseException) -> str:
    """The error at the bottom of a chain, in a few words."""
    while (deeper := error.__cause__) is not None:
        error = deeper
    return f"{type(error).__name__}: {_first_line(error)}"


# ---------------------------------------------------------------------------------------------------------- card
def model_card(config: PrunerConfig, written: Mapping[str, object], repo: str) -> str:
    """The Markdown of a repository's README.md: what it is, how to use it, its settings and its numbers.

    Texts of the config are data of unknown origin: outside the block of JSON they are escaped.

    Args:
        config: the pruner.
        written: what its file holds.
        repo: the repository's full name.
    """
    from huggingface_hub import ModelCardData

    from prune.adapters.families import FAMILIES
    from prune.registry import method_info

    names = list(dict.fromkeys(_methods(config)))
    head = ModelCardData(library_name="prune", tags=["visual-token-pruning", *(f"prune-{n}" for n in names)]).to_yaml()
    methods = []
    for info in map(method_info, names):
        paper = f" ([arXiv {info.arxiv}](https://arxiv.org/abs/{info.arxiv}))" if info.arxiv else ""
        methods.append(f"- `{info.name}`: {_plain(info.title)}{paper}")
    examples = [family.example for family in FAMILIES if family.name in config.families]
    if examples or not config.families:
        model = (
            "from transformers import AutoModelForImageTextToText\n",
            f'model = AutoModelForImageTextToText.from_pretrained("{(examples or [FAMILIES[0].example])[0]}")',
        )
    else:
        model = ("", "model = ...  # a model of a family named below")
    needs = config.budget is None and all(member.budget is None for member in config.members)
    call = f'apply_pruner(model, "{repo}"{", ratio=0.75" if needs else ""})'
    given = {} if config.budget is None else {k: v for k, v in vars(config.budget).items() if v is not None}
    budget = "".join(f"Budget: `{name}={value:.6g}`, {BUDGETS[name]}. " for name, value in given.items())
    families = ", ".join(map(_plain, config.families)) or "not recorded"
    # In indented JSON no line starts with a fence, so that no text can leave the block.
    settings = json.dumps({key: value for key, value in written.items() if key != "metrics"}, indent=2)
    parts = [
        f"---\n{head}\n---\n{OURS}\n\n# {_plain(repo.split('/')[-1])}",
        "A saved pruner for [prune](https://pypi.org/project/prune-vlm/): it drops visual tokens of an unmodified "
        "vision-language model or vision transformer, without training. This repository holds settings"
        + (", a small classifier" if config.has_weights else "")
        + " and no model.",
        "\n".join(methods),
        f"{budget}Made or tuned on: {families}.",
        "## Use",
        f"```\npip install prune-vlm\n```\n\n```python\n{model[0]}from prune import apply_pruner\n\n{model[1]}\n"
        f"handle = {call}  # from now on; handle.remove() takes it off\n```",
        "A budget or option given to `apply_pruner` replaces the saved one. `revision=` pins a version.",
        f"## Settings\n\n```json\n{settings}\n```",
    ]
    if rows := list(_numbers(config.metrics)):
        more = f"\n\n{len(rows) - ROWS} more are in `pruner_config.json`." if len(rows) > ROWS else ""
        table = "\n".join(f"| {_plain(name)} | {value:.6g} |" for name, value in rows[:ROWS])
        parts.append(f"## Numbers\n\n| what | value |\n| --- | ---: |\n{table}{more}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _methods(config: PrunerConfig) -> Iterator[str]:
    """The names of the methods of a config, of members one by one."""
    if not config.members:
        yield config.method
    for member in config.members:
        yield from _methods(member)


def _numbers(metrics: Mapping[str, object], under: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested dictionary, each with its path."""
    for key, value in metrics.items():
        name = f"{under}{key}"
        if isinstance(value, dict):
            yield from _numbers(value, f"{name} / ")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, value


def _plain(text: str) -> str:
    """A text as Markdown that shows it, in one line: no markup, HTML, links or table cells of its own."""
    text = "".join(c if c.isprintable() else " " for c in text)[:200]
    return re.sub(r"([\\`*_{}\[\]<>#|~&:@$])", r"\\\1", text)
