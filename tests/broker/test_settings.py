from pathlib import Path

import pytest

from broker import settings
from broker.errors import ImgpullError


def load(
    tmp_path: Path, user: str = "", system: str = "", env: dict[str, str] | None = None, **flags: object
) -> settings.Settings:
    home = tmp_path / "home"
    config = home / ".config" / "imgpull"
    config.mkdir(parents=True)
    etc = tmp_path / "etc"
    etc.mkdir()
    if user:
        (config / "config.toml").write_text(user)
    if system:
        (etc / "config.toml").write_text(system)
    return settings.load(flags, {"HOME": str(home), **(env or {})}, etc)


def test_defaults(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert found.max_streams == 8
    assert found.state_dir == str(tmp_path / "home/.local/state/imgpull")
    assert found.values["max_streams"].origin == "default"


def test_each_source_beats_the_next(tmp_path: Path) -> None:
    system, user = 'region = "system"\n', 'region = "user"\n'
    cases = [
        (load(tmp_path / "1", system=system), "system", "/etc/config.toml:1"),
        (load(tmp_path / "2", user, system), "user", "config.toml:1"),
        (load(tmp_path / "3", user, system, {"IMGPULL_REGION": "env"}), "env", "IMGPULL_REGION"),
        (load(tmp_path / "4", user, system, {"IMGPULL_REGION": "env"}, region="flag"), "flag", "command line"),
    ]
    for found, value, origin in cases:
        assert found.region == value
        assert found.values["region"].origin.endswith(origin)


def test_variables_of_the_aws_sdk_stand_behind_ours(tmp_path: Path) -> None:
    env = {"AWS_ENDPOINT_URL": "http://a", "AWS_ENDPOINT_URL_S3": "http://b", "AWS_DEFAULT_REGION": "r"}
    found = load(tmp_path / "1", 'region = "file"', env=env)
    assert (found.endpoint_url, found.values["endpoint_url"].origin) == ("http://b", "AWS_ENDPOINT_URL_S3")
    assert (found.region, found.source) == ("r", "http://b")
    assert load(tmp_path / "2", env={**env, "IMGPULL_ENDPOINT_URL": "http://c"}).endpoint_url == "http://c"
    assert load(tmp_path / "3", env={"AWS_PROFILE": "fleet"}).source == "profile:fleet"


def test_xdg_folders_are_honoured_and_relative_ones_ignored(tmp_path: Path) -> None:
    found = load(tmp_path, env={"XDG_STATE_HOME": "/s", "XDG_CACHE_HOME": "relative"})
    assert found.state_dir == "/s/imgpull"
    assert found.cache_dir == str(tmp_path / "home/.cache/imgpull")


def test_misspelt_key_names_line_and_nearest_key(tmp_path: Path) -> None:
    with pytest.raises(ImgpullError) as caught:
        load(tmp_path, '# comment\nregion = "x"\nmax_stream = 4\n')
    problem = caught.value.problem
    assert problem.exit_code == 78
    assert "config.toml:3: unknown key `max_stream`" in problem.what
    assert "`max_streams`" in problem.why


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('max_streams = "many"', "expected a whole number"),
        ("region = 4", "expected text"),
        ('quirks = "minio"', "expected one of"),
        ("no_sign_request = 1", "max_streams"),
        ("cache_size = -1", "expected 0 to"),
        ("max_streams = true", "expected"),
        ("= 1", "cannot be read"),
    ],
)
def test_wrong_values_are_configuration_errors(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(ImgpullError) as caught:
        load(tmp_path, text)
    assert caught.value.problem.exit_code == 78
    if word != "max_streams":
        assert word in caught.value.problem.what + caught.value.problem.why


@pytest.mark.parametrize(
    ("text", "value"), [("20G", 20 << 30), ("512MiB", 512 << 20), ("1.5k", 1536), ("7", 7), (" 1 tb ", 1 << 40)]
)
def test_sizes(text: str, value: int) -> None:
    assert settings.parse_size(text) == value


@pytest.mark.parametrize("text", ["", "G", "-1", "1e9", "0x10", "1GG", "١"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        settings.parse_size(text)
