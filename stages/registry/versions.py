"""Versions of registered models: finding, writing and deleting them, with their tags and aliases."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from stages.registry.client import database, open_client, reachable, tracking_uri
from stages.registry.mlflow_types import ModelVersion
from stages.registry.tags import COMMIT, MODEL_SHA256, REGISTERING, UNFINISHED
from stages.runtime.command import StageError

COMMIT_TO_COME = "commit-to-come"
"""Stands in the card of an unfinished version where its commit will be named."""
ADDRESS = re.compile(r"models:/(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<alias>[\w-]+)|/(?P<number>\d+))")


@dataclass(frozen=True)
class Version:
    """A version in the registry, as much of it as the pipeline works with."""

    name: str
    number: int
    run_id: str
    source: str
    tags: dict[str, str]
    aliases: tuple[str, ...]
    description: str
    """The model card, in Markdown."""
    created: float
    """Seconds since the epoch."""

    @property
    def sha256(self) -> str:
        """Of its weights; empty where registering it did not get that far."""
        return self.tags.get(MODEL_SHA256, "")

    @property
    def commit(self) -> str:
        """The git commit that gives this version again; empty where there is none (yet)."""
        return self.tags.get(COMMIT, "")

    @property
    def unfinished(self) -> bool:
        """Retrain has registered it and not committed yet: nobody may promote it."""
        return UNFINISHED in self.tags


def list_versions(name: str) -> list[Version]:
    """All versions of a registered model, newest first; empty where there is no such model."""
    client = open_client()
    models = client.search_registered_models(f"name = '{name}'")
    if not models:
        return []
    # The search for versions leaves out their aliases.
    aliases = {alias: int(number) for alias, number in models[0].aliases.items()}
    found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
    return sorted((_version(each, aliases) for each in found), key=lambda version: -version.number)


def model_names() -> list[str]:
    """All models of the registry, whoever registered them."""
    client, names, token = open_client(), list[str](), None
    while True:
        page = client.search_registered_models(page_token=token)
        names += [model.name for model in page]
        if not (token := page.token):
            return names


def find_version(name: str, model_sha256: str) -> Version | None:
    """The version with these weights, by its tag `model.sha256`."""
    return next((version for version in list_versions(name) if version.sha256 == model_sha256), None)


def version_by_alias(name: str, alias: str) -> Version | None:
    """The version that an alias points at, if any."""
    return next((version for version in list_versions(name) if alias in version.aliases), None)


def by_address(address: str) -> Version:
    """The version at `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        StageError: it is no such address, there is no such version, or MLflow failed.
    """
    parts = ADDRESS.fullmatch(address)
    if not parts:
        raise StageError(f"{address!r} is no registered model; expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = parts["name"], parts["alias"], parts["number"]
    existing = _existing(name)
    found = [each for each in existing if alias in each.aliases or str(each.number) == number]
    if not found:
        what = f"version {number}" if number else f"version with the alias {alias}"
        listed = ", ".join(" ".join([str(each.number), *(f"@{one}" for one in each.aliases)]) for each in existing[:10])
        more = ", ..." if len(existing) > 10 else ""
        raise StageError(
            f"{name} has no {what}; it has {listed}{more}. One of them: models:/{name}/{existing[0].number}"
        )
    return found[0]


def newest_registered(name: str) -> Version:
    """The newest version of a model whose registration was finished.

    Raises:
        StageError: there is none, or MLflow failed.
    """
    if found := [each for each in _existing(name) if each.sha256]:
        return found[0]
    raise StageError(f"no version of {name} was registered to the end (tag {MODEL_SHA256}); `make repro` does it")


def _existing(name: str) -> list[Version]:
    file = database(tracking_uri())
    if file and not file.exists():
        raise StageError(f"there is no registry: {file} is missing. `make repro` makes it, in the repository root")
    with reachable():
        found = list_versions(name)
    if not found:
        raise StageError(f"MLflow at {tracking_uri()} has no version of a model called {name}")
    return found


def _version(found: ModelVersion, aliases: Mapping[str, int]) -> Version:
    number = int(found.version)
    return Version(
        name=found.name,
        number=number,
        run_id=found.run_id or "",
        source=found.source or "",
        tags=dict(found.tags),
        aliases=tuple(alias for alias, target in aliases.items() if target == number),
        description=found.description or "",
        created=(found.creation_timestamp or 0) / 1000,
    )


def create_version(
    name: str, model_description: str, source: str, run_id: str, tags: Mapping[str, str], description: str
) -> Version:
    """A new version of the logged model `source` (models:/m-...), with tags and description in one write.

    The registered model is made where it is missing; `model_description` is only used then.
    """
    client = open_client()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=model_description)
    model_id = source.removeprefix("models:/")
    created = client.create_model_version(
        name, source, run_id=run_id, tags=dict(tags), description=description, model_id=model_id
    )
    return _version(created, {})


def finish_version(version: Version, model_sha256: str) -> None:
    """Tags a version with `model.sha256`, by which it counts as registered, and takes the tag `registering` away."""
    client = open_client()
    client.set_model_version_tag(version.name, str(version.number), MODEL_SHA256, model_sha256)
    client.delete_model_version_tag(version.name, str(version.number), REGISTERING)


def commit_version(version: Version, commit: str) -> None:
    """Names the commit of an unfinished version, in its card and its tags; from then on it counts as finished.

    May be repeated, and may die between its writes: the tag `unfinished` goes last.
    """
    client, number = open_client(), str(version.number)
    card = version.description.replace(COMMIT_TO_COME, commit)
    client.update_model_version(version.name, number, description=card)
    client.set_model_version_tag(version.name, number, COMMIT, commit)
    if version.unfinished:
        client.delete_model_version_tag(version.name, number, UNFINISHED)


def set_tags(version: Version, tags: Mapping[str, str]) -> None:
    """Sets tags of a version; a later value replaces an earlier one."""
    client = open_client()
    for key, value in tags.items():
        client.set_model_version_tag(version.name, str(version.number), key, value)


def delete_tag(version: Version, key: str) -> None:
    """Takes a tag off a version that has it."""
    open_client().delete_model_version_tag(version.name, str(version.number), key)


def describe_version(version: Version, card: str) -> None:
    """Replaces the version's description."""
    open_client().update_model_version(version.name, str(version.number), description=card)


def model_description(name: str) -> str:
    """The description of a registered model; empty where there is no such model."""
    found = open_client().search_registered_models(f"name = '{name}'")
    return (found[0].description or "") if found else ""


def model_tags(name: str) -> dict[str, str]:
    """The tags of a registered model; none where there is no such model."""
    found = open_client().search_registered_models(f"name = '{name}'")
    return dict(found[0].tags) if found else {}


def set_model_tag(name: str, key: str, value: str) -> None:
    """Sets a tag of a registered model; a later value replaces an earlier one."""
    open_client().set_registered_model_tag(name, key, value)


def describe_model(name: str, text: str) -> None:
    """Replaces the description of a registered model."""
    open_client().update_registered_model(name, description=text)


def delete_alias(name: str, alias: str) -> None:
    """Takes an alias off whatever it points at."""
    open_client().delete_registered_model_alias(name, alias)


def delete_version(version: Version) -> None:
    """Takes a version out of the registry, with its aliases; the logged model stays with its run."""
    open_client().delete_model_version(version.name, str(version.number))


def set_alias(version: Version, alias: str) -> None:
    """Points an alias at a version; one atomic write, whatever it pointed at before."""
    open_client().set_registered_model_alias(version.name, alias, str(version.number))
