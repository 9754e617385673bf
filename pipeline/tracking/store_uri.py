"""Where runs can be tracked: a server's address, or an SQLite store on this machine."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import ConfigError

_SQLITE = "sqlite:///"


def checked_uri(uri: str) -> str:
    """The URI with an absolute path.

    Raises:
        ConfigError: neither a server's address nor an SQLite store.
    """
    if is_embedded(uri) and uri != _SQLITE:
        return sqlite_uri(database_path(uri))
    try:
        parts = urlsplit(uri)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(
            f"tracking.uri: '{uri}' is no place for MLflow; expected https://host, http://host:port or "
            "sqlite:///folder/mlflow.db"
        )
    return uri.rstrip("/")


def is_embedded(uri: str) -> bool:
    """Whether it is an SQLite store."""
    return uri.startswith(_SQLITE)


def sqlite_uri(database: Path) -> str:
    """The URI of an SQLite file."""
    # SQLAlchemy ends the path at a `?` and decodes `%`.
    return _SQLITE + database.absolute().as_posix().replace("%", "%25").replace("?", "%3F")


def database_path(uri: str) -> Path:
    """The file of an SQLite store."""
    return Path(unquote(uri.removeprefix(_SQLITE)))


def artifacts_folder(uri: str) -> Path:
    """Where the artifacts of an SQLite store lie, beside it."""
    return database_path(uri).parent / "mlartifacts"


def without_password(uri: str) -> str:
    """The URI as it may be shown and kept."""
    if is_embedded(uri):
        return uri
    place = urlsplit(uri).netloc
    return uri.replace(place, place.rpartition("@")[2], 1)
