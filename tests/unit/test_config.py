"""The configuration: what is wrong is named by file and key."""

from pathlib import Path

import pytest

from gateway.config import ConfigError, load

GOOD = '[pools.fast]\nkind = "nfs"\nroot = "/srv/vms"\n'
TCP = '[gateway]\nlisten = ["{}"]\n'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "frostgate.toml"
    path.write_text(text)
    return path


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    config = load(written(tmp_path, GOOD))
    assert config.gateway.limits.threads == 8
    assert config.pools["fast"].kind == "nfs"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "pools"),
        ("not toml", "is not TOML"),
        ('[gateway]\nlog_level = "loud"\n' + GOOD, "gateway.log_level"),
        ("[gateway.limits]\nthreads = 0\n" + GOOD, "gateway.limits.threads"),
        ("[gateway.limits]\nthread = 4\n" + GOOD, "gateway.limits.thread"),
        ("[gateway]\nlisten = []\n" + GOOD, "gateway.listen"),
        (TCP.format("unix:relative") + GOOD, "gateway.listen"),
        (TCP.format("host:99999") + GOOD, "gateway.listen"),
        (TCP.format("0.0.0.0:7443") + GOOD, "gateway.tls"),
        (TCP.format("127.0.0.1:7443") + GOOD, "clients"),
        ('[gateway]\nsocket_mode = "666"\n' + GOOD, "gateway.socket_mode"),
        ('[[clients]]\nname = "x"\n' + GOOD, "clients.0"),
        ('[[clients]]\nname = "x"\ncertificate = "x"\npools = ["no"]\n' + GOOD, "clients.x.pools"),
        ('[[clients]]\nname = "x"\ncertificate = "x"\nrights = ["all"]\n' + GOOD, "clients.0.rights"),
        ('[pools.fast]\nkind = "tape"\n', "pools.fast.kind"),
        ('[pools.fast]\nroot = "/srv"\n', "pools.fast.kind"),
        ('[pools.fast]\nkind = "nfs"\n', "pools.fast.root"),
        ('[pools.fast]\nkind = "nfs"\nroot = "srv"\n', "pools.fast.root"),
        ('[pools.fast]\nkind = "nfs"\nroot = "/srv/../etc"\n', "pools.fast.root"),
        (GOOD + 'speed = "high"\n', "pools.fast.speed"),
        (GOOD + 'default_format = "vmdk"\n', "pools.fast.default_format"),
        ('[pools.Fast]\nkind = "nfs"\nroot = "/srv"\n', "pools.Fast"),
    ],
)
def test_the_key_at_fault_is_named(tmp_path: Path, text: str, key: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert key in str(caught.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "nowhere.toml")
